//! Tests of port forwarding over the loopback of this machine.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, Shutdown, TcpListener};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use sm_guest_proto::forward::{ForwardHeader, ForwardStatus};

use crate::{Agent, Test};

pub(crate) const TESTS: &[Test] = &[
    ("half_close_and_bulk", half_close_and_bulk),
    ("ports_without_a_listener", ports_without_a_listener),
    ("hundreds_at_once", hundreds_at_once),
];

fn open(agent: &Agent, port: u16, wait_ms: u32) -> (UnixStream, ForwardStatus) {
    let mut stream = UnixStream::connect(agent.path().join("forward")).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    stream
        .write_all(&ForwardHeader { port, wait_ms }.encode())
        .unwrap();
    let mut status = [0];
    stream.read_exact(&mut status).unwrap();
    (stream, status[0].into())
}

fn half_close_and_bulk() {
    let agent = Agent::bare();
    for listener in [
        TcpListener::bind("127.0.0.1:0"),
        TcpListener::bind((Ipv6Addr::LOCALHOST, 0)),
    ] {
        let Ok(listener) = listener else {
            continue;
        };
        let port = listener.local_addr().unwrap().port();
        // The server reads until end of file and only then answers.
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            socket.read_to_end(&mut bytes).unwrap();
            socket.write_all(&bytes).unwrap();
            bytes.len()
        });
        let (mut stream, status) = open(&agent, port, 0);
        assert_eq!(status, ForwardStatus::Connected);
        let data: Vec<u8> = (0..20_000_000u32)
            .map(|at| at.to_le_bytes()[at as usize % 3])
            .collect();
        stream.write_all(&data).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut echoed = Vec::new();
        stream.read_to_end(&mut echoed).unwrap();
        assert_eq!(server.join().unwrap(), data.len());
        assert!(echoed == data);
    }
}

fn ports_without_a_listener() {
    let agent = Agent::bare();
    let spare = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = spare.local_addr().unwrap();
    drop(spare);
    let begin = Instant::now();
    assert_eq!(
        open(&agent, address.port(), 100).1,
        ForwardStatus::NoListener
    );
    assert!(
        begin.elapsed() >= Duration::from_millis(50),
        "it tried again"
    );

    let mut stream = UnixStream::connect(agent.path().join("forward")).unwrap();
    stream.write_all(b"GET / HTTP/1").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, [ForwardStatus::BadHeader as u8]);

    // A listener that appears late is found.
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        let listener = TcpListener::bind(address).unwrap();
        listener.accept().unwrap().0.write_all(b"hi").unwrap();
    });
    let (mut stream, status) = open(&agent, address.port(), 30_000);
    assert_eq!(status, ForwardStatus::Connected);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hi");
    late.join().unwrap();
}

fn hundreds_at_once() {
    let agent = Agent::bare();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut pairs = Vec::new();
    for _ in 0..300 {
        let (stream, status) = open(&agent, port, 1000);
        assert_eq!(status, ForwardStatus::Connected);
        pairs.push((stream, listener.accept().unwrap().0));
    }
    for (number, (stream, socket)) in pairs.iter_mut().enumerate() {
        let text = format!("{number:08}");
        stream.write_all(text.as_bytes()).unwrap();
        let mut seen = [0; 8];
        socket.read_exact(&mut seen).unwrap();
        assert_eq!(seen, text.as_bytes());
        socket.write_all(&seen).unwrap();
        stream.read_exact(&mut seen).unwrap();
        assert_eq!(seen, text.as_bytes());
    }
    // A server that waits after the client's half-close is reset when the client
    // disconnects.
    let (stream, mut socket) = pairs.pop().unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(socket.read(&mut [0; 8]).unwrap(), 0);
    drop(stream);
    socket
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut fds = [rustix::event::PollFd::new(
        &socket,
        rustix::event::PollFlags::empty(),
    )];
    let minute = rustix::event::Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&minute)).unwrap();
    assert!(fds[0].revents().contains(rustix::event::PollFlags::ERR));
    // When the host side closes, the guest side is closed too.
    for (stream, mut socket) in pairs {
        drop(stream);
        assert_eq!(socket.read(&mut [0; 8]).unwrap_or(0), 0);
    }
}
