//! Handlers, their descriptors, and how they go.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use super::*;

/// Reports what it is told; drops its registration when told to.
struct Probe {
    streams: Vec<UnixStream>,
    registrations: Vec<Registration>,
    /// Removes registration `.1` when token `.0` is ready.
    removes: Option<(u64, usize)>,
    seen: Sender<(u64, Readiness)>,
}

impl EventHandler for Probe {
    fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
        for (token, stream) in (0..).zip(&self.streams) {
            let interest = Interest {
                edge: true,
                ..Interest::READ
            };
            self.registrations
                .push(registry.add(stream, token, interest)?);
        }
        Ok(())
    }

    fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut Registry<'_>) {
        self.seen.send((token, readiness)).unwrap();
        if let Some((when, which)) = self.removes
            && when == token
        {
            registry.remove(self.registrations[which], &self.streams[which]);
        }
    }
}

#[test]
fn handlers_are_called_with_their_token() {
    let event_loop = EventLoop::spawn("test").unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (seen, events) = channel();
    let probe = Probe {
        streams: vec![theirs],
        registrations: Vec::new(),
        removes: None,
        seen,
    };
    let handle = event_loop.handle();
    let id = handle.add_handler(Arc::new(Mutex::new(probe))).unwrap();
    (&ours).write_all(b"x").unwrap();
    let (token, readiness) = events.recv().unwrap();
    assert_eq!(token, 0);
    assert!(readiness.readable && !readiness.hangup);
    drop(ours);
    assert!(events.recv().unwrap().1.hangup);
    handle.remove_handler(id).unwrap();
    assert!(events.recv().is_err(), "the handler was dropped");
}

#[test]
fn an_event_fetched_before_its_removal_is_not_delivered() {
    let event_loop = EventLoop::spawn("test").unwrap();
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
        fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
            self.0.start(registry)
        }
        fn ready(&mut self, token: u64, r: Readiness, registry: &mut Registry<'_>) {
            self.0.removes = Some((token, if token == 0 { 1 } else { 0 }));
            self.0.ready(token, r, registry);
        }
    }
    let probe = Exclusive(Probe {
        streams: theirs,
        registrations: Vec::new(),
        removes: None,
        seen,
    });
    let handle = event_loop.handle();
    let id = handle.add_handler(Arc::new(Mutex::new(probe))).unwrap();
    let first = events.recv().unwrap().0;
    handle.remove_handler(id).unwrap();
    let rest: Vec<_> = events.iter().map(|(token, _)| token).collect();
    assert!(rest.iter().all(|&token| token == first), "{rest:?}");
}

/// Does nothing; keeps a descriptor open that others hold too.
struct Silent(Option<Arc<UnixStream>>);

impl EventHandler for Silent {
    fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
        if let Some(stream) = &self.0 {
            registry.add(&**stream, 0, Interest::READ)?;
        }
        Ok(())
    }
    fn ready(&mut self, _: u64, _: Readiness, _: &mut Registry<'_>) {}
}

fn silent(stream: Option<Arc<UnixStream>>) -> Arc<Mutex<Silent>> {
    Arc::new(Mutex::new(Silent(stream)))
}

#[test]
fn calls_return_values_and_never_wait_for_themselves() {
    let event_loop = EventLoop::spawn("test").unwrap();
    let handle = event_loop.handle();
    let id = handle.add_handler(silent(None)).unwrap();
    assert_eq!(handle.call(id, |_| 42).unwrap(), 42);
    let inner = handle.clone();
    let nested = handle
        .call(id, move |_| inner.call(id, |_| ()).unwrap_err().kind())
        .unwrap();
    assert_eq!(nested, io::ErrorKind::Deadlock);
    drop(event_loop);
    assert!(handle.call(id, |_| ()).is_err());
}

#[test]
fn a_handler_that_is_gone_is_not_mistaken_for_its_successor() {
    let event_loop = EventLoop::spawn("test").unwrap();
    let handle = event_loop.handle();
    let first = handle.add_handler(silent(None)).unwrap();
    handle.remove_handler(first).unwrap();
    let second = handle.add_handler(silent(None)).unwrap();
    assert_ne!(first, second);
    let error = handle.call(first, |_| ()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    // A late removal of the first leaves the second alone.
    handle.remove_handler(first).unwrap();
    handle.call(second, |_| ()).unwrap();
}

#[test]
fn descriptors_of_a_removed_handler_leave_the_set() {
    let event_loop = EventLoop::spawn("test").unwrap();
    let handle = event_loop.handle();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = Arc::new(theirs);
    let first = handle.add_handler(silent(Some(theirs.clone()))).unwrap();
    handle.remove_handler(first).unwrap();
    // Still open here, and ready: it would keep the loop spinning, and could
    // not be registered a second time.
    (&ours).write_all(b"x").unwrap();
    handle.add_handler(silent(Some(theirs))).unwrap();
}

#[test]
fn work_in_slices_lets_others_have_their_turn() {
    struct Slices {
        left: u32,
        done: Sender<u64>,
    }
    impl EventHandler for Slices {
        fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
            registry.again(7);
            registry.again(7);
            Ok(())
        }
        fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut Registry<'_>) {
            assert_eq!(readiness, Readiness::default());
            self.done.send(token).unwrap();
            if self.left > 0 {
                self.left -= 1;
                registry.again(token);
            }
        }
    }
    let event_loop = EventLoop::spawn("test").unwrap();
    let handle = event_loop.handle();
    let (done, calls) = channel();
    let slices = Slices { left: 3, done };
    let id = handle.add_handler(Arc::new(Mutex::new(slices))).unwrap();
    for _ in 0..4 {
        assert_eq!(calls.recv().unwrap(), 7);
    }
    handle.remove_handler(id).unwrap();
    assert!(calls.recv().is_err());
}

#[test]
fn handlers_are_removed_from_the_loop_itself() {
    let event_loop = EventLoop::spawn("test").unwrap();
    let handle = event_loop.handle();
    let id = handle.add_handler(silent(None)).unwrap();
    let inner = handle.clone();
    handle
        .call(id, move |_| inner.remove_handler(id).unwrap())
        .unwrap();
    // Tasks run in the order they came in, and this one comes after.
    assert!(handle.call(id, |_| ()).is_err());
}

#[test]
fn hundreds_of_descriptors_come_and_go() {
    struct Many {
        pairs: Vec<Option<(UnixStream, UnixStream, Registration)>>,
        seen: Sender<u64>,
    }
    impl EventHandler for Many {
        fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
            for token in 0..200 {
                let (ours, theirs) = UnixStream::pair()?;
                (&ours).write_all(b"x")?;
                let registration = registry.add(&theirs, token, Interest::READ)?;
                self.pairs.push(Some((ours, theirs, registration)));
            }
            Ok(())
        }
        fn ready(&mut self, token: u64, _: Readiness, registry: &mut Registry<'_>) {
            let own = self.pairs[usize::try_from(token).unwrap()].take();
            let (_, theirs, registration) = own.expect("told once");
            registry.remove(registration, &theirs);
            self.seen.send(token).unwrap();
        }
    }
    let event_loop = EventLoop::spawn("test").unwrap();
    let handle = event_loop.handle();
    let (seen, tokens) = channel();
    let pairs = Vec::new();
    let many = Arc::new(Mutex::new(Many { pairs, seen }));
    handle.add_handler(many).unwrap();
    let mut all: Vec<u64> = (0..200).map(|_| tokens.recv().unwrap()).collect();
    all.sort_unstable();
    assert!(all.into_iter().eq(0..200));
}
