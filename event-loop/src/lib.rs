//! An event loop for devices: one thread that waits for file descriptors and calls
//! the handlers that registered them.
//!
//! A handler registers descriptors under tokens of its own and is called when
//! one is ready. Registrations carry a generation, so an event that was fetched
//! before its registration was removed is never delivered, even if the
//! descriptor number or the slot has been reused in between. [`Registered`] owns a
//! descriptor that is registered, so that none is closed before it is removed. Timers
//! are entries of one queue ([`Deadlines`]), whose first is the timeout of the wait.
//!
//! [`Reactor`] is the part below handlers: a program of one thread, such as the guest
//! agent, waits by it and calls its own code. It is made of [`Deadlines`] and a [`Slab`], a
//! table whose keys carry a generation; both can be used on their own, as can the
//! [`SlotQueue`], in which slots wait for their turn. The feature `thread`, which is on by
//! default, adds the thread, handlers and what they need.
//!
//! The loop waits by means of `event-manager` (Linux's epoll); a host without epoll gets
//! another implementation of the same few calls. [`Registry`] is a trait: another loop
//! can call the same handlers, as `testing::ManualLoop` does in tests.
//!
#![cfg_attr(feature = "thread", doc = "```")]
#![cfg_attr(not(feature = "thread"), doc = "```ignore")]
//! use std::io::{self, Read as _, Write as _};
//! use std::os::unix::net::UnixStream;
//! use std::sync::mpsc::{Sender, channel};
//! use std::sync::{Arc, Mutex};
//!
//! use sm_event_loop::{EventHandler, EventLoop, Interest, Readiness, Registered, Registry};
//!
//! /// Passes on what arrives on a socket.
//! struct Reader {
//!     /// What it is started with.
//!     new: Option<UnixStream>,
//!     socket: Option<Registered<UnixStream>>,
//!     received: Sender<Vec<u8>>,
//! }
//!
//! impl EventHandler for Reader {
//!     fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
//!         if let Some(socket) = self.new.take() {
//!             self.socket = Some(registry.add(socket, 0, Interest::READ)?);
//!         }
//!         Ok(())
//!     }
//!
//!     fn ready(&mut self, _token: u64, _readiness: Readiness, registry: &mut dyn Registry) {
//!         let mut bytes = vec![0; 64];
//!         match self.socket.as_mut().map(|socket| socket.read(&mut bytes)) {
//!             Some(Ok(len)) if len > 0 => {
//!                 bytes.truncate(len);
//!                 let _ = self.received.send(bytes);
//!             }
//!             // The end.
//!             _ => {
//!                 self.socket.take().map(|socket| registry.remove(socket));
//!             }
//!         }
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let event_loop = EventLoop::spawn("devices")?;
//! let (mut ours, theirs) = UnixStream::pair()?;
//! let (received, bytes) = channel();
//! let reader = Reader { new: Some(theirs), socket: None, received };
//! event_loop.handle().add_handler(Arc::new(Mutex::new(reader)))?;
//! ours.write_all(b"hello")?;
//! assert_eq!(bytes.recv()?, b"hello");
//! # Ok(())
//! # }
//! ```
//!
//! Architecture invariants: nothing is allocated for an event; a handler that was removed
//! is never called, and never keeps the loop awake; no descriptor is closed while it is
//! registered; adding and removing a descriptor cost the same however many there are.
#![warn(missing_docs)]
#![cfg_attr(
    not(feature = "thread"),
    allow(
        rustdoc::broken_intra_doc_links,
        reason = "the documentation names items that the feature adds"
    )
)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod queue;
mod reactor;
#[cfg(feature = "thread")]
mod registered;
mod registration;
#[cfg(feature = "thread")]
mod registry;
mod slab;
mod slots;
#[cfg(feature = "thread")]
mod table;
#[cfg(any(all(test, feature = "thread"), feature = "testing"))]
pub mod testing;
#[cfg(test)]
#[cfg(feature = "thread")]
mod tests;
#[cfg(feature = "thread")]
mod thread;
mod timers;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

pub use self::reactor::Reactor;
#[cfg(feature = "thread")]
pub use self::registered::Registered;
pub use self::registration::{Ready, Registration};
#[cfg(feature = "thread")]
pub use self::registry::{Descriptor, Reclaimed, Reclaimer, Registry, RegistryFd};
pub use self::slab::{Key, Slab};
pub use self::slots::SlotQueue;
#[cfg(feature = "thread")]
pub use self::table::HandlerId;
#[cfg(feature = "thread")]
pub use self::thread::{EventLoop, EventLoopHandle};
pub use self::timers::{Deadlines, Timer};

/// The events of a file descriptor. There are none when a timer has passed, or after
/// `Registry::call_again`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Readiness {
    /// Reading will not block.
    pub readable: bool,
    /// Writing will not block.
    pub writable: bool,
    /// There is an exceptional condition, such as a change of a cgroup's state.
    pub priority: bool,
    /// The peer closed its side, or both.
    pub hangup: bool,
    /// Both sides are closed (full hang-up).
    pub closed: bool,
    /// The descriptor is in an error state.
    pub error: bool,
}

impl Readiness {
    /// Writable, and nothing else.
    pub const WRITABLE: Self = Self {
        readable: false,
        hangup: false,
        ..Self::UNKNOWN
    };
    /// Readable, writable and hung up: for a descriptor whose events may have been
    /// missed, so that its handler must try everything.
    pub const UNKNOWN: Self = Self {
        readable: true,
        writable: true,
        priority: false,
        hangup: true,
        closed: false,
        error: false,
    };
}

/// The events of a descriptor that are waited for.
///
/// Errors and full hang-up are always reported.
///
/// ```
/// use sm_event_loop::Interest;
///
/// const BOTH: Interest = Interest::READ.and(Interest::WRITE).edge_triggered();
/// assert!(BOTH.readable && BOTH.writable && BOTH.edge);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Interest {
    /// Reading will not block, or the peer shut down its writing side.
    pub readable: bool,
    /// Writing will not block.
    pub writable: bool,
    /// There is an exceptional condition (`EPOLLPRI`).
    pub priority: bool,
    /// The peer shut down its writing side. Included in `readable`.
    pub hangup: bool,
    /// Edge-triggered instead of level-triggered.
    pub edge: bool,
}

impl Interest {
    /// Only errors and full hang-up, which are always reported.
    pub const NONE: Self = Self {
        readable: false,
        writable: false,
        priority: false,
        hangup: false,
        edge: false,
    };
    /// Level-triggered reading.
    pub const READ: Self = Self {
        readable: true,
        ..Self::NONE
    };
    /// Level-triggered writing.
    pub const WRITE: Self = Self {
        writable: true,
        ..Self::NONE
    };
    /// Level-triggered exceptional conditions.
    pub const PRIORITY: Self = Self {
        priority: true,
        ..Self::NONE
    };
    /// The level-triggered end of the peer's data, also while there is unread data.
    pub const HANGUP: Self = Self {
        hangup: true,
        ..Self::NONE
    };

    /// The events of both. Edge-triggered if one of them is.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            readable: self.readable || other.readable,
            writable: self.writable || other.writable,
            priority: self.priority || other.priority,
            hangup: self.hangup || other.hangup,
            edge: self.edge || other.edge,
        }
    }

    /// The same events, edge-triggered.
    #[must_use]
    pub const fn edge_triggered(self) -> Self {
        Self { edge: true, ..self }
    }
}

/// Something that file descriptors wake up. Runs on the loop's thread only.
#[cfg(feature = "thread")]
pub trait EventHandler: Send {
    /// Called once, when the handler is added: registers its first descriptors.
    ///
    /// # Errors
    /// The handler is then not added.
    fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()>;

    /// The descriptor registered under `token` is ready. Must not block.
    /// `readiness` is empty for a token given to [`Registry::call_again`] or
    /// [`Registry::set_timer`].
    fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry);
}

/// A non-blocking eventfd.
///
/// # Errors
/// No descriptors are available.
pub fn new_eventfd() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Makes an eventfd readable.
pub fn signal(fd: BorrowedFd<'_>) {
    // Refused only when the counter is full: then it is readable already.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Makes an eventfd unreadable again. Returns true if it was readable.
#[must_use]
pub fn drain(fd: BorrowedFd<'_>) -> bool {
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}
