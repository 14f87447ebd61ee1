//! The guest's name server: stored and long answers, and other servers under rules about names.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on is a failed test"
)]

mod rig;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, TcpListener, UdpSocket};

use sm_devices_net::engine::{EngineConfig, NameServers, NetEvent};
use sm_devices_net::policy::{NetPolicy, PolicyGate, PolicyHandle};

use crate::rig::{GATEWAY, Rig, SERVER, SOON, connect, recv};

fn policy(allow: &str) -> NetPolicy {
    let words = allow.split_whitespace();
    NetPolicy::new(
        words.map(|rule| rule.parse().unwrap()).collect(),
        Vec::new(),
    )
}

fn guarded(allow: &str) -> Option<(Rig, PolicyHandle)> {
    let config = EngineConfig::default();
    let (sender, receiver) = std::sync::mpsc::channel();
    let rig = Rig::with_policy(config, true, |addresses| {
        let gate = PolicyGate::new(policy(allow), &config, addresses);
        sender.send(gate.handle()).unwrap();
        Box::new(gate)
    })?;
    Some((rig, receiver.recv().unwrap()))
}

/// A question for a type of records, with the options of RFC 6891.
fn question(id: u16, name: &str, kind: u8) -> Vec<u8> {
    let mut message = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 1]].concat();
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).unwrap());
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, kind, 0, 1]);
    message.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    message
}

/// The response to a question, without its options, and with records of its name.
fn response(question: &[u8], records: &[(u8, u32, &[u8])]) -> Vec<u8> {
    let mut response = question[..question.len() - 11].to_vec();
    (response[2], response[3], response[11]) = (0x81, 0x80, 0);
    response[7] = u8::try_from(records.len()).unwrap();
    for (kind, ttl, data) in records {
        response.extend([0xc0, 12, 0, *kind, 0, 1]);
        response.extend(ttl.to_be_bytes());
        response.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        response.extend(*data);
    }
    response
}

struct Client(UdpSocket);

impl Client {
    fn new(rig: &Rig, server: IpAddr) -> Self {
        Self(rig.guest(|| {
            let guest = UdpSocket::bind("0.0.0.0:0").unwrap();
            guest.connect((server, 53)).unwrap();
            guest.set_read_timeout(Some(SOON)).unwrap();
            guest
        }))
    }

    fn answer(&self) -> std::io::Result<Vec<u8>> {
        let mut buffer = [0; 4096];
        let (len, _) = recv(&self.0, &mut buffer)?;
        Ok(buffer[..len].to_vec())
    }
}

/// Receives a question, and returns it with its sender.
fn asked(server: &UdpSocket) -> (Vec<u8>, std::net::SocketAddr) {
    let mut buffer = [0; 1024];
    let (len, from) = recv(server, &mut buffer).unwrap();
    (buffer[..len].to_vec(), from)
}

fn server(rig: &Rig, port: u16) -> UdpSocket {
    let server = rig.internet(|| UdpSocket::bind((SERVER, port)).unwrap());
    server.set_read_timeout(Some(SOON)).unwrap();
    server
}

#[test]
fn an_answer_is_stored_and_the_policy_still_decides() {
    let Some((rig, handle)) = guarded("*.example.com") else {
        return;
    };
    let server = server(&rig, 0);
    rig.name_servers(NameServers::Fixed(vec![server.local_addr().unwrap()]));
    let client = Client::new(&rig, GATEWAY.into());
    let address = [203, 0, 113, 7];
    client.0.send(&question(1, "www.example.com", 1)).unwrap();
    let (message, from) = asked(&server);
    let answer = response(&message, &[(1, 300, &address)]);
    server.send_to(&answer, from).unwrap();
    assert_eq!(client.answer().unwrap()[2..], answer[2..]);
    // The server is not asked again.
    client.0.send(&question(2, "WWW.example.com", 1)).unwrap();
    let again = client.answer().unwrap();
    assert_eq!((&again[..2], &again[13..16]), (&[0, 2][..], &b"WWW"[..]));
    assert_eq!(rig.stats().dns_stored, 1);
    handle.set_policy(policy("*.example.org"));
    client.0.send(&question(3, "www.example.com", 1)).unwrap();
    let refused = client.answer().unwrap();
    assert_eq!(refused[3] & 15, 3);
    // "Filtered" (RFC 8914).
    assert!(
        refused.ends_with(&[0, 6, 0, 15, 0, 2, 0, 17]),
        "{refused:?}"
    );
    server.set_nonblocking(true).unwrap();
    let error = server.recv(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
}

#[test]
fn keys_for_an_encrypted_hello_do_not_reach_the_guest() {
    let Some((rig, handle)) = guarded("*.example.com") else {
        return;
    };
    let server = server(&rig, 0);
    rig.name_servers(NameServers::Fixed(vec![server.local_addr().unwrap()]));
    let client = Client::new(&rig, GATEWAY.into());
    let hint = [0, 4, 0, 4, 203, 0, 113, 9];
    let service = [&[0, 1, 0][..], &hint, &[0, 5, 0, 3, b'e', b'c', b'h']].concat();
    client.0.send(&question(1, "www.example.com", 65)).unwrap();
    let (message, from) = asked(&server);
    let answer = response(&message, &[(65, 300, &service)]);
    server.send_to(&answer, from).unwrap();
    let stripped = client.answer().unwrap();
    assert_eq!(stripped.len(), answer.len());
    assert!(!stripped.windows(3).any(|it| it == b"ech"), "{stripped:?}");
    assert!(stripped.windows(8).any(|it| it == hint));
    // The hint is an address of the name: it is prohibited by the host's own routes only.
    let kind = |last: u8| {
        let address = (IpAddr::from([203, 0, 113, last]), 80);
        rig.guest(|| connect(address.into()).unwrap_err().kind())
    };
    assert_eq!(kind(9), ErrorKind::HostUnreachable);
    assert_eq!(rig.stats().prohibited, 0);
    assert_eq!(kind(10), ErrorKind::HostUnreachable);
    assert_eq!(rig.stats().prohibited, 1);
    // Without rules about names, nothing is changed.
    handle.set_policy(policy(""));
    client.0.send(&question(2, "www.example.com", 65)).unwrap();
    assert_eq!(client.answer().unwrap()[2..], answer[2..]);
}

#[test]
fn a_truncated_answer_is_asked_for_over_tcp() {
    let Some(rig) = Rig::new() else { return };
    let listener = rig.internet(|| TcpListener::bind((SERVER, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let server = server(&rig, address.port());
    rig.name_servers(NameServers::Fixed(vec![address]));
    let client = Client::new(&rig, GATEWAY.into());
    let serve = |id: u16, name: &str, texts: u8, close: bool| {
        client.0.send(&question(id, name, 16)).unwrap();
        let (message, from) = asked(&server);
        let mut truncated = response(&message, &[]);
        truncated[2] |= 2;
        server.send_to(&truncated, from).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let mut over_tcp = vec![0; message.len() + 2];
        stream.read_exact(&mut over_tcp).unwrap();
        assert_eq!(over_tcp[2..], message[..]);
        assert_eq!(usize::from(over_tcp[1]), message.len());
        if close {
            return Vec::new();
        }
        let text = [&[200][..], &[b'x'; 200]].concat();
        let records = vec![(16, 60, &text[..]); usize::from(texts)];
        let answer = response(&message, &records);
        let len = u16::try_from(answer.len()).unwrap().to_be_bytes();
        // In pieces, as it may come.
        for piece in [&len[..1], &len[1..], &answer[..20], &answer[20..]] {
            stream.write_all(piece).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        answer
    };
    let answer = serve(7, "long.example.com", 5, false);
    assert_eq!(client.answer().unwrap()[2..], answer[2..]);
    // One that is too long for the guest's options is truncated for it, too.
    serve(8, "longer.example.com", 9, false);
    let truncated = client.answer().unwrap();
    assert_eq!((truncated[2] & 2, truncated[7]), (2, 0));
    // A server that closes is asked once more, and then there is no answer.
    serve(9, "closed.example.com", 0, true);
    let (message, from) = asked(&server);
    let mut failed = response(&message, &[]);
    failed[3] |= 2;
    server.send_to(&failed, from).unwrap();
    assert_eq!(client.answer().unwrap()[3] & 15, 2);
}

#[test]
fn another_name_server_is_under_the_rules_of_its_address() {
    let Some((rig, handle)) = guarded("udp:host:53 *.example.com") else {
        return;
    };
    let events = rig.events();
    let server = server(&rig, 53);
    let client = Client::new(&rig, SERVER.into());
    let ask = |id: u16, last: u8| {
        client.0.send(&question(id, "www.example.com", 1)).unwrap();
        let (message, from) = asked(&server);
        let address = [203, 0, 113, last];
        let answer = response(&message, &[(1, 300, &address)]);
        server.send_to(&answer, from).unwrap();
        client.answer().unwrap()
    };
    assert_eq!(ask(1, 7).last(), Some(&7));
    // It is asked each time, and its answers open addresses.
    assert_eq!(ask(2, 8).last(), Some(&8));
    for last in [7, 8] {
        let address = (IpAddr::from([203, 0, 113, last]), 80);
        rig.guest(|| connect(address.into()).unwrap_err());
    }
    assert_eq!(rig.stats().prohibited, 0);
    let NetEvent::Opened(flow) = events.recv_timeout(SOON).unwrap() else {
        panic!("no flow")
    };
    assert_eq!(flow.rule.as_deref(), Some("udp:host:53"));
    handle.set_policy(policy("*.example.com"));
    client.0.send(&question(4, "www.example.com", 1)).unwrap();
    let error = client.answer().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::HostUnreachable);
}

/// A question behind its length.
fn over_tcp(message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(message.len()).unwrap().to_be_bytes();
    [&len[..], message].concat()
}

/// Reads an answer behind its length.
fn read_answer(stream: &mut impl std::io::Read) -> Vec<u8> {
    let mut len = [0; 2];
    stream.read_exact(&mut len).unwrap();
    let mut answer = vec![0; u16::from_be_bytes(len).into()];
    stream.read_exact(&mut answer).unwrap();
    answer
}

#[test]
fn names_are_asked_for_over_tcp_under_the_same_rules() {
    let Some((rig, handle)) = guarded("*.example.com") else {
        return;
    };
    let events = rig.events();
    let server = server(&rig, 0);
    rig.name_servers(NameServers::Fixed(vec![server.local_addr().unwrap()]));
    let mut guest = rig.guest(|| connect((GATEWAY, 53).into()).unwrap());
    guest.set_read_timeout(Some(SOON)).unwrap();
    // Two questions in odd pieces; the second is answered first.
    let questions = [
        over_tcp(&question(1, "www.example.com", 1)),
        over_tcp(&question(2, "cdn.example.com", 16)),
    ]
    .concat();
    for piece in questions.chunks(7) {
        guest.write_all(piece).unwrap();
    }
    let (first, from_first) = asked(&server);
    let (second, from_second) = asked(&server);
    let text = [&[200][..], &[b'x'; 200]].concat();
    // Longer than what a datagram may be for the guest.
    let long = response(&second, &vec![(16, 60, &text[..]); 15]);
    assert!(long.len() > 3000);
    server.send_to(&long, from_second).unwrap();
    assert_eq!(read_answer(&mut guest)[2..], long[2..]);
    let short = response(&first, &[(1, 60, &[203, 0, 113, 7])]);
    server.send_to(&short, from_first).unwrap();
    let answer = read_answer(&mut guest);
    assert_eq!((&answer[..2], &answer[2..]), (&[0, 1][..], &short[2..]));
    // The answer is read: the address is one of the name.
    let address = (IpAddr::from([203, 0, 113, 7]), 80);
    rig.guest(|| connect(address.into()).unwrap_err());
    assert_eq!(rig.stats().prohibited, 0);
    let refused = over_tcp(&question(3, "www.example.org", 1));
    guest.write_all(&refused).unwrap();
    assert_eq!(read_answer(&mut guest)[3] & 15, 3);
    let Ok(NetEvent::Ended(flow, _)) = events.recv_timeout(SOON) else {
        panic!("a flow to the name server is none of the policy's")
    };
    assert_eq!(flow.remote, address.into());
    // It survives another policy, and ends for one that nobody could mean.
    handle.set_policy(policy("*.example.org"));
    guest.write_all(&refused).unwrap();
    let (message, from) = asked(&server);
    let answer = response(&message, &[(1, 60, &[203, 0, 113, 8])]);
    server.send_to(&answer, from).unwrap();
    assert_eq!(read_answer(&mut guest)[2..], answer[2..]);
    guest.write_all(&[0xff; 20]).unwrap();
    assert_eq!(guest.read(&mut [0; 8]).unwrap_or(0), 0);
    // More clients than there may be: the newest is served.
    let clients: Vec<_> = rig.guest(|| {
        let clients = (0..40).map(|_| connect((GATEWAY, 53).into()).unwrap());
        clients.collect()
    });
    let mut newest = clients.last().unwrap();
    newest.set_read_timeout(Some(SOON)).unwrap();
    newest.write_all(&refused).unwrap();
    assert_eq!(read_answer(&mut newest)[13..16], *b"www");
    drop((clients, guest));
    rig.settle(|stats| stats.tcp_flows == 0);
}
