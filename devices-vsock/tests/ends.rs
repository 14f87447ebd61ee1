//! Ends of connections, and failed attempts: on either side, in each direction, and without
//! an answer.
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
use std::time::Duration;

use sm_devices_vsock::testing::{
    CREDIT_UPDATE, Guest, Packet, REQUEST, RESPONSE, RST, RW, SHUTDOWN, connect,
};
use sm_devices_vsock::{ConnectError, ConnectOptions, VsockConfig};

const SHORT: Duration = Duration::from_millis(50);

fn impatient() -> VsockConfig {
    VsockConfig::default()
        .answer_timeout(SHORT)
        .status_timeout(SHORT)
        .linger(SHORT)
}

/// Returns a packet of the guest in the connection of `request`.
fn data(request: &Packet, payload: &[u8]) -> Packet {
    Packet {
        payload: payload.to_vec(),
        ..request.reply(RW)
    }
}

fn end(request: &Packet, flags: u32) -> Packet {
    Packet {
        flags,
        ..request.reply(SHUTDOWN)
    }
}

/// Sends to a host that reads nothing, until a part must be stored; returns the number of
/// bytes sent.
fn fill(guest: &mut Guest, request: &Packet) -> usize {
    let mut sent = 0;
    let mut quiet = 0;
    // The socket has accepted at most a quarter of 256 KiB without a grant of credit, so
    // after several packets without one a part of them is stored.
    while quiet < 20 {
        let mut granted = false;
        guest.send(&data(request, &[7; 4096]));
        sent += 4096;
        guest.settle();
        while let Some(packet) = guest.try_receive() {
            granted |= packet.op == CREDIT_UPDATE;
        }
        quiet = if granted { 0 } else { quiet + 1 };
    }
    sent
}

#[test]
fn data_of_the_host_arrive_although_it_closes_while_the_guest_sends() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, request) = guest.connected();
    let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    // Unread when the host closes.
    guest.send(&data(&request, b"nobody reads this"));
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || host.write_all(&sent).unwrap());
    let mut got = Vec::<u8>::new();
    let mut update = request.reply(CREDIT_UPDATE);
    let mut more = request.reply(RW);
    let mut told = 0;
    while told != 3 {
        let packet = guest.receive();
        match packet.op {
            RW => got.extend(&packet.payload),
            SHUTDOWN => told = packet.flags,
            CREDIT_UPDATE => {}
            other => panic!("{other}"),
        }
        update.fwd_cnt = got.len() as u32;
        more.fwd_cnt = got.len() as u32;
        more.payload = vec![1; 100];
        guest.send(&update);
        if told & 1 == 0 {
            guest.send(&more);
        }
    }
    writer.join().unwrap();
    assert_eq!(got.len(), bytes.len());
    assert!(got == bytes);
    guest.send(&request.reply(RST));
    assert_eq!(guest.muxer.stats().connections, 0);
}

/// Returns the next packet that is no credit update, which may arrive at any time.
fn past_credit(guest: &mut Guest) -> Packet {
    loop {
        let packet = guest.receive();
        if packet.op != CREDIT_UPDATE {
            return packet;
        }
    }
}

#[test]
fn a_host_that_only_stops_reading_still_sends() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, request) = guest.connected();
    host.shutdown(Shutdown::Read).unwrap();
    // More than a window: unwanted data are dropped, and credit is granted again.
    let mut told = 0;
    for _ in 0..100 {
        guest.send(&data(&request, &[1; 16 << 10]));
        while let Some(packet) = guest.try_receive() {
            match packet.op {
                SHUTDOWN => told |= packet.flags,
                CREDIT_UPDATE => {}
                other => panic!("{other}"),
            }
        }
    }
    assert_eq!(told, 1, "the guest is notified to send no more");
    assert!(guest.muxer.stats().discarded >= 99 * (16 << 10));
    host.write_all(b"still here").unwrap();
    assert_eq!(past_credit(&mut guest).payload, b"still here");
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(past_credit(&mut guest).flags, 3);
}

#[test]
fn the_last_bytes_reach_a_slow_host_after_the_guest_has_closed() {
    for close in [RST, SHUTDOWN] {
        let mut guest = Guest::new(VsockConfig::default());
        let (mut host, request) = guest.connected();
        let sent = fill(&mut guest, &request);
        match close {
            RST => guest.send(&request.reply(RST)),
            _ => guest.send(&end(&request, 3)),
        }
        assert_eq!(guest.muxer.stats().connections, 1, "it lingers");
        let mut got = Vec::new();
        host.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), sent);
        if close == SHUTDOWN {
            guest.expect(RST);
        }
        let (_host, _request) = guest.connected();
        guest.wait_until(|stats| stats.connections == 1);
        assert_eq!(
            guest.try_receive(),
            None,
            "a closed connection sends nothing"
        );
    }
}

#[test]
fn ports_of_a_lingering_connection_can_be_used_again() {
    let mut guest = Guest::new(VsockConfig::default());
    let (send, accepted) = channel();
    let _listening = guest.muxer.listen(
        1030,
        Box::new(move |_| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            send.send(ours).unwrap();
            Some(OwnedFd::from(theirs).into())
        }),
    );
    let open = Packet::from_guest(9, 1030, REQUEST);
    guest.send(&open);
    let response = guest.expect(RESPONSE);
    let mut first = accepted.recv().unwrap();
    let sent = fill(&mut guest, &response);
    guest.send(&Packet::from_guest(9, 1030, RST));
    // The same ports again, while the first connection still has data.
    guest.send(&open);
    guest.expect(RESPONSE);
    let mut second = accepted.recv().unwrap();
    guest.send(&data(&response, b"second"));
    let mut seen = [0; 6];
    second.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"second");
    let mut tail = Vec::new();
    first.read_to_end(&mut tail).unwrap();
    assert_eq!(tail.len(), sent);
}

#[test]
fn last_bytes_that_the_host_does_not_read_are_dropped() {
    let mut guest = Guest::new(impatient());
    let (mut host, request) = guest.connected();
    let sent = fill(&mut guest, &request);
    guest.send(&request.reply(RST));
    guest.wait_until(|stats| stats.connections == 0);
    assert_eq!(guest.muxer.stats().timed_out, 1);
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert!(got.len() < sent);
}

#[test]
fn a_guest_that_never_answers_times_out() {
    let mut guest = Guest::new(impatient());
    let (mut host, result) = connect(&guest.muxer, ConnectOptions::default());
    guest.expect(REQUEST);
    assert_eq!(result.recv().unwrap(), Err(ConnectError::TimedOut));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    // The guest is notified, so a late answer finds no connection.
    guest.expect(RST);
    assert_eq!(guest.muxer.stats().connections, 0);

    // The same for a status byte, after the additional time.
    let options = ConnectOptions::default().status_reply(true).wait(SHORT);
    let (_host, result) = connect(&guest.muxer, options);
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    assert_eq!(result.recv().unwrap(), Err(ConnectError::TimedOut));
    guest.expect(RST);
}

/// A server may take longer to accept than the guest to answer.
#[test]
fn a_status_may_arrive_later_than_an_answer() {
    let answer_timeout = Duration::from_secs(1);
    let mut guest = Guest::new(VsockConfig::default().answer_timeout(answer_timeout));
    let options = ConnectOptions::default().status_reply(true);
    let (_host, result) = connect(&guest.muxer, options);
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    let early = result.recv_timeout(answer_timeout * 2);
    assert!(early.is_err(), "{early:?}");
    guest.send(&data(&request, &[0]));
    assert_eq!(result.recv().unwrap(), Ok(()));
}

#[test]
fn a_guest_that_does_not_confirm_the_end_is_reset() {
    let mut guest = Guest::new(
        VsockConfig::default()
            // The guest must answer the request in time.
            .answer_timeout(Duration::from_millis(500)),
    );
    let (host, _request) = guest.connected();
    drop(host);
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);
    guest.expect(RST);
    assert_eq!(guest.muxer.stats().connections, 0);
}

#[test]
fn a_client_that_closes_before_the_answer_ends_the_attempt() {
    let mut guest = Guest::new(VsockConfig::default());
    let (host, result) = connect(&guest.muxer, ConnectOptions::default());
    guest.expect(REQUEST);
    drop(host);
    assert_eq!(result.recv().unwrap(), Err(ConnectError::HungUp));
    guest.expect(RST);
    // Data of a client that closes before the answer still arrive.
    let (mut host, result) = connect(&guest.muxer, ConnectOptions::default());
    host.write_all(b"note").unwrap();
    drop(host);
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    assert_eq!(result.recv().unwrap(), Ok(()));
    assert_eq!(guest.expect(RW).payload, b"note");
    assert_eq!(guest.expect(SHUTDOWN).flags, 3);
}

#[test]
fn requests_before_the_driver_wait_and_then_fail() {
    let guest = Guest::without_driver(impatient());
    let (mut host, result) = connect(&guest.muxer, ConnectOptions::default());
    assert_eq!(result.recv().unwrap(), Err(ConnectError::TimedOut));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    // Requests beyond the limit are refused, not queued.
    let guest = Guest::without_driver(VsockConfig::default().max_connections(2));
    let all: Vec<_> = (0..9)
        .map(|_| connect(&guest.muxer, ConnectOptions::default()))
        .collect();
    for (_host, result) in all.iter().skip(4) {
        assert_eq!(result.recv().unwrap(), Err(ConnectError::Limit));
    }
    // Waiting requests are notified of the end of the device.
    let muxer = guest.muxer.clone();
    drop(guest);
    for (_host, result) in all.iter().take(2) {
        assert_eq!(result.recv().unwrap(), Err(ConnectError::Reset));
    }
    let (_host, result) = connect(&muxer, ConnectOptions::default());
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Reset));
}

#[test]
fn a_broken_queue_ends_all_connections_and_is_reported() {
    let mut guest = Guest::new(VsockConfig::default());
    let (failures, failed) = channel();
    guest.muxer.on_failure(Box::new(move |reason| {
        failures.send(reason.to_owned()).unwrap();
    }));
    let (mut open, _request) = guest.connected();
    let (_asked, result) = connect(&guest.muxer, ConnectOptions::default());
    guest.expect(REQUEST);
    guest.break_transmit_queue();
    assert!(failed.recv().unwrap().contains("available index"));
    assert_eq!(open.read(&mut [0]).unwrap(), 0, "the host sees the end");
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Reset));
    let (_host, result) = connect(&guest.muxer, ConnectOptions::default());
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Reset));
    assert_eq!(guest.muxer.stats().connections, 0);
}

#[test]
fn a_reset_of_the_driver_is_reported_to_waiting_requesters() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut open, _request) = guest.connected();
    let (_asked, result) = connect(&guest.muxer, ConnectOptions::default());
    guest.expect(REQUEST);
    guest.driver.reset();
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Reset));
    assert_eq!(open.read(&mut [0]).unwrap(), 0);
}

#[test]
fn descriptors_that_are_no_sockets_are_refused_as_such() {
    let guest = Guest::new(VsockConfig::default());
    let (send, result) = channel();
    let options = ConnectOptions::default().on_result(move |told| send.send(told).unwrap());
    let file = std::fs::File::open("/dev/null").unwrap();
    guest.muxer.connect(7, file.into(), options);
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Unusable));
}

#[test]
fn an_acceptor_is_removed_with_its_guard() {
    let mut guest = Guest::new(VsockConfig::default().max_connections(1));
    let (send, dialled) = channel();
    let acceptor = |send: std::sync::mpsc::Sender<()>| {
        Box::new(move |_| {
            send.send(()).unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            std::mem::forget(ours);
            Some(OwnedFd::from(theirs).into())
        })
    };
    let old = guest.muxer.listen(5, acceptor(send.clone()));
    let listening = guest.muxer.listen(5, acceptor(send));
    // Dropping the replaced one has no effect.
    drop(old);
    guest.send(&Packet::from_guest(1, 5, REQUEST));
    guest.expect(RESPONSE);
    assert_eq!(dialled.try_iter().count(), 1);
    // At the limit the acceptor is not called, and the refusal is counted.
    guest.send(&Packet::from_guest(2, 5, REQUEST));
    guest.expect(RST);
    assert_eq!(dialled.try_iter().count(), 0);
    assert_eq!(guest.muxer.stats().refused, 1);
    guest.send(&Packet::from_guest(1, 5, RST));
    drop(listening);
    guest.send(&Packet::from_guest(3, 5, REQUEST));
    guest.expect(RST);
    assert_eq!(dialled.try_iter().count(), 0);
}

#[test]
fn a_burst_of_refusals_does_not_stop_the_guest() {
    let mut guest = Guest::with_receive_buffers(VsockConfig::default(), 256);
    // Twice the number that may wait, while the guest receives none of the answers.
    for port in 0..512 {
        guest.queue_packet(&Packet::from_guest(port, 9, REQUEST));
    }
    for _ in 0..512 {
        guest.expect(RST);
    }
    let (_host, _request) = guest.connected();
}

#[test]
fn a_reset_is_sent_once_there_is_a_buffer_for_it() {
    let mut guest = Guest::new(VsockConfig::default());
    // A first restore uses its only event buffer.
    guest.restore();
    guest.driver.wait_used(&mut guest.event);
    // The event is not handled yet when the machine is saved and restored once more.
    guest.restore();
    let (_host, result) = connect(&guest.muxer, ConnectOptions::default());
    guest.settle();
    assert_eq!(guest.try_receive(), None, "too early");
    guest.offer_event();
    guest.driver.wait_used(&mut guest.event);
    guest.settle();
    assert!(guest.try_receive().is_none(), "still too early");
    // A notification without a buffer has no meaning.
    guest.driver.notify(2);
    guest.settle();
    assert!(guest.try_receive().is_none(), "nothing was handled");
    guest.offer_event();
    let request = guest.expect(REQUEST);
    guest.send(&request.reply(RESPONSE));
    assert_eq!(result.recv().unwrap(), Ok(()));
}

#[test]
fn a_pause_does_not_lose_events() {
    let mut guest = Guest::new(VsockConfig::default());
    let (mut host, request) = guest.connected();
    guest.driver.transport.quiesce().unwrap();
    host.write_all(b"while paused").unwrap();
    guest.driver.transport.unquiesce();
    assert_eq!(guest.expect(RW).payload, b"while paused");
    guest.send(&data(&request, b"answer"));
    let mut seen = [0; 6];
    host.read_exact(&mut seen).unwrap();
    host.set_nonblocking(true).unwrap();
    assert!(matches!(host.read(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock));
}

/// The loop has consumed the events of the end.
#[test]
fn a_pause_does_not_lose_an_end_behind_data() {
    for gone in [false, true] {
        let mut guest = Guest::new(VsockConfig::default());
        let (mut host, request) = guest.connected();
        guest.driver.transport.quiesce().unwrap();
        host.write_all(b"last words").unwrap();
        let left = match gone {
            true => {
                drop(host);
                None
            }
            false => {
                host.shutdown(Shutdown::Write).unwrap();
                Some(host)
            }
        };
        // The loop consumes the events before the machine runs again.
        guest.driver.transport.quiesce().unwrap();
        guest.driver.transport.unquiesce();
        assert_eq!(guest.expect(RW).payload, b"last words");
        assert_eq!(guest.expect(SHUTDOWN).flags, if gone { 3 } else { 2 });
        if let Some(mut host) = left {
            guest.send(&data(&request, b"answer"));
            guest.send(&end(&request, 3));
            let mut answer = Vec::new();
            host.read_to_end(&mut answer).unwrap();
            assert_eq!(answer, b"answer");
        }
    }
}
