//! Requests of host code to the muxer, from any thread.

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

/// Reason why a connection to the guest was not established.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectError {
    /// No socket in the guest listens on that vsock port.
    #[error("no socket in the guest listens on that port")]
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
    /// The host's end is no stream or seqpacket socket, or cannot be polled.
    #[error("the host's end is not a usable socket")]
    Unusable,
    /// The guest's driver has not negotiated seqpacket sockets.
    #[error("the guest has no seqpacket sockets")]
    Unsupported,
}

/// Called once with the result of a connection attempt; on success with the host's port,
/// before any data of the connection. Runs on the event loop, or on the requesting thread
/// if the request cannot be queued; must return quickly.
pub type OnResult = Box<dyn FnOnce(Result<u32, ConnectError>) + Send>;

/// Options of a connection to the guest.
#[derive(Default)]
#[non_exhaustive]
pub struct ConnectOptions {
    /// Bytes sent to the guest before those of the stream.
    pub preamble: Vec<u8>,
    /// The guest's first byte is a status, not data: 0 is success, any other value ends the
    /// attempt with [`ConnectError::Status`].
    pub status_reply: bool,
    /// Time in addition to [`crate::VsockConfig::answer_timeout`] and
    /// [`crate::VsockConfig::status_timeout`] that the guest may take, because the preamble
    /// makes it wait for something.
    pub wait: Duration,
    /// Called with the result of the attempt.
    pub on_result: Option<OnResult>,
    /// Kept as long as the connection exists.
    pub member: Option<Member>,
}

impl ConnectOptions {
    /// Sets [`Self::preamble`].
    #[must_use]
    pub fn preamble(mut self, preamble: Vec<u8>) -> Self {
        self.preamble = preamble;
        self
    }

    /// Sets [`Self::status_reply`].
    #[must_use]
    pub fn status_reply(mut self, status_reply: bool) -> Self {
        self.status_reply = status_reply;
        self
    }

    /// Sets [`Self::wait`].
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Sets [`Self::on_result`].
    #[must_use]
    pub fn on_result(
        mut self,
        on_result: impl FnOnce(Result<u32, ConnectError>) + Send + 'static,
    ) -> Self {
        self.on_result = Some(Box::new(on_result));
        self
    }

    /// Sets [`Self::member`].
    #[must_use]
    pub fn member(mut self, member: impl Into<Option<Member>>) -> Self {
        self.member = member.into();
        self
    }
}

/// Callback for the result of an attempt; called with [`ConnectError::Reset`] if it is
/// dropped before.
pub(crate) struct Report(Option<OnResult>);

impl Report {
    pub(crate) fn none() -> Self {
        Self(None)
    }

    /// Calls the callback, unless it was called before.
    pub(crate) fn send(&mut self, result: Result<u32, ConnectError>) {
        if let Some(callback) = self.0.take() {
            callback(result);
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.send(Err(ConnectError::Reset));
    }
}

/// Type of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// Byte stream (`SOCK_STREAM`).
    Stream,
    /// Sequence of messages (`SOCK_SEQPACKET`).
    SeqPacket,
}

/// A connection that the guest requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestStream {
    /// The guest's own port.
    pub guest_port: u32,
    /// The requested host port.
    pub host_port: u32,
    /// The required type of socket.
    pub kind: SocketKind,
}

/// Positive answer to a guest's request.
#[derive(Debug)]
pub struct Accepted {
    /// One end of a socket of the requested type.
    pub socket: OwnedFd,
    /// Kept as long as the connection exists.
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

/// Accepts or refuses a guest's request. Runs on the event loop; must return quickly.
pub type Acceptor = Box<dyn FnMut(GuestStream) -> Option<Accepted> + Send>;

/// Called with the reason when the device has failed. Runs on the event loop; must return
/// quickly.
pub type OnFailure = Box<dyn FnMut(&str) + Send>;

/// A connection that host code requests.
pub(crate) struct ConnectRequest {
    pub(crate) guest_port: u32,
    pub(crate) preamble: Vec<u8>,
    pub(crate) status_reply: bool,
    pub(crate) wait: Duration,
    pub(crate) report: Report,
    pub(crate) member: Option<Member>,
    pub(crate) requested_at: Option<Instant>,
}

pub(crate) enum Command {
    Connect(OwnedFd, ConnectRequest),
    Listen {
        id: u64,
        /// All ports without an acceptor of their own, if `None`.
        host_port: Option<u32>,
        acceptor: Acceptor,
    },
    Unlisten {
        id: u64,
        host_port: Option<u32>,
    },
    /// Ends all connections of a group.
    Cut(Group),
}

impl Command {
    /// Returns true for the request of a connection of `group`.
    fn is_of(&self, group: &Group) -> bool {
        let member = match self {
            Self::Connect(_, request) => request.member.as_ref(),
            _ => None,
        };
        member.is_some_and(|member| member.group() == group)
    }
}

/// State shared by handles and the device.
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
    /// Creates a mailbox in which `most` requests for connections may wait.
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
            // Only host code sends these, and few.
            Command::Listen { .. } | Command::Unlisten { .. } | Command::Cut(_) => usize::MAX,
        };
        match self.commands.put(command, most) {
            Ok(true) => signal(self.wake.as_fd()),
            Ok(false) => {}
            Err((Command::Connect(_, mut request), Refused::Full)) => {
                self.counters.refused.add(1);
                request.report.send(Err(ConnectError::Limit));
            }
            // Dropping the command notifies the requester.
            Err(_) => {}
        }
    }

    pub(crate) fn failed(&self, reason: &str) {
        let callback = self.on_failure.lock();
        if let Some(callback) = &mut *callback.unwrap_or_else(PoisonError::into_inner) {
            callback(reason);
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
    /// Connects `stream`, any stream or seqpacket socket, to `guest_port`. It becomes
    /// non-blocking, and is closed when the connection ends or fails. A request that
    /// precedes the guest's driver waits for it, up to the answer timeout; one that follows
    /// a failure of the driver is refused.
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
            requested_at: self.mailbox.profiler.begin(),
        };
        self.mailbox.send(Command::Connect(stream, request));
    }

    /// Handles the guest's requests for `host_port` with `acceptor`, replacing an earlier
    /// one, as long as the returned value exists.
    pub fn listen(&self, host_port: u32, acceptor: Acceptor) -> Listening {
        self.start_listening(Some(host_port), acceptor)
    }

    /// Handles the guest's requests for all ports without an acceptor of their own,
    /// replacing an earlier one, as long as the returned value exists.
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

    /// Ends all connections of a group that were requested before, without waiting for data
    /// in flight; requests that the device has not taken end immediately.
    pub fn cut(&self, group: &Group) {
        let mailbox = &self.mailbox;
        // Without the lock: callbacks of the dropped requests may send commands.
        drop(mailbox.commands.take_out(|command| command.is_of(group)));
        mailbox.send(Command::Cut(group.clone()));
    }

    /// Sets a callback for failures of the device that its driver causes: all connections
    /// have then ended, and no others are possible until the driver resets the device.
    /// Replaces an earlier callback.
    pub fn on_failure(&self, callback: OnFailure) {
        let callback_slot = self.mailbox.on_failure.lock();
        *callback_slot.unwrap_or_else(PoisonError::into_inner) = Some(callback);
    }

    /// Returns the current counters.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.mailbox.counters.read()
    }

    /// Returns the profiler, which measures once it is started.
    #[must_use]
    pub fn profiler(&self) -> &Profiler {
        &self.mailbox.profiler
    }
}

/// Registration of an acceptor; dropping it removes the acceptor. Connections that it
/// accepted continue.
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
    /// Keeps the acceptor registered as long as the device exists.
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
    fn a_failure_is_reported_after_one_whose_callback_panicked() {
        let mailbox = Arc::new(Mailbox::new(new_eventfd().unwrap(), 8));
        let handle = MuxerHandle {
            mailbox: Arc::clone(&mailbox),
        };
        handle.on_failure(Box::new(|_| panic!("in a test")));
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
