//! Many connections at once, and one that makes no progress.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed expectation is a failed test"
)]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sm_devices_vsock::testing::linux::{LinuxGuest, Profile, SocketId};
use sm_devices_vsock::{ConnectOptions, VsockConfig};

fn guest() -> LinuxGuest {
    LinuxGuest::new(
        VsockConfig::default().answer_timeout(Duration::from_secs(600)),
        Profile {
            // For all data of a round in flight.
            buffers: 65_536,
            ..Profile::LINUX
        },
    )
}

fn byte(stream: usize, at: usize) -> u8 {
    (at.wrapping_mul(31) ^ (at >> 8) ^ stream.wrapping_mul(7)) as u8
}

/// Bytes of a connection, which the guest sends back.
struct Stream {
    host: UnixStream,
    sent: usize,
    got: usize,
}

/// An application in the guest that sends received data back.
#[derive(Default)]
struct Echo {
    pending: Vec<VecDeque<u8>>,
    room: Vec<u8>,
}

impl Echo {
    fn serve(&mut self, guest: &mut LinuxGuest) {
        self.room.resize(64 << 10, 0);
        while let Some(id) = guest.next_event() {
            if self.pending.len() <= id.index() {
                self.pending.resize_with(id.index() + 1, VecDeque::new);
            }
            self.socket(guest, id);
        }
        guest.kick();
    }

    fn socket(&mut self, guest: &mut LinuxGuest, id: SocketId) {
        let pending = &mut self.pending[id.index()];
        loop {
            let sent = guest.write(id, pending.make_contiguous());
            pending.drain(..sent);
            if !pending.is_empty() {
                return guest.retry(id);
            }
            let count = guest.read(id, &mut self.room);
            if count == 0 {
                return;
            }
            pending.extend(&self.room[..count]);
        }
    }
}

/// Moves data on one stream towards `until` bytes; returns true if that is reached.
fn advance(index: usize, stream: &mut Stream, until: usize, room: &mut [u8]) -> bool {
    while stream.sent < until {
        let now = (until - stream.sent).min(16 << 10);
        let data: Vec<u8> = (stream.sent..stream.sent + now)
            .map(|at| byte(index, at))
            .collect();
        match stream.host.write(&data) {
            Ok(count) => stream.sent += count,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    while stream.got < stream.sent {
        match stream.host.read(room) {
            Ok(count) => {
                assert!(count > 0, "stream {index} ended at {}", stream.got);
                let fits = room[..count]
                    .iter()
                    .zip(stream.got..)
                    .all(|(&seen, at)| seen == byte(index, at));
                assert!(fits, "stream {index} has other bytes after {}", stream.got);
                stream.got += count;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    stream.got == until
}

/// Raises the limit of descriptors to `wanted`, or as far as possible; returns the limit.
fn descriptors(wanted: u64) -> usize {
    let most = getrlimit(Resource::Nofile).maximum;
    let set = |current, maximum| {
        let current = Some(current);
        setrlimit(Resource::Nofile, Rlimit { current, maximum }).is_ok()
    };
    // Only root may exceed the hard limit, and not on every system.
    let reached = match most {
        Some(most) if most < wanted && !set(wanted, Some(wanted)) => most,
        _ => wanted,
    };
    assert!(set(reached, most.map(|most| most.max(reached))));
    usize::try_from(reached).unwrap()
}

/// Echoes `each` bytes on each of `count` connections, `round` bytes at a time on all.
fn echo(count: usize, each: usize, round: usize) {
    let count = count.min(descriptors(2 * count as u64 + 100) / 2 - 50);
    println!("{count} connections");
    let mut guest = guest();
    let mut streams = Vec::with_capacity(count);
    for _ in 0..count {
        let (host, theirs) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        guest
            .muxer
            .connect(7, theirs.into(), ConnectOptions::default());
        streams.push(Stream {
            host,
            sent: 0,
            got: 0,
        });
    }
    let mut echo = Echo::default();
    while guest.muxer.stats().opened < count as u64 {
        guest.poll();
        std::thread::yield_now();
    }
    let mut room = vec![0; 64 << 10];
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    for (index, stream) in (0..).zip(&streams) {
        let data = epoll::EventData::new_u64(index);
        epoll::add(&epoll, &stream.host, data, epoll::EventFlags::IN).unwrap();
    }
    let mut events = Vec::with_capacity(1024);
    for until in (round..=each).step_by(round) {
        let mut writing: Vec<usize> = (0..count).collect();
        let mut left = count;
        while left > 0 {
            writing.retain(|&index| {
                let stream = &mut streams[index];
                left -= usize::from(advance(index, stream, until, &mut room));
                stream.sent < until
            });
            events.clear();
            let spare = rustix::buffer::spare_capacity(&mut events);
            epoll::wait(&epoll, spare, Some(&Timespec::default())).unwrap();
            for event in &events {
                let index = usize::try_from(event.data.u64()).unwrap();
                if streams[index].got < until {
                    let there = advance(index, &mut streams[index], until, &mut room);
                    left -= usize::from(there);
                }
            }
            guest.poll();
            echo.serve(&mut guest);
        }
    }
    let stats = guest.muxer.stats();
    let total = (count * each) as u64;
    assert_eq!(stats.connections, count as u64, "all at the same time");
    assert_eq!((stats.to_guest, stats.from_guest), (total, total));
    assert_eq!((stats.discarded, stats.malformed), (0, 0));
}

/// Two descriptors for each connection: with a lower hard limit, as many connections as
/// possible, which the test prints. 8 KiB on each; 1 MiB with `cargo test --release -p
/// sm-devices-vsock --test many -- --ignored --nocapture`.
#[test]
fn ten_thousand_connections_echo() {
    echo(10_000, 8 << 10, 4 << 10);
}

#[test]
#[ignore = "10 GiB each way take minutes"]
fn ten_thousand_connections_echo_a_mebibyte_each() {
    echo(10_000, 1 << 20, 16 << 10);
}

/// While two readers, one on each side, do not read and their windows are full, the others
/// make progress: the test checks the bytes that they move, not the time, for at least ten
/// seconds.
#[test]
fn a_reader_that_stops_does_not_slow_others_down() {
    let mut guest = guest();
    let mut echo = Echo::default();
    let mut streams = Vec::new();
    let mut ids = Vec::new();
    for _ in 0..9 {
        let (host, theirs) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        guest
            .muxer
            .connect(7, theirs.into(), ConnectOptions::default());
        let id = loop {
            guest.wait();
            if let Some(id) = guest.next_event() {
                break id;
            }
        };
        ids.push(id);
        streams.push(Stream {
            host,
            sent: 0,
            got: 0,
        });
    }
    // The host's end of the first is not read until the guest has no credit, and the
    // guest's end of the second is not read until the host cannot write.
    let (stopped, mut others) = {
        let others = streams.split_off(2);
        (streams, others)
    };
    let mut unread = 0;
    loop {
        let data: Vec<u8> = (unread..unread + 4096).map(|at| byte(100, at)).collect();
        match guest.write(ids[0], &data) {
            0 if guest.credit(ids[0]) == 0 && settled(&mut guest, ids[0]) => break,
            0 => guest.kick(),
            count => unread += count,
        }
        guest.poll();
    }
    let mut filled = 0;
    while let Ok(count) = (&stopped[1].host).write(&[9; 4096]) {
        filled += count;
    }
    let begun = std::time::Instant::now();
    let mut rounds = 0;
    let mut room = vec![0; 64 << 10];
    while begun.elapsed() < Duration::from_secs(10) || rounds < 50 {
        rounds += 1;
        let until = rounds * (32 << 10);
        let mut left: Vec<usize> = (0..others.len()).collect();
        while !left.is_empty() {
            left.retain(|&index| !advance(index, &mut others[index], until, &mut room));
            guest.poll();
            while let Some(id) = guest.next_event() {
                if id != ids[0] && id != ids[1] {
                    if echo.pending.len() <= id.index() {
                        echo.pending.resize_with(id.index() + 1, VecDeque::new);
                    }
                    echo.room.resize(64 << 10, 0);
                    echo.socket(&mut guest, id);
                }
            }
            guest.kick();
        }
    }
    // The data of the stopped streams are complete.
    let mut got = 0;
    while got < unread {
        guest.poll();
        match (&stopped[0].host).read(&mut room) {
            Ok(count) => {
                let fits = room[..count]
                    .iter()
                    .zip(got..)
                    .all(|(&seen, at)| seen == byte(100, at));
                assert!(fits && count > 0, "after {got}");
                got += count;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    let mut arrived = 0;
    while arrived < filled {
        guest.poll();
        arrived += guest.read(ids[1], &mut room);
        guest.kick();
    }
    assert_eq!(arrived, filled);
}

/// Returns true if the device has done all it can and grants no more credit.
fn settled(guest: &mut LinuxGuest, id: SocketId) -> bool {
    guest.kick();
    for _ in 0..2 {
        guest.driver.transport.quiesce().unwrap();
        guest.driver.transport.unquiesce();
    }
    guest.poll();
    guest.credit(id) == 0
}
