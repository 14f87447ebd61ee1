//! A guest that violates the protocol or floods the device: only its own connections
//! suffer.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed expectation is a failed test"
)]

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;

use sm_devices_vsock::VsockConfig;
use sm_devices_vsock::testing::{CREDIT_UPDATE, Guest, Packet, REQUEST, RST, RW, SHUTDOWN};
use sm_virtio::queue::Span;
use vm_memory::GuestAddress;

/// Checks that a stream works.
fn works(guest: &mut Guest, host: &mut UnixStream, request: &Packet, taken: &mut u32) {
    host.write_all(b"ping").unwrap();
    loop {
        let packet = guest.receive();
        if packet.src_port == request.src_port && packet.op == RW {
            assert_eq!(packet.payload, b"ping");
            break;
        }
    }
    *taken += 4;
    let mut data = request.reply(RW);
    data.payload = b"pong".to_vec();
    data.fwd_cnt = *taken;
    guest.send(&data);
    let mut seen = [0; 4];
    host.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"pong");
}

#[test]
fn wrong_credit_affects_its_own_connection_only() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut honest, honest_request) = guest.connected();
    let (mut liar, request) = guest.connected();
    let mut taken = 0;
    liar.write_all(&[1; 5000]).unwrap();
    let mut sent = 0;
    while sent < 5000 {
        sent += guest.expect(RW).payload.len() as u32;
    }
    // More forwarded than was sent; a window of 1 GiB; none at all; backwards.
    let lies = [
        (1 << 16, sent + 1),
        (1 << 30, sent + 1000),
        (0, sent),
        (0, 0),
        (1, sent.wrapping_sub(u32::MAX / 2)),
    ];
    for (buf_alloc, fwd_cnt) in lies {
        let mut update = request.reply(CREDIT_UPDATE);
        (update.buf_alloc, update.fwd_cnt) = (buf_alloc, fwd_cnt);
        guest.send(&update);
        liar.write_all(&[2; 10]).unwrap();
        works(&mut guest, &mut honest, &honest_request, &mut taken);
        assert_eq!(
            guest.try_receive(),
            None,
            "the liar has no credit: {update:?}"
        );
    }
    // A correct update grants credit again.
    let mut update = request.reply(CREDIT_UPDATE);
    update.fwd_cnt = sent;
    guest.send(&update);
    assert_eq!(guest.expect(RW).payload, [2; 50]);
    // The largest window does not cause an overflow.
    let mut update = request.reply(CREDIT_UPDATE);
    (update.buf_alloc, update.fwd_cnt) = (u32::MAX, sent + 50);
    guest.send(&update);
    liar.write_all(&[3; 3000]).unwrap();
    assert_eq!(guest.expect(RW).payload, [3; 3000]);
    assert_eq!(guest.muxer.stats().connections, 2);
}

/// The same memory repeatedly: a packet of nearly 4 GiB, after a short one. The sum of
/// their lengths exceeds 32 bits.
#[test]
fn packets_of_gigabytes_do_not_overflow_the_budget() {
    // A table has 256 entries, one of them for the header.
    const LEN: u32 = (u32::MAX - 44) / 255;
    let mut guest = Guest::new(VsockConfig::default());
    let (mut neighbour, neighbour_request) = guest.connected();
    let (_host, request) = guest.connected();
    let mut taken = 0;
    let span = Span {
        address: GuestAddress(8 << 20),
        len: LEN,
    };
    let mut before = request.reply(RW);
    before.payload = vec![1; 1000];
    let huge = Packet::from_guest(999, 9, CREDIT_UPDATE).header(u32::MAX);
    guest.send_spans(&before, &huge, &[span; 255]);
    works(&mut guest, &mut neighbour, &neighbour_request, &mut taken);
}

#[test]
fn a_flood_of_resets_does_not_affect_other_connections() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, request) = guest.connected();
    let mut taken = 0;
    let mut opened = Vec::new();
    for _ in 0..500 {
        opened.push(guest.connected());
    }
    // Resets for all of them, for ended ones, and for connections that never existed, each
    // several times; and requests and shutdowns in between.
    for round in 0..4 {
        for (_host, request) in &opened {
            guest.queue_packet(&request.reply(RST));
        }
        for port in 0..500 {
            guest.queue_packet(&Packet::from_guest(port, 9, RST));
            if port % 50 == 0 {
                guest.queue_packet(&Packet::from_guest(port, 9, REQUEST));
                guest.queue_packet(&Packet::from_guest(port, 9, SHUTDOWN));
            }
        }
        works(&mut guest, &mut host, &request, &mut taken);
        assert_eq!(guest.muxer.stats().connections, 1, "round {round}");
    }
    for (host, _request) in &mut opened {
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn thousands_of_ready_connections_end_quickly() {
    // All are queued for a buffer, and there is none: each removal from the queue takes
    // constant time, so the test ends.
    let mut guest = Guest::with_receive_buffers(VsockConfig::default(), 8);
    let mut opened = Vec::new();
    for _ in 0..3000 {
        opened.push(guest.connected());
    }
    for (host, _request) in &mut opened {
        host.write_all(&[1; 100]).unwrap();
    }
    guest.settle();
    for (_host, request) in &opened {
        guest.queue_packet(&request.reply(RST));
    }
    guest.wait_until(|stats| stats.connections == 0);
}

#[test]
fn data_after_a_shutdown_and_unexpected_answers_end_a_connection() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut neighbour, neighbour_request) = guest.connected();
    let mut taken = 0;
    let wrong = |request: &Packet| {
        let mut end = request.reply(SHUTDOWN);
        end.flags = 2;
        let mut late = request.reply(RW);
        late.payload = b"late".to_vec();
        [
            vec![end, late],
            vec![request.reply(REQUEST)],
            vec![request.reply(2)],
            vec![Packet {
                kind: 2,
                ..request.reply(RW)
            }],
            vec![Packet {
                len: Some(1 << 20),
                ..request.reply(RW)
            }],
        ]
    };
    for case in 0..5 {
        let (mut host, request) = guest.connected();
        for packet in &wrong(&request)[case] {
            guest.send(packet);
        }
        let reset = guest.expect(RST);
        assert_eq!(reset.src_port, request.src_port, "case {case}");
        assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
        works(&mut guest, &mut neighbour, &neighbour_request, &mut taken);
    }
    neighbour.set_nonblocking(true).unwrap();
    let read = neighbour.read(&mut [0]);
    assert!(matches!(read, Err(error) if error.kind() == ErrorKind::WouldBlock));
}
