//! Changes of an engine that runs, from any thread.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::SocketType;
use sm_event_loop::{Interest, Registered, Registry, new_eventfd, signal};

use super::NetEngine;
use super::capture::FrameCapture;
use super::config::NameServers;
use super::flow::{FlowProtocol, TokenKind, token};
use super::rate::NetRate;
use super::socket;

/// Changes an engine while it runs, from any thread. Clones change the same engine.
///
/// A call returns at once. What it changes holds for each packet that the engine processes
/// afterwards, and an idle engine is woken.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// True if there are changes.
    is_pending: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    changes: Changes,
    /// Wakes the engine's event loop; `None` before the engine has started.
    waker: Option<Arc<OwnedFd>>,
    /// Number of the next port that is exposed.
    next_port: u64,
}

/// Changes that the engine has not applied.
#[derive(Debug, Default)]
pub(super) struct Changes {
    judge_again: bool,
    name_servers: Option<NameServers>,
    rate: Option<NetRate>,
    capture: Option<Option<FrameCapture>>,
    exposed: Vec<NewPort>,
    closed: Vec<u64>,
}

/// A port that is to be exposed.
#[derive(Debug)]
pub(crate) struct NewPort {
    pub(crate) number: u64,
    pub(crate) protocol: FlowProtocol,
    pub(crate) socket: OwnedFd,
    pub(crate) guest_port: u16,
}

/// A port of the host that reaches the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExposedPort {
    number: u64,
    address: SocketAddr,
}

impl ExposedPort {
    /// Returns the address of the host, with the port that it has.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl EngineHandle {
    pub(super) fn new() -> Self {
        Self {
            shared: Arc::default(),
        }
    }

    /// Has the policy judge all flows again: those that it prohibits now are reset.
    pub fn judge_again(&self) {
        self.change(|changes| changes.judge_again = true);
    }

    /// Makes the gateway a name server, as [`NetEngine::set_name_servers`].
    pub fn set_name_servers(&self, servers: NameServers) {
        self.change(|changes| changes.name_servers = Some(servers));
    }

    /// Limits the bytes of the guest in a second, as [`NetEngine::set_rate`].
    pub fn set_rate(&self, rate: NetRate) {
        self.change(|changes| changes.rate = Some(rate));
    }

    /// Writes all frames to a file, or ends that, as [`NetEngine::set_capture`].
    pub fn set_capture(&self, capture: Option<FrameCapture>) {
        self.change(|changes| changes.capture = Some(capture));
    }

    /// Exposes a port of the guest at an address of the host, whose port may be zero for any. The
    /// guest sees the addresses of clients, and that of the gateway for those on the host itself.
    /// Clients are not asked about by the policy. Those of UDP get their answers from that address;
    /// at an unspecified one it is the host that chooses which of its addresses answers.
    ///
    /// # Errors
    /// The address is not the host's or is in use, or the protocol is neither TCP nor UDP.
    pub fn expose(
        &self,
        protocol: FlowProtocol,
        address: SocketAddr,
        guest_port: u16,
    ) -> io::Result<ExposedPort> {
        let kind = match protocol {
            FlowProtocol::Tcp => SocketType::STREAM,
            FlowProtocol::Udp => SocketType::DGRAM,
            FlowProtocol::Echo => return Err(io::ErrorKind::Unsupported.into()),
        };
        let socket = socket::bind_port(address, kind)?;
        let address = socket::local_address(&socket)?;
        let mut number = 0;
        self.change_state(|state| {
            number = state.next_port;
            state.next_port += 1;
            state.changes.exposed.push(NewPort {
                number,
                protocol,
                socket,
                guest_port,
            });
        });
        Ok(ExposedPort { number, address })
    }

    /// Closes a port of [`Self::expose`] as soon as the engine takes note of it. Connections of TCP
    /// go on.
    pub fn unexpose(&self, port: ExposedPort) {
        self.change(|changes| changes.closed.push(port.number));
    }

    fn change(&self, apply: impl FnOnce(&mut Changes)) {
        self.change_state(|state| apply(&mut state.changes));
    }

    fn change_state(&self, apply: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        apply(&mut state);
        self.shared.is_pending.store(true, Ordering::Release);
        if let Some(waker) = &state.waker {
            signal(waker.as_fd());
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        let state = self.shared.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the changes; `None` if there are none, which costs a load.
    fn take(&self) -> Option<Changes> {
        if !self.shared.is_pending.load(Ordering::Acquire) {
            return None;
        }
        let mut state = self.lock();
        self.shared.is_pending.store(false, Ordering::Release);
        Some(std::mem::take(&mut state.changes))
    }
}

/// The engine's side of its handles.
pub(super) struct Control {
    handle: EngineHandle,
    waker: Option<Registered<Arc<OwnedFd>>>,
}

impl Control {
    pub(super) fn new() -> Self {
        Self {
            handle: EngineHandle::new(),
            waker: None,
        }
    }

    pub(super) fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Registers the descriptor that handles signal.
    fn start(&mut self, registry: &mut dyn Registry) {
        if self.waker.is_some() {
            return;
        }
        let added = new_eventfd().and_then(|fd| {
            let token = token(TokenKind::Handle, 0);
            registry.add(Arc::new(fd), token, Interest::READ.edge_triggered())
        });
        match added {
            Ok(waker) => {
                self.handle.lock().waker = Some(Arc::clone(&*waker));
                self.waker = Some(waker);
            }
            // Changes are applied at the next event.
            Err(error) => tracing::warn!(%error, "changes cannot wake the network"),
        }
    }

    /// Without a registry the event loop has ended.
    fn stop(&mut self, registry: Option<&mut (dyn Registry + '_)>) {
        self.handle.lock().waker = None;
        if let (Some(waker), Some(registry)) = (self.waker.take(), registry) {
            drop(registry.remove(waker));
        }
    }
}

impl NetEngine {
    /// Returns a handle that changes this engine while it runs.
    #[must_use]
    pub fn handle(&self) -> EngineHandle {
        self.control.handle()
    }

    /// Has handles wake the event loop of `registry`, which passes on the engine's tokens, until
    /// [`Self::reset`]. Without it, changes are applied at the next event.
    pub fn started(&mut self, registry: &mut dyn Registry) {
        self.control.start(registry);
        self.exposed.start(registry);
        self.apply(registry);
    }

    /// Applies what handles have changed.
    pub(super) fn apply(&mut self, registry: &mut dyn Registry) {
        let Some(changes) = self.control.handle.take() else {
            return;
        };
        if let Some(servers) = changes.name_servers {
            self.set_name_servers(servers);
        }
        for port in changes.exposed {
            self.exposed.add(port, registry);
        }
        for number in changes.closed {
            self.exposed.remove(number, registry, &mut self.journal);
        }
        if let Some(rate) = changes.rate {
            self.rates.set(rate, registry.now());
        }
        if let Some(capture) = changes.capture {
            self.set_capture(capture);
        }
        if changes.judge_again {
            let (mut turn, flows) = self.turn(registry);
            flows.tcp.judge_again(&mut turn);
            flows.udp.judge_again(&mut turn);
            flows.echoes.judge_again(&mut turn);
            flows.dns.judge_again(&mut turn);
        }
        // A turn sends the packets of this change.
        registry.call_again(token(TokenKind::Serve, 0));
    }

    pub(super) fn stop_control(&mut self, registry: Option<&mut (dyn Registry + '_)>) {
        self.control.stop(registry);
    }
}
