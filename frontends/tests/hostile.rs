//! A client that violates a protocol loses its own connection only.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{KINDS, Kind, Rig};
use rustix::process::{Uid, geteuid};
use rustix::thread::set_thread_res_uid;
use sm_frontends::{HandoffSender, Limit, MAX_PAYLOAD};

const LONG: Duration = Duration::from_secs(60);

#[test]
fn slow_clients_are_disconnected_and_counted() {
    let rig = Rig::new();
    // Each client sends a part of its first message, and then nothing.
    for (kind, beginning) in [
        (Kind::Tls, &b""[..]),
        (Kind::Tls, &[22, 3, 1, 2, 0, 1]),
        (Kind::Hybrid, b""),
        (Kind::Hybrid, b"CONNECT 7"),
        (Kind::Handoff, b"\0\0"),
        (Kind::Handoff, b"\0\0\0\x09half"),
    ] {
        let timeout = Duration::from_millis(100);
        let server = rig.start(kind, &Limit::none(), timeout);
        let mut slow = server.door.knock().unwrap();
        slow.write_all(beginning).unwrap();
        let begun = Instant::now();
        // The client reads the end of the stream, or a reset because unread bytes were
        // dropped.
        assert!(matches!(slow.read(&mut [0; 1]), Ok(0) | Err(_)), "{kind:?}");
        assert!(begun.elapsed() >= timeout / 2, "{kind:?}");
        assert_eq!(server.handle.stats().evicted, 1, "{kind:?} {beginning:?}");
        let connections = server.handle.connections();
        assert!(connections.wait_idle(Instant::now() + LONG), "{kind:?}");
    }
}

#[test]
fn slowly_sent_bytes_do_not_extend_the_time_limit() {
    let rig = Rig::new();
    for (kind, dribble) in [
        (Kind::Tls, &[22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..]),
        (Kind::Hybrid, b"                               "),
        (Kind::Handoff, b"\0\0\x0f\x0fand on and on and on and on"),
    ] {
        let server = rig.start(kind, &Limit::none(), Duration::from_millis(300));
        let mut slow = server.door.knock().unwrap();
        let said = dribble.iter().cycle().take(1000).take_while(|byte| {
            std::thread::sleep(Duration::from_millis(20));
            let stats = server.handle.stats();
            stats.evicted + stats.refused == 0 && slow.write_all(&[**byte]).is_ok()
        });
        assert!(said.count() < 1000, "{kind:?}");
        assert!(matches!(slow.read(&mut [0; 1]), Ok(0) | Err(_)), "{kind:?}");
    }
}

#[test]
fn a_storm_of_resets_passes() {
    let rig = Rig::new();
    for kind in KINDS {
        let server = rig.serve(kind);
        let mut neighbour = server.door.enter().unwrap();
        for round in 0..300 {
            let mut client = server.door.knock().unwrap();
            // Every second client sends some bytes first.
            if round % 2 == 0 {
                let _ = client.write_all(b"CONNECT 7\nand something that is never read");
            }
            client.reset();
        }
        neighbour.echo(&[3; 10_000]).unwrap();
        server.door.enter().unwrap().finish();
        neighbour.finish();
        let connections = server.handle.connections();
        assert!(connections.wait_idle(Instant::now() + LONG), "{kind:?}");
    }
}

#[test]
fn garbage_is_refused_and_neighbours_go_on() {
    let rig = Rig::new();
    for (kind, garbage) in [
        (Kind::Tls, &b"GET / HTTP/1.1\r\n\r\n"[..]),
        (Kind::Tls, &[0; 64]),
        (Kind::Tls, &[22, 3, 1, 0xff, 0xff, 1]),
        (Kind::Hybrid, b"GET / HTTP/1.1\r\n\r\n"),
        (Kind::Hybrid, &[0xff; 64]),
        (Kind::Handoff, &[0; 4]),
        (Kind::Handoff, &[0xff; 64]),
        (Kind::Handoff, &[0, 0x10, 0, 1]),
    ] {
        let server = rig.serve(kind);
        let mut neighbour = server.door.enter().unwrap();
        for _ in 0..20 {
            let mut client = server.door.knock().unwrap();
            client.write_all(garbage).unwrap();
            let mut said = Vec::new();
            // The stream ends or is reset, perhaps after an alert.
            let _ = client.read_to_end(&mut said);
            assert!(said.len() < 20, "{kind:?} {said:?}");
        }
        neighbour.echo(b"still there").unwrap();
        // The client may read the end just before the frontend counts it.
        let counted = || {
            let stats = server.handle.stats();
            (stats.refused, stats.accepted)
        };
        let deadline = Instant::now() + LONG;
        while counted() != (20, 1) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(counted(), (20, 1), "{kind:?} {garbage:?}");
    }
}

/// Runs `work` on a thread of another user. Returns `None` if this process is not root.
fn as_nobody<R: Send>(work: impl FnOnce() -> R + Send) -> Option<R> {
    let nobody = Uid::from_raw(65_534);
    if !geteuid().is_root() {
        return None;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            // The call changes the credentials of this thread only.
            set_thread_res_uid(nobody, nobody, nobody).unwrap();
            work()
        });
        Some(thread.join().unwrap())
    })
}

#[test]
fn other_users_are_refused_even_where_they_can_connect() {
    let rig = Rig::new();
    for kind in [Kind::Unix, Kind::Handoff, Kind::Hybrid] {
        let server = rig.serve(kind);
        let path = &server.door.path;
        let door = &server.door;
        let kept_out = as_nobody(|| door.knock().is_err());
        assert!(kept_out.unwrap_or(true), "{kind:?}");
        // The permissions are too wide by mistake.
        for (path, mode) in [(path.parent().unwrap(), 0o777), (path, 0o666)] {
            std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        }
        let hung_up_on = as_nobody(|| {
            let mut client = door.knock().unwrap();
            matches!(client.read(&mut [0; 1]), Ok(0) | Err(_))
        });
        let Some(hung_up_on) = hung_up_on else {
            eprintln!("not root: other users were not tried");
            return;
        };
        assert!(hung_up_on, "{kind:?}");
        assert_eq!(server.handle.stats().refused, 1, "{kind:?}");
        server.door.enter().unwrap().finish();
    }
}

#[test]
fn a_payload_of_a_mebibyte_arrives_whole() {
    let rig = Rig::new();
    let server = rig.serve(Kind::Handoff);
    let mut router = HandoffSender::connect(&server.door.path).unwrap();
    let payload: Vec<u8> = (0..251_u8).cycle().take(MAX_PAYLOAD).collect();
    let (mut client, socket) = UnixStream::pair().unwrap();
    client.write_all(b"and more").unwrap();
    router.send(&socket, &payload).unwrap();
    drop(socket);
    let mut received = vec![0; MAX_PAYLOAD + 8];
    client.read_exact(&mut received).unwrap();
    assert!(received[..MAX_PAYLOAD] == payload[..]);
    assert_eq!(&received[MAX_PAYLOAD..], b"and more");
    let too_long = router.send(&client, &vec![0; MAX_PAYLOAD + 1]);
    assert!(too_long.is_err() && !router.is_broken());
}
