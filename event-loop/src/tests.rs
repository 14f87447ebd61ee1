//! The behaviour that every loop has: handlers, their descriptors, timers, and removal.
//! Tests that concern threads are in `thread/tests.rs`.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::testing::ManualLoop;

/// A loop under test.
trait Loop {
    fn new() -> Self;
    fn add(&mut self, handler: Arc<Mutex<dyn EventHandler>>) -> io::Result<HandlerId>;
    fn remove(&mut self, id: HandlerId);
    /// Runs `task` with a handler's registry; `None` when the handler is gone.
    fn with<R: Send + 'static>(
        &mut self,
        id: HandlerId,
        task: impl FnOnce(&mut dyn Registry) -> R + Send + 'static,
    ) -> Option<R>;
    /// The next value that a handler sends; `None` when no handler can send any more.
    fn next<T>(&mut self, events: &Receiver<T>) -> Option<T>;
}

struct Threaded(EventLoop);

impl Loop for Threaded {
    fn new() -> Self {
        Self(EventLoop::spawn("test").unwrap())
    }

    fn add(&mut self, handler: Arc<Mutex<dyn EventHandler>>) -> io::Result<HandlerId> {
        self.0.handle().add_handler(handler)
    }

    fn remove(&mut self, id: HandlerId) {
        self.0.handle().remove_handler(id).unwrap();
    }

    fn with<R: Send + 'static>(
        &mut self,
        id: HandlerId,
        task: impl FnOnce(&mut dyn Registry) -> R + Send + 'static,
    ) -> Option<R> {
        match self.0.handle().call(id, task) {
            Ok(result) => Some(result),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn next<T>(&mut self, events: &Receiver<T>) -> Option<T> {
        events.recv().ok()
    }
}

impl Loop for ManualLoop {
    fn new() -> Self {
        Self::new()
    }

    fn add(&mut self, handler: Arc<Mutex<dyn EventHandler>>) -> io::Result<HandlerId> {
        self.add_handler(handler)
    }

    fn remove(&mut self, id: HandlerId) {
        self.remove_handler(id);
    }

    fn with<R: Send + 'static>(
        &mut self,
        id: HandlerId,
        task: impl FnOnce(&mut dyn Registry) -> R + Send + 'static,
    ) -> Option<R> {
        self.with(id, task)
    }

    fn next<T>(&mut self, events: &Receiver<T>) -> Option<T> {
        loop {
            match events.try_recv() {
                Ok(event) => return Some(event),
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return None,
                Err(std::sync::mpsc::TryRecvError::Empty) => {
                    if !self.turn() {
                        let idle = self.until_timer();
                        self.advance(idle.expect("nothing will happen any more"));
                    }
                }
            }
        }
    }
}

/// Runs each test with every loop.
macro_rules! with_every_loop {
    ($($test:ident)*) => {
        mod threaded {
            $(#[test]
            fn $test() {
                super::$test::<super::Threaded>();
            })*
        }

        mod manual {
            $(#[test]
            fn $test() {
                super::$test::<super::ManualLoop>();
            })*
        }
    };
}

with_every_loop! {
    handlers_are_called_with_their_token
    an_event_fetched_before_its_removal_is_not_delivered
    a_handler_that_does_not_start_is_not_added
    a_handler_that_is_gone_is_not_mistaken_for_its_successor
    descriptors_of_a_removed_handler_leave_the_set
    work_in_slices_lets_others_have_their_turn
    a_changed_interest_reports_what_holds
    hundreds_of_descriptors_come_and_go
    a_descriptor_that_is_removed_is_given_back
    a_descriptor_that_is_dropped_leaves_the_set
    timers_pass_in_their_order
    a_timer_that_has_always_passed_lets_others_have_their_turn
    timers_of_a_removed_handler_go_with_it
}

const EDGE: Interest = Interest {
    edge: true,
    ..Interest::READ
};

/// Reports the events of its streams.
struct Probe {
    new: Vec<UnixStream>,
    /// By their tokens.
    streams: Vec<Option<Registered<UnixStream>>>,
    seen: Sender<(u64, Readiness)>,
}

impl Probe {
    fn new(streams: Vec<UnixStream>, seen: Sender<(u64, Readiness)>) -> Self {
        Self {
            new: streams,
            streams: Vec::new(),
            seen,
        }
    }
}

impl EventHandler for Probe {
    fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
        for (token, stream) in (0..).zip(self.new.drain(..)) {
            self.streams.push(Some(registry.add(stream, token, EDGE)?));
        }
        Ok(())
    }

    fn ready(&mut self, token: u64, readiness: Readiness, _: &mut dyn Registry) {
        self.seen.send((token, readiness)).unwrap();
    }
}

fn handlers_are_called_with_their_token<L: Loop>() {
    let mut event_loop = L::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (seen, events) = channel();
    let probe = Probe::new(vec![theirs], seen);
    let id = event_loop.add(Arc::new(Mutex::new(probe))).unwrap();
    (&ours).write_all(b"x").unwrap();
    let (token, readiness) = event_loop.next(&events).unwrap();
    assert_eq!(token, 0);
    assert!(readiness.readable && !readiness.hangup);
    drop(ours);
    assert!(event_loop.next(&events).unwrap().1.hangup);
    event_loop.remove(id);
    let after = event_loop.next(&events);
    assert!(after.is_none(), "the handler was dropped");
}

fn an_event_fetched_before_its_removal_is_not_delivered<L: Loop>() {
    let mut event_loop = L::new();
    let pairs: Vec<_> = (0..2).map(|_| UnixStream::pair().unwrap()).collect();
    let (seen, events) = channel();
    let (mut ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    // Both are ready when they are registered, so they come in one batch;
    // whichever is first removes the other.
    for stream in &mut ours {
        stream.write_all(b"x").unwrap();
    }
    struct Exclusive(Probe);
    impl EventHandler for Exclusive {
        fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
            self.0.start(registry)
        }
        fn ready(&mut self, token: u64, r: Readiness, registry: &mut dyn Registry) {
            let other = if token == 0 { 1 } else { 0 };
            if let Some(stream) = self.0.streams[other].take() {
                registry.remove(stream);
            }
            self.0.ready(token, r, registry);
        }
    }
    let probe = Exclusive(Probe::new(theirs, seen));
    let id = event_loop.add(Arc::new(Mutex::new(probe))).unwrap();
    let first = event_loop.next(&events).unwrap().0;
    event_loop.remove(id);
    let rest: Vec<_> = events.iter().map(|(token, _)| token).collect();
    assert!(rest.iter().all(|&token| token == first), "{rest:?}");
}

/// Does nothing; registers a descriptor that others hold too.
struct Silent {
    stream: Option<Arc<UnixStream>>,
    registered: Option<Registered<Arc<UnixStream>>>,
}

impl EventHandler for Silent {
    fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
        if let Some(stream) = &self.stream {
            self.registered = Some(registry.add(stream.clone(), 0, Interest::READ)?);
        }
        Ok(())
    }
    fn ready(&mut self, _: u64, _: Readiness, _: &mut dyn Registry) {}
}

fn silent(stream: Option<Arc<UnixStream>>) -> Arc<Mutex<Silent>> {
    Arc::new(Mutex::new(Silent {
        stream,
        registered: None,
    }))
}

fn a_handler_that_does_not_start_is_not_added<L: Loop>() {
    let mut event_loop = L::new();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let theirs = Arc::new(theirs);
    event_loop.add(silent(Some(theirs.clone()))).unwrap();
    struct Failing(Arc<UnixStream>, Sender<()>);
    impl EventHandler for Failing {
        fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
            registry.call_again(0);
            let _dropped = registry.add(self.0.clone(), 0, Interest::READ)?;
            Err(io::ErrorKind::Other.into())
        }
        fn ready(&mut self, _: u64, _: Readiness, _: &mut dyn Registry) {
            self.1.send(()).unwrap();
        }
    }
    let (called, calls) = channel();
    let (ours, theirs) = UnixStream::pair().unwrap();
    (&ours).write_all(b"x").unwrap();
    let failing = Failing(Arc::new(theirs), called);
    let error = event_loop.add(Arc::new(Mutex::new(failing))).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Other);
    assert!(event_loop.next(&calls).is_none());
}

fn a_handler_that_is_gone_is_not_mistaken_for_its_successor<L: Loop>() {
    let mut event_loop = L::new();
    let first = event_loop.add(silent(None)).unwrap();
    event_loop.remove(first);
    let second = event_loop.add(silent(None)).unwrap();
    assert_ne!(first, second);
    assert!(event_loop.with(first, |_| ()).is_none());
    // A late removal of the first leaves the second alone.
    event_loop.remove(first);
    event_loop.with(second, |_| ()).unwrap();
}

fn descriptors_of_a_removed_handler_leave_the_set<L: Loop>() {
    let mut event_loop = L::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = Arc::new(theirs);
    let first = event_loop.add(silent(Some(theirs.clone()))).unwrap();
    event_loop.remove(first);
    // Still open here, and ready: it would keep the loop spinning, and could
    // not be registered a second time.
    (&ours).write_all(b"x").unwrap();
    event_loop.add(silent(Some(theirs))).unwrap();
}

fn work_in_slices_lets_others_have_their_turn<L: Loop>() {
    struct Slices {
        left: u32,
        done: Sender<u64>,
    }
    impl EventHandler for Slices {
        fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
            registry.call_again(7);
            registry.call_again(7);
            Ok(())
        }
        fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
            assert_eq!(readiness, Readiness::default());
            self.done.send(token).unwrap();
            if self.left > 0 {
                self.left -= 1;
                registry.call_again(token);
            }
        }
    }
    let mut event_loop = L::new();
    let (done, calls) = channel();
    let slices = Slices { left: 3, done };
    let id = event_loop.add(Arc::new(Mutex::new(slices))).unwrap();
    for _ in 0..4 {
        assert_eq!(event_loop.next(&calls), Some(7));
    }
    event_loop.remove(id);
    assert_eq!(event_loop.next(&calls), None);
}

fn a_changed_interest_reports_what_holds<L: Loop>() {
    let mut event_loop = L::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (seen, events) = channel();
    struct Changing {
        new: Option<UnixStream>,
        stream: Option<Registered<UnixStream>>,
        seen: Sender<Readiness>,
    }
    impl EventHandler for Changing {
        fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
            let stream = self.new.take().unwrap();
            self.stream = Some(registry.add(stream, 0, EDGE)?);
            Ok(())
        }
        fn ready(&mut self, _: u64, readiness: Readiness, registry: &mut dyn Registry) {
            self.seen.send(readiness).unwrap();
            if !readiness.writable {
                let both = Interest {
                    writable: true,
                    ..EDGE
                };
                let stream = self.stream.as_ref().unwrap();
                registry.modify(stream, both).unwrap();
            }
        }
    }
    (&ours).write_all(b"x").unwrap();
    let handler = Changing {
        new: Some(theirs),
        stream: None,
        seen,
    };
    event_loop.add(Arc::new(Mutex::new(handler))).unwrap();
    let first = event_loop.next(&events).unwrap();
    assert!(first.readable && !first.writable);
    let second = event_loop.next(&events).unwrap();
    assert!(second.readable && second.writable);
}

fn hundreds_of_descriptors_come_and_go<L: Loop>() {
    struct Many {
        pairs: Vec<Option<(UnixStream, Registered<UnixStream>)>>,
        seen: Sender<u64>,
    }
    impl EventHandler for Many {
        fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
            for token in 0..200 {
                let (ours, theirs) = UnixStream::pair()?;
                (&ours).write_all(b"x")?;
                let theirs = registry.add(theirs, token, Interest::READ)?;
                self.pairs.push(Some((ours, theirs)));
            }
            Ok(())
        }
        fn ready(&mut self, token: u64, _: Readiness, registry: &mut dyn Registry) {
            let own = self.pairs[usize::try_from(token).unwrap()].take();
            let (_, theirs) = own.expect("told once");
            registry.remove(theirs);
            self.seen.send(token).unwrap();
        }
    }
    let mut event_loop = L::new();
    let (seen, tokens) = channel();
    let pairs = Vec::new();
    let many = Arc::new(Mutex::new(Many { pairs, seen }));
    event_loop.add(many).unwrap();
    let mut all: Vec<u64> = (0..200)
        .map(|_| event_loop.next(&tokens).unwrap())
        .collect();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..200));
}

/// Passes on what it is called with.
struct Calls(Sender<u64>);

impl EventHandler for Calls {
    fn start(&mut self, _: &mut dyn Registry) -> io::Result<()> {
        Ok(())
    }
    fn ready(&mut self, token: u64, readiness: Readiness, _: &mut dyn Registry) {
        assert_eq!(readiness, Readiness::default());
        self.0.send(token).unwrap();
    }
}

fn timers_pass_in_their_order<L: Loop>() {
    let mut event_loop = L::new();
    let (called, calls) = channel();
    let id = event_loop.add(Arc::new(Mutex::new(Calls(called)))).unwrap();
    let cancelled = event_loop.with(id, |registry| {
        let now = registry.now();
        let after = |ms| now + Duration::from_millis(ms);
        registry.set_timer(after(30), 5);
        registry.set_timer(after(20), 4);
        let cancelled = registry.set_timer(after(10), 3);
        registry.set_timer(after(10), 2);
        registry.set_timer(now, 1);
        registry.cancel_timer(cancelled);
        assert_eq!(registry.set_timer_after(Duration::MAX, 6), None);
        assert_eq!(cancelled.at(), after(10));
        cancelled
    });
    for token in [1, 2, 4, 5] {
        assert_eq!(event_loop.next(&calls), Some(token));
    }
    event_loop.with(id, move |registry| {
        // The number of a timer that is gone is nobody else's.
        registry.set_timer(cancelled.unwrap().at(), 7);
        registry.cancel_timer(cancelled.unwrap());
    });
    assert_eq!(event_loop.next(&calls), Some(7));
}

fn a_timer_that_has_always_passed_lets_others_have_their_turn<L: Loop>() {
    /// Sets a timer for a time in the past whenever it is called.
    struct Late;
    impl EventHandler for Late {
        fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
            self.ready(0, Readiness::default(), registry);
            Ok(())
        }
        fn ready(&mut self, _: u64, _: Readiness, registry: &mut dyn Registry) {
            let now = registry.now();
            registry.set_timer(now, 0);
        }
    }
    let mut event_loop = L::new();
    event_loop.add(Arc::new(Mutex::new(Late))).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (seen, events) = channel();
    let probe = Probe::new(vec![theirs], seen);
    event_loop.add(Arc::new(Mutex::new(probe))).unwrap();
    (&ours).write_all(b"x").unwrap();
    assert!(event_loop.next(&events).unwrap().1.readable);
}

fn timers_of_a_removed_handler_go_with_it<L: Loop>() {
    let mut event_loop = L::new();
    let (called, calls) = channel();
    let first = event_loop
        .add(Arc::new(Mutex::new(Calls(called.clone()))))
        .unwrap();
    let second = event_loop.add(Arc::new(Mutex::new(Calls(called)))).unwrap();
    event_loop.with(first, |registry| {
        registry.set_timer_after(Duration::from_millis(10), 1);
        registry.call_again(2);
    });
    event_loop.remove(first);
    event_loop.with(second, |registry| {
        registry.set_timer_after(Duration::from_millis(20), 3);
    });
    let mut seen = Vec::new();
    while !seen.contains(&3) {
        seen.extend(event_loop.next(&calls));
    }
    // The call that it asked for may have come before its end.
    assert!(!seen.contains(&1), "{seen:?}");
}

fn a_descriptor_that_is_removed_is_given_back<L: Loop>() {
    let mut event_loop = L::new();
    let (called, calls) = channel();
    let id = event_loop.add(Arc::new(Mutex::new(Calls(called)))).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let given = event_loop.with(id, |registry| {
        let mut registered = registry.add(theirs, 1, Interest::READ).unwrap();
        registered.write_all(b"x").unwrap();
        registry.remove(registered)
    });
    (&ours).write_all(b"x").unwrap();
    let mut given = given.unwrap();
    given.write_all(b"y").unwrap();
    let mut both = [0; 2];
    (&ours).read_exact(&mut both).unwrap();
    assert_eq!(&both, b"xy");
    // It is readable, and would come before this.
    event_loop.with(id, |registry| registry.call_again(2));
    assert_eq!(event_loop.next(&calls), Some(2));
}

fn a_descriptor_that_is_dropped_leaves_the_set<L: Loop>() {
    let mut event_loop = L::new();
    let (seen, events) = channel();
    let probe = Arc::new(Mutex::new(Probe::new(Vec::new(), seen)));
    let id = event_loop.add(probe).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    // Which keeps it in epoll when the other is closed.
    let duplicate = theirs.try_clone().unwrap();
    let registered = event_loop.with(id, |registry| {
        registry.add(theirs, 1, Interest::READ).unwrap()
    });
    // Here, on another thread than the loop's.
    drop(registered);
    // Two rounds: the loop looks at what was dropped before it does this.
    for _ in 0..2 {
        event_loop.with(id, |registry| registry.call_again(9));
        while event_loop.next(&events).unwrap().0 != 9 {}
    }
    (&ours).write_all(b"x").unwrap();
    // One of these has its number, unless another test took that.
    let (our_next, their_next) = UnixStream::pair().unwrap();
    let registered = event_loop.with(id, |registry| {
        let first = registry.add(our_next, 2, EDGE).unwrap();
        let second = registry.add(their_next, 3, EDGE).unwrap();
        (&*first).write_all(b"x").unwrap();
        (first, second)
    });
    let (token, readiness) = event_loop.next(&events).unwrap();
    assert!(token == 3 && readiness.readable, "{token}");
    drop((registered, duplicate));
}
