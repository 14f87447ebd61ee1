//! Ports of the host that reach the guest, with Linux as the guest.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on is a failed test"
)]

mod rig;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use sm_devices_net::engine::{EngineConfig, FlowEnd, FlowProtocol, NetEvent};

use crate::rig::{GATEWAY, MIB, Rig, SERVER, SERVER_V6, SOON, connect, exchange, recv};

fn v6_gateway() -> IpAddr {
    EngineConfig::default().gateway_v6.into()
}

#[test]
fn clients_of_udp_get_answers_of_the_guest() {
    let Some(rig) = Rig::new() else { return };
    let events = rig.events();
    let handle = rig.handle();
    let guest = rig.guest(|| UdpSocket::bind("0.0.0.0:7000").unwrap());
    guest.set_read_timeout(Some(SOON)).unwrap();
    let expose =
        |address: SocketAddr| rig.internet(|| handle.expose(FlowProtocol::Udp, address, 7000));
    let port = expose((SERVER, 0).into()).unwrap();
    assert_ne!(port.address().port(), 0);
    let error = expose(port.address()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    let loopback = expose((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let client = |address: IpAddr, to: SocketAddr| {
        rig.internet(|| {
            let client = UdpSocket::bind((address, 0)).unwrap();
            client.connect(to).unwrap();
            client.set_read_timeout(Some(SOON)).unwrap();
            client
        })
    };
    let own: IpAddr = "198.51.100.2".parse().unwrap();
    let clients = [
        client(own, port.address()),
        client(own, port.address()),
        client(Ipv4Addr::LOCALHOST.into(), loopback.address()),
    ];
    let mut buffer = vec![0; 10_000];
    for round in 0..3 {
        let mut seen = Vec::new();
        for client in &clients {
            client.send(b"question").unwrap();
            let (len, from) = recv(&guest, &mut buffer).unwrap();
            assert_eq!(buffer[..len], *b"question");
            seen.push(from);
        }
        // The guest sees who asks, and hosts on the loopback interface as the gateway.
        assert_eq!(seen[0], clients[0].local_addr().unwrap());
        assert_eq!(seen[1], clients[1].local_addr().unwrap());
        let third = clients[2].local_addr().unwrap().port();
        assert_eq!(seen[2], (GATEWAY, third).into());
        for (number, from) in seen.iter().enumerate().rev() {
            let answer = vec![u8::try_from(number).unwrap(); 9000];
            guest.send_to(&answer, from).unwrap();
            let (len, address) = recv(&clients[number], &mut buffer).unwrap();
            assert!(buffer[..len] == answer, "round {round}");
            assert_eq!(address, clients[number].peer_addr().unwrap());
        }
    }
    let NetEvent::Opened(flow) = events.recv_timeout(SOON).unwrap() else {
        panic!("no flow")
    };
    assert!(flow.from_host && flow.guest.port() == 7000);
    handle.unexpose(port);
    loop {
        if let NetEvent::Ended(flow, summary) = events.recv_timeout(SOON).unwrap() {
            assert_eq!(flow.remote.ip(), own);
            assert_eq!((summary.to_guest, summary.from_guest), (24, 27_000));
            assert_eq!(summary.end, FlowEnd::Stopped);
            break;
        }
    }
    // The port is free again, and the other one is not.
    let start = Instant::now();
    while expose(port.address()).is_err() {
        assert!(start.elapsed() < SOON);
        std::thread::sleep(Duration::from_millis(5));
    }
    clients[2].send(b"again").unwrap();
    assert_eq!(recv(&guest, &mut buffer).unwrap().0, 5);
}

#[test]
fn connections_of_the_host_reach_the_guest_with_their_source() {
    let Some(rig) = Rig::new() else { return };
    let handle = rig.handle();
    let listeners = ["0.0.0.0:8000", "[::]:8001"]
        .map(|address| rig.guest(|| TcpListener::bind(address).unwrap()));
    let expose = |address: IpAddr, guest_port: u16| {
        let port =
            rig.internet(|| handle.expose(FlowProtocol::Tcp, (address, 0).into(), guest_port));
        port.unwrap()
    };
    for (address, seen, index) in [
        (IpAddr::from(SERVER), IpAddr::from(SERVER), 0),
        (SERVER_V6.into(), SERVER_V6.into(), 1),
        (Ipv4Addr::LOCALHOST.into(), GATEWAY.into(), 0),
        (Ipv6Addr::LOCALHOST.into(), v6_gateway(), 1),
    ] {
        let port = expose(address, [8000, 8001][index]);
        for lose in [0, 10] {
            rig.lose(lose, 0);
            let client = rig.internet(|| connect(port.address()).unwrap());
            let (guest, from) = listeners[index].accept().unwrap();
            let client_port = client.local_addr().unwrap().port();
            assert_eq!(from, (seen, client_port).into());
            for socket in [&client, &guest] {
                socket.set_read_timeout(Some(SOON)).unwrap();
            }
            exchange(&guest, &client, if lose == 0 { 4 * MIB } else { MIB / 2 });
            // Each side ends on its own.
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!((&guest).read(&mut [0; 8]).unwrap(), 0);
            (&guest).write_all(b"last").unwrap();
            drop(guest);
            let mut last = Vec::new();
            (&client).read_to_end(&mut last).unwrap();
            assert_eq!(last, b"last");
        }
        rig.lose(0, 0);
        handle.unexpose(port);
    }
    rig.settle(|stats| stats.tcp_flows == 0);
}

#[test]
fn a_client_is_reset_if_the_guest_refuses_it() {
    let Some(rig) = Rig::new() else { return };
    let events = rig.events();
    let handle = rig.handle();
    let address = (SERVER, 0).into();
    let port = rig.internet(|| handle.expose(FlowProtocol::Tcp, address, 8002).unwrap());
    // The reset may come while the client takes note of its connection.
    let error = rig.internet(|| match connect(port.address()) {
        Ok(mut client) => {
            client.set_read_timeout(Some(SOON)).unwrap();
            client.read(&mut [0; 8]).unwrap_err()
        }
        Err(error) => error,
    });
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(matches!(events.recv_timeout(SOON), Ok(NetEvent::Opened(_))));
    let Ok(NetEvent::Ended(flow, summary)) = events.recv_timeout(SOON) else {
        panic!("no end")
    };
    assert!(flow.from_host);
    assert_eq!(summary.end, FlowEnd::Refused);
    let error = rig.internet(|| handle.expose(FlowProtocol::Echo, address, 1).unwrap_err());
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}
