//! The protocols by which threads wake each other up, in all orders that the memory
//! model allows (loom): whoever looks, looks at what others did before.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

/// What `inbox.rs` shares between threads, as loom has it.
mod sync {
    pub(crate) use loom::sync::Mutex;
    pub(crate) use loom::sync::atomic::{AtomicBool, Ordering};
}

#[expect(dead_code, reason = "the model needs a part of it")]
#[path = "../src/inbox.rs"]
mod inbox;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU16, AtomicUsize, Ordering, fence};
use loom::thread;

use inbox::{Inbox, Refused};

/// An eventfd: counts what was not waited for.
#[derive(Default)]
struct Wake(AtomicUsize);

impl Wake {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether somebody who waits would go on.
    fn is_signalled(&self) -> bool {
        self.0.swap(0, Ordering::SeqCst) > 0
    }
}

/// No item stays behind without a wake-up that follows it.
#[test]
fn an_inbox_loses_no_item() {
    loom::model(|| {
        let shared = Arc::new((Inbox::new(), Wake::default()));
        let senders: Vec<_> = (0..2)
            .map(|item| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    if shared.0.put(item, 8).unwrap() {
                        shared.1.signal();
                    }
                })
            })
            .collect();
        let (mut got, mut room) = (Vec::new(), Vec::new());
        let mut take = |got: &mut Vec<i32>| {
            shared.0.take(&mut room);
            got.append(&mut room);
        };
        // Taking may come at any time, before or after a wake-up.
        take(&mut got);
        if shared.1.is_signalled() {
            take(&mut got);
        }
        for sender in senders {
            sender.join().unwrap();
        }
        while shared.1.is_signalled() {
            take(&mut got);
        }
        got.sort_unstable();
        assert_eq!(got, [0, 1]);
    });
}

/// What comes after the end is given back, and what came before is not lost.
#[test]
fn a_closed_inbox_gives_everything_back() {
    loom::model(|| {
        let inbox = Arc::new(Inbox::new());
        let sender = Arc::clone(&inbox);
        let sending = thread::spawn(move || match sender.put(1, 8) {
            Ok(_) => 0,
            Err((item, reason)) => {
                assert_eq!(reason, Refused::Closed);
                item
            }
        });
        let taken = inbox.close().len();
        assert_eq!(sending.join().unwrap() + taken, 1);
    });
}

/// One ring's indices, as the driver and the device share them. `offered` is the
/// available index, `wanted` the index at which the device asks to be notified
/// (`avail_event`); the other way round `used` and `used_event`.
#[derive(Default)]
struct Ring {
    offered: AtomicU16,
    wanted: AtomicU16,
    kick: Wake,
}

/// The side that gives: `DriverQueue::make_available` and `needs_kick`, and with
/// the roles changed `Queue::publish` (virtio 1.3 section 2.7.10).
fn give(ring: &Ring, from: u16, to: u16) {
    ring.offered.store(to, Ordering::Release);
    fence(Ordering::SeqCst);
    let event = ring.wanted.load(Ordering::Relaxed);
    if to.wrapping_sub(event).wrapping_sub(1) < to.wrapping_sub(from) {
        ring.kick.signal();
    }
}

/// The side that takes: `Queue::pop` until there is nothing, and with the roles
/// changed a driver that enables interrupts and looks once more.
fn take(ring: &Ring, next: &mut u16) {
    loop {
        if ring.offered.load(Ordering::Acquire) == *next {
            ring.wanted.store(*next, Ordering::Release);
            fence(Ordering::SeqCst);
            if ring.offered.load(Ordering::Acquire) == *next {
                return;
            }
        }
        *next = next.wrapping_add(1);
    }
}

/// Whatever is offered while the other side falls asleep is seen, or it is woken
/// up. Batches, so that the event index may lie within one; a start close to the
/// end of the numbers, so that they wrap around.
#[test]
fn nothing_offered_is_slept_over() {
    loom::model(|| {
        let start = u16::MAX;
        let ring = Arc::new(Ring::default());
        ring.offered.store(start, Ordering::SeqCst);
        ring.wanted.store(start, Ordering::SeqCst);
        let giver = Arc::clone(&ring);
        let giving = thread::spawn(move || {
            give(&giver, start, start.wrapping_add(1));
            give(&giver, start.wrapping_add(1), start.wrapping_add(3));
        });
        let mut next = start;
        take(&ring, &mut next);
        if ring.kick.is_signalled() {
            take(&ring, &mut next);
        }
        giving.join().unwrap();
        while ring.kick.is_signalled() {
            take(&ring, &mut next);
        }
        assert_eq!(next, start.wrapping_add(3), "offered and not seen");
    });
}
