//! Transient memory shortages (ENOBUFS, ENOMEM): the affected clients are served later.
//!
//! A seccomp filter's listener (seccomp_unotify(2)) answers the system calls of the event
//! loop and fails some of them.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed expectation is a failed test"
)]
#![expect(unsafe_code, reason = "installs a filter and answers for the kernel")]

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use sm_devices_vsock::VsockConfig;
use sm_devices_vsock::testing::{Guest, REQUEST, RESPONSE, RW};
use sm_event_loop::EventLoop;
use sm_frontends::{HandoffFrontend, HandoffSender, HybridFrontend};
use sm_guest_proto::forward::{ForwardHeader, HEADER_LEN};

/// `SECCOMP_IOCTL_NOTIF_RECV` and `SECCOMP_IOCTL_NOTIF_SEND` (linux/seccomp.h).
const RECEIVE: libc::Ioctl = 0xc050_2100u32 as libc::Ioctl;
const SEND: libc::Ioctl = 0xc018_2101u32 as libc::Ioctl;
/// Number of calls that fail.
const REFUSED: u32 = 5;

/// Installs a filter in this thread and the threads that it will start. The returned
/// descriptor receives their calls of `call`.
fn intercept(call: libc::c_long) -> OwnedFd {
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
        step(equal, 0, 1, call as u32),
        step(answer, 0, 0, libc::SECCOMP_RET_USER_NOTIF),
        step(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program and its length are right, and the kernel copies it.
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
    // SAFETY: the descriptor is new, and has no other owner.
    unsafe { OwnedFd::from_raw_fd(listener as i32) }
}

/// Fails the first calls with `error` and continues the others; counts both. Ends with
/// the filtered threads.
fn answer_for_the_kernel(listener: OwnedFd, error: i32, calls: Arc<AtomicU32>) {
    std::thread::spawn(move || {
        loop {
            // SAFETY: plain data, for which zeroes are "nothing".
            let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
            // SAFETY: the structure is as long as the request says.
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

/// Runs `test` with a guest, an event loop and a socket path, while the first calls of
/// `call` fail.
fn short_of_memory(
    call: libc::c_long,
    test: impl Fn(Guest, &EventLoop, PathBuf) + Clone + Send + 'static,
) {
    for error in [libc::ENOBUFS, libc::ENOMEM] {
        let test = test.clone();
        // A filter lasts as long as its thread.
        let alone = move || {
            let calls = Arc::new(AtomicU32::new(0));
            let directory = tempfile::tempdir().unwrap();
            let guest = Guest::new(VsockConfig::default());
            answer_for_the_kernel(intercept(call), error, Arc::clone(&calls));
            // Its thread inherits the filter.
            let event_loop = EventLoop::spawn("test").unwrap();
            test(guest, &event_loop, directory.path().join("socket"));
            assert!(calls.load(Ordering::SeqCst) > REFUSED);
        };
        std::thread::spawn(alone).join().unwrap();
    }
}

#[test]
fn a_router_is_served_after_a_memory_shortage() {
    short_of_memory(libc::SYS_recvmsg, |mut guest, event_loop, path| {
        let target = ForwardHeader {
            port: 80,
            wait_ms: 5,
        };
        let _frontend = HandoffFrontend::new(&path, target)
            .start(guest.muxer.clone(), &event_loop.handle())
            .unwrap();
        let (client, socket) = UnixStream::pair().unwrap();
        let mut router = HandoffSender::connect(&path).unwrap();
        router.send(&socket, b"payload").unwrap();
        let request = guest.expect(REQUEST);
        guest.send(&request.reply(RESPONSE));
        let mut got = Vec::new();
        while got.len() < HEADER_LEN + 7 {
            got.extend(guest.expect(RW).payload);
        }
        assert_eq!(&got[HEADER_LEN..], b"payload");
        drop(client);
    });
}

#[test]
fn a_client_is_served_after_a_memory_shortage() {
    short_of_memory(libc::SYS_recvfrom, |mut guest, event_loop, path| {
        let _frontend = HybridFrontend::new(&path)
            .start(guest.muxer.clone(), &event_loop.handle())
            .unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"CONNECT 52\n").unwrap();
        let request = guest.expect(REQUEST);
        assert_eq!(request.dst_port, 52);
        guest.send(&request.reply(RESPONSE));
        let mut answer = [0; 3];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"OK ");
    });
}
