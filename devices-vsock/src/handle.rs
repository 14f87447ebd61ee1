//! How host code asks the muxer for streams, from any thread.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sm_vmm_core::event_loop::signal;
use thiserror::Error;

use crate::group::{Group, Member};
use crate::profile::Profiler;

/// Why a stream to the guest did not come about.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ConnectError {
    /// Nothing in the guest listens on that vsock port.
    #[error("nothing in the guest listens on that port")]
    Refused,
    /// The guest answered the forward header with this status byte.
    #[error("the guest answered with status {0}")]
    Status(u8),
    /// All connections are in use.
    #[error("the limit of connections to this guest is reached")]
    Limit,
    /// The guest's driver was reset, or the guest ended.
    #[error("the guest's vsock driver was reset")]
    Reset,
}

/// Told once how a connection attempt ended, with the host's port of a connection
/// before any of its bytes come. Runs on the event loop: short.
pub type OnResult = Box<dyn FnOnce(Result<u32, ConnectError>) + Send>;

/// Particulars of a connection to the guest.
#[derive(Default)]
pub struct ConnectOptions {
    /// Bytes sent to the guest before those of the stream.
    pub preamble: Vec<u8>,
    /// The guest's first byte is a status, not data: 0 is success, anything else
    /// ends the attempt with [`ConnectError::Status`].
    pub status_reply: bool,
    /// Told how the attempt ended.
    pub on_result: Option<OnResult>,
    /// Kept for as long as the connection lives.
    pub member: Option<Member>,
}

impl ConnectOptions {
    fn is_of(&self, group: &Group) -> bool {
        let member = self.member.as_ref();
        member.is_some_and(|member| member.group() == group)
    }
}

/// A stream that the guest wants to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestStream {
    /// The guest's own port.
    pub guest_port: u32,
    /// The host port it asks for.
    pub host_port: u32,
}

/// Answers a guest's request with one end of a stream socket, or refuses it.
/// Runs on the event loop: short.
pub type Acceptor = Box<dyn FnMut(GuestStream) -> Option<OwnedFd> + Send>;

/// Counters since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connections open now.
    pub connections: usize,
    /// Connections opened so far.
    pub opened: u64,
    /// Bytes read from host sockets into the guest.
    pub to_guest: u64,
    /// Bytes taken from the guest for host sockets.
    pub from_guest: u64,
    /// Packets of the guest that made no sense and were answered by a reset.
    pub malformed: u64,
    /// Requests of the guest that nothing on the host wanted.
    pub refused: u64,
}

pub(crate) enum Command {
    Connect {
        guest_port: u32,
        stream: OwnedFd,
        options: ConnectOptions,
    },
    Listen {
        /// All ports that no other acceptor is for, if `None`.
        host_port: Option<u32>,
        acceptor: Acceptor,
    },
    /// End all connections of a group.
    Cut(Group),
}

/// What handles and the device share.
pub(crate) struct Mailbox {
    commands: Mutex<VecDeque<Command>>,
    stats: Mutex<Stats>,
    pub(crate) profiler: Profiler,
    pub(crate) wake: OwnedFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it holds one of these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mailbox {
    pub(crate) fn new(wake: OwnedFd) -> Self {
        Self {
            commands: Mutex::default(),
            stats: Mutex::default(),
            profiler: Profiler::default(),
            wake,
        }
    }

    pub(crate) fn take(&self) -> VecDeque<Command> {
        std::mem::take(&mut *lock(&self.commands))
    }

    /// Has the connections of a group end, those that were asked for and have not
    /// begun at once.
    fn cut(&self, group: &Group) {
        let mut forgotten = Vec::new();
        let mut commands = lock(&self.commands);
        for command in std::mem::take(&mut *commands) {
            match command {
                Command::Connect {
                    options, stream, ..
                } if options.is_of(group) => {
                    forgotten.push((options, stream));
                }
                command => commands.push_back(command),
            }
        }
        commands.push_back(Command::Cut(group.clone()));
        // Not in the lock: whoever waits for their end may ask for more.
        drop(commands);
        drop(forgotten);
    }

    pub(crate) fn set_stats(&self, stats: Stats) {
        *lock(&self.stats) = stats;
    }
}

/// Opens streams to the guest. Cheap to clone.
#[derive(Clone)]
pub struct MuxerHandle {
    pub(crate) mailbox: Arc<Mailbox>,
}

impl std::fmt::Debug for MuxerHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MuxerHandle").finish_non_exhaustive()
    }
}

impl MuxerHandle {
    /// Connects `stream`, any stream socket, to `guest_port`. It is made
    /// non-blocking, and closed when the connection ends or cannot be made. A
    /// request made before the guest's driver is ready waits for it.
    pub fn connect(&self, guest_port: u32, stream: OwnedFd, options: ConnectOptions) {
        self.send(Command::Connect {
            guest_port,
            stream,
            options,
        });
    }

    /// Answers the guest's requests for `host_port`, in place of an earlier
    /// acceptor.
    pub fn listen(&self, host_port: u32, acceptor: Acceptor) {
        self.send(Command::Listen {
            host_port: Some(host_port),
            acceptor,
        });
    }

    /// Answers the guest's requests for all ports that have no acceptor of their
    /// own, in place of an earlier acceptor.
    pub fn listen_to_others(&self, acceptor: Acceptor) {
        self.send(Command::Listen {
            host_port: None,
            acceptor,
        });
    }

    /// Ends all connections of a group that were asked for before, without waiting
    /// for anything that is on its way.
    pub fn cut(&self, group: &Group) {
        self.mailbox.cut(group);
        signal(self.mailbox.wake.as_fd());
    }

    /// Counters, as of the last batch of work.
    #[must_use]
    pub fn stats(&self) -> Stats {
        *lock(&self.mailbox.stats)
    }

    /// Where the time goes; it measures when it is told to.
    #[must_use]
    pub fn profiler(&self) -> &Profiler {
        &self.mailbox.profiler
    }

    fn send(&self, command: Command) {
        lock(&self.mailbox.commands).push_back(command);
        signal(self.mailbox.wake.as_fd());
    }
}
