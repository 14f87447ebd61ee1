//! The order in which a vCPU's state is read: some of KVM's GET requests move state from
//! one set of registers to another.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![expect(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a failed expectation is a failed test"
)]
#![expect(
    unsafe_code,
    reason = "installs a filter that reports system calls (seccomp_unotify(2))"
)]

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex};

use sm_hypervisor::testing::native;
use sm_hypervisor::{Hypervisor as _, Vcpu as _, VcpuSeed as _, VirtualMachine as _, VmParameters};

/// `SECCOMP_IOCTL_NOTIF_RECV` and `SECCOMP_IOCTL_NOTIF_SEND` (linux/seccomp.h).
const RECEIVE: libc::Ioctl = 0xc050_2100u32 as libc::Ioctl;
const SEND: libc::Ioctl = 0xc018_2101u32 as libc::Ioctl;
/// Numbers of requests (linux/kvm.h).
const GET_REGS: u8 = 0x81;
const GET_SREGS: u8 = 0x83;
const GET_MSRS: u8 = 0x88;
const GET_LAPIC: u8 = 0x8e;
const GET_MP_STATE: u8 = 0x98;
const GET_VCPU_EVENTS: u8 = 0x9f;
const GET_DEBUGREGS: u8 = 0xa1;

/// Installs a filter that reports each KVM ioctl of this thread from now on.
fn watch_ioctls() -> OwnedFd {
    let step = |code: u32, yes, no, k: u32| libc::sock_filter {
        code: code as u16,
        jt: yes,
        jf: no,
        k,
    };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let and = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let mut program = [
        step(load, 0, 0, 0),
        step(equal, 0, 4, libc::SYS_ioctl as u32),
        // The lower half of the second argument: requests of KVM's type.
        step(load, 0, 0, 24),
        step(and, 0, 0, 0xff00),
        step(equal, 0, 1, 0xae00),
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

/// Records the requests' numbers, and lets them continue.
fn note(listener: &OwnedFd, requests: &Mutex<Vec<u8>>) {
    loop {
        // SAFETY: plain data; zeroes are valid and mean "nothing".
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the structure has the length that the request encodes.
        if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut call) } != 0 {
            return;
        }
        requests.lock().unwrap().push(call.data.args[1] as u8);
        let mut response = libc::seccomp_notif_resp {
            id: call.id,
            val: 0,
            error: 0,
            flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        };
        // SAFETY: as above.
        unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw mut response) };
    }
}

/// `GET_VCPU_EVENTS` delivers the address of a pending page fault to CR2 and the cause of a
/// pending debug exception to DR6, and reports them as injected: both must be read
/// afterwards. `GET_MP_STATE` processes INIT and start-up signals.
#[test]
fn events_are_read_before_the_registers_that_they_change() {
    let Some(kvm) = native() else { return };
    let requests = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&requests);
    // A filter lasts as long as its thread.
    let saving = std::thread::spawn(move || {
        let vm = kvm.create_vm(&VmParameters { vcpus: 1 }).unwrap();
        let seed = vm.create_vcpu(0).unwrap();
        let mut vcpu = seed.bind(None).unwrap();
        let listener = watch_ioctls();
        std::thread::spawn(move || note(&listener, &noted));
        vcpu.save().unwrap();
    });
    saving.join().unwrap();
    let requests = requests.lock().unwrap();
    let at = |request| {
        let found = requests.iter().position(|&other| other == request);
        found.unwrap_or_else(|| panic!("{request:#x} is not among {requests:x?}"))
    };
    assert!(at(GET_MP_STATE) < at(GET_VCPU_EVENTS), "{requests:x?}");
    for later in [GET_REGS, GET_SREGS, GET_DEBUGREGS, GET_LAPIC, GET_MSRS] {
        assert!(at(GET_VCPU_EVENTS) < at(later), "{requests:x?}");
    }
}
