//! Allocations of the device: none for a packet, and few bytes for an idle connection.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed expectation is a failed test"
)]
#![expect(unsafe_code, reason = "counts calls of the system's allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use sm_devices_vsock::testing::linux::{LinuxGuest, Profile, SocketId};
use sm_devices_vsock::{ConnectOptions, VsockConfig};

struct Counting;

/// Allocations, and allocated bytes, of the device's thread.
static COUNT: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicI64 = AtomicI64::new(0);

thread_local! {
    /// Needs no allocation, unlike the thread's name in the library.
    static OF_DEVICE: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Returns true on the event loop's thread, which is called "test".
fn of_device() -> bool {
    OF_DEVICE.with(|known| {
        // A thread without a name may still get it.
        if !known.get() {
            let mut name = [0u8; 16];
            // SAFETY: the kernel writes at most 16 bytes, with a final zero.
            unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
            known.set(name.starts_with(b"test\0"));
        }
        known.get()
    })
}

fn note(count: u64, bytes: i64) {
    if of_device() {
        COUNT.fetch_add(count, Ordering::Relaxed);
        BYTES.fetch_add(bytes, Ordering::Relaxed);
    }
}

fn size(layout: Layout) -> i64 {
    i64::try_from(layout.size()).unwrap_or(0)
}

// SAFETY: all calls are passed unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(1, size(layout));
        // SAFETY: as the caller guarantees.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        note(0, -size(layout));
        // SAFETY: as the caller guarantees.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn connect(guest: &mut LinuxGuest) -> (UnixStream, SocketId) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest
        .muxer
        .connect(7, theirs.into(), ConnectOptions::default());
    loop {
        guest.wait();
        while let Some(id) = guest.next_event() {
            if guest.is_established(id) {
                return (ours, id);
            }
        }
    }
}

/// Waits until the device has handled all earlier notifications: a pause handles everything
/// before it.
fn settle(guest: &LinuxGuest) {
    for _ in 0..2 {
        guest.driver.transport.quiesce().unwrap();
        guest.driver.transport.unquiesce();
    }
}

/// Moves megabytes both ways, with phases in which the host reads late, so that the backlog
/// fills and empties.
fn traffic(guest: &mut LinuxGuest, host: &mut UnixStream, id: SocketId, rounds: usize) {
    let mut room = vec![0; 64 << 10];
    for _ in 0..rounds {
        host.write_all(&room[..20_000]).unwrap();
        let mut left = 20_000;
        while left > 0 {
            match guest.read(id, &mut room) {
                0 => guest.wait(),
                count => left -= count,
            }
        }
        // As much as credit allows: more than the host's socket accepts.
        let mut sent = 0;
        loop {
            match guest.write(id, &room[..10_000]) {
                0 if sent >= 300_000 => break,
                0 => {
                    guest.poll();
                    if guest.credit(id) == 0 {
                        break;
                    }
                }
                count => sent += count,
            }
            guest.kick();
        }
        while sent > 0 {
            let most = sent.min(room.len());
            sent -= host.read(&mut room[..most]).unwrap();
        }
        guest.poll();
    }
}

#[test]
fn packets_allocate_nothing_and_idle_connections_cost_little() {
    let mut guest = LinuxGuest::new(VsockConfig::default(), Profile::LINUX);
    let (mut host, id) = connect(&mut guest);
    // Buffers grow to their final size.
    traffic(&mut guest, &mut host, id, 100);
    settle(&guest);
    let packets = guest.muxer.stats();
    let before = COUNT.load(Ordering::Relaxed);
    traffic(&mut guest, &mut host, id, 200);
    let after = COUNT.load(Ordering::Relaxed);
    let moved = guest.muxer.stats();
    assert!(moved.from_guest - packets.from_guest > 40_000_000);
    assert!(moved.to_guest - packets.to_guest >= 4_000_000);
    // For about seven thousand packets. A backlog longer than ever before may take chunks,
    // of which a window has 64.
    let allocated = after - before;
    assert!(allocated < 70, "{allocated} allocations for packets");

    const MANY: usize = 4000;
    settle(&guest);
    let before = BYTES.load(Ordering::Relaxed);
    let idle: Vec<_> = (0..MANY).map(|_| connect(&mut guest)).collect();
    settle(&guest);
    let each = (BYTES.load(Ordering::Relaxed) - before) / MANY as i64;
    println!("{each} bytes for an idle connection");
    assert!(each <= 1024, "{each} bytes for an idle connection");
    // At least the connection itself was counted.
    assert!(
        each >= 100 && after > 0,
        "{each} bytes, {after} allocations counted"
    );
    drop(idle);
}
