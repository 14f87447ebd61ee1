//! The part that all listeners have on the event loop.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use sm_devices_vsock::{MuxerHandle, Stage};
use sm_vmm_core::event_loop::{
    EventHandler, EventLoopHandle, HandlerId, Interest, Readiness, Registry,
};

use crate::Target;

/// Connections accepted before other handlers get their turn.
const BATCH: usize = 64;

/// A listening socket.
pub(crate) trait Listener: AsFd + Send + 'static {
    /// Takes a connection. `None` is one that was refused.
    fn accept(&self) -> io::Result<Option<OwnedFd>>;
}

/// What a listener did so far.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    accepted: AtomicU64,
    refused: AtomicU64,
}

impl Counters {
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// A listener on the event loop. Dropping it closes the socket; connections that
/// were accepted go on.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) counters: Arc<Counters>,
    event_loop: EventLoopHandle,
    id: HandlerId,
}

impl Drop for Served {
    fn drop(&mut self) {
        // Fails when the loop has stopped: then nothing listens any more either.
        let _ = self.event_loop.remove_handler(self.id);
    }
}

/// Hands each connection that `listener`, which does not block, gets to `target`.
pub(crate) fn serve(
    listener: impl Listener,
    target: Target,
    muxer: MuxerHandle,
    event_loop: &EventLoopHandle,
) -> io::Result<Served> {
    let counters = Arc::new(Counters::default());
    let handler = Listening {
        listener,
        target,
        muxer,
        counters: Arc::clone(&counters),
        spare: Spare::new(),
    };
    let id = event_loop.add_handler(Arc::new(Mutex::new(handler)))?;
    Ok(Served {
        counters,
        event_loop: event_loop.clone(),
        id,
    })
}

/// A descriptor to give up when there are no more.
#[derive(Debug)]
pub(crate) struct Spare(Option<File>);

impl Spare {
    pub(crate) fn new() -> Self {
        Self(File::open("/dev/null").ok())
    }

    /// Accepts a connection. One that nobody takes would keep the loop awake:
    /// when there are no more descriptors it is taken with this one, and hung up
    /// on.
    pub(crate) fn accept<T>(&mut self, accept: impl Fn() -> io::Result<T>) -> io::Result<T> {
        let accepted = accept();
        let full = accepted.as_ref().is_err_and(out_of_descriptors);
        if full {
            self.0 = None;
            drop(accept());
            *self = Self::new();
        }
        accepted
    }
}

fn out_of_descriptors(error: &io::Error) -> bool {
    let errno = rustix::io::Errno::from_io_error(error);
    matches!(
        errno,
        Some(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE)
    )
}

struct Listening<L> {
    listener: L,
    target: Target,
    muxer: MuxerHandle,
    counters: Arc<Counters>,
    spare: Spare,
}

impl<L: Listener> Listening<L> {
    fn accept(&mut self) -> io::Result<()> {
        let begun = self.muxer.profiler().begin();
        match self.spare.accept(|| self.listener.accept()) {
            Ok(Some(stream)) => {
                self.counters.accepted.fetch_add(1, Ordering::Relaxed);
                let (port, options) = self.target.open();
                self.muxer.connect(port, stream, options);
                self.muxer.profiler().end(Stage::Accept, begun);
                Ok(())
            }
            Ok(None) => {
                self.counters.refused.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            // The peer has thought better of it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl<L: Listener> EventHandler for Listening<L> {
    fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
        registry.add(&self.listener, 0, Interest::READ)?;
        Ok(())
    }

    fn ready(&mut self, _token: u64, _readiness: Readiness, _registry: &mut Registry<'_>) {
        for _ in 0..BATCH {
            match self.accept() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    return;
                }
            }
        }
    }
}
