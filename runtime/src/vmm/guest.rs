//! What the supervisor needs of a machine, and what a machine tells it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::{EventfdFlags, eventfd};

/// A running machine, seen from its supervisor.
pub(crate) trait Guest {
    /// Opens a stream to a vsock port of the guest. A refusal shows as the end
    /// of the stream.
    fn connect(&mut self, port: u32) -> io::Result<UnixStream>;
    /// Whether it started from a snapshot.
    fn restored(&self) -> bool {
        false
    }
    /// The agent is there and has nothing to do yet: the moment to make a
    /// snapshot of, before the machine is given its image and identity.
    fn agent_ready(&mut self) -> Result<(), String> {
        Ok(())
    }
    /// Holds all vCPUs.
    fn pause(&mut self) -> Result<(), String>;
    /// Lets them run again.
    fn resume(&mut self) -> Result<(), String>;
    /// Ends the machine; [`Self::end`] follows.
    fn stop(&mut self);
    /// Becomes, and stays, readable when the machine has ended.
    fn end_event(&self) -> BorrowedFd<'_>;
    /// How it ended, once it has.
    fn end(&self) -> Option<GuestEnd>;
}

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GuestEnd {
    /// It was stopped by its supervisor.
    Stopped,
    /// The guest did it: a clause such as "the guest powered off".
    Guest(String),
}

/// Hands streams that the agent has dialled to the supervisor, from any thread.
#[derive(Clone, Debug)]
pub(crate) struct DialSender {
    sender: Sender<UnixStream>,
    wake: Arc<OwnedFd>,
}

impl DialSender {
    pub(crate) fn send(&self, stream: UnixStream) {
        // A supervisor that is gone needs no stream; a full counter is awake.
        let _ = self.sender.send(stream);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

/// The supervisor's end.
#[derive(Debug)]
pub(crate) struct DialReceiver {
    receiver: Receiver<UnixStream>,
    wake: Arc<OwnedFd>,
}

impl DialReceiver {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(crate) fn next(&mut self) -> Option<UnixStream> {
        self.receiver.try_recv().ok()
    }

    /// Resets readiness. Call before [`Self::next`], so that no stream is missed.
    pub(crate) fn clear(&mut self) {
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
    }
}

pub(crate) fn dial_channel() -> io::Result<(DialSender, DialReceiver)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = channel();
    Ok((
        DialSender {
            sender,
            wake: Arc::clone(&wake),
        },
        DialReceiver { receiver, wake },
    ))
}
