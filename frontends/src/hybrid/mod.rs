//! The hybrid vsock protocol of Firecracker and Cloud Hypervisor.
//!
//! A client connects to the socket and writes `CONNECT PORT\n`; when a listener in the
//! guest has accepted on that vsock port, the client reads `OK HOSTPORT\n`, and the bytes
//! of the stream follow. A connection from the guest to the host's port N is forwarded to
//! the socket `PATH_N`, which the server of that port creates.

pub(crate) mod line;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use sm_devices_vsock::{
    Accepted, ConnectOptions, GuestStream, Limit, Listening, Member, MuxerHandle, Permit,
    ProfileStage, SocketKind,
};
use sm_event_loop::{
    EventHandler, EventLoopHandle, Interest, Readiness, Registered, Registry, Timer,
};

use self::line::{MAX_LINE, RequestLine};
use crate::acceptor::{CLOSING_ROUNDS, LISTENER, ListenerAcceptor};
use crate::handle::Frontend;
use crate::peer::is_trusted_peer;
use crate::service::{FrontendService, HandlerWaker};
use crate::shortage::{Retries, is_shortage};
use crate::socket_path;
use crate::{Error, FrontendHandle, LocalAddress, token};

/// Clients without a complete request line; others wait in the backlog.
const MAX_UNDECIDED: usize = 256;
/// Time limit for the request line.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const FRONTEND: &str = "hybrid";

/// First token of clients.
const FIRST: u64 = 1;

/// Edge-triggered: an incomplete line stays in the socket.
const NEW_BYTES: Interest = Interest::READ.edge_triggered();

/// Builder of a hybrid frontend.
#[derive(Clone, Debug)]
pub struct HybridFrontend {
    path: PathBuf,
    limit: Limit,
    request_timeout: Duration,
}

impl HybridFrontend {
    /// Creates a frontend that will listen on `path`, and forward the guest's connections
    /// to the sockets `path_N`.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            limit: Limit::none(),
            request_timeout: REQUEST_TIMEOUT,
        }
    }

    /// Sets the limit from which each connection takes one descriptor. Clients beyond it
    /// wait in the kernel's backlog, connections of the guest are refused.
    #[must_use]
    pub fn limit(mut self, limit: &Limit) -> Self {
        self.limit = limit.clone();
        self
    }

    /// Sets the time limit for a client's request line. The default is 10 s.
    #[must_use]
    pub fn request_timeout(mut self, request_timeout: Duration) -> Self {
        self.request_timeout = request_timeout;
        self
    }

    /// Starts listening. The socket is as private as that of [`crate::UnixFrontend`].
    ///
    /// # Errors
    /// The path is in use, or a system call failed.
    pub fn start(
        self,
        muxer: MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<FrontendHandle, Error> {
        let (listener, socket_path) = socket_path::listen(FRONTEND, &self.path)?;
        let name = format!("{FRONTEND} {}", self.path.display());
        let service = FrontendService::new(name, muxer, self.limit);
        let failed = || socket_path::failed(FRONTEND, "wait for connections on", &self.path);
        let handler = Hybrid {
            acceptor: ListenerAcceptor::new(listener, 1, service.limit.clone()),
            request_timeout: self.request_timeout,
            service: service.clone(),
            waker: None,
            path: self.path.clone(),
            beside: None,
            undecided: HashMap::new(),
            next_token: FIRST,
            retries: Retries::default(),
            backlog_waits: false,
            closed: false,
        };
        let address = LocalAddress::Unix(self.path.clone());
        FrontendHandle::start(handler, address, Some(socket_path), service, event_loop)
            .map_err(failed())
    }
}

/// Connects a stream of the guest to the socket of its port, without waiting: a server
/// whose backlog is full counts as absent. A server of another user, which may have bound
/// the path first in a directory with too wide permissions, receives nothing.
fn connect_beside(path: &Path, request: GuestStream) -> Option<OwnedFd> {
    let kind = match request.kind {
        SocketKind::Stream => SocketType::STREAM,
        SocketKind::SeqPacket => SocketType::SEQPACKET,
    };
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{}", request.host_port));
    let address = SocketAddrUnix::new(PathBuf::from(name)).ok()?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).ok()?;
    rustix::net::connect(&socket, &address).ok()?;
    is_trusted_peer(&socket).ok()?.then_some(socket)
}

/// A client whose request line is incomplete.
struct Undecided {
    stream: Registered<UnixStream>,
    member: Member,
    /// End of the time limit for the request line.
    deadline: Option<Timer>,
}

struct Hybrid {
    acceptor: ListenerAcceptor<UnixListener>,
    request_timeout: Duration,
    service: FrontendService,
    waker: Option<HandlerWaker>,
    path: PathBuf,
    /// Accepts connections of the guest.
    beside: Option<Listening>,
    undecided: HashMap<u64, Undecided>,
    next_token: u64,
    /// Clients that are read again after a memory shortage.
    retries: Retries,
    /// True if a client may be in the backlog while [`MAX_UNDECIDED`] are undecided.
    backlog_waits: bool,
    closed: bool,
}

impl Hybrid {
    /// Accepts some clients. Returns true if there may be more.
    fn accept(&mut self, registry: &mut dyn Registry) -> bool {
        let Some(waker) = self.waker.clone() else {
            return false;
        };
        let free = MAX_UNDECIDED.saturating_sub(self.undecided.len());
        self.backlog_waits = free == 0;
        let accepted = self.acceptor.accept(free, &waker, &self.service, registry);
        for (stream, permit) in accepted {
            match self.add(stream, permit, registry) {
                Ok(()) => {}
                Err(error) => self.turn_away(&error),
            }
        }
        self.acceptor.has_more()
    }

    fn add(
        &mut self,
        stream: UnixStream,
        permit: Permit,
        registry: &mut dyn Registry,
    ) -> io::Result<()> {
        let member = self.service.group.join(Some(permit));
        // Most clients have already sent their line.
        let token = self.next_token;
        match read_line(&stream) {
            Ok(Some(port)) => {
                self.connect(port, stream, member);
                return Ok(());
            }
            Ok(None) => {}
            Err(error) if is_shortage(&error) => {
                self.retries.add(token, registry);
            }
            Err(error) => return Err(error),
        }
        let stream = registry.add(stream, token, NEW_BYTES)?;
        self.next_token += 1;
        let client = Undecided {
            stream,
            member,
            deadline: registry.set_timer_after(self.request_timeout, token | token::DEADLINE),
        };
        self.undecided.insert(token, client);
        Ok(())
    }

    fn remove(&mut self, token: u64, registry: &mut dyn Registry) -> Option<(UnixStream, Member)> {
        let client = self.undecided.remove(&token)?;
        let stream = registry.remove(client.stream);
        if let Some(timer) = client.deadline {
            registry.cancel_timer(timer);
        }
        self.retries.remove(token, registry);
        if std::mem::take(&mut self.backlog_waits) {
            registry.call_again(LISTENER);
        }
        self.deregister_when_idle();
        Some((stream, client.member))
    }

    fn deregister_when_idle(&self) {
        if let Some(waker) = &self.waker
            && self.closed
            && self.undecided.is_empty()
        {
            waker.remove();
        }
    }

    fn client_ready(&mut self, token: u64, registry: &mut dyn Registry) {
        let Some(client) = self.undecided.get(&token) else {
            return;
        };
        let wanted = read_line(&client.stream);
        match &wanted {
            Ok(None) => return,
            Err(error) if is_shortage(error) => {
                self.retries.add(token, registry);
                return;
            }
            _ => {}
        }
        let Some((stream, member)) = self.remove(token, registry) else {
            return;
        };
        match wanted {
            Ok(Some(port)) => self.connect(port, stream, member),
            Ok(None) => {}
            Err(error) => self.turn_away(&error),
        }
    }

    fn turn_away(&self, error: &io::Error) {
        // A client that has disconnected is not counted as refused.
        if error.kind() != io::ErrorKind::UnexpectedEof {
            self.service.counters.refuse(error);
        }
    }

    fn connect(&self, port: u32, stream: UnixStream, member: Member) {
        let since = self.service.muxer.profiler().begin();
        let answer = match stream.try_clone() {
            // The second descriptor is temporary, so a reached limit does not delay it.
            Ok(answer) => (answer, self.service.limit.take(1)),
            Err(error) => return self.service.counters.refuse(error),
        };
        let options = ConnectOptions::default().on_result(move |result| {
            let (answer, _permit) = answer;
            if let Ok(host_port) = result {
                // The answer is the first data on this socket, so the buffer has
                // space for it.
                let line = format!("OK {host_port}\n");
                let _ = rustix::io::write(&answer, line.as_bytes());
            }
        });
        self.service
            .connect((port, options), stream.into(), Some(member));
        self.service
            .muxer
            .profiler()
            .end(ProfileStage::Accept, since);
    }
}

/// Reads the request line from the stream, and nothing after it, and returns its port;
/// `None` if the line is incomplete.
fn read_line(stream: &UnixStream) -> io::Result<Option<u32>> {
    let mut bytes = [0; MAX_LINE];
    let count = match rustix::net::recv(stream, &mut bytes[..], RecvFlags::PEEK) {
        Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok((count, _)) => count,
        Err(rustix::io::Errno::AGAIN) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match line::read(bytes.get(..count).unwrap_or_default()) {
        RequestLine::Part => Ok(None),
        RequestLine::Request { port, len } => {
            let line = bytes.get_mut(..len).unwrap_or_default();
            rustix::net::recv(stream, line, RecvFlags::empty())?;
            Ok(Some(port))
        }
        RequestLine::Malformed => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the request is not CONNECT PORT",
        )),
    }
}

impl EventHandler for Hybrid {
    fn start(&mut self, _registry: &mut dyn Registry) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, token: u64, _readiness: Readiness, registry: &mut dyn Registry) {
        match token {
            LISTENER => {
                self.accept(registry);
            }
            late if late & token::DEADLINE != 0 => {
                let why = "the request line was not complete in time";
                self.service.counters.evict(why);
                self.remove(late & !token::DEADLINE, registry);
            }
            due if due & token::RETRY != 0 => {
                let token = due & !token::RETRY;
                self.retries.passed(token);
                self.client_ready(token, registry);
            }
            token => self.client_ready(token, registry),
        }
    }
}

impl Frontend for Hybrid {
    fn register(&mut self, waker: HandlerWaker, registry: &mut dyn Registry) -> io::Result<()> {
        self.waker = Some(waker);
        let (path, service) = (self.path.clone(), self.service.clone());
        let acceptor = move |request| {
            let permit = service.limit.take(1)?;
            let socket = connect_beside(&path, request)?;
            service.counters.accept();
            let member = Some(service.group.join(Some(permit)));
            Some(Accepted { socket, member })
        };
        self.beside = Some(self.service.muxer.listen_to_others(Box::new(acceptor)));
        self.acceptor.register(registry)
    }

    fn close(&mut self, registry: &mut dyn Registry) {
        let mut rounds = 0..CLOSING_ROUNDS;
        while rounds.next().is_some() && self.accept(registry) {}
        self.acceptor.close(registry);
        // From now on, connections of the guest are refused.
        self.beside = None;
    }

    fn cut(&mut self, registry: &mut dyn Registry) {
        let tokens: Vec<u64> = self.undecided.keys().copied().collect();
        for token in tokens {
            self.remove(token, registry);
        }
    }

    fn outlives_handle(&mut self) -> bool {
        self.closed = true;
        !self.undecided.is_empty()
    }
}
