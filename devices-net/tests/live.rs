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

use sm_devices_net::engine::{EngineConfig, FlowEnd, FlowProtocol, NetEvent};
use sm_devices_net::policy::{NetPolicy, PolicyGate, PolicyHandle, learn_rules};

use crate::rig::{MIB, PROHIBITED, Rig, SERVER, SOON, connect, exchange, recv};

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

#[test]
fn flows_and_refusals_are_reported() {
    let Some((rig, handle)) = guarded("host") else {
        return;
    };
    let events = rig.events();
    let next = || events.recv_timeout(SOON).unwrap();
    let (guest, peer) = rig.pair(SERVER.into());
    let NetEvent::Opened(opened) = next() else {
        panic!("no flow")
    };
    assert_eq!(opened.guest, guest.local_addr().unwrap());
    assert_eq!(opened.remote, peer.local_addr().unwrap());
    let port = opened.remote.port();
    assert_eq!(opened.rule, Some(format!("tcp:host:{port}")));
    exchange(&guest, &peer, MIB);
    drop((guest, peer));
    let NetEvent::Ended(record, summary) = next() else {
        panic!("no end")
    };
    assert_eq!(record, opened);
    let bytes = (summary.from_guest, summary.to_guest);
    assert_eq!(bytes, (MIB as u64, MIB as u64));
    assert_eq!(summary.end, FlowEnd::Closed);

    // Refused by the peer, and by the policy, which says what would help.
    rig.guest(|| connect((SERVER, 9).into()).unwrap_err());
    let NetEvent::Ended(_, summary) = next() else {
        panic!("no end")
    };
    assert_eq!(summary.end, FlowEnd::Refused);
    for _ in 0..3 {
        rig.guest(|| connect((PROHIBITED, 80).into()).unwrap_err());
    }
    let NetEvent::Refused(refused) = next() else {
        panic!("no refusal")
    };
    assert_eq!(
        (refused.remote, refused.count),
        ((PROHIBITED, 80).into(), 1)
    );
    let rule = format!("tcp:{PROHIBITED}:80");
    assert_eq!(refused.reason.rule.as_deref(), Some(rule.as_str()));
    assert!(events.try_recv().is_err(), "the others are merged");

    let server = rig.internet(|| UdpSocket::bind((SERVER, 0)).unwrap());
    rig.guest(|| {
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        client
            .send_to(b"hello", server.local_addr().unwrap())
            .unwrap();
    });
    let event = next();
    let NetEvent::Opened(opened) = &event else {
        panic!("{event:?}")
    };
    assert_eq!(opened.protocol, FlowProtocol::Udp);
    let rules: Vec<String> = learn_rules([&event])
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(rules, [format!("udp:host:{}", opened.remote.port())]);
    handle.set_policy(policy("", ""));
    let NetEvent::Ended(_, summary) = next() else {
        panic!("no end")
    };
    assert_eq!((summary.from_guest, summary.end), (5, FlowEnd::Prohibited));
}
