//! Arbitrary bytes and descriptors from a router, in any pieces: the same handoffs as in
//! a simple model, or an error; and every descriptor is closed.
#![no_main]

use std::fs::File;
use std::io::{ErrorKind, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use sm_frontends::MAX_PAYLOAD;
use sm_frontends::fuzzing::HandoffReader;

/// Bytes that fit in the socket buffer in any pieces.
const MOST: usize = 4096;

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// Sends bytes with some descriptors: sockets or, for every fourth number, a file.
fn send(router: &UnixStream, bytes: &[u8], what: u8, socket: &UnixStream, file: &File) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fd = match what % 4 {
        3 => file.as_fd(),
        _ => socket.as_fd(),
    };
    let fds = [fd; 3];
    let count = usize::from(what / 4 % 4);
    if count > 0 {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds[..count])));
    }
    sendmsg(
        router,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .expect("room");
}

fuzz_target!(|data: &[u8]| {
    let data = &data[..data.len().min(MOST)];
    let before = open_files();
    {
        let (router, reader_side) = UnixStream::pair().expect("descriptors");
        let (_peer, socket) = UnixStream::pair().expect("descriptors");
        let file = File::open("/dev/null").expect("a file");
        let mut reader = HandoffReader::default();
        let (mut stream, mut read, mut alive) = (Vec::new(), 0, true);
        let mut rest = data;
        // Each piece has a length, the kind of its descriptors, and bytes.
        while let [len, what, after @ ..] = rest {
            let (piece, later) = after.split_at(after.len().min(usize::from(*len)));
            rest = later;
            if piece.is_empty() {
                continue;
            }
            send(&router, piece, *what, &socket, &file);
            stream.extend_from_slice(piece);
            while alive {
                match reader.read_from(&reader_side) {
                    Ok((_socket, payload)) => {
                        // The payload is the next one in the stream.
                        let header: [u8; 4] = stream[read..read + 4].try_into().expect("four");
                        let len = u32::from_be_bytes(header) as usize;
                        assert_eq!(payload.len(), len);
                        assert!((1..=MAX_PAYLOAD).contains(&len));
                        assert_eq!(payload, stream[read + 4..read + 4 + len]);
                        read += 4 + len;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => alive = false,
                }
            }
            if !alive {
                break;
            }
        }
    }
    assert_eq!(open_files(), before, "descriptors");
});
