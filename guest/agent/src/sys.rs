//! System calls that neither `std` nor `rustix` offers in a safe form.
//!
//! Every function is a thin wrapper around one system call, without policy.
#![expect(
    unsafe_code,
    reason = "raw system calls with no safe wrapper: clone3, signal masks, wait4, ioctls"
)]

use std::ffi::{CString, c_int, c_long};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Pid;

/// A new mount namespace.
pub(crate) const NEW_MOUNTS: c_int = libc::CLONE_NEWNS;
/// A new PID namespace.
pub(crate) const NEW_PIDS: c_int = libc::CLONE_NEWPID;
/// A new cgroup namespace.
pub(crate) const NEW_CGROUPS: c_int = libc::CLONE_NEWCGROUP;

/// `CLONE_INTO_CGROUP` does not fit `c_int`, so libc's constant cannot be used.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The side of a fork.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fork {
    /// The new process, which must end in [`exit_now`] or an exec.
    Child,
    /// The calling process, with the child's PID in its own namespace.
    Parent(Pid),
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn check_long(result: c_long) -> io::Result<c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    c_int::try_from(result).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Forks into new `namespaces` (a union of the `NEW_` constants) and, if given, directly
/// into the cgroup directory `cgroup`.
///
/// Creation in the cgroup has two advantages over a later move: no process of the
/// workload is ever outside the freezer, and the kernel does not wait for an RCU grace
/// period.
///
/// # Safety
/// The calling process must have only one thread: the child continues with a
/// copy of memory in which locks held by other threads would stay locked.
pub(crate) unsafe fn fork(namespaces: c_int, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Fork> {
    let mut flags = u64::from(namespaces.unsigned_abs());
    let mut cgroup_fd = 0;
    if let Some(fd) = cgroup {
        flags |= CLONE_INTO_CGROUP;
        cgroup_fd = u64::from(fd.as_raw_fd().unsigned_abs());
    }
    let args = libc::clone_args {
        flags,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup_fd,
    };
    // SAFETY: `args` is a valid clone_args of the size passed; without CLONE_VM the child
    // has its own copy of memory and of the stack. The caller guarantees that this
    // process has a single thread.
    let pid = check_long(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    })?;
    Ok(Pid::from_raw(pid).map_or(Fork::Child, Fork::Parent))
}

/// Terminates this process immediately, without destructors and exit handlers.
pub(crate) fn exit_now(status: u8) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(c_int::from(status)) }
}

/// Moves the calling process (for PIDs: its future children) into a namespace.
pub(crate) fn setns(namespace: BorrowedFd<'_>, kind: c_int) -> io::Result<()> {
    // SAFETY: plain system call on a descriptor that lives across it.
    check(unsafe { libc::setns(namespace.as_raw_fd(), kind) }).map(drop)
}

/// Gives the calling process its own namespaces of the given kinds.
pub(crate) fn unshare(kinds: c_int) -> io::Result<()> {
    // SAFETY: only namespaces are unshared, never the descriptor table.
    check(unsafe { libc::unshare(kinds) }).map(drop)
}

/// Exit of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reaped {
    /// PID of the child.
    pub(crate) pid: Pid,
    /// Exit status, or 128+n if signal n terminated the child.
    pub(crate) status: u32,
    /// Peak resident set size in KiB, of the child and of the children that it waited
    /// for.
    pub(crate) peak_rss_kib: u64,
}

/// Reaps one child that has exited, without waiting.
///
/// `Ok(None)` means that children exist but none has exited.
///
/// # Errors
/// `ECHILD` if there are no children.
pub(crate) fn reap() -> io::Result<Option<Reaped>> {
    let mut status = 0;
    // SAFETY: rusage is plain data for which all-zero is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live locals of the right types.
    let pid = check(unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage) })?;
    let Some(pid) = Pid::from_raw(pid) else {
        return Ok(None);
    };
    let status = if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status).unsigned_abs()
    } else {
        libc::WEXITSTATUS(status).unsigned_abs()
    };
    Ok(Some(Reaped {
        pid,
        status,
        peak_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
    }))
}

/// Sends signal `number` to a process.
pub(crate) fn kill(pid: Pid, number: u8) -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::kill(pid.as_raw_nonzero().get(), c_int::from(number)) }).map(drop)
}

/// Sends signal `number` to a process group.
pub(crate) fn kill_group(group: Pid, number: u8) -> io::Result<()> {
    // SAFETY: plain system call.
    check(unsafe { libc::kill(-group.as_raw_nonzero().get(), c_int::from(number)) }).map(drop)
}

fn empty_set() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data; sigemptyset initialises it.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        set
    }
}

/// Blocks `signals` and returns a descriptor that becomes readable on them.
pub(crate) fn signal_fd(signals: &[c_int]) -> io::Result<OwnedFd> {
    let mut set = empty_set();
    for signal in signals {
        // SAFETY: `set` is initialised.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    // SAFETY: `set` is initialised; the old mask is not requested.
    unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    // SAFETY: `set` is initialised; the returned descriptor is new and has no other
    // owner.
    unsafe {
        let fd = check(libc::signalfd(
            -1,
            &raw const set,
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Returns the number of one pending signal of a [`signal_fd`].
pub(crate) fn next_signal(fd: BorrowedFd<'_>) -> Option<c_int> {
    // SAFETY: signalfd_siginfo is plain data for which all-zero is valid.
    let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::signalfd_siginfo>();
    // SAFETY: the pointer and length describe `info`.
    let read = unsafe { libc::read(fd.as_raw_fd(), (&raw mut info).cast(), size) };
    if usize::try_from(read).ok() != Some(size) {
        return None;
    }
    c_int::try_from(info.ssi_signo).ok()
}

/// Ignores a signal in this process.
pub(crate) fn ignore_signal(signal: c_int) {
    // SAFETY: SIG_IGN is always a valid disposition.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Resets every signal to its default disposition and unblocks all signals.
pub(crate) fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is always a valid disposition; the error for signals that
        // cannot be changed is ignored.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let set = empty_set();
    // SAFETY: `set` is initialised.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
}

/// Closes every descriptor above the standard ones, except those in `keep`, in a freshly
/// forked process.
pub(crate) fn close_all_but(keep: &[BorrowedFd<'_>]) {
    let numbers = keep
        .iter()
        .filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok());
    let mut numbers: Vec<_> = numbers.filter(|number| *number > 2).collect();
    numbers.sort_unstable();
    let mut first = 3;
    for number in numbers {
        if number > first {
            close_range(first, number - 1);
        }
        first = number.saturating_add(1);
    }
    close_range(first, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    // SAFETY: the caller is a freshly forked process that owns nothing in this range and
    // never runs destructors of the copies it inherited.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// Duplicates `fd` to the descriptor `number`, which stays open across exec.
pub(crate) fn dup_to(fd: BorrowedFd<'_>, number: c_int) -> io::Result<()> {
    if fd.as_raw_fd() == number {
        // SAFETY: plain fcntl on a live descriptor.
        return check(unsafe { libc::fcntl(number, libc::F_SETFD, 0) }).map(drop);
    }
    // SAFETY: the caller does not use the previous file of `number` any more.
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }).map(drop)
}

/// Executes a program. Returns only on failure.
pub(crate) fn exec(path: &CString, argv: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter()
            .map(|item| item.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both vectors are null-terminated arrays of NUL-terminated strings
    // that outlive the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Sets the supplementary groups, group and user of this process irrevocably.
pub(crate) fn set_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // Raw system calls: the process has one thread, and libc's wrappers exist only to
    // synchronise several.
    // SAFETY: pointer and length describe `groups`.
    check_long(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    // SAFETY: plain system call.
    check_long(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: plain system call.
    check_long(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    Ok(())
}

/// Returns the size of a block device in bytes (`BLKGETSIZE64`).
pub(crate) fn block_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    /// `_IOR(0x12, 114, size_t)`, which is the same number on every 64-bit machine.
    const BLKGETSIZE64: u32 = 0x8008_1272;
    let mut size = 0u64;
    // SAFETY: the ioctl writes one u64 to the address given.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64 as _, &raw mut size) };
    check(result)?;
    Ok(size)
}

/// Adds `entropy` to the kernel's pool, credits all of it, and reseeds the CRNG.
pub(crate) fn add_entropy(random: BorrowedFd<'_>, entropy: &[u8]) -> io::Result<()> {
    /// `_IOW('R', 0x03, int[2])`.
    const RNDADDENTROPY: u32 = 0x4008_5203;
    /// `_IO('R', 0x07)`.
    const RNDRESEEDCRNG: u32 = 0x5207;
    /// `struct rand_pool_info` with the largest buffer used here.
    #[repr(C)]
    struct PoolInfo {
        entropy_count: c_int,
        buf_size: c_int,
        buf: [u8; 512],
    }
    for chunk in entropy.chunks(512) {
        let size = c_int::try_from(chunk.len()).unwrap_or(512);
        let mut info = PoolInfo {
            entropy_count: size * 8,
            buf_size: size,
            buf: [0; 512],
        };
        info.buf[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: `info` has the layout the ioctl reads, `buf_size` bytes valid.
        check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &raw const info) })?;
    }
    // SAFETY: this ioctl takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _, 0) })?;
    Ok(())
}

fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all-zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from.cast_signed() as libc::c_char;
    }
    request
}

/// Brings a network interface up.
pub(crate) fn interface_up(socket: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let mut request = interface_request(name);
    let flags = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or(libc::c_short::MAX);
    // SAFETY: `request` is a valid ifreq.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw const request,
        )
    })
    .map(drop)
}

/// Creates a non-blocking vsock stream socket.
pub(crate) fn vsock_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: plain system call; the descriptor returned is new.
    unsafe {
        Ok(OwnedFd::from_raw_fd(check(libc::socket(
            libc::AF_VSOCK,
            kind,
            0,
        ))?))
    }
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    libc::sockaddr_vm {
        svm_family: libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default(),
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    }
}

const VSOCK_ADDRESS_LEN: libc::socklen_t = 16;

/// Binds a vsock socket to `port` on any CID and listens.
pub(crate) fn vsock_listen(socket: BorrowedFd<'_>, port: u32) -> io::Result<()> {
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    let fd = socket.as_raw_fd();
    // SAFETY: the address is a sockaddr_vm and the length is its size.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), VSOCK_ADDRESS_LEN) })?;
    // SAFETY: plain system call.
    check(unsafe { libc::listen(fd, 1024) }).map(drop)
}

/// Starts to connect a vsock socket; `Ok(false)` means that connecting is in progress.
pub(crate) fn vsock_connect(socket: BorrowedFd<'_>, cid: u32, port: u32) -> io::Result<bool> {
    let address = vsock_address(cid, port);
    // SAFETY: the address is a sockaddr_vm and the length is its size.
    let result = check(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            VSOCK_ADDRESS_LEN,
        )
    });
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Accepts a connection, which is non-blocking and close-on-exec. Returns it and the
/// length of the peer's address in `address`.
pub(crate) fn accept(
    listener: BorrowedFd<'_>,
    address: &mut [u8; 128],
) -> io::Result<(OwnedFd, usize)> {
    let mut len: libc::socklen_t = 128;
    // SAFETY: the pointers are to a buffer of `len` bytes, in which the kernel's layout
    // needs no alignment, and to its length; the returned descriptor is new.
    let socket = unsafe {
        OwnedFd::from_raw_fd(check(libc::accept4(
            listener.as_raw_fd(),
            address.as_mut_ptr().cast(),
            &raw mut len,
            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        ))?)
    };
    Ok((socket, usize::try_from(len).map_or(0, |len| len.min(128))))
}

/// Creates a non-blocking socket that receives the kernel's uevents.
pub(crate) fn uevent_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: plain system call; the descriptor returned is new.
    let socket = unsafe {
        OwnedFd::from_raw_fd(check(libc::socket(
            libc::AF_NETLINK,
            kind,
            libc::NETLINK_KOBJECT_UEVENT,
        ))?)
    };
    // SAFETY: sockaddr_nl is plain data for which all-zero is valid.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).unwrap_or_default();
    address.nl_groups = 1;
    // SAFETY: the address is a sockaddr_nl (12 bytes).
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), 12) })?;
    Ok(socket)
}

/// Makes the kernel check requests for lists of a netlink socket, and so apply the filters in
/// them (`NETLINK_GET_STRICT_CHK`; Linux 4.20).
pub(crate) fn check_netlink_strictly(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: c_int = 1;
    let option = libc::NETLINK_GET_STRICT_CHK;
    // SAFETY: the pointer is to a c_int, whose size is the length given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            (&raw const on).cast(),
            4,
        )
    };
    check(result).map(drop)
}
