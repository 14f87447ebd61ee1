//! The hybrid vsock protocol of Firecracker and Cloud Hypervisor.
//!
//! A client connects to the socket and writes `CONNECT PORT\n`; once something in
//! the guest has accepted on that vsock port, it reads `OK HOSTPORT\n`, and the
//! bytes of the stream follow. What a guest opens to the host's port N is
//! connected to the socket `PATH_N`, which whoever serves that port makes.

pub(crate) mod line;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use sm_devices_vsock::{
    Accepted, ConnectOptions, GuestStream, Limit, Listening, Member, MuxerHandle, Permit,
    SocketKind, Stage,
};
use sm_event_loop::{EventHandler, EventLoopHandle, Interest, Readiness, Registration, Registry};

use self::line::{Line, MAX_LINE};
use crate::deadlines::Deadlines;
use crate::gate::{CLOSING_ROUNDS, Gate, LISTENER};
use crate::handle::Frontend;
use crate::peer::is_trusted_peer;
use crate::place;
use crate::service::{Bell, Service};
use crate::shortage::{Retries, is_shortage};
use crate::{Error, FrontendHandle, LocalAddress};

/// Clients that have not said yet what they want; more wait in the backlog.
const MAX_UNDECIDED: usize = 256;
/// Time for a client to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);
const FRONTEND: &str = "hybrid";

const TIMER: u64 = 1;
/// Clients that could not be heard for want of memory.
const SHORTAGE: u64 = 2;
/// Tokens of clients begin here.
const FIRST: u64 = 3;

/// Told once per change: the beginning of a line stays in the socket.
const NEW_BYTES: Interest = Interest {
    readable: true,
    writable: false,
    edge: true,
};

/// A frontend to be started.
#[derive(Clone, Debug)]
pub struct HybridFrontend {
    path: PathBuf,
    limit: Limit,
    patience: Duration,
}

impl HybridFrontend {
    /// A frontend that will listen on `path`, and connect what the guest opens to
    /// sockets beside it.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            limit: Limit::none(),
            patience: PATIENCE,
        }
    }

    /// Takes descriptors, one for each connection, from this limit. When there are
    /// none left, clients wait in the system's backlog and the guest is refused.
    #[must_use]
    pub fn limit(mut self, limit: &Limit) -> Self {
        self.limit = limit.clone();
        self
    }

    /// How long a client may take to say what it wants: 10 s unless this is called.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Starts listening; the socket is private as [`crate::UnixFrontend`]'s is.
    ///
    /// # Errors
    /// The place is taken, or the system refused.
    pub fn start(
        self,
        muxer: MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<FrontendHandle, Error> {
        let (listener, place) = place::listen(FRONTEND, &self.path)?;
        let name = format!("{FRONTEND} {}", self.path.display());
        let service = Service::new(name, muxer, self.limit);
        let failed = || place::failed(FRONTEND, "wait for connections on", &self.path);
        let handler = Hybrid {
            gate: Gate::new(listener, 1, service.limit.clone()),
            patience: self.patience,
            service: service.clone(),
            bell: None,
            path: self.path.clone(),
            beside: None,
            undecided: HashMap::new(),
            next_token: FIRST,
            deadlines: Deadlines::new().map_err(failed())?,
            retries: Retries::new().map_err(failed())?,
            somebody_waits: false,
            closed: false,
        };
        let address = LocalAddress::Unix(self.path.clone());
        FrontendHandle::start(handler, address, Some(place), service, event_loop).map_err(failed())
    }
}

/// Connects a stream of the guest's to the socket of its port. Never waits: a
/// server whose backlog is full is as good as none. So is one of another user, who may
/// have come first to a directory that all can write to: it gets no byte.
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

/// A client that has not said yet what it wants.
struct Undecided {
    stream: UnixStream,
    registration: Registration,
    member: Member,
    deadline: Instant,
}

struct Hybrid {
    gate: Gate<UnixListener>,
    patience: Duration,
    service: Service,
    bell: Option<Bell>,
    path: PathBuf,
    /// Answers what the guest opens.
    beside: Option<Listening>,
    undecided: HashMap<u64, Undecided>,
    next_token: u64,
    deadlines: Deadlines,
    /// When clients are heard again, after there was no memory for it.
    retries: Retries,
    /// There may be a client in the backlog for which there is no place.
    somebody_waits: bool,
    closed: bool,
}

impl Hybrid {
    /// Accepts some clients; whether there may be more.
    fn accept(&mut self, registry: &mut Registry<'_>) -> bool {
        let Some(bell) = self.bell.clone() else {
            return false;
        };
        let room = MAX_UNDECIDED.saturating_sub(self.undecided.len());
        self.somebody_waits = room == 0;
        let accepted = self.gate.accept(room, &bell, &self.service, registry);
        for (stream, permit) in accepted {
            match self.add(stream, permit, registry) {
                Ok(()) => {}
                Err(error) => self.turn_away(&error),
            }
        }
        self.gate.has_more()
    }

    fn add(
        &mut self,
        stream: UnixStream,
        permit: Permit,
        registry: &mut Registry<'_>,
    ) -> io::Result<()> {
        let member = self.service.group.join(Some(permit));
        // Most have said what they want by now.
        let token = self.next_token;
        match take_line(&stream) {
            Ok(Some(port)) => {
                self.connect(port, stream, member);
                return Ok(());
            }
            Ok(None) => {}
            Err(error) if is_shortage(&error) => {
                self.retries.add(token);
            }
            Err(error) => return Err(error),
        }
        let registration = registry.add(&stream, token, NEW_BYTES)?;
        self.next_token += 1;
        let client = Undecided {
            stream,
            registration,
            member,
            deadline: self.deadlines.add(token, self.patience),
        };
        self.undecided.insert(token, client);
        Ok(())
    }

    fn remove(&mut self, token: u64, registry: &mut Registry<'_>) -> Option<(UnixStream, Member)> {
        let client = self.undecided.remove(&token)?;
        registry.remove(client.registration, &client.stream);
        self.deadlines.remove(client.deadline, token);
        if std::mem::take(&mut self.somebody_waits) {
            registry.again(LISTENER);
        }
        self.leave_with_the_last();
        Some((client.stream, client.member))
    }

    fn leave_with_the_last(&self) {
        if let Some(bell) = &self.bell
            && self.closed
            && self.undecided.is_empty()
        {
            bell.remove();
        }
    }

    fn client_ready(&mut self, token: u64, registry: &mut Registry<'_>) {
        let Some(client) = self.undecided.get(&token) else {
            return;
        };
        let wanted = take_line(&client.stream);
        match &wanted {
            Ok(None) => return,
            Err(error) if is_shortage(error) => {
                self.retries.add(token);
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
        // Unless it has thought better of it.
        if error.kind() != io::ErrorKind::UnexpectedEof {
            self.service.counters.refuse(error);
        }
    }

    fn connect(&self, port: u32, stream: UnixStream, member: Member) {
        let begun = self.service.muxer.profiler().begin();
        let answer = match stream.try_clone() {
            // One more for a moment: not waited for.
            Ok(answer) => (answer, self.service.limit.take(1)),
            Err(error) => return self.service.counters.refuse(error),
        };
        let options = ConnectOptions {
            on_result: Some(Box::new(move |result| {
                let (answer, _permit) = answer;
                if let Ok(host_port) = result {
                    // The first thing that is written, so there is room for it.
                    let line = format!("OK {host_port}\n");
                    let _ = rustix::io::write(&answer, line.as_bytes());
                }
            })),
            ..ConnectOptions::default()
        };
        self.service
            .connect((port, options), stream.into(), Some(member));
        self.service.muxer.profiler().end(Stage::Accept, begun);
    }
}

/// The port of a request line, which is taken off the stream, and nothing after
/// it; `None` if not all of it is there yet.
fn take_line(stream: &UnixStream) -> io::Result<Option<u32>> {
    let mut bytes = [0; MAX_LINE];
    let count = match rustix::net::recv(stream, &mut bytes[..], RecvFlags::PEEK) {
        Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok((count, _)) => count,
        Err(rustix::io::Errno::AGAIN) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match line::read(bytes.get(..count).unwrap_or_default()) {
        Line::Part => Ok(None),
        Line::Request { port, len } => {
            let line = bytes.get_mut(..len).unwrap_or_default();
            rustix::net::recv(stream, line, RecvFlags::empty())?;
            Ok(Some(port))
        }
        Line::Nonsense => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it does not say CONNECT PORT",
        )),
    }
}

impl EventHandler for Hybrid {
    fn start(&mut self, _registry: &mut Registry<'_>) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, token: u64, _readiness: Readiness, registry: &mut Registry<'_>) {
        match token {
            LISTENER => {
                self.accept(registry);
            }
            TIMER => {
                while let Some(token) = self.deadlines.next_due() {
                    let why = "it did not say in time what it wants";
                    self.service.counters.evict(why);
                    self.remove(token, registry);
                }
            }
            SHORTAGE => {
                while let Some(token) = self.retries.next_due() {
                    registry.again(token);
                }
            }
            token => self.client_ready(token, registry),
        }
    }
}

impl Frontend for Hybrid {
    fn begin(&mut self, bell: Bell, registry: &mut Registry<'_>) -> io::Result<()> {
        self.bell = Some(bell);
        let (path, service) = (self.path.clone(), self.service.clone());
        let acceptor = move |request| {
            let permit = service.limit.take(1)?;
            let socket = connect_beside(&path, request)?;
            service.counters.accept();
            let member = Some(service.group.join(Some(permit)));
            Some(Accepted { socket, member })
        };
        self.beside = Some(self.service.muxer.listen_to_others(Box::new(acceptor)));
        registry.add(&self.deadlines, TIMER, Interest::READ)?;
        registry.add(&self.retries, SHORTAGE, Interest::READ)?;
        self.gate.begin(registry)
    }

    fn close(&mut self, registry: &mut Registry<'_>) {
        let mut rounds = 0..CLOSING_ROUNDS;
        while rounds.next().is_some() && self.accept(registry) {}
        self.gate.close(registry);
        // What the guest opens is refused from now on.
        self.beside = None;
    }

    fn cut(&mut self, registry: &mut Registry<'_>) {
        let tokens: Vec<u64> = self.undecided.keys().copied().collect();
        for token in tokens {
            self.remove(token, registry);
        }
    }

    fn stays(&mut self) -> bool {
        self.closed = true;
        !self.undecided.is_empty()
    }
}
