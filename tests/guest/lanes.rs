//! A static program for guests: it detects whether a snapshot during a computation, or
//! with armed timers, loses state. `cargo xtask test` builds it with rustc alone.
//!
//! `lanes ROUNDS` computes in four threads. Each fills sixteen 256-bit registers in a
//! loop of vector instructions, does the same in ordinary arithmetic, and compares; its
//! line of output has the result and a checksum of memory. `timers SECONDS` arms timers
//! and prints the time at which each fires. `echo PORT` echoes on all connections
//! concurrently, with a longer backlog than busybox's `nc`. `knock CIDS PORTS` connects
//! by vsock and prints the result of each attempt; `cid` prints this guest's CID. `watch
//! DIRECTORY` prints the contents of files of which it is notified. `true` exits.
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used)]

use std::arch::asm;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const THREADS: u64 = 4;
/// Sixteen registers of four numbers.
const NUMBERS: usize = 64;
/// Turns of the loop in which the numbers are only in registers.
const TURNS: u64 = 20_000;

#[repr(align(32))]
#[derive(Clone, Copy, PartialEq, Eq)]
struct Numbers([u64; NUMBERS]);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "lanes", rounds] => lanes(rounds.parse().expect("a number of rounds")),
        [_, "timers", seconds] => timers(seconds.parse().expect("a number of seconds")),
        [_, "echo", port] => echo(port.parse().expect("a port")),
        [_, "knock", cids, ports] => knock(cids, ports),
        [_, "cid"] => println!("{}", own_cid()),
        [_, "watch", directory] => watch(directory),
        [_, "true"] => {}
        _ => panic!(
            "lanes ROUNDS | timers SECONDS | echo PORT | knock CIDS PORTS | cid | \
             watch DIRECTORY | true"
        ),
    }
}

unsafe extern "C" {
    fn inotify_init1(flags: i32) -> i32;
    fn inotify_add_watch(fd: i32, path: *const std::ffi::c_char, mask: u32) -> i32;
}

/// Watches a directory as Node.js does, and prints files of which it is notified, or the
/// number of entries if a file is gone or it is notified of the directory.
fn watch(directory: &str) {
    // ATTRIB, MODIFY, CREATE, DELETE, DELETE_SELF, MOVE_SELF, MOVED_FROM, MOVED_TO.
    let mask = 0x4 | 0x2 | 0x100 | 0x200 | 0x400 | 0x800 | 0x40 | 0x80;
    let path = std::ffi::CString::new(directory).unwrap();
    // SAFETY: the path is a string with a NUL, and the descriptor is a new one.
    let mut events = unsafe {
        let fd = inotify_init1(0);
        assert!(inotify_add_watch(fd, path.as_ptr(), mask) > 0, "no watch");
        File::from_raw_fd(fd)
    };
    println!("watching");
    let mut bytes = [0; 4096];
    loop {
        let count = events.read(&mut bytes).expect("events");
        let mut rest = &bytes[..count];
        // struct inotify_event: watch, mask, cookie, length of the name, name.
        while let [_, _, _, _, _, _, _, _, _, _, _, _, a, b, c, d, ..] = *rest {
            let end = 16 + usize::try_from(u32::from_ne_bytes([a, b, c, d])).unwrap();
            let name = String::from_utf8_lossy(&rest[16..end]);
            let name = name.trim_end_matches('\0');
            match std::fs::read_to_string(format!("{directory}/{name}")) {
                Ok(text) => println!("{name}: {text}"),
                Err(_) => println!("entries: {}", std::fs::read_dir(directory).unwrap().count()),
            }
            rest = &rest[end..];
        }
    }
}

fn echo(port: u16) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("a free port");
    for stream in listener.incoming() {
        let mut stream = stream.expect("a connection");
        std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..count]).is_err() {
                        break;
                    }
                }
            })
            .expect("a thread");
    }
}

fn lanes(rounds: u64) {
    assert!(std::is_x86_feature_detected!("avx2"), "no AVX2");
    let threads: Vec<_> = (0..THREADS)
        .map(|thread| std::thread::spawn(move || compute(thread, rounds)))
        .collect();
    for (number, thread) in threads.into_iter().enumerate() {
        let (lanes, checksum) = thread.join().expect("a thread that computes");
        println!("{number} {lanes:016x} {checksum:016x}");
    }
}

fn compute(thread: u64, rounds: u64) -> (u64, u64) {
    let mut numbers = Numbers(std::array::from_fn(|i| (thread + 1) << 40 | i as u64));
    let mut memory = vec![0u8; 256 * 1024];
    let mut checksum = thread;
    for round in 0..rounds {
        let mut vectors = numbers;
        // SAFETY: AVX2 is supported, which `lanes` has checked.
        unsafe { turn_vectors(&mut vectors) };
        turn_numbers(&mut numbers);
        assert!(
            vectors == numbers,
            "round {round} of thread {thread} went wrong"
        );
        for (place, byte) in memory.iter_mut().enumerate() {
            *byte = byte.wrapping_add((numbers.0[place % NUMBERS] >> (place % 57)) as u8);
            checksum = (checksum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
        if thread == 0 {
            let mut out = std::io::stderr().lock();
            writeln!(out, "round {round}").expect("somebody who reads");
        }
    }
    let all = numbers
        .0
        .iter()
        .fold(0, |all: u64, x| all.rotate_left(7) ^ x);
    (all, checksum)
}

/// Adds each register to the next one repeatedly, without memory accesses.
#[target_feature(enable = "avx2")]
unsafe fn turn_vectors(numbers: &mut Numbers) {
    // SAFETY: reads and writes the sixteen aligned vectors behind the pointer, and
    // changes the registers that are named.
    unsafe {
        asm!(
            "vmovdqa ymm0, [{p}]", "vmovdqa ymm1, [{p} + 32]",
            "vmovdqa ymm2, [{p} + 64]", "vmovdqa ymm3, [{p} + 96]",
            "vmovdqa ymm4, [{p} + 128]", "vmovdqa ymm5, [{p} + 160]",
            "vmovdqa ymm6, [{p} + 192]", "vmovdqa ymm7, [{p} + 224]",
            "vmovdqa ymm8, [{p} + 256]", "vmovdqa ymm9, [{p} + 288]",
            "vmovdqa ymm10, [{p} + 320]", "vmovdqa ymm11, [{p} + 352]",
            "vmovdqa ymm12, [{p} + 384]", "vmovdqa ymm13, [{p} + 416]",
            "vmovdqa ymm14, [{p} + 448]", "vmovdqa ymm15, [{p} + 480]",
            "2:",
            "vpaddq ymm0, ymm0, ymm1", "vpaddq ymm1, ymm1, ymm2",
            "vpaddq ymm2, ymm2, ymm3", "vpaddq ymm3, ymm3, ymm4",
            "vpaddq ymm4, ymm4, ymm5", "vpaddq ymm5, ymm5, ymm6",
            "vpaddq ymm6, ymm6, ymm7", "vpaddq ymm7, ymm7, ymm8",
            "vpaddq ymm8, ymm8, ymm9", "vpaddq ymm9, ymm9, ymm10",
            "vpaddq ymm10, ymm10, ymm11", "vpaddq ymm11, ymm11, ymm12",
            "vpaddq ymm12, ymm12, ymm13", "vpaddq ymm13, ymm13, ymm14",
            "vpaddq ymm14, ymm14, ymm15", "vpaddq ymm15, ymm15, ymm0",
            "dec {turns}",
            "jnz 2b",
            "vmovdqa [{p}], ymm0", "vmovdqa [{p} + 32], ymm1",
            "vmovdqa [{p} + 64], ymm2", "vmovdqa [{p} + 96], ymm3",
            "vmovdqa [{p} + 128], ymm4", "vmovdqa [{p} + 160], ymm5",
            "vmovdqa [{p} + 192], ymm6", "vmovdqa [{p} + 224], ymm7",
            "vmovdqa [{p} + 256], ymm8", "vmovdqa [{p} + 288], ymm9",
            "vmovdqa [{p} + 320], ymm10", "vmovdqa [{p} + 352], ymm11",
            "vmovdqa [{p} + 384], ymm12", "vmovdqa [{p} + 416], ymm13",
            "vmovdqa [{p} + 448], ymm14", "vmovdqa [{p} + 480], ymm15",
            "vzeroupper",
            p = in(reg) numbers.0.as_mut_ptr(),
            turns = inout(reg) TURNS => _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
            out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
        );
    }
}

fn turn_numbers(numbers: &mut Numbers) {
    for _ in 0..TURNS {
        for register in 0..16 {
            for lane in 0..4 {
                let next = numbers.0[(register + 1) % 16 * 4 + lane];
                let number = &mut numbers.0[register * 4 + lane];
                *number = number.wrapping_add(next);
            }
        }
    }
}

#[repr(C)]
struct Time {
    seconds: i64,
    nanos: i64,
}

unsafe extern "C" {
    fn clock_nanosleep(clock: i32, flags: i32, wanted: *const Time, left: *mut Time) -> i32;
    fn clock_gettime(clock: i32, now: *mut Time) -> i32;
}

const REALTIME: i32 = 0;
const MONOTONIC: i32 = 1;
const ABSOLUTE: i32 = 1;

fn now(clock: i32) -> i64 {
    let mut time = Time {
        seconds: 0,
        nanos: 0,
    };
    // SAFETY: writes to the structure.
    assert_eq!(unsafe { clock_gettime(clock, &raw mut time) }, 0);
    time.seconds
}

/// Arms an absolute timer `seconds` away on each clock, and a relative one.
fn timers(seconds: u64) {
    let clocks = [("realtime", REALTIME), ("monotonic", MONOTONIC)];
    let mut threads: Vec<_> = clocks
        .map(|(name, clock)| {
            let wanted = Time {
                seconds: now(clock) + i64::try_from(seconds).expect("few seconds"),
                nanos: 0,
            };
            std::thread::spawn(move || {
                // SAFETY: reads the structure; an absolute sleep has no remainder.
                let slept = unsafe {
                    clock_nanosleep(clock, ABSOLUTE, &raw const wanted, std::ptr::null_mut())
                };
                assert_eq!(slept, 0);
                tell(name, now(clock) - wanted.seconds);
            })
        })
        .into();
    threads.push(std::thread::spawn(move || {
        let begun = Instant::now();
        std::thread::sleep(Duration::from_secs(seconds));
        let late = begun.elapsed().as_secs() - seconds;
        tell("relative", i64::try_from(late).expect("few seconds"));
    }));
    println!("set");
    for thread in threads {
        thread.join().expect("a timer");
    }
}

/// Prints the name of a timer, its delay by its own clock, and the wall clock time.
fn tell(name: &str, late: i64) {
    let wall = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a time after 1970");
    println!("{name} {late} {}", wall.as_secs());
}

/// The address of a vsock socket (`sockaddr_vm`).
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn connect(socket: i32, address: *const Address, len: u32) -> i32;
    fn ioctl(file: i32, request: u64, value: *mut u32) -> i32;
}

const VSOCK: u16 = 40;
const KINDS: [(&str, i32); 2] = [("stream", 1), ("seqpacket", 5)];
const GET_LOCAL_CID: u64 = 0x7b9;

fn numbers(list: &str) -> impl Iterator<Item = u32> {
    list.split(',')
        .map(|number| number.parse().expect("a number"))
}

/// Makes all attempts concurrently: some last until Linux gives up the connection.
fn knock(cids: &str, ports: &str) {
    let attempts = KINDS
        .iter()
        .flat_map(|kind| numbers(cids).map(move |cid| (kind, cid)))
        .flat_map(|(kind, cid)| numbers(ports).map(move |port| (kind, cid, port)));
    let threads: Vec<_> = attempts
        .map(|(kind, cid, port)| {
            std::thread::spawn(move || {
                let came = connect_by(kind.1, cid, port).unwrap_or_else(|error| error.to_string());
                println!("{} {cid} {port}: {came}", kind.0);
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("an attempt");
    }
}

/// Connects and reads.
fn connect_by(kind: i32, cid: u32, port: u32) -> std::io::Result<String> {
    let address = Address {
        family: VSOCK,
        reserved: 0,
        port,
        cid,
        zero: [0; 4],
    };
    // SAFETY: takes numbers only.
    let fd = unsafe { socket(i32::from(VSOCK), kind, 0) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new, and has no other owner.
    let mut socket = unsafe { File::from_raw_fd(fd) };
    // SAFETY: reads the address, which has this length.
    if unsafe { connect(fd, &raw const address, 16) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let mut said = [0; 64];
    let read = socket.read(&mut said).map(|count| said[..count].to_vec());
    Ok(format!("connected, {read:?}"))
}

fn own_cid() -> u32 {
    let device = File::open("/dev/vsock").expect("/dev/vsock");
    let mut cid = 0;
    // SAFETY: writes one number.
    let done = unsafe { ioctl(device.as_raw_fd(), GET_LOCAL_CID, &raw mut cid) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    cid
}
