use std::os::fd::AsFd as _;

use proptest::prelude::*;

use super::*;

proptest! {
    /// A window contains the bytes of its spans, cut at both ends.
    #[test]
    fn a_window_is_a_run_of_bytes(
        lens in prop::collection::vec(0u32..9, 0..6),
        skip in 0u32..40,
        len in 0u32..40,
        step in 0u32..40,
    ) {
        let mut next = 0;
        let mut all = Vec::new();
        let spans: Vec<Span> = lens
            .into_iter()
            .map(|len| {
                next += 1000;
                all.extend((0..u64::from(len)).map(|i| next + i));
                Span { address: GuestAddress(next), len }
            })
            .collect();
        let bytes = |window: Window<'_>| -> Vec<u64> {
            let runs = window.spans();
            runs.flat_map(|s| (0..u64::from(s.len)).map(move |i| s.address.0 + i))
                .collect()
        };
        let mut window = Window::new(&spans, skip, len);
        let expected: Vec<u64> =
            all.into_iter().skip(skip as usize).take(len as usize).collect();
        prop_assert_eq!(window.len() as usize, expected.len());
        prop_assert_eq!(&bytes(window), &expected);
        window.advance(step);
        let rest = expected.get(step as usize..).unwrap_or_default();
        prop_assert_eq!(bytes(window), rest);
    }
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

/// Returns `count` empty spans, then one of `len` bytes at `address`.
fn after_empty(count: usize, address: u64, len: u32) -> Vec<Span> {
    let span = |address, len| Span {
        address: GuestAddress(address),
        len,
    };
    let mut spans = vec![span(0, 0); count];
    spans.push(span(address, len));
    spans
}

#[test]
fn empty_buffers_are_not_the_end_of_a_file() {
    use std::io::Write as _;
    let memory = memory();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"contents").unwrap();
    let spans = after_empty(MAX_SPANS + 3, 4096, 8);
    read_exact_at(&memory, Window::new(&spans, 0, 8), file.as_fd(), 0).unwrap();
    let mut seen = [0; 8];
    memory.read_slice(&mut seen, GuestAddress(4096)).unwrap();
    assert_eq!(&seen, b"contents");
    write_all_at(&memory, Window::new(&spans, 0, 8), file.as_fd(), 8).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 16);
}

/// A read of 0 bytes before the end that the caller knows: the result of a kernel with
/// the `RWF_NOWAIT` bug for a page that is not cached.
#[test]
fn a_read_of_zero_bytes_is_not_cached_data() {
    use std::io::Write as _;
    let memory = memory();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"cont").unwrap();
    let spans = after_empty(0, 4096, 8);
    let window = Window::new(&spans, 0, 8);
    memory.write_slice(b"........", GuestAddress(4096)).unwrap();
    assert!(!read_cached_at(&memory, window, file.as_fd(), 0).unwrap());
    let error = read_exact_at(&memory, window, file.as_fd(), 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    let mut seen = [0; 8];
    memory.read_slice(&mut seen, GuestAddress(4096)).unwrap();
    assert_eq!(&seen, b"cont....");
}

#[test]
fn a_closed_peer_is_an_error_and_no_signal() {
    use std::os::unix::net::UnixStream;
    let memory = memory();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let spans = after_empty(MAX_SPANS, 4096, 8);
    assert_eq!(send(&memory, &spans, ours.as_fd()).unwrap(), 8);
    let received = receive(&memory, &spans, theirs.as_fd()).unwrap();
    assert_eq!((received.len, received.stopped), (8, false));
    drop(theirs);
    // A blocked signal stays pending, even if it is ignored.
    let pending = || {
        // SAFETY: signal sets are plain data, written before they are read.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&raw mut set, libc::SIGPIPE);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            libc::sigpending(&raw mut set);
            libc::sigismember(&raw const set, libc::SIGPIPE) == 1
        }
    };
    assert!(!pending());
    let error = send(&memory, &spans, ours.as_fd()).unwrap_err();
    assert!(!pending());
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn reads_end_with_the_file_and_writes_append() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap();
    let spans = [(0x1000, 5), (0x3000, 4), (0x5000, 9000)].map(|(at, len)| Span {
        address: GuestAddress(at),
        len,
    });
    let window = |skip, len| Window::new(&spans, skip, len);
    assert!(window(0, 9).copy_in(&memory, b"directory"));
    let file = tempfile::tempfile().unwrap();
    let fd = file.as_fd();
    assert_eq!(write_at(&memory, window(0, 6), fd, Some(2)).unwrap(), 6);
    assert_eq!(write_at(&memory, window(6, 3), fd, None).unwrap(), 3);
    assert_eq!(read_at(&memory, window(0, 9000), fd, 0).unwrap(), 11);
    let mut bytes = [9; 11];
    assert!(window(0, 11).copy_out(&memory, &mut bytes));
    assert_eq!(&bytes, b"\0\0directory");
    assert_eq!(read_at(&memory, window(0, 9), fd, 11).unwrap(), 0);
    let outside = [Span {
        address: GuestAddress(1 << 20),
        len: 4,
    }];
    assert!(read_at(&memory, Window::new(&outside, 0, 4), fd, 0).is_err());
}
