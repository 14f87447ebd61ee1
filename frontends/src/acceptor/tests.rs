//! A listener whose `accept` fails for a while.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sm_devices_vsock::VsockConfig;
use sm_devices_vsock::testing::Guest;
use sm_event_loop::{EventLoop, new_eventfd, signal};

use super::*;
use crate::listening::FrontendListener;
use crate::{ForwardTarget, FrontendHandle, LocalAddress};

#[derive(Default)]
struct Waiting {
    looks: u64,
    clients: VecDeque<File>,
    /// The error of `accept`, if it fails now.
    error: Option<Errno>,
}

/// A descriptor that is readable as long as it is open, like that of a backlog.
struct Backlog {
    fd: OwnedFd,
    waiting: Arc<Mutex<Waiting>>,
    looked: Sender<()>,
}

impl AsFd for Backlog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Listener for Backlog {
    type Stream = File;

    fn accept(&self) -> io::Result<File> {
        let mut waiting = self.waiting.lock().unwrap();
        waiting.looks += 1;
        let _ = self.looked.send(());
        if let Some(error) = waiting.error {
            return Err(error.into());
        }
        let client = waiting.clients.pop_front();
        client.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }
}

#[test]
fn a_failing_accept_is_retried_after_a_pause() {
    const TURNS: u64 = 500;
    for error in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS] {
        let guest = Guest::new(VsockConfig::default());
        let event_loop = EventLoop::spawn("test").unwrap();
        let service = FrontendService::new("short".to_owned(), guest.muxer.clone(), Limit::none());
        let waiting = Arc::new(Mutex::new(Waiting {
            looks: 0,
            clients: [File::open("/dev/null").unwrap()].into(),
            error: Some(error),
        }));
        let (looked, looks) = channel();
        let listener = Backlog {
            fd: new_eventfd().unwrap(),
            waiting: waiting.clone(),
            looked,
        };
        signal(listener.as_fd());
        let listening = FrontendListener::new(listener, ForwardTarget::Vsock(7), service.clone());
        let address = LocalAddress::Unix("short".into());
        let handle =
            FrontendHandle::start(listening, address, None, service, &event_loop.handle()).unwrap();
        looks.recv_timeout(Duration::from_secs(60)).unwrap();
        let other = Arc::new(Mutex::new(Idle));
        let id = event_loop.handle().add_handler(other).unwrap();
        for _ in 0..TURNS {
            event_loop.handle().call(id, |_| ()).unwrap();
        }
        // A busy loop would call `accept` in every turn; a pause allows one call each.
        let looked = waiting.lock().unwrap().looks;
        assert!(looked < TURNS, "{error:?}: {looked}");
        let stats = handle.stats();
        assert_eq!((stats.accepted, stats.refused), (0, 0), "{error:?}");
        // Clearing the error causes no event.
        waiting.lock().unwrap().error = None;
        while handle.stats().accepted == 0 {
            looks.recv_timeout(Duration::from_secs(60)).unwrap();
            // The loop has finished its current turn.
            event_loop.handle().call(id, |_| ()).unwrap();
        }
    }
}

struct Idle;

impl sm_event_loop::EventHandler for Idle {
    fn start(&mut self, _registry: &mut dyn Registry) -> io::Result<()> {
        Ok(())
    }

    fn ready(
        &mut self,
        _token: u64,
        _readiness: sm_event_loop::Readiness,
        _registry: &mut dyn Registry,
    ) {
    }
}

#[test]
fn a_spare_descriptor_that_was_taken_is_reopened_later() {
    let mut spare = Spare::new();
    let out = || -> io::Result<()> { Err(Errno::MFILE.into()) };
    assert!(out_of_descriptors(&spare.accept(out).unwrap_err()));
    spare.0 = None;
    assert!(out_of_descriptors(&spare.accept(out).unwrap_err()));
    assert!(spare.0.is_none());
    assert_eq!(spare.accept(|| Ok(())).unwrap(), Some(()));
    assert!(spare.0.is_some());
    // The connection is accepted with the reserve descriptor and closed.
    let first = std::cell::Cell::new(true);
    let once = || match first.replace(false) {
        true => out(),
        false => Ok(()),
    };
    assert_eq!(spare.accept(once).unwrap(), None);
    assert!(spare.0.is_some());
}
