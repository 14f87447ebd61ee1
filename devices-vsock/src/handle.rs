//! How host code asks the muxer for streams, from any thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sm_event_loop::signal;
use thiserror::Error;

use crate::group::{Group, Member};
use crate::inbox::{Inbox, Refused};
use crate::profile::Profiler;
use crate::stats::{Counters, Stats};

/// Why a connection to the guest did not come about.
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
    /// The guest's driver was reset or has failed, or the guest ended.
    #[error("the guest's vsock driver was reset")]
    Reset,
    /// The guest did not answer in time.
    #[error("the guest did not answer in time")]
    TimedOut,
    /// The host's end was closed before the guest answered.
    #[error("the host's end was closed before the guest answered")]
    HungUp,
    /// The host's end is no stream or seqpacket socket, or cannot be waited for.
    #[error("the host's end is no socket that can be used")]
    Unusable,
    /// The guest's driver does not know sockets that keep messages apart.
    #[error("the guest has no seqpacket sockets")]
    Unsupported,
}

/// Told once how a connection attempt ended, with the host's port of a connection
/// before any of its bytes come. Runs on the event loop, or at once on the thread
/// that asks when the request cannot even be queued: short.
pub type OnResult = Box<dyn FnOnce(Result<u32, ConnectError>) + Send>;

/// Particulars of a connection to the guest.
#[derive(Default)]
pub struct ConnectOptions {
    /// Bytes sent to the guest before those of the stream.
    pub preamble: Vec<u8>,
    /// The guest's first byte is a status, not data: 0 is success, anything else
    /// ends the attempt with [`ConnectError::Status`].
    pub status_reply: bool,
    /// The time beyond [`crate::VsockConfig::answer_timeout`] and
    /// [`crate::VsockConfig::status_timeout`] that the guest may take, because it was told
    /// to wait for something.
    pub wait: Duration,
    /// Told how the attempt ended.
    pub on_result: Option<OnResult>,
    /// Kept for as long as the connection lives.
    pub member: Option<Member>,
}

/// What is to be told of an attempt; told [`ConnectError::Reset`] if it is dropped
/// before anything was.
pub(crate) struct Report(Option<OnResult>);

impl Report {
    pub(crate) fn nobody() -> Self {
        Self(None)
    }

    /// Tells it, if nothing was told yet.
    pub(crate) fn tell(&mut self, result: Result<u32, ConnectError>) {
        if let Some(tell) = self.0.take() {
            tell(result);
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.tell(Err(ConnectError::Reset));
    }
}

/// Whether a socket keeps messages apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// Bytes (`SOCK_STREAM`).
    Stream,
    /// Messages (`SOCK_SEQPACKET`).
    SeqPacket,
}

/// A connection that the guest wants to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestStream {
    /// The guest's own port.
    pub guest_port: u32,
    /// The host port it asks for.
    pub host_port: u32,
    /// What kind of socket must answer.
    pub kind: SocketKind,
}

/// What answers a guest's request.
#[derive(Debug)]
pub struct Accepted {
    /// One end of a socket of the kind asked for.
    pub socket: OwnedFd,
    /// Kept for as long as the connection lives.
    pub member: Option<Member>,
}

impl From<OwnedFd> for Accepted {
    fn from(socket: OwnedFd) -> Self {
        Self {
            socket,
            member: None,
        }
    }
}

/// Answers a guest's request, or refuses it. Runs on the event loop: short.
pub type Acceptor = Box<dyn FnMut(GuestStream) -> Option<Accepted> + Send>;

/// Told when the device has failed: why. Runs on the event loop: short.
pub type OnFailure = Box<dyn FnMut(&str) + Send>;

/// A connection that host code asks for.
pub(crate) struct ConnectRequest {
    pub(crate) guest_port: u32,
    pub(crate) preamble: Vec<u8>,
    pub(crate) status_reply: bool,
    pub(crate) wait: Duration,
    pub(crate) report: Report,
    pub(crate) member: Option<Member>,
    pub(crate) asked: Option<Instant>,
}

pub(crate) enum Command {
    Connect(OwnedFd, ConnectRequest),
    Listen {
        id: u64,
        /// All ports that no other acceptor is for, if `None`.
        host_port: Option<u32>,
        acceptor: Acceptor,
    },
    Unlisten {
        id: u64,
        host_port: Option<u32>,
    },
    /// End all connections of a group.
    Cut(Group),
}

impl Command {
    /// Asks for a connection of a group.
    fn is_of(&self, group: &Group) -> bool {
        let member = match self {
            Self::Connect(_, request) => request.member.as_ref(),
            _ => None,
        };
        member.is_some_and(|member| member.group() == group)
    }
}

/// What handles and the device share.
pub(crate) struct Mailbox {
    pub(crate) commands: Inbox<Command>,
    pub(crate) counters: Counters,
    pub(crate) profiler: Profiler,
    pub(crate) wake: OwnedFd,
    most: usize,
    next_listener: AtomicU64,
    on_failure: Mutex<Option<OnFailure>>,
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Mailbox {
    /// `most` requests for connections may wait.
    pub(crate) fn new(wake: OwnedFd, most: usize) -> Self {
        Self {
            commands: Inbox::new(),
            counters: Counters::default(),
            profiler: Profiler::default(),
            wake,
            most,
            next_listener: AtomicU64::new(0),
            on_failure: Mutex::new(None),
        }
    }

    fn send(&self, command: Command) {
        let most = match command {
            Command::Connect(..) => self.most,
            // Only host code makes these, and few.
            Command::Listen { .. } | Command::Unlisten { .. } | Command::Cut(_) => usize::MAX,
        };
        match self.commands.put(command, most) {
            Ok(true) => signal(self.wake.as_fd()),
            Ok(false) => {}
            Err((Command::Connect(_, mut request), Refused::Full)) => {
                self.counters.refused.add(1);
                request.report.tell(Err(ConnectError::Limit));
            }
            // Who asked is told by dropping it.
            Err(_) => {}
        }
    }

    pub(crate) fn failed(&self, reason: &str) {
        let tell = self.on_failure.lock();
        if let Some(tell) = &mut *tell.unwrap_or_else(PoisonError::into_inner) {
            tell(reason);
        }
    }
}

/// Opens connections to the guest. Cheap to clone.
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
    /// Connects `stream`, any stream or seqpacket socket, to `guest_port`. It is
    /// made non-blocking, and closed when the connection ends or cannot be made. A
    /// request made before the guest's driver is ready waits for it, as long as an
    /// answer may take; one made after the driver has failed is refused.
    pub fn connect(&self, guest_port: u32, stream: OwnedFd, mut options: ConnectOptions) {
        if let Some(member) = &mut options.member {
            member.begin();
        }
        let request = ConnectRequest {
            guest_port,
            preamble: options.preamble,
            status_reply: options.status_reply,
            wait: options.wait,
            report: Report(options.on_result),
            member: options.member,
            asked: self.mailbox.profiler.begin(),
        };
        self.mailbox.send(Command::Connect(stream, request));
    }

    /// Answers the guest's requests for `host_port`, in place of an earlier
    /// acceptor, as long as what is returned lives.
    pub fn listen(&self, host_port: u32, acceptor: Acceptor) -> Listening {
        self.start_listening(Some(host_port), acceptor)
    }

    /// Answers the guest's requests for all ports that have no acceptor of their
    /// own, in place of an earlier acceptor, as long as what is returned lives.
    pub fn listen_to_others(&self, acceptor: Acceptor) -> Listening {
        self.start_listening(None, acceptor)
    }

    fn start_listening(&self, host_port: Option<u32>, acceptor: Acceptor) -> Listening {
        let mailbox = &self.mailbox;
        let id = mailbox.next_listener.fetch_add(1, Ordering::Relaxed);
        mailbox.send(Command::Listen {
            id,
            host_port,
            acceptor,
        });
        Listening {
            mailbox: Some(Arc::clone(mailbox)),
            id,
            host_port,
        }
    }

    /// Ends all connections of a group that were asked for before, without waiting
    /// for anything that is on its way; those that have not begun at once.
    pub fn cut(&self, group: &Group) {
        let mailbox = &self.mailbox;
        // Not in the lock: whoever waits for their end may ask for more.
        drop(mailbox.commands.take_out(|command| command.is_of(group)));
        mailbox.send(Command::Cut(group.clone()));
    }

    /// Has `tell` called with the reason whenever the device fails, because of what
    /// its driver does: all connections are over then, and there are no others
    /// until the driver resets the device. In place of an earlier one.
    pub fn on_failure(&self, tell: OnFailure) {
        let place = self.mailbox.on_failure.lock();
        *place.unwrap_or_else(PoisonError::into_inner) = Some(tell);
    }

    /// Counters, as of now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.mailbox.counters.read()
    }

    /// Where the time goes; it measures when it is told to.
    #[must_use]
    pub fn profiler(&self) -> &Profiler {
        &self.mailbox.profiler
    }
}

/// An acceptor in its place; it leaves it when this is dropped. Connections that
/// it made go on.
#[must_use = "nothing is accepted any more once this is dropped"]
pub struct Listening {
    mailbox: Option<Arc<Mailbox>>,
    id: u64,
    host_port: Option<u32>,
}

impl std::fmt::Debug for Listening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listening")
            .field("host_port", &self.host_port)
            .finish_non_exhaustive()
    }
}

impl Listening {
    /// Leaves the acceptor in its place for the life of the device.
    pub fn forever(mut self) {
        self.mailbox = None;
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(mailbox) = &self.mailbox {
            mailbox.send(Command::Unlisten {
                id: self.id,
                host_port: self.host_port,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sm_event_loop::new_eventfd;

    #[test]
    fn a_failure_is_told_after_one_that_panicked() {
        let mailbox = Arc::new(Mailbox::new(new_eventfd().unwrap(), 8));
        let handle = MuxerHandle {
            mailbox: Arc::clone(&mailbox),
        };
        handle.on_failure(Box::new(|_| panic!("of a test")));
        let failing = Arc::clone(&mailbox);
        std::thread::spawn(move || failing.failed("first"))
            .join()
            .unwrap_err();
        let (send, told) = std::sync::mpsc::channel();
        handle.on_failure(Box::new(move |reason| {
            send.send(reason.to_owned()).unwrap();
        }));
        mailbox.failed("second");
        assert_eq!(told.try_recv().unwrap(), "second");
    }
}
