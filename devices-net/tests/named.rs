//! Flows that have to prove a name, with Linux as the guest.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on is a failed test"
)]

mod rig;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::time::Instant;

use sm_devices_net::engine::{EngineConfig, FlowEnd, NameServers, NetEvent};
use sm_devices_net::policy::{NetPolicy, PolicyGate, PolicyHandle};

use crate::rig::{GATEWAY, MIB, Rig, SOON, connect, exchange, recv};

/// An address of the internet that the tests give to a server with names.
const NAMED: [u8; 4] = [203, 0, 113, 7];

fn policy(allow: &str, deny: &str) -> NetPolicy {
    let rules = |text: &str| {
        let words = text.split_whitespace();
        words.map(|rule| rule.parse().unwrap()).collect()
    };
    NetPolicy::new(rules(allow), rules(deny))
}

struct Named {
    rig: Rig,
    handle: PolicyHandle,
    listener: TcpListener,
}

impl Named {
    /// A server at port 443, and a guest that has asked for these names and got its address.
    fn new(allow: &str, deny: &str, names: &[&str]) -> Option<Self> {
        let config = EngineConfig::default();
        let (sender, receiver) = std::sync::mpsc::channel();
        // The gate does not know that the host has the address.
        let rig = Rig::with_policy(config, true, |_| {
            let gate = PolicyGate::new(policy(allow, deny), &config, Vec::new());
            sender.send(gate.handle()).unwrap();
            Box::new(gate)
        })?;
        let listener = rig.internet(|| {
            let status = std::process::Command::new("ip")
                .args(["address", "add", "203.0.113.7/32", "dev", "lo"])
                .status();
            assert!(status.unwrap().success());
            TcpListener::bind((IpAddr::from(NAMED), 443)).unwrap()
        });
        let server = rig.internet(|| UdpSocket::bind("198.51.100.1:0").unwrap());
        server.set_read_timeout(Some(SOON)).unwrap();
        rig.name_servers(NameServers::Fixed(vec![server.local_addr().unwrap()]));
        let client = rig.guest(|| {
            let client = UdpSocket::bind("0.0.0.0:0").unwrap();
            client.connect((GATEWAY, 53)).unwrap();
            client.set_read_timeout(Some(SOON)).unwrap();
            client
        });
        for name in names {
            let mut message = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            for label in name.split('.') {
                message.push(u8::try_from(label.len()).unwrap());
                message.extend(label.as_bytes());
            }
            message.extend([0, 0, 1, 0, 1]);
            client.send(&message).unwrap();
            let mut buffer = [0; 512];
            let (len, from) = recv(&server, &mut buffer).unwrap();
            let mut answer = buffer[..len].to_vec();
            (answer[2], answer[7]) = (0x81, 1);
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(NAMED);
            server.send_to(&answer, from).unwrap();
            recv(&client, &mut buffer).unwrap();
        }
        let handle = receiver.recv().unwrap();
        Some(Self {
            rig,
            handle,
            listener,
        })
    }

    /// Connects; the host does so, too, before the guest has sent anything.
    fn pair(&self) -> (TcpStream, TcpStream) {
        let address = (IpAddr::from(NAMED), 443).into();
        let guest = self.rig.guest(|| connect(address).unwrap());
        let (peer, _) = self.listener.accept().unwrap();
        for socket in [&guest, &peer] {
            socket.set_read_timeout(Some(SOON)).unwrap();
        }
        (guest, peer)
    }
}

/// A ClientHello in one record, with a name if there is one.
fn hello(name: Option<&str>) -> Vec<u8> {
    let vector = |bytes: &[u8]| {
        let len = u16::try_from(bytes.len()).unwrap().to_be_bytes();
        [&len[..], bytes].concat()
    };
    let extensions = name.map_or(Vec::new(), |name| {
        let entry = [&[0][..], &vector(name.as_bytes())].concat();
        [&[0, 0][..], &vector(&vector(&entry))].concat()
    });
    let parts = [
        &[3, 3][..],
        &[7; 32],
        &[0, 0, 2, 0x13, 1, 1, 0],
        &vector(&extensions),
    ];
    let body = parts.concat();
    let message = [&[1, 0][..], &vector(&body)].concat();
    [&[22, 3, 1][..], &vector(&message)].concat()
}

#[test]
fn a_flow_goes_on_with_an_allowed_name_only() {
    let names = ["www.example.com", "www.example.org"];
    let Some(named) = Named::new("*.example.com", "", &names[..1]) else {
        return;
    };
    let (mut guest, mut peer) = named.pair();
    let bytes = hello(Some("www.example.com"));
    // In two parts, of which the peer has neither before the name is complete.
    guest.write_all(&bytes[..20]).unwrap();
    peer.write_all(b"early").unwrap();
    guest.read_exact(&mut [0; 5]).unwrap();
    peer.set_nonblocking(true).unwrap();
    let error = peer.read(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    peer.set_nonblocking(false).unwrap();
    guest.write_all(&bytes[20..]).unwrap();
    let mut received = vec![0; bytes.len()];
    peer.read_exact(&mut received).unwrap();
    assert_eq!(received, bytes);
    exchange(&guest, &peer, MIB);
    let events = named.rig.events();
    for (first, rule) in [
        (
            hello(Some("www.example.org")),
            Some("tcp:www.example.org:443"),
        ),
        // An allowed name that has another address, or none.
        (hello(Some("cdn.example.com")), None),
        (hello(None), None),
        (
            b"GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n".to_vec(),
            None,
        ),
    ] {
        let (mut guest, mut peer) = named.pair();
        guest.write_all(&first).unwrap();
        for socket in [&mut guest, &mut peer] {
            let error = socket.read(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        let refused = loop {
            match events.recv_timeout(SOON).unwrap() {
                NetEvent::Refused(refused) => break Some(refused),
                NetEvent::Ended(_, summary) => {
                    assert_eq!(summary.end, FlowEnd::Prohibited);
                    // Repeated refusals of a destination are merged.
                    break None;
                }
                _ => {}
            }
        };
        if let Some(refused) = refused {
            assert_eq!(refused.reason.rule.as_deref(), rule);
            assert_eq!(refused.name.as_deref(), Some("www.example.org"));
        } else {
            assert!(rule.is_none());
        }
    }
    assert_eq!(named.rig.stats().prohibited, 4);
    // The name that was proven is judged again.
    named
        .handle
        .set_policy(policy("cdn.example.com www.example.com", ""));
    exchange(&guest, &peer, MIB / 16);
    named.handle.set_policy(policy("cdn.example.com", ""));
    let error = guest.read(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let address = guest.local_addr().unwrap();
    let name = loop {
        match events.recv_timeout(SOON).unwrap() {
            NetEvent::Ended(flow, _) if flow.guest == address => break flow.name,
            _ => {}
        }
    };
    assert_eq!(name.as_deref(), Some("www.example.com"));
}

#[test]
fn a_denied_name_is_denied_at_any_address() {
    let Some(named) = Named::new("", "ads.example.com", &["www.example.com"]) else {
        return;
    };
    for first in [hello(Some("other.example.com")), b"SSH-2.0-x\r\n".to_vec()] {
        let (mut guest, mut peer) = named.pair();
        guest.write_all(&first).unwrap();
        let mut received = vec![0; first.len()];
        peer.read_exact(&mut received).unwrap();
        assert_eq!(received, first);
        guest.shutdown(Shutdown::Write).unwrap();
        assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0);
    }
    let (mut guest, _peer) = named.pair();
    guest.write_all(&hello(Some("ads.example.com"))).unwrap();
    let error = guest.read(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_flow_that_says_nothing_ends() {
    let Some(named) = Named::new("*.example.com", "", &["www.example.com"]) else {
        return;
    };
    // One that the guest ends at once is no attempt.
    let (guest, mut peer) = named.pair();
    drop(guest);
    assert_eq!(peer.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(named.rig.stats().prohibited, 0);
    let (mut guest, _peer) = named.pair();
    let start = Instant::now();
    guest
        .write_all(&hello(Some("www.example.com"))[..30])
        .unwrap();
    let error = guest.read(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(start.elapsed().as_secs() >= 4);
}
