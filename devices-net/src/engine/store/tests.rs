use std::collections::VecDeque;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;

fn content(queue: &ByteQueue, store: &ChunkStore, from: Cursor) -> Vec<u8> {
    let mut slices = [IoSlice::new(&[]); 64];
    let (len, count, _) = queue.slices(store, from, u32::MAX, &mut slices);
    let bytes = slices[..count].concat_slices();
    assert_eq!(bytes.len(), len as usize);
    bytes
}

trait ConcatSlices {
    fn concat_slices(&self) -> Vec<u8>;
}

impl ConcatSlices for [IoSlice<'_>] {
    fn concat_slices(&self) -> Vec<u8> {
        self.iter().flat_map(|slice| slice.to_vec()).collect()
    }
}

proptest! {
    #[test]
    fn two_queues_separate_their_bytes_and_preserve_order(
        steps in prop::collection::vec((any::<bool>(), 0u8..4, 0u32..9000), 0..60),
    ) {
        let pattern: Vec<u8> = (0..1u32 << 16).map(|n| (n % 253) as u8).collect();
        let (mut near, far) = UnixStream::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        let mut store = ChunkStore::new(1 << 20);
        let mut real = [store.reserve().unwrap(), ByteQueue::default()];
        let mut model = [VecDeque::new(), VecDeque::new()];
        for (second, step, amount) in steps {
            let which = usize::from(second);
            let (queue, model) = (&mut real[which], &mut model[which]);
            let from = (amount * 7 % 50_000) as usize;
            let some = &pattern[from..from + amount as usize];
            match step {
                0 if model.len() < 40_000 => {
                    prop_assert_eq!(queue.push(&mut store, &&pattern[..], from, amount), amount);
                    model.extend(some);
                }
                1 if amount > 0 && model.len() < 40_000 => {
                    near.write_all(some).unwrap();
                    let mut left = amount;
                    while left > 0 {
                        let most = left.min(5000);
                        let (read, drained) = queue.read(&mut store, far.as_fd(), most).unwrap();
                        // The bytes are there, in one piece, so a read is full.
                        prop_assert_eq!((read, drained), (most, false));
                        left -= read;
                    }
                    let again = queue.read(&mut store, far.as_fd(), 64 << 10).unwrap_err();
                    prop_assert_eq!(again.kind(), io::ErrorKind::WouldBlock);
                    model.extend(some);
                }
                2 => {
                    // A position stays valid while bytes before it are removed, and others
                    // are added.
                    let first = amount.min(queue.len());
                    let mut slices = [IoSlice::new(&[]); 64];
                    let (len, _, after) = queue.slices(&store, queue.start(), first, &mut slices);
                    prop_assert_eq!(len, first);
                    let rest: Vec<u8> = model.range(first as usize..).copied().collect();
                    prop_assert_eq!(content(queue, &store, after), rest.clone());
                    if first < queue.len() {
                        queue.consume(&mut store, first / 2);
                        model.drain(..first as usize / 2);
                        prop_assert_eq!(content(queue, &store, after), rest);
                    }
                }
                3 if model.is_empty() => {
                    let nothing = queue.read(&mut store, far.as_fd(), 64 << 10).unwrap_err();
                    prop_assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
                }
                _ => {
                    queue.consume(&mut store, amount);
                    model.drain(..model.len().min(amount as usize));
                }
            }
            prop_assert_eq!(queue.len() as usize, model.len());
            prop_assert_eq!(content(queue, &store, queue.start()), Vec::from(model.clone()));
            let most: usize = real.iter().map(|it| (it.len() as usize).div_ceil(CHUNK) + 1).sum();
            prop_assert!(store.used as usize <= most);
            prop_assert_eq!(store.reserved, u32::from(real[0].is_empty()));
        }
        real.iter_mut().for_each(|queue| queue.clear(&mut store));
        prop_assert_eq!((store.used, store.reserved), (0, 1));
    }

    #[test]
    fn a_full_store_takes_no_more_and_loses_nothing(amounts in prop::collection::vec(1u32..9000, 1..40)) {
        let pattern = vec![7; 9000];
        let mut store = ChunkStore::new(16 << 10);
        let mut queue = ByteQueue::default();
        let mut total = 0;
        for amount in amounts {
            total += queue.push(&mut store, &&pattern[..], 0, amount);
            prop_assert_eq!(queue.len(), total);
            prop_assert!(total <= 16 << 10);
        }
        queue.clear(&mut store);
        prop_assert_eq!(store.used, 0);
    }
}

#[test]
fn greedy_queues_leave_something_for_others() {
    const QUEUES: u32 = 4096;
    let mut store = ChunkStore::new(16 << 20);
    let pattern = vec![0; 256 << 10];
    let mut queues: Vec<ByteQueue> = Vec::new();
    for number in 0..QUEUES {
        let mut queue = store.reserve().unwrap();
        let share = store.share(&queue, 256 << 10);
        assert!(share >= LEN);
        // Early ones take all that they may, and do not release it.
        let len = if number < 1000 { share } else { 1 };
        assert_eq!(queue.push(&mut store, &&pattern[..], 0, len), len);
        queues.push(queue);
        if store.free() == 0 {
            break;
        }
    }
    assert!(store.reserve().is_none());
    assert!(queues.len() > 60);
    assert_eq!(store.used + store.reserved, QUEUES);
    // Memory of emptied queues is freed, but for a reserve.
    queues.iter_mut().for_each(|queue| queue.clear(&mut store));
    assert_eq!((store.used, store.reserved as usize), (0, queues.len()));
    let with_memory = store.chunks.iter().filter(|chunk| chunk.bytes.is_some());
    assert_eq!(with_memory.count(), SPARE);
}

#[test]
fn a_reserved_chunk_is_certain() {
    let mut store = ChunkStore::new(4 * CHUNK);
    let pattern = vec![0; 16 << 10];
    let (mut certain, mut greedy) = (store.reserve().unwrap(), ByteQueue::default());
    // The greedy queue gets all but one.
    assert_eq!(greedy.push(&mut store, &&pattern[..], 0, 4 * LEN), 3 * LEN);
    assert_eq!(store.share(&greedy, 1 << 20), 0);
    let (mut near, far) = UnixStream::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    for _ in 0..3 {
        assert_eq!(store.share(&certain, 1 << 20), LEN);
        near.write_all(&pattern[..5000]).unwrap();
        let read = certain.read(&mut store, far.as_fd(), 5000).unwrap();
        assert_eq!(read, (LEN, false));
        assert_eq!(store.share(&certain, 1 << 20), 0);
        let full = certain.read(&mut store, far.as_fd(), 5000).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::OutOfMemory);
        certain.consume(&mut store, LEN);
        assert_eq!(
            certain.read(&mut store, far.as_fd(), 5000).unwrap(),
            (904, true)
        );
        certain.clear(&mut store);
        let nothing = certain.read(&mut store, far.as_fd(), 5000).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        assert_eq!((store.used, store.reserved), (3, 1));
    }
    store.remove(certain);
    store.remove(greedy);
    assert_eq!((store.used, store.reserved), (0, 0));
}

#[test]
fn a_frame_that_cannot_be_read_leaves_no_chunk() {
    let mut store = ChunkStore::new(1 << 20);
    let mut queue = ByteQueue::default();
    assert_eq!(queue.push(&mut store, &&[1, 2][..], 0, 3), 0);
    assert_eq!((queue.len(), store.used), (0, 0));
}

/// A peer that closes an idle connection: the read of all the room finds no byte.
#[test]
fn a_read_of_nothing_returns_one_reservation() {
    let mut store = ChunkStore::new(1 << 20);
    let (near, far) = UnixStream::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    let mut queue = store.reserve().unwrap();
    let nothing = queue.read(&mut store, far.as_fd(), 64 << 10).unwrap_err();
    assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    assert_eq!((store.used, store.reserved), (0, 1));
    drop(near);
    let end = queue.read(&mut store, far.as_fd(), 64 << 10).unwrap();
    assert_eq!(end, (0, true));
    assert_eq!((store.used, store.reserved), (0, 1));
    store.remove(queue);
    assert_eq!((store.used, store.reserved), (0, 0));
}
