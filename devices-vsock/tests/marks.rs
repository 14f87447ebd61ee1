//! Reads that end before the socket is empty: urgent data (TCP) and out-of-band bytes (Unix
//! sockets).
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed expectation is a failed test"
)]

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use sm_devices_vsock::testing::{Guest, PORT, REQUEST, RESPONSE, RW};
use sm_devices_vsock::{ConnectOptions, VsockConfig};

fn tcp() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    (client.into(), accepted.into())
}

fn unix() -> (OwnedFd, OwnedFd) {
    let (client, accepted) = UnixStream::pair().unwrap();
    (client.into(), accepted.into())
}

/// Sends bytes, one of them marked, and more bytes: all arrive before the first read.
/// Returns false if the system has no such mark.
fn send_marked(client: impl AsFd, first: usize, last: usize) -> bool {
    let client = client.as_fd();
    if first > 0 {
        assert_eq!(send(client, &vec![1; first], SendFlags::empty()), Ok(first));
    }
    match send(client, &[2], SendFlags::OOB) {
        Err(Errno::OPNOTSUPP) => return false,
        sent => assert_eq!(sent, Ok(1)),
    }
    if last > 0 {
        assert_eq!(send(client, &vec![3; last], SendFlags::empty()), Ok(last));
    }
    true
}

#[test]
fn bytes_behind_a_mark_arrive() {
    for (name, pair) in [("tcp", tcp as fn() -> _), ("unix", unix)] {
        for (first, last) in [(1000, 1000), (0, 1000), (1000, 0), (5000, 5000)] {
            let mut guest = Guest::new(VsockConfig::default());
            let (client, accepted) = pair();
            if !send_marked(&client, first, last) {
                eprintln!("{name}: this system has no out-of-band bytes");
                continue;
            }
            let options = ConnectOptions::default();
            guest.muxer.connect(PORT, accepted, options);
            let request = guest.expect(REQUEST);
            guest.send(&request.reply(RESPONSE));
            let mut seen = Vec::new();
            while seen.len() < first + 1 + last {
                seen.extend(guest.expect(RW).payload);
            }
            // The marked byte stays in the stream.
            let mut wanted = vec![1; first];
            wanted.push(2);
            wanted.resize(first + 1 + last, 3);
            assert!(seen == wanted, "{name} {first} {last}");
            // Later data arrive, too.
            assert!(send_marked(&client, 10, 10));
            seen.clear();
            while seen.len() < 21 {
                seen.extend(guest.expect(RW).payload);
            }
        }
    }
}
