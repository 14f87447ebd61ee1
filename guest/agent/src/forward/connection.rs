//! A forwarded connection: header, connecting, then one pump per direction.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, connect, recv, send,
    shutdown, socket_with, sockopt,
};
use sm_event_loop::Key;
use sm_guest_proto::forward::{ForwardHeader, ForwardStatus, HEADER_LEN};

use super::listening;
use crate::reactor::{Class, Deadline, Interest, Reactor, Readiness, Token, Watched};
use crate::sending::{Refusal, send_bytes};

/// Parts of forward tokens.
mod part {
    pub(super) const HOST: u8 = 0;
    pub(super) const TCP: u8 = 1;
    pub(super) const RETRY: u8 = 2;
}

/// Maximum number of chunks moved per direction and event, so that other connections are
/// served.
const ROUNDS: usize = 4;

const FIRST_BACKOFF: Duration = Duration::from_millis(1);
const LONGEST_BACKOFF: Duration = Duration::from_millis(50);

/// One direction of a connection.
#[derive(Debug, Default)]
struct Pump {
    /// Bytes that were read but not written yet.
    pending: Vec<u8>,
    written: usize,
    /// The source is at end of file.
    at_end: bool,
    /// The sink has been shut down, or accepts no more bytes.
    done: bool,
    /// The kernel had no memory for the sink's next packet.
    starved: bool,
}

#[derive(Debug)]
enum ForwardPhase {
    Header {
        bytes: [u8; HEADER_LEN],
        received: usize,
    },
    /// Connecting to the given address family, or waiting for another attempt.
    Connecting {
        v6: bool,
    },
    Open,
    /// The status of a failure is yet to be sent.
    Refused,
    Closed,
}

/// A forwarded connection; see the module documentation.
#[derive(Debug)]
pub(super) struct Connection {
    host: Watched,
    tcp: Option<Watched>,
    phase: ForwardPhase,
    port: u16,
    deadline: Instant,
    backoff: Duration,
    /// The next attempt to connect.
    retry: Option<Deadline>,
    to_tcp: Pump,
    to_host: Pump,
    /// One side failed before both were at end of file.
    aborted: bool,
}

impl Pump {
    fn accepts_input(&self) -> bool {
        !self.at_end && !self.done && self.pending.is_empty()
    }

    fn is_blocked(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Moves as many bytes as possible without blocking.
    ///
    /// # Errors
    /// The source failed, so the connection must be closed.
    fn run(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        scratch: &mut [u8],
    ) -> Result<(), Errno> {
        self.flush(to);
        for _ in 0..ROUNDS {
            if !self.accepts_input() {
                break;
            }
            let count = match recv(from, &mut *scratch, RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    self.at_end = true;
                    break;
                }
                Ok((count, _)) => count,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error),
            };
            let bytes = scratch.get(..count).unwrap_or_default();
            let sent = self.send(bytes, to);
            if !self.done {
                self.pending
                    .extend_from_slice(bytes.get(sent..).unwrap_or_default());
            }
        }
        if self.at_end && !self.done && self.pending.is_empty() {
            self.done = true;
            let _ = shutdown(to, Shutdown::Write);
        }
        Ok(())
    }

    fn flush(&mut self, to: BorrowedFd<'_>) {
        if self.pending.is_empty() {
            return;
        }
        let pending = std::mem::take(&mut self.pending);
        self.written += self.send(pending.get(self.written..).unwrap_or_default(), to);
        if self.written < pending.len() && !self.done {
            self.pending = pending;
        } else {
            self.written = 0;
        }
    }

    /// Sends as many bytes as the sink accepts. A sink that accepts no more ends only
    /// this direction, because its own bytes may still be in transit.
    fn send(&mut self, bytes: &[u8], to: BorrowedFd<'_>) -> usize {
        let (count, refusal) = send_bytes(to, bytes);
        self.done |= refusal == Some(Refusal::Broken);
        self.starved = refusal == Some(Refusal::Starved);
        count
    }
}

impl Connection {
    pub(super) fn new(host: OwnedFd) -> Self {
        Self {
            host: Watched::new(host),
            tcp: None,
            phase: ForwardPhase::Header {
                bytes: [0; HEADER_LEN],
                received: 0,
            },
            port: 0,
            deadline: Instant::now(),
            backoff: FIRST_BACKOFF,
            retry: None,
            to_tcp: Pump::default(),
            to_host: Pump::default(),
            aborted: false,
        }
    }

    pub(super) fn ready(
        &mut self,
        reactor: &Reactor,
        key: Key,
        which: u8,
        ready: Readiness,
        scratch: &mut [u8],
    ) {
        match self.phase {
            ForwardPhase::Header { .. } => self.read_header(reactor, key),
            ForwardPhase::Connecting { v6 } if which == part::TCP => {
                let outcome = match &self.tcp {
                    Some(tcp) => sockopt::socket_error(tcp).unwrap_or_else(Err),
                    None => Err(Errno::NOTCONN),
                };
                self.connected(outcome, v6, reactor, key);
            }
            ForwardPhase::Connecting { .. } => {
                // Until the connection is open, only the end of the host's side is
                // relevant. Data that it sent ahead stays in the socket.
                let closed = ready.closed || ready.error;
                if closed || is_closed(self.host.as_fd()) {
                    self.phase = ForwardPhase::Closed;
                }
            }
            ForwardPhase::Open => self.pump(which, ready, scratch),
            ForwardPhase::Refused => {
                self.to_host.flush(self.host.as_fd());
                self.end_when_flushed();
            }
            ForwardPhase::Closed => {}
        }
    }

    fn read_header(&mut self, reactor: &Reactor, key: Key) {
        let ForwardPhase::Header { bytes, received } = &mut self.phase else {
            return;
        };
        match recv(&self.host, &mut bytes[*received..], RecvFlags::DONTWAIT) {
            Ok((count, _)) if count > 0 => *received += count,
            Err(Errno::AGAIN | Errno::INTR) => return,
            _ => {
                self.phase = ForwardPhase::Closed;
                return;
            }
        }
        if *received < HEADER_LEN {
            return;
        }
        match ForwardHeader::decode(*bytes) {
            Err(_) => self.finish(ForwardStatus::BadHeader),
            Ok(header) => {
                self.port = header.port;
                self.deadline = Instant::now() + Duration::from_millis(u64::from(header.wait_ms));
                self.phase = ForwardPhase::Connecting { v6: false };
                self.retry(reactor, key);
            }
        }
    }

    /// Answers with a failure and ends the connection.
    fn finish(&mut self, status: ForwardStatus) {
        self.phase = ForwardPhase::Refused;
        self.send_status(status);
        self.end_when_flushed();
    }

    /// Sends the status byte, now or when the host's socket takes it: the kernel may lack
    /// memory at the moment.
    fn send_status(&mut self, status: ForwardStatus) {
        self.to_host.pending.push(status as u8);
        self.to_host.flush(self.host.as_fd());
    }

    fn end_when_flushed(&mut self) {
        if !self.to_host.is_blocked() {
            self.phase = ForwardPhase::Closed;
        }
    }

    // ---- connecting ----

    /// Starts an attempt, with IPv4 first.
    pub(super) fn retry(&mut self, reactor: &Reactor, key: Key) {
        if matches!(self.phase, ForwardPhase::Connecting { .. }) && self.tcp.is_none() {
            self.attempt(false, reactor, key);
        }
    }

    fn attempt(&mut self, v6: bool, reactor: &Reactor, key: Key) {
        self.phase = ForwardPhase::Connecting { v6 };
        let port = match self.port {
            0 => listening::first(),
            port => Some(port),
        };
        let Some(port) = port else {
            return self.connected(Err(Errno::CONNREFUSED), true, reactor, key);
        };
        let (family, address) = if v6 {
            (
                AddressFamily::INET6,
                SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
            )
        } else {
            (
                AddressFamily::INET,
                SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            )
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let outcome = socket_with(family, SocketType::STREAM, flags, None).and_then(|socket| {
            let outcome = connect(&socket, &address);
            self.tcp = Some(Watched::new(socket));
            outcome
        });
        if outcome != Err(Errno::INPROGRESS) {
            self.connected(outcome, v6, reactor, key);
        }
    }

    fn connected(&mut self, outcome: Result<(), Errno>, v6: bool, reactor: &Reactor, key: Key) {
        if outcome.is_err() {
            self.tcp = None;
        }
        match outcome {
            Ok(()) => self.open(),
            // A missing address family counts as a port without a listener.
            Err(
                Errno::CONNREFUSED | Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL | Errno::NETUNREACH,
            ) => {
                if !v6 {
                    return self.attempt(true, reactor, key);
                }
                let next = Instant::now() + self.backoff;
                if next > self.deadline {
                    return self.finish(ForwardStatus::NoListener);
                }
                // This is the only place where the agent polls for a state: Linux has no
                // event for new listeners.
                self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
                let token = Token::new(Class::Forward, part::RETRY, key);
                self.retry = Some(reactor.deadline(next, token));
            }
            Err(_) => self.finish(ForwardStatus::Failed),
        }
    }

    fn open(&mut self) {
        self.send_status(ForwardStatus::Connected);
        if self.to_host.done {
            self.phase = ForwardPhase::Closed;
            return;
        }
        if let Some(tcp) = &self.tcp {
            // Small messages must not wait for the peer's acknowledgement.
            let _ = sockopt::set_tcp_nodelay(tcp, true);
        }
        self.phase = ForwardPhase::Open;
    }

    // ---- open ----

    fn pump(&mut self, which: u8, ready: Readiness, scratch: &mut [u8]) {
        let Some(tcp) = &self.tcp else {
            return;
        };
        let (host, tcp) = (self.host.as_fd(), tcp.as_fd());
        let source_ended = if which == part::HOST {
            self.to_tcp.at_end && !self.to_host.done
        } else {
            self.to_host.at_end && !self.to_tcp.done
        };
        // One direction has ended before, and now the other one cannot continue.
        let fd = if which == part::HOST { host } else { tcp };
        if source_ended && (ready.closed || ready.error || is_closed(fd)) {
            self.aborted = true;
            self.phase = ForwardPhase::Closed;
            return;
        }
        let outcome = self
            .to_tcp
            .run(host, tcp, scratch)
            .and_then(|()| self.to_host.run(tcp, host, scratch));
        self.aborted = outcome.is_err();
        if self.aborted || (self.to_tcp.done && self.to_host.done) {
            self.phase = ForwardPhase::Closed;
        }
    }

    /// Updates the watched events. Returns false if the connection is to be closed.
    pub(super) fn settle(&mut self, reactor: &Reactor, key: Key) -> bool {
        let token = |part| Token::new(Class::Forward, part, key);
        let (host, tcp) = match self.phase {
            ForwardPhase::Closed => return false,
            ForwardPhase::Header { .. } => (Interest::READ, Interest::NONE),
            ForwardPhase::Refused => (Interest::WRITE, Interest::NONE),
            ForwardPhase::Connecting { .. } => (
                Interest::WRITE.and(Interest::HANGUP).edge_triggered(),
                Interest::WRITE,
            ),
            ForwardPhase::Open => (
                interest(&self.to_tcp, &self.to_host),
                interest(&self.to_host, &self.to_tcp),
            ),
        };
        self.host.set_starved(self.to_host.starved);
        let host = self.host.set(reactor, token(part::HOST), host);
        let tcp = match &mut self.tcp {
            Some(watched) => {
                watched.set_starved(self.to_tcp.starved);
                watched.set(reactor, token(part::TCP), tcp)
            }
            None => Ok(()),
        };
        // A connection that cannot be watched is cut off, with bytes possibly unread.
        self.aborted |= host.is_err() || tcp.is_err();
        !self.aborted
    }

    pub(super) fn close(self) {
        if self.aborted
            && let Some(tcp) = &self.tcp
        {
            // Reset the connection, because a server that is only waiting would not
            // notice a second FIN.
            let _ = sockopt::set_socket_linger(tcp, Some(Duration::ZERO));
        }
    }
}

/// Returns the events to watch on a socket that `from_it` reads and `into_it` writes.
fn interest(from_it: &Pump, into_it: &Pump) -> Interest {
    let mut want = Interest::NONE;
    if from_it.accepts_input() {
        want = want.and(Interest::READ);
    }
    if into_it.is_blocked() {
        want = want.and(Interest::WRITE);
    }
    if want == Interest::NONE && !into_it.done {
        // While idle, one edge-triggered event reports that the peer has closed
        // completely. A closed vsock peer is reported as writable and not as hung up.
        want = Interest::WRITE.edge_triggered();
    }
    want
}

/// Returns true if a socket can no longer send. Sending zero bytes has no other effect.
fn is_closed(socket: BorrowedFd<'_>) -> bool {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    !matches!(send(socket, &[], flags), Ok(_) | Err(Errno::AGAIN))
}
