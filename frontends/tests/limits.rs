//! More clients than the limits allow: they wait, and none is disconnected.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{Client, Door, KINDS, Kind, Rig};
use sm_frontends::{HandoffSender, Limit};

const LONG: Duration = Duration::from_secs(60);

/// Descriptors per connection of this kind.
fn cost(kind: Kind) -> usize {
    match kind {
        Kind::Tls => 3,
        _ => 1,
    }
}

#[test]
fn connections_beyond_the_limit_wait_until_others_end() {
    let rig = Rig::new();
    for kind in KINDS {
        let limit = Limit::new(2 * cost(kind));
        let server = rig.start(kind, &limit, Duration::from_secs(3600));
        let first = server.door.enter().unwrap();
        let second = server.door.enter().unwrap();
        let door = server.door.clone();
        let third = std::thread::spawn(move || door.enter().unwrap());
        // The client stays in the backlog, whenever the frontend looks at it.
        let held = rig.hold();
        drop(held);
        assert!(server.handle.stats().active <= 2, "{kind:?}");
        assert!(!third.is_finished(), "{kind:?}");
        first.finish();
        let third = third.join().unwrap();
        second.finish();
        third.finish();
        let connections = server.handle.connections();
        assert!(connections.wait_idle(Instant::now() + LONG), "{kind:?}");
        let stats = server.handle.stats();
        assert_eq!(
            (stats.accepted, stats.refused, stats.evicted),
            (3, 0, 0),
            "{kind:?}"
        );
    }
}

#[test]
fn frontends_share_a_limit() {
    let rig = Rig::new();
    let limit = Limit::new(3);
    let servers = [Kind::Unix, Kind::Tcp, Kind::Tls, Kind::Hybrid]
        .map(|kind| rig.start(kind, &limit, Duration::from_secs(3600)));
    for _ in 0..20 {
        let doors: Vec<Door> = servers.iter().map(|server| server.door.clone()).collect();
        let clients = doors.into_iter().map(|door| {
            std::thread::spawn(move || {
                let mut client = door.enter().unwrap();
                client.echo(b"in turn").unwrap();
                client.finish();
            })
        });
        let clients: Vec<_> = clients.collect();
        for client in clients {
            client.join().unwrap();
        }
    }
    let begun = Instant::now();
    while limit.free() < 3 {
        assert!(begun.elapsed() < LONG);
    }
    for server in servers {
        let stats = server.handle.stats();
        assert_eq!((stats.accepted, stats.refused, stats.evicted), (20, 0, 0));
    }
}

#[test]
fn a_burst_of_clients_is_served_to_the_last() {
    let rig = Rig::new();
    // The most connections that the system's backlog holds.
    let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
    let burst = most.trim().parse::<usize>().unwrap().min(600);
    for kind in [Kind::Unix, Kind::Tcp, Kind::Hybrid] {
        let server = rig.serve(kind);
        // All clients have sent their request before the event loop runs.
        let held = rig.hold();
        let clients: Vec<_> = (0..burst)
            .map(|_| {
                let mut client = server.door.knock().unwrap();
                let asked: &[u8] = if kind == Kind::Hybrid {
                    b"CONNECT 7\n"
                } else {
                    b"OK "
                };
                client.write_all(asked).unwrap();
                client
            })
            .collect();
        drop(held);
        for mut client in clients {
            let mut answer = [0; 3];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"OK ");
        }
        let stats = server.handle.stats();
        assert_eq!(
            (stats.accepted, stats.evicted),
            (burst as u64, 0),
            "{kind:?}"
        );
    }
}

#[test]
fn a_burst_of_handshakes_is_served_to_the_last() {
    const BURST: usize = 300;
    let rig = Rig::new();
    let server = rig.serve(Kind::Tls);
    let clients: Vec<_> = (0..BURST)
        .map(|_| {
            let door = server.door.clone();
            std::thread::spawn(move || door.enter().unwrap())
        })
        .collect();
    let clients: Vec<Client> = clients
        .into_iter()
        .map(|client| client.join().unwrap())
        .collect();
    let stats = server.handle.stats();
    assert_eq!((stats.active, stats.evicted, stats.refused), (BURST, 0, 0));
    drop(clients);
}

#[test]
fn silent_clients_do_not_block_others_for_long() {
    for kind in [Kind::Hybrid, Kind::Tls, Kind::Handoff] {
        let rig = Rig::new();
        let timeout = Duration::from_millis(500);
        let server = rig.start(kind, &Limit::none(), timeout);
        let silent: Vec<_> = (0..300).map(|_| server.door.knock().unwrap()).collect();
        // An admitted client may itself exceed the short time limit.
        let begun = Instant::now();
        while server.door.enter().is_err() {
            assert!(begun.elapsed() < LONG, "{kind:?}");
        }
        assert!(server.handle.stats().evicted > 0, "{kind:?}");
        drop(silent);
    }
}

#[test]
fn a_router_that_is_silent_stays_while_nobody_waits() {
    let rig = Rig::new();
    let server = rig.start(Kind::Handoff, &Limit::none(), Duration::from_millis(10));
    let mut router = HandoffSender::connect(&server.door.path).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    for _ in 0..2 {
        let (mut client, socket) = UnixStream::pair().unwrap();
        router.send(&socket, b"later").unwrap();
        drop(socket);
        let mut said = [0; 5];
        client.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"later");
        std::thread::sleep(Duration::from_millis(30));
    }
    assert_eq!(server.handle.stats().evicted, 0);
}
