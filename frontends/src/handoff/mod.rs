//! Connections that a router has accepted and hands over with the bytes it has read.
//!
//! A router connects to the socket and sends any number of messages `[u32 BE
//! length][payload]`, each with a stream socket (SCM_RIGHTS) attached to any of its
//! bytes. The length is 1 to 1 MiB. The guest receives the payload first and then the
//! bytes of the socket. [`HandoffSender`] is the router's side.
//!
//! A router that violates the protocol is disconnected, and the descriptors of its
//! incomplete message are closed; streams that were handed over before continue.

pub(crate) mod message;
mod sender;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sm_devices_vsock::{ConnectOptions, Limit, MuxerHandle, Permit, ProfileStage};
use sm_event_loop::{
    EventHandler, EventLoopHandle, Interest, Readiness, Registered, Registry, Timer,
};
use sm_guest_proto::forward::ForwardHeader;
use sm_guest_proto::port;

use self::message::HandoffMessage;
pub use self::sender::HandoffSender;
use crate::acceptor::{CLOSING_ROUNDS, LISTENER, ListenerAcceptor};
use crate::handle::Frontend;
use crate::service::{FrontendService, HandlerWaker};
use crate::shortage::{Retries, is_shortage};
use crate::socket_path;
use crate::{Error, FrontendHandle, LocalAddress, token};

/// Longest payload of one handoff, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Bytes of the length field.
const HEADER: usize = 4;
/// Routers served at once.
const MAX_ROUTERS: usize = 64;
/// Reads served before other handlers get their turn.
const BATCH: usize = 64;
/// Time limit of one handoff, and idle time after which a router makes room for another.
const HANDOFF_TIMEOUT: Duration = Duration::from_secs(10);
const FRONTEND: &str = "handoff";

/// A descriptor limit may allow more streams.
const PERMITS: u64 = 1;
/// First token of routers.
const FIRST: u64 = 2;

/// Edge-triggered: routers that wait for a descriptor are not read in the meantime.
const NEW_BYTES: Interest = Interest::READ.edge_triggered();

/// Builder of a handoff frontend.
#[derive(Clone, Debug)]
pub struct HandoffFrontend {
    path: PathBuf,
    target: ForwardHeader,
    limit: Limit,
    handoff_timeout: Duration,
}

impl HandoffFrontend {
    /// Creates a frontend that will listen on `path`, and connect the streams to a TCP
    /// port of the guest.
    #[must_use]
    pub fn new(path: &Path, target: ForwardHeader) -> Self {
        Self {
            path: path.to_owned(),
            target,
            limit: Limit::none(),
            handoff_timeout: HANDOFF_TIMEOUT,
        }
    }

    /// Sets the limit from which each stream takes one descriptor. Routers wait while it
    /// is reached. The routers themselves, at most 64, are not counted.
    #[must_use]
    pub fn limit(mut self, limit: &Limit) -> Self {
        self.limit = limit.clone();
        self
    }

    /// Sets the time limit of a handoff that has begun, which is also the time after
    /// which an idle router is disconnected if others wait. The default is 10 s.
    #[must_use]
    pub fn handoff_timeout(mut self, handoff_timeout: Duration) -> Self {
        self.handoff_timeout = handoff_timeout;
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
        let failed = || socket_path::failed(FRONTEND, "wait for routers on", &self.path);
        let handoff = Handoff {
            acceptor: ListenerAcceptor::new(listener, 0, service.limit.clone()),
            target: self.target,
            handoff_timeout: self.handoff_timeout,
            service: service.clone(),
            waker: None,
            routers: HashMap::new(),
            next_token: FIRST,
            retries: Retries::default(),
            backlog_waits: false,
        };
        let address = LocalAddress::Unix(self.path.clone());
        FrontendHandle::start(handoff, address, Some(socket_path), service, event_loop)
            .map_err(failed())
    }
}

struct RouterConnection {
    stream: Registered<UnixStream>,
    message: HandoffMessage,
    /// Permit for the stream of the current handoff.
    permit: Option<Permit>,
    /// True while the router is not read because the descriptor limit is reached.
    is_paused: bool,
    /// End of the time limit of the current handoff, or of being idle.
    deadline: Option<Timer>,
    /// Time at which the router exceeded its idle time.
    idle_since: Option<Instant>,
}

struct Handoff {
    acceptor: ListenerAcceptor<UnixListener>,
    target: ForwardHeader,
    handoff_timeout: Duration,
    service: FrontendService,
    waker: Option<HandlerWaker>,
    routers: HashMap<u64, RouterConnection>,
    next_token: u64,
    /// Routers that are read again after a memory shortage.
    retries: Retries,
    /// True if a router may be in the backlog while [`MAX_ROUTERS`] are connected.
    backlog_waits: bool,
}

impl Handoff {
    /// Accepts some routers. Returns true if there may be more.
    fn accept(&mut self, registry: &mut dyn Registry) -> bool {
        let Some(waker) = self.waker.clone() else {
            return false;
        };
        if self.routers.len() >= MAX_ROUTERS && !self.evict_idle(registry) {
            self.backlog_waits = true;
            return false;
        }
        let free = MAX_ROUTERS.saturating_sub(self.routers.len());
        let accepted = self.acceptor.accept(free, &waker, &self.service, registry);
        for (stream, _) in accepted {
            if let Err(error) = self.add(stream, registry) {
                self.service.counters.refuse(error);
            }
        }
        self.acceptor.has_more()
    }

    fn add(&mut self, stream: UnixStream, registry: &mut dyn Registry) -> io::Result<()> {
        let token = self.next_token;
        let stream = registry.add(stream, token, NEW_BYTES)?;
        self.next_token += 1;
        let router = RouterConnection {
            stream,
            message: HandoffMessage::default(),
            permit: None,
            is_paused: false,
            deadline: registry.set_timer_after(self.handoff_timeout, token | token::DEADLINE),
            idle_since: None,
        };
        self.routers.insert(token, router);
        // The event of bytes that have already arrived may have been missed.
        registry.call_again(token);
        Ok(())
    }

    /// Disconnects the router that has been idle for longest, if it exceeded its idle
    /// time.
    fn evict_idle(&mut self, registry: &mut dyn Registry) -> bool {
        let idle = self
            .routers
            .iter()
            .filter_map(|(&token, router)| Some((router.idle_since?, token)));
        let Some((_, token)) = idle.min() else {
            return false;
        };
        let why = "the router was idle, and others wait";
        self.service.counters.evict(why);
        self.remove(token, registry);
        true
    }

    fn remove(&mut self, token: u64, registry: &mut dyn Registry) {
        if let Some(router) = self.routers.remove(&token) {
            registry.remove(router.stream);
            if let Some(timer) = router.deadline {
                registry.cancel_timer(timer);
            }
            self.retries.remove(token, registry);
            if std::mem::take(&mut self.backlog_waits) {
                registry.call_again(LISTENER);
            }
        }
    }

    /// Handles the expired deadline of a router, which is in a handoff or idle.
    fn handle_deadline(&mut self, token: u64, registry: &mut dyn Registry) {
        let Some(router) = self.routers.get_mut(&token) else {
            return;
        };
        if router.is_paused {
            // The router waits for a descriptor, which is no fault of its own.
            router.deadline =
                registry.set_timer_after(self.handoff_timeout, token | token::DEADLINE);
            return;
        }
        router.deadline = None;
        if router.message.has_begun() {
            self.service
                .counters
                .evict("a handoff was not complete in time");
            return self.remove(token, registry);
        }
        router.idle_since = Some(registry.now());
        if self.backlog_waits {
            registry.call_again(LISTENER);
        }
    }

    /// Reads handoffs of a router. Returns true if there may be more.
    ///
    /// # Errors
    /// `UnexpectedEof` when the router closed its connection; other kinds for protocol
    /// violations.
    fn serve(&mut self, token: u64, registry: &mut dyn Registry) -> io::Result<bool> {
        for _ in 0..BATCH {
            let Some(router) = self.routers.get_mut(&token) else {
                return Ok(false);
            };
            let had_begun = router.message.has_begun();
            if had_begun && router.permit.is_none() {
                let Some(waker) = self.waker.clone() else {
                    return Ok(false);
                };
                let limit = &self.service.limit;
                let permit = limit.take_or_wait(1, move || waker.wake(PERMITS));
                router.is_paused = permit.is_err();
                router.permit = permit.ok();
                if router.is_paused {
                    let why = "the limit of descriptors is reached";
                    self.service.counters.warn("routers wait", why);
                    return Ok(false);
                }
            }
            let complete = router.message.read_from(&router.stream)?;
            if !had_begun || complete {
                // The deadline restarts for this handoff, or for the idle time after it.
                if let Some(timer) = router.deadline.take() {
                    registry.cancel_timer(timer);
                }
                router.deadline =
                    registry.set_timer_after(self.handoff_timeout, token | token::DEADLINE);
                router.idle_since = None;
            }
            if complete {
                self.deliver(token)?;
            }
        }
        Ok(true)
    }

    fn deliver(&mut self, token: u64) -> io::Result<()> {
        let Some(router) = self.routers.get_mut(&token) else {
            return Ok(());
        };
        let since = self.service.muxer.profiler().begin();
        let permit = router.permit.take();
        let (stream, payload) = std::mem::take(&mut router.message).into_parts()?;
        let mut preamble = self.target.encode().to_vec();
        preamble.extend(payload);
        let options = ConnectOptions::default()
            .preamble(preamble)
            .status_reply(true)
            .wait(self.target.wait());
        let member = self.service.group.join(permit);
        self.service
            .connect((port::FORWARD, options), stream, Some(member));
        self.service
            .muxer
            .profiler()
            .end(ProfileStage::Accept, since);
        Ok(())
    }

    fn router_ready(&mut self, token: u64, registry: &mut dyn Registry) {
        let error = match self.serve(token, registry) {
            Ok(true) => return registry.call_again(token),
            Ok(false) => return,
            Err(error) => error,
        };
        if is_shortage(&error) {
            self.retries.add(token, registry);
            return;
        }
        match error.kind() {
            io::ErrorKind::WouldBlock => return,
            io::ErrorKind::Interrupted => return registry.call_again(token),
            // The router closed its connection.
            io::ErrorKind::UnexpectedEof => {}
            _ => self.service.counters.refuse(error),
        }
        self.remove(token, registry);
    }
}

impl EventHandler for Handoff {
    fn start(&mut self, _registry: &mut dyn Registry) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, token: u64, _readiness: Readiness, registry: &mut dyn Registry) {
        match token {
            LISTENER => {
                self.accept(registry);
            }
            late if late & token::DEADLINE != 0 => {
                self.handle_deadline(late & !token::DEADLINE, registry);
            }
            due if due & token::RETRY != 0 => {
                let token = due & !token::RETRY;
                self.retries.passed(token);
                self.router_ready(token, registry);
            }
            PERMITS => {
                let waiting = self.routers.iter().filter(|(_, router)| router.is_paused);
                for (&token, _) in waiting {
                    registry.call_again(token);
                }
            }
            token => self.router_ready(token, registry),
        }
    }
}

impl Frontend for Handoff {
    fn register(&mut self, waker: HandlerWaker, registry: &mut dyn Registry) -> io::Result<()> {
        self.waker = Some(waker);
        self.acceptor.register(registry)
    }

    fn close(&mut self, registry: &mut dyn Registry) {
        let mut rounds = 0..CLOSING_ROUNDS;
        while rounds.next().is_some() && self.accept(registry) {}
        self.acceptor.close(registry);
        // Handoffs that routers have already sent are served; there will be no more.
        let tokens: Vec<u64> = self.routers.keys().copied().collect();
        for token in tokens {
            let _ = self.serve(token, registry);
            self.remove(token, registry);
        }
    }
}
