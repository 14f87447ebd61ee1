//! The wake-up protocols of threads, in all orders that the memory model allows (loom): no
//! wake-up is lost.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

/// Shared types of `inbox.rs`, from loom.
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

/// An eventfd: counts unconsumed signals.
#[derive(Default)]
struct Wake(AtomicUsize);

impl Wake {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// Returns true if a waiting thread would continue.
    fn is_signalled(&self) -> bool {
        self.0.swap(0, Ordering::SeqCst) > 0
    }
}

/// Every item is followed by a wake-up or is taken.
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
        // Taking may happen at any time, before or after a wake-up.
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

/// Later items are returned to the sender, and earlier ones are not lost.
#[test]
fn a_closed_inbox_returns_all_items() {
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

/// One ring's indices, as driver and device share them. `offered` is the available index,
/// `wanted` the index at which the device requests a notification (`avail_event`); in the
/// other direction `used` and `used_event`.
#[derive(Default)]
struct Ring {
    offered: AtomicU16,
    wanted: AtomicU16,
    kick: Wake,
}

/// The producer: `DriverQueue::make_available` and `needs_kick`, and with exchanged roles
/// `Queue::publish` (virtio 1.3 section 2.7.10).
fn give(ring: &Ring, from: u16, to: u16) {
    ring.offered.store(to, Ordering::Release);
    fence(Ordering::SeqCst);
    let event = ring.wanted.load(Ordering::Relaxed);
    if to.wrapping_sub(event).wrapping_sub(1) < to.wrapping_sub(from) {
        ring.kick.signal();
    }
}

/// The consumer: `Queue::pop` until the ring is empty, and with exchanged roles a driver
/// that enables interrupts and checks once more.
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

/// Chains offered while the consumer goes to sleep are seen, or it is woken. Batches, so
/// that the event index may lie within one; a start close to the largest number, so that
/// indices wrap around.
#[test]
fn no_offered_chain_is_missed() {
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
