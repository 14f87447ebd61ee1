//! Start, end and counters of frontends.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use common::{KINDS, Kind, Rig};
use sm_frontends::{Error, ForwardTarget, Limit, TcpFrontend};

const LONG: Duration = Duration::from_secs(60);

#[test]
fn connections_are_counted_with_their_bytes() {
    let rig = Rig::new();
    for kind in KINDS {
        let server = rig.serve(kind);
        let mut client = server.door.enter().unwrap();
        client.echo(&[7; 1000]).unwrap();
        let stats = server.handle.stats();
        assert_eq!((stats.accepted, stats.active), (1, 1), "{kind:?}");
        client.finish();
        let connections = server.handle.connections();
        assert!(connections.wait_idle(Instant::now() + LONG), "{kind:?}");
        let stats = server.handle.stats();
        assert_eq!((stats.accepted, stats.active), (1, 0), "{kind:?}");
        assert_eq!((stats.refused, stats.evicted), (0, 0), "{kind:?}");
        // Bytes of the frontend's own protocol are counted as well.
        assert!((1005..1100).contains(&stats.to_guest), "{kind:?} {stats:?}");
        assert!(
            (1005..1100).contains(&stats.from_guest),
            "{kind:?} {stats:?}"
        );
    }
}

#[test]
fn stopping_lets_connections_end_and_admits_no_others() {
    let rig = Rig::new();
    for kind in KINDS {
        let server = rig.serve(kind);
        let door = server.door.clone();
        let mut client = door.enter().unwrap();
        let connections = server.handle.connections().clone();
        let handle = server.handle;
        let stopping = std::thread::spawn(move || handle.stop(Duration::from_secs(3600)));
        let begun = Instant::now();
        while door.knock().is_ok() {
            assert!(begun.elapsed() < LONG, "{kind:?}");
        }
        client.echo(b"still here").unwrap();
        assert!(connections.active() >= 1, "{kind:?}");
        assert!(!stopping.is_finished(), "{kind:?}");
        client.finish();
        assert_eq!(stopping.join().unwrap(), 0, "{kind:?}");
        assert!(!door.path.exists(), "{kind:?}");
    }
}

#[test]
fn connections_that_do_not_end_in_time_are_cut_and_counted() {
    let rig = Rig::new();
    for kind in KINDS {
        let server = rig.serve(kind);
        let clients = [server.door.enter().unwrap(), server.door.enter().unwrap()];
        assert_eq!(server.handle.stop(Duration::from_millis(10)), 2, "{kind:?}");
        for client in clients {
            assert!(client.ends(), "{kind:?}");
        }
    }
}

#[test]
fn connections_go_on_without_their_frontend() {
    let rig = Rig::new();
    for kind in KINDS {
        let server = rig.serve(kind);
        let mut client = server.door.enter().unwrap();
        let connections = server.handle.connections().clone();
        drop(server.handle);
        assert!(server.door.knock().is_err(), "{kind:?}");
        assert!(!server.door.path.exists(), "{kind:?}");
        client.echo(&[1; 100_000]).unwrap();
        client.finish();
        assert!(connections.wait_idle(Instant::now() + LONG), "{kind:?}");
    }
}

#[test]
fn the_backlog_is_served_before_the_listener_closes() {
    let rig = Rig::new();
    for kind in [Kind::Unix, Kind::Tcp, Kind::Hybrid] {
        let server = rig.serve(kind);
        let held = rig.hold();
        let mut client = server.door.knock().unwrap();
        if kind == Kind::Hybrid {
            client.write_all(b"CONNECT 7\n").unwrap();
        }
        client.write_all(b"early").unwrap();
        let closing = std::thread::spawn(move || {
            server.handle.close();
            server.handle
        });
        drop(held);
        let handle = closing.join().unwrap();
        let mut said = Vec::new();
        while !said.ends_with(b"early") {
            let mut byte = [0; 1];
            client.read_exact(&mut byte).unwrap();
            said.extend(byte);
        }
        assert_eq!(handle.stats().accepted, 1, "{kind:?}");
    }
}

#[test]
fn a_port_is_chosen_used_once_and_released() {
    let rig = Rig::new();
    let server = rig.serve(Kind::Tcp);
    let address = server.door.tcp.unwrap();
    assert_ne!(address.port(), 0);
    let start = || {
        TcpFrontend::new(address, ForwardTarget::Vsock(1))
            .start(rig.muxer.clone(), &rig.event_loop.handle())
    };
    let error = start().unwrap_err();
    assert!(matches!(error, Error::PortInUse { .. }), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    drop(server.handle);
    TcpListener::bind(address).unwrap();
}

#[test]
fn an_address_in_use_is_named() {
    let rig = Rig::new();
    for kind in [Kind::Unix, Kind::Handoff, Kind::Hybrid] {
        let server = rig.serve(kind);
        let path = server.door.path.clone();
        drop(server.handle);
        std::fs::write(&path, "precious").unwrap();
        let error = rig
            .try_start(kind, &Limit::none(), LONG)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(error.contains("not a socket"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
        let _live = UnixListener::bind(&path).unwrap();
        let error = rig.try_start(kind, &Limit::none(), LONG).err().unwrap();
        assert!(matches!(error, Error::InUse { .. }), "{error}");
    }
}

#[test]
fn a_handle_can_be_dropped_on_the_event_loop() {
    let rig = Rig::new();
    let server = rig.serve(Kind::Tcp);
    let id = rig.id_of_a_handler();
    let (handle, door) = (server.handle, server.door);
    rig.event_loop.handle().post(id, move |_| drop(handle));
    let begun = Instant::now();
    while door.knock().is_ok() {
        assert!(begun.elapsed() < LONG);
    }
}
