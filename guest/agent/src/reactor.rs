//! The agent's only blocking wait: the event loop of the host without its thread.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use sm_event_loop::{Key, Ready, Registration, Timer};

pub(crate) use sm_event_loop::{Interest, Readiness};

/// The part of the agent that an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// A container: its init's channel and the deadline of its root.
    Container,
    /// All containers: the events of their cgroup, and deadlines.
    Containers,
    /// Power-off deadlines.
    Power,
}

/// Identifies the target of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) class: Class,
    /// Part of the target, with a meaning that depends on the class.
    pub(crate) part: u8,
    pub(crate) key: Key,
}

impl Token {
    /// Creates a token for a target that exists only once.
    pub(crate) fn single(class: Class, part: u8) -> Self {
        Self::new(class, part, Key::new(0, 0))
    }

    /// Creates a token for an occupant of a slab.
    pub(crate) fn new(class: Class, part: u8, key: Key) -> Self {
        Self { class, part, key }
    }
}

/// An event.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// A descriptor is ready.
    Io(Token, Readiness),
    /// A deadline has passed.
    Timer(Token),
}

/// The purpose of a registration or a timer.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// The descriptor of a token. A timer reports that the descriptor is writable.
    Io(Token),
    /// A deadline.
    Deadline(Token),
}

/// Number of events read per system call.
const BATCH: usize = 64;

/// Delay before a socket for which the kernel had no memory is written to again: long
/// enough for the kernel to reclaim memory, short for the reader.
const SHORTAGE: Duration = Duration::from_millis(10);

type Shared = Rc<RefCell<sm_event_loop::Reactor<Target>>>;

/// An event loop; see the module documentation.
#[derive(Debug)]
pub(crate) struct Reactor {
    /// Shared with each [`Watched`] that is registered and each [`Deadline`].
    shared: Shared,
    batch: Vec<Ready>,
    /// Number of events of the batch that have been taken.
    taken: usize,
    /// The end of the last wait.
    now: Instant,
}

impl Reactor {
    pub(crate) fn new() -> io::Result<Self> {
        let shared = sm_event_loop::Reactor::new(BATCH)?;
        Ok(Self {
            shared: Rc::new(RefCell::new(shared)),
            batch: Vec::with_capacity(BATCH),
            taken: 0,
            now: Instant::now(),
        })
    }

    /// Delivers [`Event::Timer`] with `token` once `at` has passed, unless the deadline is
    /// dropped before.
    pub(crate) fn deadline(&self, at: Instant, token: Token) -> Deadline {
        self.timer(at, Target::Deadline(token))
    }

    fn timer(&self, at: Instant, target: Target) -> Deadline {
        Deadline {
            timer: self.shared.borrow_mut().set_timer(at, target),
            shared: Rc::clone(&self.shared),
        }
    }

    /// Waits for events. [`Reactor::take_event`] returns them.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        self.batch.clear();
        self.taken = 0;
        let waited = self.shared.borrow_mut().wait(None, &mut self.batch);
        self.now = Instant::now();
        waited
    }

    /// Returns the next event since the last wait. Events of descriptors and deadlines
    /// that have been dropped in the meantime are skipped.
    pub(crate) fn take_event(&mut self) -> Option<Event> {
        let mut shared = self.shared.borrow_mut();
        while let Some(ready) = self.batch.get(self.taken) {
            self.taken += 1;
            if let Some(&Target::Io(token)) = shared.target(ready) {
                return Some(Event::Io(token, ready.readiness));
            }
        }
        // A deadline that an event sets is later than this time, so the loop ends.
        Some(match shared.pop_timer(self.now)? {
            Target::Io(token) => Event::Io(token, Readiness::WRITABLE),
            Target::Deadline(token) => Event::Timer(token),
        })
    }
}

/// A deadline, which is cancelled when this is dropped.
#[derive(Debug)]
#[must_use = "dropping it cancels the deadline"]
pub(crate) struct Deadline {
    timer: Timer,
    shared: Shared,
}

impl Deadline {
    /// Returns true until the deadline has been delivered.
    fn is_pending(&self) -> bool {
        self.shared.borrow().has_timer(self.timer)
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        self.shared.borrow_mut().cancel_timer(self.timer);
    }
}

/// A descriptor and the events that it is watched for.
///
/// A descriptor watched for no events is not registered, so that a hang-up on it cannot
/// wake the loop continuously.
///
/// Dropping it removes the registration and then closes the descriptor. Forked children
/// share the open file until exec, so closing alone would not remove the registration.
/// A child shares the epoll instance as well: it must not drop any of these, and ends by
/// exec or `_exit`.
#[derive(Debug)]
pub(crate) struct Watched {
    /// Dropped before the descriptor, because fields are dropped in this order.
    watch: Watch,
    fd: OwnedFd,
}

#[derive(Debug)]
struct Watch {
    registration: Option<(Shared, Registration)>,
    current: Interest,
    /// The kernel had no memory for the last send.
    starved: bool,
    /// The retry for this reason.
    retry: Option<Deadline>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some((shared, registration)) = self.registration.take() {
            // Removing fails only for a descriptor that was closed before.
            let _ = shared.borrow_mut().remove(registration);
        }
    }
}

impl Watched {
    /// Wraps a descriptor that is not watched yet.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self {
            watch: Watch {
                registration: None,
                current: Interest::NONE,
                starved: false,
                retry: None,
            },
            fd,
        }
    }

    /// Records whether the kernel lacks memory for sending. Such a socket remains
    /// writable, so [`Watched::set`] does not watch it, but reports it as writable after
    /// [`SHORTAGE`].
    pub(crate) fn set_starved(&mut self, starved: bool) {
        self.watch.starved = starved;
    }

    /// Watches for the events `want` from now on.
    pub(crate) fn set(
        &mut self,
        reactor: &Reactor,
        token: Token,
        mut want: Interest,
    ) -> io::Result<()> {
        let watch = &mut self.watch;
        if watch.starved && want.writable {
            want.writable = false;
            // One that is due is kept until it is taken: other events of the batch come
            // first, and their handlers may set the interest again.
            if !watch.retry.as_ref().is_some_and(Deadline::is_pending) {
                let at = Instant::now() + SHORTAGE;
                watch.retry = Some(reactor.timer(at, Target::Io(token)));
            }
        } else {
            watch.retry = None;
        }
        if want == watch.current {
            return Ok(());
        }
        #[cfg(test)]
        refusal::check(want)?;
        let mut shared = reactor.shared.borrow_mut();
        let fd = self.fd.as_fd();
        match watch.registration.take() {
            Some((_, registration)) if want == Interest::NONE => {
                watch.current = want;
                shared.remove(registration)?;
            }
            Some(both) => {
                let modified = shared.modify(both.1, fd, want);
                watch.registration = Some(both);
                modified?;
            }
            None => {
                let registration = shared.add(fd, want, Target::Io(token))?;
                watch.registration = Some((Rc::clone(&reactor.shared), registration));
            }
        }
        watch.current = want;
        Ok(())
    }

    /// Stops watching and returns the descriptor.
    pub(crate) fn release(self) -> OwnedFd {
        let Self { watch, fd } = self;
        drop(watch);
        fd
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Injection of ENOMEM into registrations of the current thread.
#[cfg(test)]
pub(crate) mod refusal {
    use std::cell::Cell;
    use std::io;

    use super::Interest;

    thread_local! {
        static FAILING: Cell<u32> = const { Cell::new(0) };
    }

    /// Refuses the next `count` changes of an interest of this thread.
    pub(crate) fn begin(count: u32) {
        FAILING.set(count);
    }

    pub(super) fn check(want: Interest) -> io::Result<()> {
        let left = FAILING.get();
        if left == 0 || want == Interest::NONE {
            return Ok(());
        }
        FAILING.set(left - 1);
        Err(rustix::io::Errno::NOMEM.into())
    }
}

#[cfg(test)]
impl Reactor {
    /// Waits once and returns the events.
    pub(crate) fn events(&mut self) -> Vec<Event> {
        self.wait().unwrap();
        std::iter::from_fn(|| self.take_event()).collect()
    }

    /// Returns the number of registered descriptors and of timers.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let shared = self.shared.borrow();
        (shared.descriptors(), shared.timers())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    #[test]
    fn readiness_and_deadlines_arrive_in_order() {
        let mut reactor = Reactor::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut watched = Watched::new(ours.into());
        let token = Token::single(Class::Control, 3);
        watched.set(&reactor, token, Interest::READ).unwrap();
        let now = Instant::now();
        let timer = |part| Token::single(Class::Power, part);
        let _second = reactor.deadline(now + Duration::from_millis(20), timer(2));
        let _first = reactor.deadline(now + Duration::from_millis(10), timer(1));

        theirs.write_all(b"x").unwrap();
        let events = reactor.events();
        assert!(matches!(events[0], Event::Io(t, r) if t == token && r.readable));

        watched.set(&reactor, token, Interest::NONE).unwrap();
        drop(theirs);
        let mut fired = Vec::new();
        while fired.len() < 2 {
            for event in reactor.events() {
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
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut watched = Watched::new(ours.into());
        let token = Token::single(Class::Control, 3);
        let want = Interest::READ.and(Interest::WRITE);
        let started = Instant::now();
        for _ in 0..1000 {
            watched.set_starved(true);
            watched.set(&reactor, token, want).unwrap();
        }
        assert_eq!(reactor.counts().1, 1);

        // The socket is writable, and only arriving data wakes the loop before its time.
        theirs.write_all(b"x").unwrap();
        let first = |events: &[Event]| match events {
            [Event::Io(t, ready), ..] if *t == token => *ready,
            _ => panic!("{} other events", events.len()),
        };
        let events = reactor.events();
        if started.elapsed() < SHORTAGE {
            let ready = first(&events);
            assert!(ready.readable && !ready.writable);
        }
        watched.set(&reactor, token, Interest::WRITE).unwrap();
        let mut resumed = events;
        let mut count = 0;
        while count == 0 {
            resumed = reactor.events();
            count = resumed.len();
        }
        assert!(started.elapsed() >= SHORTAGE);
        assert_eq!((first(&resumed), count), (Readiness::WRITABLE, 1));

        watched.set_starved(false);
        watched.set(&reactor, token, want).unwrap();
        let ready = first(&reactor.events());
        assert!(ready.readable && ready.writable);
    }

    #[test]
    fn a_due_retry_is_delivered_although_other_events_come_first() {
        let mut reactor = Reactor::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut watched = Watched::new(ours.into());
        let token = Token::single(Class::Control, 3);
        let want = Interest::READ.and(Interest::WRITE);
        watched.set_starved(true);
        watched.set(&reactor, token, want).unwrap();
        theirs.write_all(b"x").unwrap();
        // Afterwards the retry is due, and the socket still readable.
        std::thread::sleep(SHORTAGE);
        reactor.wait().unwrap();
        let first = reactor.take_event();
        assert!(matches!(first, Some(Event::Io(_, ready)) if ready.readable));
        // Its handler sets the interest again before the retry is taken.
        watched.set(&reactor, token, want).unwrap();
        let second = reactor.take_event();
        assert!(matches!(second, Some(Event::Io(t, Readiness::WRITABLE)) if t == token));
        // Once delivered, there is another one while the kernel still lacks memory.
        assert_eq!(reactor.counts().1, 0);
        watched.set(&reactor, token, want).unwrap();
        assert_eq!(reactor.counts().1, 1);
    }

    #[test]
    fn a_socket_that_is_not_written_to_any_more_is_not_retried() {
        let reactor = Reactor::new().unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut watched = Watched::new(ours.into());
        let token = Token::single(Class::Control, 3);
        for end in [Interest::NONE, Interest::READ] {
            watched.set_starved(true);
            watched.set(&reactor, token, Interest::WRITE).unwrap();
            assert_eq!(reactor.counts(), (0, 1));
            watched.set(&reactor, token, end).unwrap();
            assert_eq!(reactor.counts().1, 0);
            watched.set(&reactor, token, Interest::NONE).unwrap();
        }
        watched.set(&reactor, token, Interest::WRITE).unwrap();
        watched.set_starved(false);
        watched.set(&reactor, token, Interest::WRITE).unwrap();
        assert_eq!(reactor.counts(), (1, 0));
        drop(watched);
        assert_eq!(reactor.counts(), (0, 0));
    }

    #[test]
    fn an_event_of_a_dropped_descriptor_is_not_delivered() {
        let mut reactor = Reactor::new().unwrap();
        let token = |part| Token::single(Class::Control, part);
        let watch = |reactor: &Reactor, part| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(b"x").unwrap();
            let mut watched = Watched::new(ours.into());
            watched.set(reactor, token(part), Interest::READ).unwrap();
            (watched, theirs)
        };
        let mut both = vec![watch(&reactor, 0), watch(&reactor, 1)];
        reactor.wait().unwrap();
        let Some(Event::Io(first, _)) = reactor.take_event() else {
            panic!("two sockets are readable");
        };
        // The event of the other one has been fetched. A new socket takes its slot, and
        // usually its number.
        drop(both.remove(usize::from(1 - first.part)));
        both.push(watch(&reactor, 2));
        assert!(reactor.take_event().is_none());
        let mut parts: Vec<_> = reactor
            .events()
            .iter()
            .map(|event| match event {
                Event::Io(token, _) => token.part,
                Event::Timer(_) => panic!("there is no deadline"),
            })
            .collect();
        parts.sort_unstable();
        assert_eq!(parts, [first.part, 2]);
        both.clear();
        assert_eq!(reactor.counts(), (0, 0));
    }

    #[test]
    fn a_cancelled_deadline_leaves_nothing_behind() {
        let mut reactor = Reactor::new().unwrap();
        let token = |part| Token::single(Class::Exec, part);
        let day = Instant::now() + Duration::from_secs(86_400);
        for _ in 0..10_000 {
            drop(reactor.deadline(day, token(1)));
        }
        assert_eq!(reactor.counts(), (0, 0));
        // Neither when it has passed with another one.
        let now = Instant::now();
        let mut both = vec![
            reactor.deadline(now, token(1)),
            reactor.deadline(now, token(2)),
        ];
        reactor.wait().unwrap();
        assert!(matches!(reactor.take_event(), Some(Event::Timer(it)) if it.part == 1));
        both.pop();
        assert!(reactor.take_event().is_none());
    }

    #[test]
    fn a_released_descriptor_is_not_registered() {
        let mut reactor = Reactor::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let token = Token::single(Class::Control, 1);
        let mut watched = Watched::new(ours.into());
        watched.set(&reactor, token, Interest::READ).unwrap();
        let fd = watched.release();
        assert_eq!(reactor.counts(), (0, 0));
        theirs.write_all(b"x").unwrap();
        // It can be registered again under its number.
        let mut watched = Watched::new(fd);
        watched.set(&reactor, token, Interest::READ).unwrap();
        assert_eq!(reactor.events().len(), 1);
    }
}
