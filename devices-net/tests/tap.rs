//! Linux as the guest of an engine, behind a TAP.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on is a failed test"
)]

mod rig;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use sm_devices_net::engine::EngineConfig;

use crate::rig::{
    GATEWAY, MIB, PROHIBITED, Rig, SERVER, SERVER_V6, SOON, connect, exchange, receive, recv, send,
};

fn servers() -> [IpAddr; 2] {
    [SERVER.into(), SERVER_V6.into()]
}

#[test]
fn bytes_arrive_in_both_directions_and_families() {
    for offloads in [true, false] {
        let Some(rig) = Rig::with(EngineConfig::default(), offloads) else {
            return;
        };
        for server in servers() {
            let (guest, peer) = rig.pair(server);
            exchange(&guest, &peer, 16 * MIB);
        }
        let stats = rig.settle(|stats| stats.tcp_flows == 0);
        assert_eq!(stats.malformed, 0);
        assert!(stats.tcp_bytes_from_guest >= 32 * MIB as u64);
    }
}

#[test]
fn each_side_can_end_before_the_other() {
    let Some(rig) = Rig::new() else { return };
    for (server, guest_first) in servers()
        .into_iter()
        .flat_map(|it| [(it, true), (it, false)])
    {
        let (guest, peer) = rig.pair(server);
        let (mut first, mut second) = if guest_first {
            (&guest, &peer)
        } else {
            (&peer, &guest)
        };
        send(first, 3, MIB / 4);
        first.shutdown(Shutdown::Write).unwrap();
        receive(second, 3, MIB / 4);
        assert_eq!(second.read(&mut [0; 8]).unwrap(), 0, "the end");
        // The other direction goes on, with more than any buffer holds.
        std::thread::scope(|scope| {
            scope.spawn(|| send(second, 4, 8 * MIB));
            receive(first, 4, 8 * MIB);
        });
        second.shutdown(Shutdown::Write).unwrap();
        assert_eq!(first.read(&mut [0; 8]).unwrap(), 0, "the end");
        assert_eq!(
            second.write_all(b"more").unwrap_err().kind(),
            ErrorKind::BrokenPipe
        );
    }
    rig.settle(|stats| stats.tcp_flows == 0);
}

#[test]
fn the_last_bytes_arrive_although_the_sender_has_closed() {
    let Some(rig) = Rig::new() else { return };
    for guest_first in [true, false] {
        let (guest, peer) = rig.pair(SERVER.into());
        let (sender, receiver) = if guest_first {
            (guest, peer)
        } else {
            (peer, guest)
        };
        // More than the sockets buffer: the rest is sent after the close.
        std::thread::scope(|scope| {
            scope.spawn(move || send(sender, 5, 4 * MIB));
            std::thread::sleep(Duration::from_millis(50));
            receive(&receiver, 5, 4 * MIB);
            assert_eq!((&receiver).read(&mut [0; 8]).unwrap(), 0, "the end");
        });
    }
    rig.settle(|stats| stats.tcp_flows == 0);
}

/// Closes a socket by a reset.
fn reset(socket: TcpStream) {
    let linger = rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
    linger.unwrap();
}

#[test]
fn a_reset_of_one_side_reaches_the_other() {
    let Some(rig) = Rig::new() else { return };
    for server in servers() {
        let (guest, mut peer) = rig.pair(server);
        reset(guest);
        let error = peer.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        let (mut guest, peer) = rig.pair(server);
        reset(peer);
        let error = guest.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        // A peer that closes with unread bytes resets, too, after what it has sent.
        let (mut guest, mut peer) = rig.pair(server);
        guest.write_all(b"unread").unwrap();
        peer.write_all(b"last words").unwrap();
        let mut word = [0; 10];
        guest.read_exact(&mut word).unwrap();
        rig.settle(|stats| stats.tcp_flows == 1);
        drop(peer);
        let error = guest.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        rig.settle(|stats| stats.tcp_flows == 0);
    }
}

#[test]
fn a_connection_that_fails_fails_in_the_guest_at_once() {
    let Some(rig) = Rig::new() else { return };
    let start = Instant::now();
    let kind = |address: SocketAddr| rig.guest(|| connect(address).unwrap_err().kind());
    for server in servers() {
        assert_eq!(kind((server, 9).into()), ErrorKind::ConnectionRefused);
    }
    // No route: neither a name with a dead IPv6 address nor a host that is away stalls.
    assert_eq!(
        kind("[2001:db8:1::1]:80".parse().unwrap()),
        ErrorKind::NetworkUnreachable
    );
    assert_eq!(
        kind("192.0.2.1:80".parse().unwrap()),
        ErrorKind::NetworkUnreachable
    );
    // Prohibited by the policy, and by the host's own rules.
    assert_eq!(kind((PROHIBITED, 80).into()), ErrorKind::HostUnreachable);
    assert_eq!(
        kind("203.0.113.1:80".parse().unwrap()),
        ErrorKind::HostUnreachable
    );
    assert!(start.elapsed() < Duration::from_secs(3));
    let stats = rig.stats();
    assert_eq!((stats.tcp_flows, stats.tcp_connected), (0, 0));
    assert_eq!(stats.prohibited, 1);
}

#[test]
fn a_guest_sees_no_connection_before_the_host_has_one() {
    let Some(rig) = Rig::new() else { return };
    // A listener that accepts none: its queue is full, and further SYNs get no answer.
    let listener = rig.internet(|| {
        let listener = TcpListener::bind((SERVER, 0)).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        listener
    });
    let address = listener.local_addr().unwrap();
    let _filler = rig.internet(|| connect(address).unwrap());
    let black_holes = 10;
    rig.guest(|| {
        std::thread::scope(|scope| {
            for _ in 0..black_holes {
                scope.spawn(|| {
                    let timeout = Duration::from_secs(2);
                    let error = TcpStream::connect_timeout(&address, timeout).unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::TimedOut);
                });
            }
        });
    });
    // They do not disturb another one.
    let start = Instant::now();
    let (guest, peer) = rig.pair(SERVER.into());
    exchange(&guest, &peer, MIB);
    assert!(start.elapsed() < Duration::from_secs(2));
    assert!(rig.stats().tcp_flows > black_holes);
}

#[test]
fn a_slow_reader_does_not_slow_others_down() {
    let Some(rig) = Rig::new() else { return };
    let (slow_guest, slow_peer) = rig.pair(SERVER.into());
    let (idle_guest, idle_peer) = rig.pair(SERVER_V6.into());
    std::thread::scope(|scope| {
        // Senders in both directions whose receivers do not read for now.
        scope.spawn(|| send(&slow_peer, 6, 16 * MIB));
        scope.spawn(|| send(&idle_guest, 7, 16 * MIB));
        std::thread::sleep(Duration::from_millis(300));
        let (guest, peer) = rig.pair(SERVER.into());
        let start = Instant::now();
        exchange(&guest, &peer, 16 * MIB);
        assert!(start.elapsed() < Duration::from_secs(10));
        // Then they read a little at a time, and all arrives.
        let mut byte = [0; 1];
        for _ in 0..100 {
            slow_guest.peek(&mut byte).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        scope.spawn(|| receive(&slow_guest, 6, 16 * MIB));
        scope.spawn(|| receive(&idle_peer, 7, 16 * MIB));
    });
}

#[test]
fn a_thousand_connections_at_once() {
    let Some(rig) = Rig::new() else { return };
    const COUNT: usize = 1000;
    let listener = rig.internet(|| {
        let listener = TcpListener::bind((SERVER, 0)).unwrap();
        rustix::net::listen(&listener, 4096).unwrap();
        listener
    });
    let address = listener.local_addr().unwrap();
    let start = Instant::now();
    let guests: Vec<_> = rig.guest(|| (0..COUNT).map(|_| connect(address).unwrap()).collect());
    let peers: Vec<_> = (0..COUNT).map(|_| listener.accept().unwrap().0).collect();
    let connected = start.elapsed();
    assert_eq!(rig.stats().tcp_flows, COUNT as u64);
    for round in 0..3u8 {
        for (mut guest, mut peer) in guests.iter().zip(&peers) {
            guest.write_all(&[round; 100]).unwrap();
            let mut echo = [0; 100];
            peer.read_exact(&mut echo).unwrap();
            peer.write_all(&echo).unwrap();
            guest.read_exact(&mut echo).unwrap();
            assert_eq!(echo, [round; 100]);
        }
    }
    drop((guests, peers));
    rig.settle(|stats| stats.tcp_flows == 0);
    assert!(connected < Duration::from_secs(10), "{connected:?}");
}

#[test]
fn lost_frames_are_sent_again() {
    for offloads in [true, false] {
        let Some(rig) = Rig::with(EngineConfig::default(), offloads) else {
            return;
        };
        for server in servers() {
            // Frames for the guest, SYN and FIN included.
            rig.lose(20, 0);
            let (guest, peer) = rig.pair(server);
            exchange(&guest, &peer, MIB);
            peer.shutdown(Shutdown::Write).unwrap();
            assert_eq!((&guest).read(&mut [0; 8]).unwrap(), 0, "the end");
            drop((guest, peer));
            // A ring loses nothing that the guest sends: from that it recovers, but slowly.
            rig.lose(0, 20);
            let (guest, peer) = rig.pair(server);
            send(&guest, 8, MIB / 16);
            receive(&peer, 8, MIB / 16);
            guest.shutdown(Shutdown::Write).unwrap();
            assert_eq!((&peer).read(&mut [0; 8]).unwrap(), 0, "the end");
        }
        rig.lose(0, 0);
        let stats = rig.settle(|stats| stats.tcp_flows == 0);
        assert!(stats.tcp_retransmissions > 0, "{stats:?}");
    }
}

fn udp_pair(rig: &Rig, server: IpAddr) -> (UdpSocket, UdpSocket) {
    let peer = rig.internet(|| UdpSocket::bind((server, 0)).unwrap());
    let address = peer.local_addr().unwrap();
    let guest = rig.guest(|| {
        let any: IpAddr = match server {
            IpAddr::V4(_) => "0.0.0.0".parse().unwrap(),
            IpAddr::V6(_) => "::".parse().unwrap(),
        };
        let guest = UdpSocket::bind((any, 0)).unwrap();
        guest.connect(address).unwrap();
        guest
    });
    for socket in [&guest, &peer] {
        socket.set_read_timeout(Some(SOON)).unwrap();
    }
    (guest, peer)
}

#[test]
fn datagrams_of_any_size_arrive_in_both_directions() {
    for offloads in [true, false] {
        let Some(rig) = Rig::with(EngineConfig::default(), offloads) else {
            return;
        };
        for server in servers() {
            let (guest, peer) = udp_pair(&rig, server);
            let mut buffer = vec![0; 1 << 16];
            for len in [0, 1, 1452, 1453, 1472, 1473, 9000, 60_000, 65_487] {
                let bytes: Vec<u8> = (0..len).map(|n| (n % 253) as u8).collect();
                guest.send(&bytes).unwrap();
                let (got, from) = recv(&peer, &mut buffer).unwrap();
                assert!(buffer[..got] == bytes, "{len} bytes of the guest");
                peer.send_to(&bytes, from).unwrap();
                let (got, _) = recv(&guest, &mut buffer).unwrap();
                assert!(buffer[..got] == bytes, "{len} bytes for the guest");
            }
        }
        let stats = rig.stats();
        assert_eq!((stats.udp_flows, stats.malformed), (2, 0));
        assert!(stats.reassembled >= 8);
    }
}

#[test]
fn a_datagram_without_a_receiver_is_refused_in_the_guest() {
    let Some(rig) = Rig::new() else { return };
    for server in servers() {
        let (guest, peer) = udp_pair(&rig, server);
        drop(peer);
        // A program that another test starts has the receiver's socket for a moment, too.
        guest
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let start = Instant::now();
        let error = loop {
            guest.send(b"anyone?").unwrap();
            let error = recv(&guest, &mut [0; 8]).unwrap_err();
            if error.kind() != ErrorKind::WouldBlock || start.elapsed() > SOON {
                break error;
            }
        };
        assert_eq!(
            error.kind(),
            ErrorKind::ConnectionRefused,
            "{server}: {:?}",
            rig.stats()
        );
    }
    let error = rig.guest(|| {
        let guest = UdpSocket::bind("0.0.0.0:0").unwrap();
        guest.connect((PROHIBITED, 53)).unwrap();
        guest.set_read_timeout(Some(SOON)).unwrap();
        guest.send(b"hello").unwrap();
        recv(&guest, &mut [0; 8]).unwrap_err()
    });
    assert_eq!(error.kind(), ErrorKind::HostUnreachable);
}

#[test]
fn flows_of_datagrams_are_limited_and_the_oldest_goes() {
    let mut config = EngineConfig::default();
    config.limits.udp_flows = 64;
    let Some(rig) = Rig::with(config, true) else {
        return;
    };
    let (guest, peer) = udp_pair(&rig, SERVER.into());
    let mut buffer = [0; 16];
    for round in 0..3 {
        // A flow in use survives those of a port scan.
        rig.guest(|| {
            let scanner = UdpSocket::bind("0.0.0.0:0").unwrap();
            for port in 0..500 {
                scanner
                    .send_to(b"scan", (SERVER, 20_000 + round * 500 + port))
                    .unwrap();
            }
        });
        guest.send(b"still here").unwrap();
        assert_eq!(recv(&peer, &mut buffer).unwrap().0, 10);
    }
    let stats = rig.stats();
    assert_eq!(stats.udp_flows, 64);
    assert!(stats.limited > 0);
}

#[test]
fn echo_requests_are_answered() {
    if !sm_test_needs::programs(&["ping"]) {
        return;
    }
    let Some(rig) = Rig::new() else { return };
    let ping = |arguments: &str| {
        rig.guest(|| {
            let output = Command::new("ping")
                .args(arguments.split(' '))
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            (output.status.success(), text)
        })
    };
    for target in [
        SERVER.to_string(),
        SERVER_V6.to_string(),
        GATEWAY.to_string(),
    ] {
        for size in ["56", "9000"] {
            let (success, text) = ping(&format!("-c 3 -i 0.05 -W 5 -s {size} {target}"));
            assert!(success && text.contains("3 received"), "{target}: {text}");
        }
    }
    let (success, text) = ping(&format!("-c 1 -W 5 {PROHIBITED}"));
    assert!(!success && text.contains("Packet filtered"), "{text}");
    let (success, text) = ping("-c 1 -W 5 192.0.2.1");
    assert!(!success && text.contains("Net Unreachable"), "{text}");
    let (success, text) = ping(&format!("-c 1 -W 5 -t 1 {SERVER}"));
    assert!(!success && text.contains("Time to live exceeded"), "{text}");
}

#[test]
fn the_gateway_is_the_host_that_the_policy_says() {
    let Some(rig) = Rig::new() else { return };
    let listener = rig.internet(|| TcpListener::bind((SERVER, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    let guest = rig.guest(|| connect((GATEWAY, port).into()).unwrap());
    assert_eq!(guest.peer_addr().unwrap(), (GATEWAY, port).into());
    let (peer, _) = listener.accept().unwrap();
    exchange(&guest, &peer, MIB);
}
