//! Seqpacket sockets, which preserve message boundaries (VIRTIO_VSOCK_F_SEQPACKET).
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed expectation is a failed test"
)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use sm_devices_vsock::testing::{
    CREDIT_UPDATE, Guest, PORT, Packet, REQUEST, RESPONSE, RST, RW, SHUTDOWN,
};
use sm_devices_vsock::{ConnectError, ConnectOptions, SocketKind, VsockConfig};

const SEQPACKET: u16 = 2;
const END: u32 = 1;

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fn connected(guest: &mut Guest) -> (OwnedFd, Packet) {
    let (ours, theirs) = pair();
    guest.muxer.connect(PORT, theirs, ConnectOptions::default());
    let request = guest.expect(REQUEST);
    assert_eq!(request.kind, SEQPACKET);
    guest.send(&of(&request, RESPONSE, 0, b""));
    (ours, request)
}

fn of(request: &Packet, op: u16, flags: u32, payload: &[u8]) -> Packet {
    Packet {
        kind: SEQPACKET,
        flags,
        payload: payload.to_vec(),
        ..request.reply(op)
    }
}

fn next(fd: &OwnedFd) -> Vec<u8> {
    let mut room = vec![0; 300_000];
    let (_, len) = recv(fd, &mut room[..], RecvFlags::TRUNC).unwrap();
    room.truncate(len);
    room
}

#[test]
fn message_boundaries_are_preserved_in_both_directions() {
    let mut guest = Guest::new(VsockConfig::default());
    let (host, request) = connected(&mut guest);
    for message in [&b"one"[..], b"", b"three"] {
        send(&host, message, SendFlags::empty()).unwrap();
    }
    for expected in [&b"one"[..], b"", b"three"] {
        let packet = guest.expect(RW);
        assert_eq!((&packet.payload[..], packet.flags), (expected, END));
        assert_eq!(packet.kind, SEQPACKET);
    }
    // Longer than a buffer: several packets, the last of which ends the message.
    let long: Vec<u8> = (0..20_000u32).map(|n| (n % 251) as u8).collect();
    send(&host, &long, SendFlags::empty()).unwrap();
    let mut got = Vec::<u8>::new();
    loop {
        let packet = guest.expect(RW);
        got.extend(&packet.payload);
        if packet.flags & END != 0 {
            break;
        }
    }
    assert!(got == long);

    guest.send(&of(&request, RW, END, b"whole"));
    guest.send(&of(&request, RW, 0, b"in "));
    guest.send(&of(&request, RW, 0, b""));
    guest.send(&of(&request, RW, END, b"parts"));
    guest.send(&of(&request, RW, END, b""));
    guest.send(&of(&request, RW, END, b"after nothing"));
    assert_eq!(next(&host), b"whole");
    assert_eq!(next(&host), b"in parts");
    assert_eq!(next(&host), b"");
    assert_eq!(next(&host), b"after nothing");
    guest.send(&of(&request, SHUTDOWN, 3, b""));
    assert_eq!(next(&host), b"");
    guest.expect(RST);
}

#[test]
fn messages_wait_for_credit_and_for_a_slow_reader() {
    let mut guest = Guest::new(VsockConfig::default());
    let (host, request) = connected(&mut guest);
    let mut update = of(&request, CREDIT_UPDATE, 0, b"");
    (update.buf_alloc, update.fwd_cnt) = (1000, 0);
    guest.send(&update);
    send(&host, &[1; 700], SendFlags::empty()).unwrap();
    send(&host, &[2; 700], SendFlags::empty()).unwrap();
    assert_eq!(guest.expect(RW).payload, [1; 700]);
    let part = guest.expect(RW);
    assert_eq!((part.payload, part.flags), (vec![2; 300], 0));
    update.fwd_cnt = 700;
    guest.send(&update);
    let rest = guest.expect(RW);
    assert_eq!((rest.payload, rest.flags), (vec![2; 400], END));

    // Half a window of messages that are not read yet.
    let messages: Vec<Vec<u8>> = (0..100u8).map(|n| vec![n; 1000 + usize::from(n)]).collect();
    for message in &messages {
        guest.send(&of(&request, RW, END, message));
    }
    for message in &messages {
        assert_eq!(&next(&host), message);
    }
}

#[test]
fn messages_that_are_too_large_end_their_connection_only() {
    let mut guest = Guest::new(VsockConfig::default());
    let (_other, _) = connected(&mut guest);
    // For the guest: it can never receive a message longer than its window.
    let (host, request) = connected(&mut guest);
    let mut update = of(&request, CREDIT_UPDATE, 0, b"");
    update.buf_alloc = 100;
    guest.send(&update);
    send(&host, &[1; 101], SendFlags::empty()).unwrap();
    assert_eq!(guest.expect(RST).kind, SEQPACKET);
    assert_eq!(next(&host), b"");
    // For the host: a message that never ends, beyond the window.
    let (_host, request) = connected(&mut guest);
    let mut sent = 0;
    while guest.muxer.stats().connections == 2 {
        guest.send(&of(&request, RW, 0, &[1; 16 << 10]));
        sent += 16 << 10;
        assert!(sent <= 1 << 20, "kept without bound");
    }
    guest.expect(RST);
    // Messages without bytes, which take no credit, and are not read.
    let (_host, request) = connected(&mut guest);
    let mut sent = 0;
    while guest.muxer.stats().connections == 2 {
        guest.send(&of(&request, RW, END, b""));
        sent += 1;
        assert!(sent <= 100_000, "kept without bound");
    }
    guest.expect(RST);
    assert_eq!(guest.muxer.stats().connections, 1);
}

#[test]
fn a_guest_connects_to_acceptors_of_the_same_socket_type() {
    let mut guest = Guest::new(VsockConfig::default());
    let (send_end, accepted) = channel();
    let _listening = guest.muxer.listen(
        5,
        Box::new(move |stream| {
            assert_eq!(stream.kind, SocketKind::SeqPacket);
            let (ours, theirs) = pair();
            send_end.send(ours).unwrap();
            Some(theirs.into())
        }),
    );
    // An acceptor that supports streams only.
    let _other = guest.muxer.listen(
        6,
        Box::new(|_| Some(OwnedFd::from(UnixStream::pair().unwrap().0).into())),
    );
    let request = |port| Packet {
        kind: SEQPACKET,
        ..Packet::from_guest(1, port, REQUEST)
    };
    guest.send(&request(5));
    let response = guest.expect(RESPONSE);
    assert_eq!(response.kind, SEQPACKET);
    let host = accepted.recv().unwrap();
    guest.send(&of(&response, RW, END, b"hello"));
    assert_eq!(next(&host), b"hello");
    guest.send(&request(6));
    assert_eq!(guest.expect(RST).kind, SEQPACKET);
}

#[test]
fn a_guest_without_seqpacket_sockets_gets_no_request() {
    let mut guest = Guest::with_streams_only(VsockConfig::default());
    let (_ours, theirs) = pair();
    let (send, result) = channel();
    let options = ConnectOptions::default().on_result(move |told| send.send(told).unwrap());
    guest.muxer.connect(PORT, theirs, options);
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Unsupported));
    guest.send(&Packet {
        kind: SEQPACKET,
        ..Packet::from_guest(1, 5, REQUEST)
    });
    guest.expect(RST);
    assert_eq!(guest.muxer.stats().malformed, 1);
}
