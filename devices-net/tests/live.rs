//! Changes of a running engine, with Linux as its guest.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on is a failed test"
)]

mod rig;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::process::Command;
use std::sync::{Arc, Mutex};

use sm_devices_net::engine::EngineConfig;
use sm_devices_net::policy::{NetPolicy, PolicyGate, PolicyHandle};

use crate::rig::{Rig, SERVER, SOON, connect, recv};

fn policy(allow: &str, deny: &str) -> NetPolicy {
    let rules = |text: &str| {
        let words = text.split_whitespace();
        words.map(|rule| rule.parse().unwrap()).collect()
    };
    NetPolicy::new(rules(allow), rules(deny))
}

/// A rig whose policy can be changed; the gate follows the addresses of its host.
fn guarded(allow: &str) -> Option<(Rig, PolicyHandle)> {
    let handle = Arc::new(Mutex::new(None));
    let slot = Arc::clone(&handle);
    let config = EngineConfig::default();
    let rig = Rig::with_policy(config, true, |_| {
        let gate = PolicyGate::following_host(policy(allow, ""), &config).unwrap();
        *slot.lock().unwrap() = Some(gate.handle());
        Box::new(gate)
    })?;
    let handle = handle.lock().unwrap().take().unwrap();
    Some((rig, handle))
}

#[test]
fn a_new_policy_ends_what_it_prohibits_and_nothing_else() {
    let Some((rig, handle)) = guarded("host") else {
        return;
    };
    let (mut guest, mut peer) = rig.pair(SERVER.into());
    let (mut kept, mut kept_peer) = rig.pair("198.51.100.2".parse().unwrap());
    // More flows than answers are queued: all of them end.
    let listener = rig.internet(|| {
        let listener = TcpListener::bind((SERVER, 0)).unwrap();
        rustix::net::listen(&listener, 512).unwrap();
        listener
    });
    let address = listener.local_addr().unwrap();
    let idle: Vec<_> = rig.guest(|| (0..300).map(|_| connect(address).unwrap()).collect());
    let peers: Vec<_> = idle.iter().map(|_| listener.accept().unwrap().0).collect();
    let server = rig.internet(|| UdpSocket::bind((SERVER, 0)).unwrap());
    let client = rig.guest(|| {
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        client
    });
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(SOON)).unwrap();
    }
    client.send(b"hello").unwrap();
    recv(&server, &mut [0; 8]).unwrap();

    handle.set_policy(policy("host", "198.51.100.1"));
    // Nobody sends: the engine was woken.
    for mut socket in idle {
        socket.set_read_timeout(Some(SOON)).unwrap();
        let error = socket.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    for mut socket in peers {
        socket.set_read_timeout(Some(SOON)).unwrap();
        let error = socket.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    for socket in [&mut guest, &mut peer] {
        let error = socket.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    client.send(b"hello").unwrap();
    let error = recv(&client, &mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HostUnreachable);
    let error = rig.guest(|| connect(address).unwrap_err());
    assert_eq!(error.kind(), ErrorKind::HostUnreachable);
    kept.write_all(b"hello").unwrap();
    kept_peer.read_exact(&mut [0; 5]).unwrap();
    let stats = rig.stats();
    assert_eq!((stats.tcp_flows, stats.udp_flows), (1, 0));

    handle.set_policy(policy("host", ""));
    rig.guest(|| connect(address).unwrap());
}

#[test]
fn an_address_that_the_host_gets_is_one_of_the_host() {
    let Some((rig, _)) = guarded("public private") else {
        return;
    };
    let address: IpAddr = "198.18.0.7".parse().unwrap();
    let kind = || rig.guest(|| connect((address, 9).into()).unwrap_err().kind());
    // It is a private one that nobody has: there is no route.
    assert_eq!(kind(), ErrorKind::NetworkUnreachable);
    for (command, expected) in [
        ("add", ErrorKind::HostUnreachable),
        ("del", ErrorKind::NetworkUnreachable),
    ] {
        let arguments = ["address", command, "198.18.0.7/32", "dev", "lo"];
        let status = rig.internet(|| Command::new("ip").args(arguments).status());
        assert!(status.unwrap().success());
        assert_eq!(kind(), expected, "{command}");
    }
}
