//! Properties of the arithmetic on a driver's numbers, checked for *all* inputs of a
//! bounded size: indices, sizes, and cuts of span lists.
//!
//! These replace proofs by Kani, whose verifier is in no package registry. `queue.rs` has
//! the walk of descriptor tables, and random ones.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;
use sm_virtio::queue::{DescriptorChain, Queue, QueueError, Span, slice_spans};
use sm_virtio::testing::DriverQueue;
use vm_memory::{Bytes as _, GuestAddress};

const MEMORY: usize = 0x1_0000;
const BASE: u64 = 0x1000;

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

/// For every index that the driver writes and every state of the device: the numbers of
/// pending chains and of chains in flight never exceed the queue size, and an index that
/// would make them exceed it is refused.
#[test]
fn pending_is_bounded_for_every_index() {
    let memory = memory();
    for size in [1u16, 2, 8, 256] {
        let driver = DriverQueue::new(memory.clone(), BASE, size);
        for used in [0u16, 1, 0x7fff, 0xfff8, 0xffff] {
            for in_flight in [0, 1, size / 2, size] {
                let mut taken = driver.device_side(false);
                taken.skip_to(used);
                let taken = advance(&memory, taken, used, in_flight);
                for index in 0..=u16::MAX {
                    driver.set_available_index(index);
                    let offered = index.wrapping_sub(used);
                    let sound = offered <= size && offered >= in_flight;
                    let expected = match sound {
                        true => Ok(offered - in_flight),
                        false => Err(QueueError::AvailableIndex),
                    };
                    assert_eq!(taken.pending(&memory), expected, "{size} {used} {index}");
                }
            }
        }
    }
}

/// Makes `queue` take `count` chains, of one descriptor each, from index `at` on.
fn advance(memory: &GuestMemory, mut queue: Queue, at: u16, count: u16) -> Queue {
    let mut driver = DriverQueue::new(memory.clone(), BASE, queue.size);
    driver.skip_to(at);
    let mut chain = DescriptorChain::new();
    for _ in 0..count {
        let buffer = Span {
            address: GuestAddress(0x100),
            len: 1,
        };
        driver.offer(&[buffer], &[]).unwrap();
        assert_eq!(queue.pop(memory, &mut chain), Ok(true));
    }
    queue
}

/// A queue that counts as valid has all of its rings in guest memory: no access to them
/// fails, for any size and for addresses around every boundary.
#[test]
fn valid_queues_never_leave_memory() {
    let memory = memory();
    // Descriptors that are zero: one empty buffer each.
    let end = MEMORY as u64;
    let mut chain = DescriptorChain::new();
    let mut valid = 0u32;
    for size in 0..=u16::MAX {
        let rings = [16, 2, 8].map(|entry| entry * u64::from(size));
        for (place, length) in rings.into_iter().enumerate() {
            // The other two rings have room for the largest size.
            for distance in [0, 1, 2, 4, 6, 8, 14, 15, 16, 17, 32] {
                for at in [
                    distance,
                    end.wrapping_sub(length).wrapping_sub(distance),
                    u64::MAX - distance,
                ] {
                    let mut queue = Queue::new(256);
                    (queue.size, queue.ready, queue.event_idx) = (size, true, true);
                    (queue.descriptors, queue.available, queue.used) = (0x2000, 0x4000, 0x6000);
                    match place {
                        0 => queue.descriptors = at,
                        1 => queue.available = at,
                        _ => queue.used = at,
                    }
                    if !queue.is_valid(&memory) {
                        continue;
                    }
                    valid += 1;
                    assert!(size.is_power_of_two() && size <= 256, "{queue:?}");
                    // Offer one chain; then access everything.
                    memory
                        .write_obj(1u16, GuestAddress(queue.available + 2))
                        .unwrap();
                    let popped = queue.pop(&memory, &mut chain);
                    assert_ne!(popped, Err(QueueError::Ring), "{queue:?}");
                    let used = (0..size).try_for_each(|_| queue.push_used(&memory, 0, 0));
                    assert_eq!(used, Ok(()), "{queue:?}");
                    assert!(queue.publish(&memory).is_ok(), "{queue:?}");
                    memory.write_slice(&[0; MEMORY], GuestAddress(0)).unwrap();
                }
            }
        }
    }
    assert!(valid > 100, "{valid}");
}

/// Returns all lists of up to four spans of up to three bytes.
fn lists() -> impl Iterator<Item = Vec<Span>> {
    (0..=4u32).flat_map(|count| {
        (0..4u32.pow(count)).map(move |number| {
            (0..count)
                .map(|position| Span {
                    address: GuestAddress(u64::from(position + 1) * 1000),
                    len: number / 4u32.pow(position) % 4,
                })
                .collect()
        })
    })
}

/// Returns the addresses of all bytes, one by one.
fn bytes(spans: impl IntoIterator<Item = Span>) -> Vec<u64> {
    let byte = |span: Span| (0..u64::from(span.len)).map(move |at| span.address.0 + at);
    spans.into_iter().flat_map(byte).collect()
}

fn cut(all: &[u64], skip: u32, len: u32) -> &[u64] {
    let skip = usize::try_from(skip).unwrap().min(all.len());
    let len = usize::try_from(len).unwrap().min(all.len() - skip);
    &all[skip..skip + len]
}

/// Cuts that are longer than the list, up to the longest possible.
const CUTS: [u32; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, u32::MAX];

#[test]
fn every_cut_of_a_list_is_the_cut_of_its_bytes() {
    let mut out = Vec::new();
    for list in lists() {
        let all = bytes(list.iter().copied());
        for skip in CUTS {
            for len in CUTS {
                let expected = cut(&all, skip, len);
                let count = slice_spans(&list, skip, len, &mut out);
                assert_eq!(
                    bytes(out.iter().copied()),
                    expected,
                    "{list:?} {skip} {len}"
                );
                assert_eq!(count as usize, expected.len());
                assert!(out.iter().all(|span| span.len > 0));
                let window = Window::new(&list, skip, len);
                assert_eq!(bytes(window.spans()), expected, "{list:?} {skip} {len}");
                assert_eq!(window.len() as usize, expected.len());
            }
        }
    }
}

#[test]
fn windows_advance_to_the_same_byte_in_one_step_or_many() {
    for list in lists() {
        let all = bytes(list.iter().copied());
        for skip in CUTS {
            for first in CUTS {
                for second in [0, 1, 2, 5, u32::MAX] {
                    let mut window = Window::new(&list, skip, u32::MAX);
                    window.advance(first);
                    window.advance(second);
                    let rest = cut(&all, skip, u32::MAX);
                    let rest = cut(rest, first, u32::MAX);
                    let rest = cut(rest, second, u32::MAX);
                    assert_eq!(
                        bytes(window.spans()),
                        rest,
                        "{list:?} {skip} {first} {second}"
                    );
                    assert_eq!(window.len() as usize, rest.len());
                    assert_eq!(window.is_empty(), rest.is_empty());
                }
            }
        }
    }
}

/// The same for the largest numbers: lists of nearly 4 GiB.
#[test]
fn the_longest_lists_do_not_overflow() {
    let big = |len| Span {
        address: GuestAddress(0),
        len,
    };
    let list = [big(u32::MAX - 1), big(1)];
    let mut out = Vec::new();
    assert_eq!(slice_spans(&list, 0, u32::MAX, &mut out), u32::MAX);
    assert_eq!(slice_spans(&list, u32::MAX, u32::MAX, &mut out), 0);
    assert_eq!(slice_spans(&list, u32::MAX - 1, u32::MAX, &mut out), 1);
    assert_eq!(out, [big(1)]);
    let mut window = Window::new(&list, u32::MAX - 2, u32::MAX);
    assert_eq!(window.len(), 2);
    window.advance(u32::MAX);
    assert!(window.is_empty());
    // More than a chain can have: saturated instead of wrapped.
    let more = [big(u32::MAX), big(u32::MAX)];
    assert_eq!(Window::new(&more, 0, u32::MAX).len(), u32::MAX);
    assert_eq!(slice_spans(&more, 0, u32::MAX, &mut out), u32::MAX);
}
