//! The device with a model of the guest's driver: queues in memory of its own, no VM.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed expectation is a failed test"
)]

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use sm_devices_vsock::testing::{
    CREDIT_UPDATE, EVENT_BASE, Guest, Packet, REQUEST, RESPONSE, RST, RW, SHUTDOWN, connect,
};
use sm_devices_vsock::{ConnectError, ConnectOptions, Group, Limit, Vsock, VsockConfig};
use sm_virtio::queue::Span;
use vm_memory::GuestAddress;

#[test]
fn data_flow_in_both_directions_and_each_end_is_reported() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, request) = guest.connected();
    host.write_all(b"to the guest").unwrap();
    assert_eq!(guest.expect(RW).payload, b"to the guest");
    let mut data = request.reply(RW);
    data.payload = b"to the host".to_vec();
    guest.send(&data);
    let mut seen = [0; 11];
    host.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"to the host");

    // Half-close from the host: the last bytes come first, the guest may continue.
    host.write_all(b"tail").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(RW).payload, b"tail");
    assert_eq!(guest.expect(SHUTDOWN).flags, 2);
    data.payload = b"late".to_vec();
    guest.send(&data);
    let mut end = request.reply(SHUTDOWN);
    end.flags = 2;
    guest.send(&end);
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"late");
    // Both directions have ended, and so has the connection.
    guest.expect(RST);
    assert_eq!(guest.muxer.stats().connections, 0);
}

#[test]
fn a_closed_host_differs_from_one_that_stops_sending() {
    let mut guest = Guest::new(VsockConfig::default());
    let (host, _request) = guest.connected();
    drop(host);
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);
    // First shutdown, then close.
    let (host, _request) = guest.connected();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(SHUTDOWN).flags, 2);
    drop(host);
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);
    // Earlier data arrive first.
    let (mut host, _request) = guest.connected();
    host.write_all(b"tail").unwrap();
    drop(host);
    assert_eq!(guest.expect(RW).payload, b"tail");
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);
}

#[test]
fn a_refused_connection_is_reported_and_closed() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, result) = connect(&guest.muxer, ConnectOptions::default());
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RST));
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Refused));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_preamble_is_sent_first_and_a_status_is_not_data() {
    let mut guest = Guest::new(VsockConfig::default());
    let options = || {
        ConnectOptions::default()
            .preamble(b"header".to_vec())
            .status_reply(true)
    };
    let (mut host, result) = connect(&guest.muxer, options());
    host.write_all(b"+body").unwrap();
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    let mut got = Vec::new();
    while got.len() < 11 {
        got.extend(guest.expect(RW).payload);
    }
    assert_eq!(got, b"header+body");
    let mut answer = request.reply(RW);
    answer.payload = b"\0hello".to_vec();
    guest.send(&answer);
    assert_eq!(result.recv().unwrap(), Ok(()));
    let mut seen = [0; 5];
    host.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"hello");

    let (mut host, result) = connect(&guest.muxer, options());
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    guest.expect(RW);
    let mut answer = request.reply(RW);
    answer.payload = vec![1];
    guest.send(&answer);
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Status(1)));
    guest.expect(RST);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_guest_opens_streams_to_ports_with_an_acceptor() {
    let mut guest = Guest::new(VsockConfig::default());
    let (send, accepted) = channel();
    let _listening = guest.muxer.listen(
        1030,
        Box::new(move |request| {
            assert_eq!((request.guest_port, request.host_port), (555, 1030));
            let (ours, theirs) = UnixStream::pair().unwrap();
            send.send(ours).unwrap();
            Some(OwnedFd::from(theirs).into())
        }),
    );
    guest.send(&Packet::from_guest(555, 1030, REQUEST));
    guest.expect(RESPONSE);
    let mut host = accepted.recv().unwrap();
    let mut data = Packet::from_guest(555, 1030, RW);
    data.payload = b"ready".to_vec();
    guest.send(&data);
    let mut seen = [0; 5];
    host.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"ready");

    guest.send(&Packet::from_guest(556, 9999, REQUEST));
    let reset = guest.expect(RST);
    assert_eq!((reset.src_port, reset.dst_port), (9999, 556));
    assert_eq!(guest.muxer.stats().refused, 1);
}

#[test]
fn the_guests_window_is_never_exceeded() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, result) = connect(&guest.muxer, ConnectOptions::default());
    let request = guest.expect(REQUEST);
    let mut response = request.reply(RESPONSE);
    response.buf_alloc = 100;
    guest.send(&response);
    result.recv().unwrap().unwrap();
    host.write_all(&[7; 250]).unwrap();
    assert_eq!(guest.expect(RW).payload.len(), 100);
    for (forwarded, more) in [(60, 60), (100, 40), (200, 50)] {
        let mut update = request.reply(CREDIT_UPDATE);
        update.buf_alloc = 100;
        update.fwd_cnt = forwarded;
        guest.send(&update);
        assert_eq!(guest.expect(RW).payload.len(), more, "after {forwarded}");
    }
}

#[test]
fn a_guest_that_exceeds_the_window_loses_that_connection_only() {
    let mut guest = Guest::new(VsockConfig::default().window(4096));
    let (other, other_request) = guest.connected();
    let (mut slow, request) = guest.connected();
    // Fill the socket of a reader that does not read, then the window.
    let mut data = request.reply(RW);
    data.payload = vec![1; 2048];
    let mut sent = 0usize;
    loop {
        guest.send(&data);
        sent += 1;
        assert!(
            sent < 10_000,
            "memory of one connection grows without bound"
        );
        if guest.muxer.stats().connections == 1 {
            break;
        }
    }
    let reset = loop {
        let packet = guest.receive();
        if packet.op == RST {
            break packet;
        }
    };
    assert_eq!(reset.src_port, request.src_port);
    let mut rest = Vec::new();
    slow.read_to_end(&mut rest).unwrap();
    assert!(rest.iter().all(|&byte| byte == 1));
    // The neighbour is not affected.
    let mut data = other_request.reply(RW);
    data.payload = b"fine".to_vec();
    guest.send(&data);
    let mut seen = [0; 4];
    (&other).read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"fine");
}

#[test]
fn invalid_packets_are_answered_by_a_reset_and_counted() {
    let mut guest = Guest::new(VsockConfig::default());
    let base = || Packet::from_guest(5, 6, RW);
    let wrong = [
        Packet {
            src_cid: 9,
            ..base()
        },
        Packet {
            dst_cid: 9,
            ..base()
        },
        Packet { kind: 3, ..base() },
        Packet { op: 77, ..base() },
        Packet {
            len: Some(1000),
            ..base()
        },
    ];
    for (count, packet) in wrong.iter().enumerate() {
        guest.send(packet);
        let reset = guest.expect(RST);
        assert_eq!((reset.src_port, reset.dst_port), (6, 5));
        assert_eq!(guest.muxer.stats().malformed, count as u64 + 1);
    }
    // Data without a connection is not malformed, but is answered by a reset.
    guest.send(&base());
    guest.expect(RST);
    // A reset is not answered.
    guest.send(&Packet::from_guest(5, 6, RST));
    let (_host, _request) = guest.connected();
}

#[test]
fn a_large_stream_arrives_whole_in_both_directions() {
    let mut guest = Guest::new(VsockConfig::default().window(16 << 10));
    let (host, request) = guest.connected();
    let bytes: Vec<u8> = (0..1u32 << 20).map(|n| (n * 7 + (n >> 8)) as u8).collect();
    std::thread::scope(|scope| {
        let (mut writer, mut reader) = (&host, &host);
        let input = &bytes;
        scope.spawn(move || writer.write_all(input).unwrap());
        let read = scope.spawn(move || {
            let mut seen = vec![0; input.len()];
            reader.read_exact(&mut seen).unwrap();
            seen
        });
        let (mut got, mut sent) = (Vec::<u8>::new(), 0);
        let mut granted = request.buf_alloc as usize;
        while got.len() < bytes.len() || sent < bytes.len() {
            // Send as much as the device granted, in packets of odd sizes.
            while sent < bytes.len() && sent < granted {
                let len = 3001.min(granted - sent).min(bytes.len() - sent);
                let mut data = request.reply(RW);
                data.fwd_cnt = got.len() as u32;
                data.payload = bytes[sent..sent + len].to_vec();
                guest.send(&data);
                sent += len;
            }
            if got.len() == bytes.len() && sent == bytes.len() {
                break;
            }
            let packet = guest.receive();
            granted = packet.buf_alloc as usize + packet.fwd_cnt as usize;
            got.extend(&packet.payload);
            let mut update = request.reply(CREDIT_UPDATE);
            update.fwd_cnt = got.len() as u32;
            guest.send(&update);
        }
        assert_eq!(got, bytes);
        assert_eq!(read.join().unwrap(), bytes);
    });
}

#[test]
fn buffers_of_any_size_lose_no_byte() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, request) = guest.connected();
    let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| host.write_all(&bytes).unwrap());
        let mut got = Vec::new();
        let mut update = request.reply(CREDIT_UPDATE);
        let mut sizes = [44, 45, 4096, 44, 300, 1000].into_iter().cycle();
        while got.len() < bytes.len() {
            got.extend(guest.receive_into(sizes.next().unwrap()).payload);
            update.fwd_cnt = got.len() as u32;
            guest.send(&update);
        }
        assert!(got == bytes);
    });
}

#[test]
fn connections_wait_until_a_restored_guest_has_handled_the_reset() {
    let mut guest = Guest::new(VsockConfig::default());
    let (old, _request) = guest.connected();
    guest.driver.transport.quiesce().unwrap();
    let state = guest.driver.transport.save().unwrap();
    guest.driver.transport.restore(&state).unwrap();
    guest.driver.transport.unquiesce();
    let (head, len) = guest.driver.wait_used(&mut guest.event);
    assert_eq!(len, 4, "a transport reset event");
    // The old stream is gone on the host.
    old.set_nonblocking(true).unwrap();
    assert!(!matches!((&old).read(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock));
    let (_host, result) = connect(&guest.muxer, ConnectOptions::default());
    assert!(
        guest.rx.take_used().is_none(),
        "too early: it would be reset too"
    );
    let _ = head;
    let event = Span {
        address: GuestAddress(EVENT_BASE),
        len: 8,
    };
    guest.event.offer(&[], &[event]).unwrap();
    guest.driver.notify(2);
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    assert_eq!(result.recv().unwrap(), Ok(()));
}

#[test]
fn the_limit_of_connections_is_reported() {
    let mut guest = Guest::new(VsockConfig::default().max_connections(2));
    let (_a, _) = guest.connected();
    let (_b, _) = guest.connected();
    let (_c, result) = connect(&guest.muxer, ConnectOptions::default());
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Limit));
}

/// Opens a connection of a group that the guest accepts; returns the host's end, and the
/// request.
fn member_of(group: &Group, guest: &mut Guest) -> (UnixStream, Packet) {
    let options = ConnectOptions::default().member(group.join(None));
    let (host, result) = connect(&guest.muxer, options);
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    assert_eq!(result.recv().unwrap(), Ok(()));
    (host, request)
}

#[test]
fn a_group_counts_its_bytes_and_reports_their_delivery() {
    let mut guest = Guest::new(VsockConfig::default());
    let group = Group::new();
    let (mut host, request) = member_of(&group, &mut guest);
    let (_other, _) = guest.connected();
    assert_eq!((group.active(), group.undelivered()), (1, 1));
    host.write_all(b"five!").unwrap();
    assert_eq!(guest.expect(RW).payload, b"five!");
    let (send, told) = channel();
    group.when_delivered(move || send.send(()).unwrap());
    let mut data = request.reply(RW);
    data.payload = b"all there is".to_vec();
    guest.send(&data);
    assert!(told.try_recv().is_err());
    let mut end = request.reply(SHUTDOWN);
    end.flags = 2;
    guest.send(&end);
    told.recv().unwrap();
    assert_eq!((group.active(), group.undelivered()), (1, 0));
    drop(host);
    guest.closed(&request);
    assert!(group.wait_idle(Instant::now() + Duration::from_secs(60)));
    assert_eq!((group.to_guest(), group.from_guest()), (5, 12));
}

#[test]
fn a_group_is_cut_and_other_connections_continue() {
    let mut guest = Guest::new(VsockConfig::default());
    let group = Group::new();
    let (mut cut, request) = member_of(&group, &mut guest);
    let (mut other, other_request) = guest.connected();
    guest.muxer.cut(&group);
    let reset = guest.expect(RST);
    assert_eq!(reset.src_port, request.src_port);
    assert_eq!(cut.read(&mut [0]).unwrap(), 0);
    assert!(group.wait_idle(Instant::now() + Duration::from_secs(60)));
    let mut data = other_request.reply(RW);
    data.payload = b"on".to_vec();
    guest.send(&data);
    let mut said = [0; 2];
    other.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"on");
}

#[test]
fn connections_that_have_not_started_are_cut_immediately() {
    // The guest's driver never starts.
    let (_device, muxer) = Vsock::new(VsockConfig::default()).unwrap();
    let group = Group::new();
    let limit = Limit::new(1);
    let (mut host, theirs) = UnixStream::pair().unwrap();
    let options = ConnectOptions::default().member(group.join(limit.take(1)));
    muxer.connect(1, theirs.into(), options);
    muxer.cut(&group);
    assert_eq!((group.active(), limit.free()), (0, 1));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}
