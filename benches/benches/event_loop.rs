//! The cost of adding and removing a descriptor, by the number of those registered, and
//! of an event.
#![expect(clippy::unwrap_used, reason = "a bench on data of its own making")]

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use sm_event_loop::{
    EventHandler, EventLoop, Interest, Readiness, Registered, Registry, new_eventfd, signal,
};

/// Registers descriptors and leaves them alone.
struct Crowd {
    new: Vec<Arc<OwnedFd>>,
    registered: Vec<Registered<Arc<OwnedFd>>>,
}

impl EventHandler for Crowd {
    fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
        for (token, fd) in (0..).zip(self.new.drain(..)) {
            self.registered
                .push(registry.add(fd, token, Interest::READ)?);
        }
        Ok(())
    }

    fn ready(&mut self, _: u64, _: Readiness, _: &mut dyn Registry) {}
}

fn registrations(c: &mut Criterion) {
    let mut group = c.benchmark_group("event loop: add and remove");
    for others in [100usize, 1_000, 10_000] {
        let event_loop = EventLoop::spawn("bench").unwrap();
        let handle = event_loop.handle();
        let crowd = Crowd {
            new: (0..others)
                .map(|_| Arc::new(new_eventfd().unwrap()))
                .collect(),
            registered: Vec::new(),
        };
        let id = handle.add_handler(Arc::new(Mutex::new(crowd))).unwrap();
        let fd = Arc::new(new_eventfd().unwrap());
        group.bench_function(BenchmarkId::new("beside", others), |b| {
            b.iter_custom(|iterations| {
                let fd = Arc::clone(&fd);
                let timed = move |registry: &mut dyn Registry| {
                    let begun = Instant::now();
                    for _ in 0..iterations {
                        let registered = registry.add(Arc::clone(&fd), 0, Interest::READ);
                        registry.remove(registered.unwrap());
                    }
                    begun.elapsed()
                };
                handle.call(id, timed).unwrap()
            });
        });
    }
    group.finish();
}

/// Keeps a number of descriptors ready and counts calls until there were enough.
struct Busy {
    left: u64,
    crowd: Crowd,
    begun: Option<Instant>,
    done: std::sync::mpsc::Sender<Duration>,
}

impl EventHandler for Busy {
    fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
        self.crowd.start(registry)?;
        for fd in &self.crowd.registered {
            signal(fd.as_fd());
        }
        self.begun = Some(Instant::now());
        Ok(())
    }

    fn ready(&mut self, _: u64, _: Readiness, registry: &mut dyn Registry) {
        self.left = self.left.saturating_sub(1);
        if self.left == 0
            && let Some(begun) = self.begun.take()
        {
            self.done.send(begun.elapsed()).unwrap();
            for fd in self.crowd.registered.drain(..) {
                registry.remove(fd);
            }
        }
    }
}

fn events(c: &mut Criterion) {
    let mut group = c.benchmark_group("event loop: events");
    for ready in [8usize, 64, 256] {
        let event_loop = EventLoop::spawn("bench").unwrap();
        let handle = event_loop.handle();
        group.bench_function(BenchmarkId::new("at once", ready), |b| {
            b.iter_custom(|iterations| {
                let (done, took) = std::sync::mpsc::channel();
                let busy = Busy {
                    left: iterations,
                    crowd: Crowd {
                        new: (0..ready)
                            .map(|_| Arc::new(new_eventfd().unwrap()))
                            .collect(),
                        registered: Vec::new(),
                    },
                    begun: None,
                    done,
                };
                let id = handle.add_handler(Arc::new(Mutex::new(busy))).unwrap();
                let took = took.recv().unwrap();
                handle.remove_handler(id).unwrap();
                took
            });
        });
    }
    group.finish();
}

criterion_group!(benches, registrations, events);
criterion_main!(benches);
