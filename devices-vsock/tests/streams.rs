//! Any interleaving of both sides' actions, compared with a model: every byte arrives once
//! and in order, and every end at its position.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a failed expectation is a failed test"
)]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::Duration;

use proptest::prelude::*;
use sm_devices_vsock::testing::linux::{LinuxGuest, Profile, SocketId};
use sm_devices_vsock::{ConnectOptions, VsockConfig};

/// Next action of one side of one connection.
#[derive(Clone, Copy, Debug)]
enum Action {
    /// Opens a connection, by the host or by the guest.
    Connect {
        by_host: bool,
    },
    HostWrites(usize, u16),
    HostReads(usize, u16),
    /// Ends writing.
    HostEnds(usize),
    /// Ends writing and reading.
    HostCloses(usize),
    GuestWrites(usize, u16),
    /// Also grants credit.
    GuestReads(usize, u16),
    /// 1 ends reading, 2 ends writing, 3 both.
    GuestEnds(usize, u32),
    GuestResets(usize),
}

fn action() -> impl Strategy<Value = Action> {
    let one = 0usize..8;
    let len = prop_oneof![1u16..100, 1u16..9000, 20_000u16..u16::MAX];
    prop_oneof![
        2 => any::<bool>().prop_map(|by_host| Action::Connect { by_host }),
        6 => (one.clone(), len.clone()).prop_map(|(i, n)| Action::HostWrites(i, n)),
        4 => (one.clone(), len.clone()).prop_map(|(i, n)| Action::HostReads(i, n)),
        1 => one.clone().prop_map(Action::HostEnds),
        1 => one.clone().prop_map(Action::HostCloses),
        6 => (one.clone(), len.clone()).prop_map(|(i, n)| Action::GuestWrites(i, n)),
        4 => (one.clone(), len).prop_map(|(i, n)| Action::GuestReads(i, n)),
        1 => (one.clone(), 1u32..4).prop_map(|(i, flags)| Action::GuestEnds(i, flags)),
        1 => one.prop_map(Action::GuestResets),
    ]
}

/// One direction of one stream.
#[derive(Debug, Default)]
struct Direction {
    written: u64,
    read: u64,
    /// The writer has ended it, or the reader has.
    ended: bool,
    unwanted: bool,
}

/// Returns the byte at a position of a stream, which differs between streams.
fn byte(stream: usize, direction: u8, at: u64) -> u8 {
    (at.wrapping_mul(31) ^ (at >> 8) ^ (stream as u64 * 7) ^ (u64::from(direction) * 101)) as u8
}

fn bytes(stream: usize, direction: u8, at: u64, len: usize) -> Vec<u8> {
    (at..at + len as u64)
        .map(|at| byte(stream, direction, at))
        .collect()
}

struct Stream {
    host: Option<UnixStream>,
    guest: SocketId,
    /// The guest has closed its socket.
    forgotten: bool,
    to_guest: Direction,
    to_host: Direction,
}

struct World {
    guest: LinuxGuest,
    streams: Vec<Stream>,
    accepted: std::sync::mpsc::Receiver<UnixStream>,
    next_port: u32,
    room: Vec<u8>,
    _listening: sm_devices_vsock::Listening,
}

impl World {
    fn new(profile: Profile, window: u32) -> Self {
        let guest = LinuxGuest::new(
            VsockConfig::default()
                .window(window)
                .max_connections(64)
                .max_backlog(1 << 20)
                .answer_timeout(Duration::from_secs(600)),
            profile,
        );
        let (send, accepted) = channel();
        let listening = guest.muxer.listen(
            9,
            Box::new(move |_| {
                let (ours, theirs) = UnixStream::pair().unwrap();
                send.send(ours).unwrap();
                Some(OwnedFd::from(theirs).into())
            }),
        );
        Self {
            guest,
            streams: Vec::new(),
            accepted,
            next_port: 100,
            room: vec![0; 64 << 10],
            _listening: listening,
        }
    }

    fn connect(&mut self, by_host: bool) {
        let known: Vec<SocketId> = self.streams.iter().map(|one| one.guest).collect();
        let (host, guest) = if by_host {
            let (ours, theirs) = UnixStream::pair().unwrap();
            self.guest
                .muxer
                .connect(7, theirs.into(), ConnectOptions::default());
            let id = loop {
                self.guest.wait();
                let mut found = None;
                while let Some(id) = self.guest.next_event() {
                    let old = known.contains(&id) && !self.is_forgotten(id);
                    if !old && self.guest.is_established(id) {
                        found = Some(id);
                    }
                }
                if let Some(id) = found {
                    break id;
                }
            };
            (ours, id)
        } else {
            self.next_port += 1;
            let id = self.guest.connect(self.next_port, 9);
            while !self.guest.is_established(id) {
                self.guest.wait();
            }
            (self.accepted.recv().unwrap(), id)
        };
        host.set_nonblocking(true).unwrap();
        self.streams.push(Stream {
            host: Some(host),
            guest,
            forgotten: false,
            to_guest: Direction::default(),
            to_host: Direction::default(),
        });
    }

    fn is_forgotten(&self, id: SocketId) -> bool {
        !self
            .streams
            .iter()
            .any(|stream| stream.guest == id && !stream.forgotten)
    }

    fn run(&mut self, action: Action) {
        self.guest.poll();
        match action {
            Action::Connect { by_host } => {
                if self.streams.len() < 12 {
                    self.connect(by_host);
                }
            }
            Action::HostWrites(i, len) => self.host_writes(i, len.into()),
            Action::HostReads(i, len) => {
                self.host_reads(i, len.into());
            }
            Action::HostEnds(i) => {
                if let Some(stream) = self.streams.get_mut(i)
                    && let Some(host) = &stream.host
                {
                    let _ = host.shutdown(Shutdown::Write);
                    stream.to_guest.ended = true;
                }
            }
            Action::HostCloses(i) => {
                if let Some(stream) = self.streams.get_mut(i)
                    && stream.host.take().is_some()
                {
                    stream.to_guest.ended = true;
                    stream.to_host.unwanted = true;
                }
            }
            Action::GuestWrites(i, len) => self.guest_writes(i, len.into()),
            Action::GuestReads(i, len) => {
                self.guest_reads(i, len.into());
            }
            Action::GuestEnds(i, flags) => self.guest_ends(i, flags),
            Action::GuestResets(i) => {
                if let Some(stream) = self.streams.get_mut(i)
                    && !stream.forgotten
                {
                    stream.forgotten = true;
                    stream.to_guest.unwanted = true;
                    stream.to_host.ended = true;
                    let id = stream.guest;
                    self.guest.remove(id);
                }
            }
        }
        self.guest.kick();
    }

    fn host_writes(&mut self, i: usize, len: usize) {
        let Some(stream) = self.streams.get_mut(i) else {
            return;
        };
        let Some(host) = stream.host.as_mut().filter(|_| !stream.to_guest.ended) else {
            return;
        };
        let data = bytes(i, 0, stream.to_guest.written, len);
        match host.write(&data) {
            Ok(count) => stream.to_guest.written += count as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => {
                assert!(stream.to_guest.unwanted, "the host cannot write: {error}");
            }
        }
    }

    /// Returns true if the call may be repeated.
    fn host_reads(&mut self, i: usize, len: usize) -> bool {
        let Some(stream) = self.streams.get_mut(i) else {
            return false;
        };
        let Some(host) = &mut stream.host else {
            return false;
        };
        let room = &mut self.room[..len];
        match host.read(room) {
            Ok(0) => {
                assert!(stream.to_host.ended, "an end that nobody made");
                assert_eq!(stream.to_host.read, stream.to_host.written, "bytes lost");
                false
            }
            Ok(count) => {
                let expected = bytes(i, 1, stream.to_host.read, count);
                assert!(room[..count] == expected, "other bytes to the host");
                stream.to_host.read += count as u64;
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => true,
            Err(error) => {
                // A guest that has closed did not read all data of the host.
                assert!(stream.to_guest.unwanted, "the host cannot read: {error}");
                true
            }
        }
    }

    fn guest_writes(&mut self, i: usize, len: usize) {
        let Some(stream) = self.streams.get_mut(i) else {
            return;
        };
        if stream.forgotten || stream.to_host.ended {
            return;
        }
        let id = stream.guest;
        if self.guest.is_refused(id) {
            assert!(stream.to_host.unwanted, "the guest knows that nobody reads");
            return;
        }
        let data = bytes(i, 1, stream.to_host.written, len);
        stream.to_host.written += self.guest.write(id, &data) as u64;
    }

    /// Returns true if the call may be repeated.
    fn guest_reads(&mut self, i: usize, len: usize) -> bool {
        let Some(stream) = self.streams.get_mut(i) else {
            return false;
        };
        if stream.forgotten {
            return false;
        }
        let id = stream.guest;
        let room = &mut self.room[..len];
        let count = self.guest.read(id, room);
        if count == 0 && self.guest.is_at_end(id) {
            let over = stream.to_guest.ended || stream.to_guest.unwanted;
            assert!(over, "an end that nobody made");
            let all = stream.to_guest.read == stream.to_guest.written;
            assert!(all || stream.to_guest.unwanted, "bytes lost");
            return false;
        }
        let expected = bytes(i, 0, stream.to_guest.read, count);
        assert!(room[..count] == expected, "other bytes to the guest");
        stream.to_guest.read += count as u64;
        true
    }

    fn guest_ends(&mut self, i: usize, flags: u32) {
        let Some(stream) = self.streams.get_mut(i) else {
            return;
        };
        if stream.forgotten {
            return;
        }
        stream.to_guest.unwanted |= flags & 1 != 0;
        stream.to_host.ended |= flags & 2 != 0;
        let id = stream.guest;
        self.guest.shut_down(id, flags);
    }

    /// Ends all streams and reads them to their ends.
    fn finish(&mut self) {
        for i in 0..self.streams.len() {
            if let Some(host) = &self.streams[i].host {
                let _ = host.shutdown(Shutdown::Write);
                self.streams[i].to_guest.ended = true;
            }
            self.guest_ends(i, 2);
        }
        let mut left: VecDeque<(usize, bool)> = (0..self.streams.len())
            .flat_map(|i| [(i, false), (i, true)])
            .collect();
        let begun = std::time::Instant::now();
        while let Some((i, by_host)) = left.pop_front() {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{left:?} never end"
            );
            self.guest.poll();
            let stream = &self.streams[i];
            let again = match by_host {
                // The rest arrives or not, depending on the time of the other side's close.
                true if stream.to_guest.unwanted && stream.forgotten => {
                    self.host_reads(i, 60_000) && stream_is_open(&self.streams[i])
                }
                true => self.host_reads(i, 60_000),
                false => self.guest_reads(i, 60_000),
            };
            if again {
                left.push_back((i, by_host));
            }
            self.guest.kick();
        }
    }
}

/// Returns true if the host's end has unread data.
fn stream_is_open(stream: &Stream) -> bool {
    let mut host = stream.host.as_ref();
    host.as_mut()
        .is_some_and(|_| stream.to_host.read < stream.to_host.written)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 30, ..ProptestConfig::default() })]
    #[test]
    fn every_stream_arrives_unchanged(
        actions in prop::collection::vec(action(), 1..250),
        payload in prop::sample::select(vec![1u32, 100, 3732, 16 << 10]),
        window in prop::sample::select(vec![4096u32, 64 << 10, 256 << 10]),
    ) {
        // Buffers for the unread data of all sockets.
        let profile = Profile {
            buffers: 4096,
            window: (payload * 256).min(256 << 10),
            ..Profile::with_payload(payload)
        };
        let mut world = World::new(profile, window);
        world.connect(true);
        world.connect(false);
        for action in actions {
            world.run(action);
        }
        world.finish();
    }
}
