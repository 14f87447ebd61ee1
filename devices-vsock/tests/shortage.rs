//! A temporary lack of memory (ENOBUFS, ENOMEM): no data are lost, and no direction ends.
//!
//! A seccomp filter's listener (seccomp_unotify(2)) answers the system calls of one socket,
//! and refuses some of them.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed expectation is a failed test"
)]
#![expect(unsafe_code, reason = "installs a filter and answers for the kernel")]

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use sm_devices_vsock::testing::{Guest, PORT, Packet, REQUEST, RESPONSE, RW};
use sm_devices_vsock::{ConnectOptions, VsockConfig};

/// `SECCOMP_IOCTL_NOTIF_RECV` and `SECCOMP_IOCTL_NOTIF_SEND` (linux/seccomp.h).
const RECEIVE: libc::Ioctl = 0xc050_2100u32 as libc::Ioctl;
const SEND: libc::Ioctl = 0xc018_2101u32 as libc::Ioctl;
/// Number of refused calls.
const REFUSED: u32 = 5;

/// Intercepts `call` on `descriptor`, in this thread and in those that it starts; the
/// returned listener answers the calls.
fn intercept(call: libc::c_long, descriptor: i32) -> OwnedFd {
    let step = |code: u32, yes, no, k: u32| libc::sock_filter {
        code: code as u16,
        jt: yes,
        jf: no,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let mut program = [
        step(load, 0, 0, 0),
        step(equal, 0, 3, call as u32),
        // The lower half of the first argument.
        step(load, 0, 0, 16),
        step(equal, 0, 1, descriptor as u32),
        step(answer, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        step(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program and its length are correct, and the kernel copies it.
    let listener = unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    assert!(listener >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and has no other owner.
    unsafe { OwnedFd::from_raw_fd(listener as i32) }
}

/// Refuses the first calls and permits the others, as long as a thread may make them;
/// counts both.
fn answer_for_the_kernel(listener: OwnedFd, error: i32, calls: Arc<AtomicU32>) {
    std::thread::spawn(move || {
        loop {
            // SAFETY: plain data; zeroes are valid and mean "nothing".
            let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
            // SAFETY: the structure has the length that the request encodes.
            if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut call) } != 0 {
                return;
            }
            let refuse = calls.fetch_add(1, Ordering::SeqCst) < REFUSED;
            let mut response = libc::seccomp_notif_resp {
                id: call.id,
                val: 0,
                error: if refuse { -error } else { 0 },
                flags: if refuse {
                    0
                } else {
                    libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32
                },
            };
            // SAFETY: as above.
            unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw mut response) };
        }
    });
}

/// Creates a guest and a connection whose `call` is refused at first.
fn connected(call: libc::c_long, error: i32) -> (Guest, Packet, UnixStream, Arc<AtomicU32>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let calls = Arc::new(AtomicU32::new(0));
    // Before the device's thread exists, which inherits it.
    let listener = intercept(call, theirs.as_raw_fd());
    answer_for_the_kernel(listener, error, Arc::clone(&calls));
    let mut guest = Guest::new(VsockConfig::default());
    let options = ConnectOptions::default();
    guest.muxer.connect(PORT, theirs.into(), options);
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    (guest, request, ours, calls)
}

#[test]
fn a_write_that_lacks_memory_is_repeated() {
    for error in [libc::ENOBUFS, libc::ENOMEM] {
        // A filter lasts as long as its thread.
        let test = move || {
            let (mut guest, request, mut ours, calls) = connected(libc::SYS_sendmsg, error);
            let mut data = request.reply(RW);
            for payload in [b"first", b"later"] {
                data.payload = payload.to_vec();
                guest.send(&data);
            }
            let mut seen = [0; 10];
            ours.read_exact(&mut seen).unwrap();
            assert_eq!(&seen, b"firstlater");
            assert!(calls.load(Ordering::SeqCst) > REFUSED);
            // Both directions work.
            ours.write_all(b"back").unwrap();
            while guest.receive().payload != b"back" {}
        };
        std::thread::spawn(test).join().unwrap();
    }
}

#[test]
fn a_read_that_lacks_memory_is_repeated() {
    let test = || {
        let (mut guest, _, mut ours, calls) = connected(libc::SYS_recvmsg, libc::ENOMEM);
        ours.write_all(b"to the guest").unwrap();
        assert_eq!(guest.expect(RW).payload, b"to the guest");
        assert!(calls.load(Ordering::SeqCst) > REFUSED);
    };
    std::thread::spawn(test).join().unwrap();
}
