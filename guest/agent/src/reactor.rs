//! The agent's only blocking wait: epoll, and a heap of deadlines.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

use crate::slab::Key;

pub(crate) use rustix::event::epoll::EventFlags as Ready;

/// The part of the agent that an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Class {
    /// A listening socket, selected by the part.
    Listener,
    /// SIGCHLD and other signals.
    Signals,
    /// The kernel log.
    KernelLog,
    /// A control connection.
    Control,
    /// An exec session; the part selects the descriptor.
    Exec,
    /// A forwarded connection; the part selects the side.
    Forward,
    /// The workload: its init's channel, and its cgroup's events.
    Workload,
    /// Power-off deadlines.
    Power,
}

const CLASSES: [Class; 8] = [
    Class::Listener,
    Class::Signals,
    Class::KernelLog,
    Class::Control,
    Class::Exec,
    Class::Forward,
    Class::Workload,
    Class::Power,
];

/// Identifies the target of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) class: Class,
    /// Part of the target, with a meaning that depends on the class; below 16.
    pub(crate) part: u8,
    pub(crate) key: Key,
}

impl Token {
    /// Creates a token for a target that exists only once.
    pub(crate) fn single(class: Class, part: u8) -> Self {
        let key = Key {
            slot: 0,
            generation: 0,
        };
        Self { class, part, key }
    }

    /// Creates a token for an occupant of a slab.
    pub(crate) fn new(class: Class, part: u8, key: Key) -> Self {
        Self { class, part, key }
    }

    fn encode(self) -> u64 {
        u64::from(self.class as u8) << 60
            | u64::from(self.part & 15) << 56
            | u64::from(self.key.slot & 0x00ff_ffff) << 32
            | u64::from(self.key.generation)
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "each field is masked or shifted to its own width"
    )]
    fn decode(value: u64) -> Option<Self> {
        Some(Self {
            class: *CLASSES.get((value >> 60) as usize)?,
            part: (value >> 56) as u8 & 15,
            key: Key {
                slot: (value >> 32) as u32 & 0x00ff_ffff,
                generation: value as u32,
            },
        })
    }
}

/// An event.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// A descriptor is ready.
    Io(Token, Ready),
    /// A deadline has passed. Deadlines cannot be cancelled, so the owner checks that it
    /// is still relevant.
    Timer(Token),
}

/// A descriptor and the events that it is watched for.
///
/// A descriptor watched for no events is not registered, so that a hang-up on it cannot
/// wake the loop continuously.
#[derive(Debug)]
pub(crate) struct Watched {
    fd: OwnedFd,
    current: Ready,
    /// The kernel had no memory for the last send.
    starved: bool,
    /// Time of the latest retry that was requested for this reason.
    resumes: Option<Instant>,
}

impl Watched {
    /// Wraps a descriptor that is not watched yet.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            current: Ready::empty(),
            starved: false,
            resumes: None,
        }
    }

    /// Records whether the kernel lacks memory for sending. Such a socket remains
    /// writable, so [`Watched::set`] does not watch it, but reports it as writable after
    /// [`SHORTAGE`].
    pub(crate) fn set_starved(&mut self, starved: bool) {
        self.starved = starved;
    }

    /// Watches for the events `want` from now on.
    pub(crate) fn set(
        &mut self,
        reactor: &Reactor,
        token: Token,
        mut want: Ready,
    ) -> io::Result<()> {
        if self.starved && want.contains(Ready::OUT) {
            want -= Ready::OUT;
            let now = Instant::now();
            if self.resumes.is_none_or(|resumes| resumes <= now) {
                let resumes = now + SHORTAGE;
                self.resumes = Some(resumes);
                reactor.resume(resumes, token);
            }
        }
        if want == self.current {
            return Ok(());
        }
        let data = epoll::EventData::new_u64(token.encode());
        if want.is_empty() {
            epoll::delete(&reactor.epoll, &self.fd)?;
        } else if self.current.is_empty() {
            epoll::add(&reactor.epoll, &self.fd, data, want)?;
        } else {
            epoll::modify(&reactor.epoll, &self.fd, data, want)?;
        }
        self.current = want;
        Ok(())
    }

    /// Stops watching and closes the descriptor. Forked children share the open file
    /// until exec, so closing alone would not remove the registration.
    pub(crate) fn retire(self, reactor: &Reactor) {
        drop(self.release(reactor));
    }

    /// Stops watching and returns the descriptor.
    pub(crate) fn release(self, reactor: &Reactor) -> OwnedFd {
        if !self.current.is_empty() {
            // A failed removal leaves at worst stale events, which the token's generation
            // filters out.
            let _ = epoll::delete(&reactor.epoll, &self.fd);
        }
        self.fd
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Number of events read per system call.
const BATCH: usize = 64;

/// Delay before a socket for which the kernel had no memory is written to again: long
/// enough for the kernel to reclaim memory, short for the reader.
const SHORTAGE: Duration = Duration::from_millis(10);

/// An event loop; see the module documentation.
pub(crate) struct Reactor {
    epoll: OwnedFd,
    timers: BinaryHeap<Reverse<(Instant, u64)>>,
    /// Sockets to be reported as writable, by time; at most one entry for each.
    resuming: RefCell<BinaryHeap<Reverse<(Instant, u64)>>>,
    batch: Vec<epoll::Event>,
}

impl Reactor {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            timers: BinaryHeap::new(),
            resuming: RefCell::default(),
            batch: Vec::with_capacity(BATCH),
        })
    }

    /// Delivers [`Event::Timer`] with `token` once `at` has passed.
    pub(crate) fn timer(&mut self, at: Instant, token: Token) {
        self.timers.push(Reverse((at, token.encode())));
    }

    /// Reports `token` as writable once `at` has passed.
    fn resume(&self, at: Instant, token: Token) {
        self.resuming
            .borrow_mut()
            .push(Reverse((at, token.encode())));
    }

    /// Waits for events and fills `events` with them.
    pub(crate) fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        events.clear();
        let resuming = self.resuming.get_mut();
        let next = [self.timers.peek(), resuming.peek()];
        let next = next.into_iter().flatten().map(|Reverse((at, _))| *at).min();
        let timeout = match next {
            None => None,
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now());
                Some(Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?)
            }
        };
        self.batch.clear();
        let spare = rustix::buffer::spare_capacity(&mut self.batch);
        match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &self.batch {
            let (data, flags) = (event.data, event.flags);
            if let Some(token) = Token::decode(data.u64()) {
                events.push(Event::Io(token, flags));
            }
        }
        if next.is_none() {
            return Ok(());
        }
        let now = Instant::now();
        while let Some(token) = due(resuming, now) {
            events.extend(Token::decode(token).map(|token| Event::Io(token, Ready::OUT)));
        }
        while let Some(token) = due(&mut self.timers, now) {
            events.extend(Token::decode(token).map(Event::Timer));
        }
        Ok(())
    }
}

/// Removes and returns the first entry of `times` if its time has passed.
fn due(times: &mut BinaryHeap<Reverse<(Instant, u64)>>, now: Instant) -> Option<u64> {
    let Reverse((at, token)) = times.peek().copied()?;
    (at <= now).then(|| {
        times.pop();
        token
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn tokens_survive_the_kernel() {
        let key = Key {
            slot: 0x00ab_cdef,
            generation: u32::MAX,
        };
        for class in CLASSES {
            let token = Token::new(class, 15, key);
            assert_eq!(Token::decode(token.encode()), Some(token));
        }
    }

    #[test]
    fn readiness_and_deadlines_arrive_in_order() {
        let mut reactor = Reactor::new().unwrap();
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut watched = Watched::new(ours.into());
        let token = Token::single(Class::Control, 3);
        watched.set(&reactor, token, Ready::IN).unwrap();
        let now = Instant::now();
        let timer = |part| Token::single(Class::Power, part);
        reactor.timer(now + Duration::from_millis(20), timer(2));
        reactor.timer(now + Duration::from_millis(10), timer(1));

        theirs.write_all(b"x").unwrap();
        let mut events = Vec::new();
        reactor.wait(&mut events).unwrap();
        assert!(matches!(events[0], Event::Io(t, r) if t == token && r.contains(Ready::IN)));

        watched.set(&reactor, token, Ready::empty()).unwrap();
        drop(theirs);
        let mut fired = Vec::new();
        while fired.len() < 2 {
            reactor.wait(&mut events).unwrap();
            for event in &events {
                match event {
                    Event::Timer(token) => fired.push(token.part),
                    Event::Io(..) => panic!("a descriptor watched for nothing woke the loop"),
                }
            }
        }
        assert_eq!(fired, [1, 2]);
    }

    #[test]
    fn a_socket_without_memory_is_written_to_again_after_a_moment() {
        let mut reactor = Reactor::new().unwrap();
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut watched = Watched::new(ours.into());
        let token = Token::single(Class::Control, 3);
        let want = Ready::IN | Ready::OUT;
        let started = Instant::now();
        for _ in 0..1000 {
            watched.set_starved(true);
            watched.set(&reactor, token, want).unwrap();
        }

        // The socket is writable, and only arriving data wakes the loop before its time.
        theirs.write_all(b"x").unwrap();
        let mut events = Vec::new();
        reactor.wait(&mut events).unwrap();
        let first = |events: &[Event]| match events {
            [Event::Io(t, ready), ..] if *t == token => *ready,
            _ => panic!("{} other events", events.len()),
        };
        if started.elapsed() < SHORTAGE {
            assert_eq!(first(&events), Ready::IN);
        }
        watched.set(&reactor, token, Ready::OUT).unwrap();
        let mut resumed = 0;
        while resumed == 0 {
            reactor.wait(&mut events).unwrap();
            resumed += events.len();
        }
        assert!(started.elapsed() >= SHORTAGE);
        assert_eq!((first(&events), resumed), (Ready::OUT, 1));

        watched.set_starved(false);
        watched.set(&reactor, token, want).unwrap();
        reactor.wait(&mut events).unwrap();
        assert!(first(&events).contains(want));
    }
}
