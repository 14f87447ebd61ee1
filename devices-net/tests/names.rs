//! Names and rules, with Linux as the guest of an engine.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on is a failed test"
)]

mod rig;

use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sm_devices_net::engine::{EngineConfig, NameServers};
use sm_devices_net::policy::{NetPolicy, NetRule, PolicyGate};

use crate::rig::{GATEWAY, MIB, Rig, SERVER, SERVER_V6, SOON, connect, exchange, recv};

fn rules(text: &str) -> Vec<NetRule> {
    text.split_whitespace()
        .map(|rule| rule.parse().unwrap())
        .collect()
}

/// A rig with a policy, and the lines about what it refuses.
fn guarded(allow: &str) -> Option<(Rig, Arc<Mutex<Vec<String>>>)> {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&lines);
    let config = EngineConfig::default();
    let rig = Rig::with_policy(config, true, |addresses| {
        let policy = NetPolicy::new(rules(allow), Vec::new());
        let gate = PolicyGate::new(policy, &config, addresses);
        Box::new(gate.on_refusal(Box::new(move |request, verdict| {
            log.lock()
                .unwrap()
                .push(format!("{}: {verdict}", request.destination));
        })))
    });
    Some((rig?, lines))
}

#[test]
fn the_host_is_not_reached_in_any_form() {
    let Some((rig, lines)) = guarded("") else {
        return;
    };
    let listener = rig.internet(|| TcpListener::bind("0.0.0.0:0").unwrap());
    let port = listener.local_addr().unwrap().port();
    let _v6 = rig.internet(|| TcpListener::bind(("::", port)));
    let targets = [
        "198.51.100.1",
        "198.51.100.2",
        "100.96.0.1",
        "169.254.169.254",
        "168.63.129.16",
        "10.0.0.1",
        "192.168.1.1",
        "2001:db8::1",
        "fd73:6d00::1",
        "64:ff9b::198.51.100.1",
        "64:ff9b::127.0.0.1",
        "2002:c633:6401::",
        "2002:7f00:1::1",
        "fd00:ec2::254",
        "64:ff9b::a9fe:a9fe",
    ];
    for target in targets {
        let address: IpAddr = target.parse().unwrap();
        let error = rig.guest(|| connect((address, port).into()).unwrap_err());
        let expected = match address {
            IpAddr::V4(_) => ErrorKind::HostUnreachable,
            IpAddr::V6(_) => ErrorKind::PermissionDenied,
        };
        assert_eq!(error.kind(), expected, "{target}: {error}");
    }
    let lines = lines.lock().unwrap();
    assert_eq!(lines.len(), targets.len());
    let line = format!("198.51.100.1:{port}: not allowed; \"tcp:host:{port}\" would allow it");
    assert_eq!(lines[0], line);
    assert_eq!(rig.stats().tcp_connected, 0);
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_name_opens_its_addresses_and_no_others() {
    let Some((rig, _)) = guarded("tcp:*.example.com private") else {
        return;
    };
    let server = rig.internet(|| UdpSocket::bind((SERVER, 0)).unwrap());
    server.set_read_timeout(Some(SOON)).unwrap();
    rig.name_servers(NameServers::Fixed(vec![server.local_addr().unwrap()]));
    let guest = rig.guest(|| {
        let guest = UdpSocket::bind("0.0.0.0:0").unwrap();
        guest.connect((GATEWAY, 53)).unwrap();
        guest.set_read_timeout(Some(SOON)).unwrap();
        guest
    });
    // 198.51.100.200 is nobody's: a route is missing, which is not a prohibition.
    let kind = |last: u8| {
        let address: IpAddr = [198, 51, 100, last].into();
        rig.guest(|| connect((address, 443).into()).unwrap_err().kind())
    };
    assert_eq!(kind(200), ErrorKind::HostUnreachable);
    let mut buffer = [0; 512];
    let mut ask = |name: &str, last: u8| {
        guest.send(&question(9, name)).unwrap();
        answer(&server, Ok(last));
        recv(&guest, &mut buffer).unwrap();
        buffer[3] & 15
    };
    assert_eq!(ask("www.example.com", 200), 0);
    assert_eq!(kind(200), ErrorKind::NetworkUnreachable);
    assert_eq!(kind(201), ErrorKind::HostUnreachable);
    // An answer with an address of the host is withheld.
    assert_eq!(ask("evil.example.com", 1), 3);
    assert_eq!(kind(1), ErrorKind::HostUnreachable);
}

/// A question for the addresses of `name`.
fn question(id: u16, name: &str) -> Vec<u8> {
    let mut message = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).unwrap());
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

/// Answers questions with an address whose last byte is given, or with an error.
fn answer(server: &UdpSocket, address: Result<u8, u8>) -> Vec<u8> {
    let mut buffer = [0; 512];
    let (len, from) = recv(server, &mut buffer).unwrap();
    let mut response = buffer[..len].to_vec();
    response[2] = 0x81;
    match address {
        Ok(last) => {
            response[7] = 1;
            response.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 198, 51, 100, last]);
        }
        Err(code) => response[3] = code,
    }
    server.send_to(&response, from).unwrap();
    buffer[..len].to_vec()
}

#[test]
fn questions_go_to_the_servers_of_the_host() {
    let Some(rig) = Rig::new() else { return };
    let servers = [SERVER, "198.51.100.2".parse().unwrap()].map(|address| {
        let server = rig.internet(|| UdpSocket::bind((address, 0)).unwrap());
        server.set_read_timeout(Some(SOON)).unwrap();
        server
    });
    let addresses = servers
        .each_ref()
        .map(|server| server.local_addr().unwrap());
    rig.name_servers(NameServers::Fixed(addresses.to_vec()));
    let guest = rig.guest(|| {
        let guest = UdpSocket::bind("0.0.0.0:0").unwrap();
        guest.connect((GATEWAY, 53)).unwrap();
        guest.set_read_timeout(Some(SOON)).unwrap();
        guest
    });
    let mut buffer = [0; 512];
    let mut ask = |name: &str, serve: &dyn Fn() -> Vec<u8>| {
        let question = question(77, name);
        guest.send(&question).unwrap();
        let asked = serve();
        let (len, _) = recv(&guest, &mut buffer).unwrap();
        assert_eq!(buffer[..2], [0, 77]);
        assert_eq!(buffer[12..question.len()], question[12..]);
        assert!(asked.is_empty() || asked[12..] == question[12..]);
        (buffer[3] & 15, buffer[len - 1])
    };
    let mut numbers = std::collections::BTreeSet::new();
    for last in 1..20 {
        let number = std::cell::Cell::new([0; 2]);
        let name = format!("www{last}.example.com");
        let (code, address) = ask(&name, &|| {
            let asked = answer(&servers[0], Ok(last));
            number.set([asked[0], asked[1]]);
            asked
        });
        assert_eq!((code, address), (0, last));
        numbers.insert(number.get());
    }
    assert!(numbers.len() > 15, "the numbers are not those of the guest");
    // One that cannot answer is followed by the next, at once; and so is one that is silent.
    let start = Instant::now();
    let second = || {
        answer(&servers[0], Err(2));
        answer(&servers[1], Ok(9))
    };
    assert_eq!(ask("www.example.com", &second), (0, 9));
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(
        ask("silent.example.com", &|| answer(&servers[1], Ok(10))),
        (0, 10)
    );
    let _ = recv(&servers[0], &mut [0; 512]).unwrap();
    // A name that does not exist is an answer; no server at all is a failure.
    assert_eq!(ask("no.example.com", &|| answer(&servers[0], Err(3))).0, 3);
    drop(servers);
    assert_eq!(ask("none.example.com", &Vec::new).0, 2);
    assert_eq!(rig.stats().udp_flows, 0);
}

#[test]
fn servers_of_a_file_that_changes_are_the_new_ones() {
    let Some(rig) = Rig::new() else { return };
    let directory = std::env::temp_dir().join(format!("sm-net-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let file = directory.join("resolv.conf");
    std::fs::write(&file, format!("nameserver {SERVER}\n")).unwrap();
    rig.name_servers(NameServers::File(file.clone()));
    let guest = rig.guest(|| {
        let guest = UdpSocket::bind("0.0.0.0:0").unwrap();
        guest.connect((GATEWAY, 53)).unwrap();
        guest.set_read_timeout(Some(SOON)).unwrap();
        guest
    });
    let mut buffer = [0; 512];
    for address in [IpAddr::from(SERVER), SERVER_V6.into()] {
        let server = rig.internet(|| UdpSocket::bind((address, 53)).unwrap());
        server.set_read_timeout(Some(SOON)).unwrap();
        std::fs::write(&file, format!("# changed\nnameserver {address}\n")).unwrap();
        guest.send(&question(5, "example.com")).unwrap();
        answer(&server, Ok(4));
        let (len, _) = recv(&guest, &mut buffer).unwrap();
        assert_eq!(buffer[len - 1], 4);
    }
    std::fs::remove_dir_all(&directory).unwrap();
    // Long answers come over TCP.
    let server = rig.internet(|| TcpListener::bind((SERVER, 0)).unwrap());
    rig.name_servers(NameServers::Fixed(vec![server.local_addr().unwrap()]));
    let guest = rig.guest(|| connect((GATEWAY, 53).into()).unwrap());
    let (peer, _) = server.accept().unwrap();
    exchange(&guest, &peer, MIB / 16);
}
