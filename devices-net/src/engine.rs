//! The network behind the device: connections of the guest end here, and are continued by
//! sockets of the host.
//!
//! [`NetEngine`] is a gateway for one guest. It needs no privileges: each connection, flow of
//! datagrams or echo request of the guest is one of the host's process, after the
//! [`EgressPolicy`] has agreed. Behind a virtio-net device it is a
//! [`NetBackend`](crate::NetBackend); a program with a TAP calls its three methods itself.
//!
//! | module | idea |
//! |---|---|
//! | `config`, `stats` | addresses and limits; counters |
//! | `handle` | changes of an engine that runs |
//! | `incoming` | frames of the guest |
//! | `link` | the way from and to the guest |
//! | `egress` | the decision about each flow |
//! | `events`, `journal` | records of flows and refusals |
//! | `tcp`, `udp`, `echo` | flows |
//! | `dns` | the guest's name server |
//! | `expose` | ports of the host that reach the guest |
//! | `fragments` | packets that come in parts |
//! | `output`, `answers` | frames for the guest |
//! | `rate`, `capture` | limits of bytes in a second; frames in a file |
//! | `store`, `table`, `sequence` | bytes and flows |
//!
//! Architecture invariants: memory is bounded by [`EngineLimits`] and constants, whatever guest
//! and peers do; a packet of an established flow allocates nothing; the guest's headers are
//! copied once and only the copy is used; no call waits for the guest or the network.

mod answers;
mod backend;
mod capture;
mod config;
mod dns;
mod echo;
mod egress;
mod events;
mod expose;
mod flow;
mod fragments;
mod handle;
mod incoming;
mod journal;
mod link;
mod output;
mod rate;
mod sequence;
mod socket;
mod stats;
mod store;
mod table;
mod tcp;
mod turn;
mod udp;

use std::os::fd::OwnedFd;
use std::time::Instant;

use sm_event_loop::{Readiness, Registry, Timer};

use self::answers::Answers;
use self::dns::DnsProxy;
use self::echo::Echoes;
use self::expose::ExposedPorts;
use self::flow::{FlowKey, TokenKind, parse_token, token};
use self::fragments::Fragments;
use self::handle::Control;
use self::journal::Journal;
use self::output::{Framer, Output, end_capture};
use self::rate::Rates;
use self::tcp::TcpFlows;
use self::turn::Turn;
use self::udp::UdpFlows;
use crate::wire::{Head, MacAddress, TcpSegment};

pub use self::backend::EngineBackend;
pub use self::capture::FrameCapture;
pub use self::config::{EngineConfig, EngineLimits, NameServers};
pub use self::egress::{EgressPolicy, EgressRequest, EgressVerdict, FlowProtocol, RefusalReason};
pub use self::events::{
    EventSink, FlowEnd, FlowRecord, FlowSummary, NetEvent, RefusedFlow, RefusedName, event_channel,
};
pub use self::handle::{EngineHandle, ExposedPort};
pub use self::link::{GuestFrame, GuestLink, LinkFull, LinkOffloads};
pub use self::rate::NetRate;
pub use self::stats::EngineStats;

/// Visits of flows until other handlers of the event loop have their turn.
const VISITS: usize = 64;
/// Bytes for the guest until they have.
const BYTES: u64 = 256 << 10;

/// A gateway for one guest.
///
/// All calls of one engine have the registry of one event handler, which passes on events of
/// tokens for which [`Self::has_token`] is true.
pub struct NetEngine {
    config: EngineConfig,
    policy: Box<dyn EgressPolicy>,
    stats: EngineStats,
    answers: Answers,
    tcp: TcpFlows,
    udp: UdpFlows,
    echoes: Echoes,
    dns: DnsProxy,
    exposed: ExposedPorts,
    fragments: Fragments,
    fragments_timer: Option<Timer>,
    control: Control,
    journal: Journal,
    rates: Rates,
    name_clients: Vec<(FlowKey, OwnedFd)>,
    capture: Option<FrameCapture>,
    /// Ethernet address of the guest, from its frames.
    guest: MacAddress,
}

impl std::fmt::Debug for NetEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetEngine")
            .field("config", &self.config)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl NetEngine {
    /// Creates a gateway, which uses neither descriptors nor memory for flows yet.
    #[must_use]
    pub fn new(config: EngineConfig, mut policy: Box<dyn EgressPolicy>) -> Self {
        let control = Control::new();
        policy.attached(control.handle());
        Self {
            config,
            policy,
            stats: EngineStats::default(),
            answers: Answers::default(),
            tcp: TcpFlows::new(config.limits),
            udp: UdpFlows::new(config.limits),
            echoes: Echoes::new(config.limits),
            dns: DnsProxy::new(config.limits),
            exposed: ExposedPorts::new(config.limits),
            fragments: Fragments::new(config.limits),
            fragments_timer: None,
            control,
            journal: Journal::new(),
            rates: Rates::default(),
            name_clients: Vec::new(),
            capture: None,
            guest: config.guest_mac,
        }
    }

    /// Makes the gateway a name server, which asks these of the host. Connections to its port 53
    /// reach the first of them without a question to [`EgressPolicy::judge`], or end in the engine
    /// if the policy restricts names. Without name servers, the port is one as others.
    pub fn set_name_servers(&mut self, servers: NameServers) {
        self.dns.set_servers(servers);
    }

    /// Sets the receiver of events, which is called on the engine's thread.
    pub fn set_event_sink(&mut self, sink: EventSink) {
        self.journal.set_sink(sink);
    }

    /// Limits the bytes of the guest in a second, and those for it.
    pub fn set_rate(&mut self, rate: NetRate) {
        self.rates.set(rate, Instant::now());
    }

    /// Writes all frames to a file from now on, or ends that.
    pub fn set_capture(&mut self, capture: Option<FrameCapture>) {
        if let Some(mut ended) = std::mem::replace(&mut self.capture, capture) {
            let _ = ended.flush();
        }
    }

    /// Returns true for tokens of an engine's descriptors and timers.
    #[must_use]
    pub fn has_token(token: u64) -> bool {
        parse_token(token).is_some()
    }

    /// Returns the counters.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            tcp_flows: self.tcp.len() as u64,
            udp_flows: self.udp.len() as u64,
            ..self.stats
        }
    }

    fn turn<'a>(&'a mut self, registry: &'a mut dyn Registry) -> (Turn<'a>, Flows<'a>) {
        let now = registry.now();
        let name_server = self.dns.known_server();
        let turn = Turn {
            config: &self.config,
            policy: &mut *self.policy,
            stats: &mut self.stats,
            answers: &mut self.answers,
            journal: &mut self.journal,
            rates: &mut self.rates,
            name_clients: &mut self.name_clients,
            registry,
            guest: self.guest,
            now,
            name_server,
        };
        let flows = Flows {
            tcp: &mut self.tcp,
            udp: &mut self.udp,
            echoes: &mut self.echoes,
            dns: &mut self.dns,
            exposed: &mut self.exposed,
        };
        (turn, flows)
    }

    /// Processes an event of a descriptor, a timer, or a further turn. [`Self::serve`] is to be
    /// called afterwards.
    pub fn host_ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        let Some((kind, slot)) = parse_token(token) else {
            return;
        };
        self.apply(registry);
        if kind == TokenKind::Fragments {
            self.fragments_timer = None;
            if let Some(at) = self.fragments.expire(registry.now()) {
                self.fragments_timer = Some(registry.set_timer(at, token));
            }
            return;
        }
        let (mut turn, flows) = self.turn(registry);
        match kind {
            TokenKind::Tcp => flows.tcp.host_ready(&mut turn, slot, readiness),
            TokenKind::TcpTimer => flows.tcp.timer(&mut turn, slot),
            TokenKind::NameTimer => flows.tcp.name_timer(&mut turn),
            TokenKind::NameClient => flows.dns.client_ready(&mut turn, slot),
            TokenKind::Exposed => flows.exposed.host_ready(&mut turn, flows.tcp, slot),
            TokenKind::ExposedTimer => flows.exposed.timer(&mut turn),
            TokenKind::RateTimer => {
                turn.rates.passed();
                flows.tcp.resume(&mut turn);
                flows.udp.resume();
            }
            TokenKind::Udp => flows.udp.host_ready(slot, readiness),
            TokenKind::UdpTimer => flows.udp.timer(&mut turn),
            TokenKind::Echo => flows.echoes.host_ready(slot),
            TokenKind::EchoTimer => flows.echoes.timer(&mut turn),
            TokenKind::Dns => flows.dns.host_ready(&mut turn, slot),
            TokenKind::DnsTimer => flows.dns.timer(&mut turn),
            TokenKind::Journal => self.journal.timer(),
            TokenKind::Serve | TokenKind::Fragments | TokenKind::Handle => {}
        }
    }

    /// Sends to the guest until there is nothing to send, the link is full, or others should
    /// have their turn; the registry then calls again with a token of the engine.
    pub fn serve(&mut self, link: &mut dyn GuestLink, registry: &mut dyn Registry) {
        if self.send_all(link, registry) == Ok(true) {
            registry.call_again(token(TokenKind::Serve, 0));
        }
        let now = registry.now();
        (self.journal).report(&mut *self.policy, now, Some(registry));
        self.rates.arm(registry);
        if let Some(capture) = &mut self.capture
            && let Err(error) = capture.flush()
        {
            end_capture(&mut self.capture, &error);
        }
    }

    /// Returns true if there is more to send.
    fn send_all(
        &mut self,
        link: &mut dyn GuestLink,
        registry: &mut dyn Registry,
    ) -> Result<bool, LinkFull> {
        let start = self.stats.bytes_to_guest;
        let mut output = Output {
            link,
            framer: Framer {
                config: &self.config,
                guest: self.guest,
            },
            stats: &mut self.stats,
            journal: &mut self.journal,
            rates: &mut self.rates,
            capture: &mut self.capture,
            now: registry.now(),
        };
        for _ in 0..VISITS {
            self.answers.serve(&mut output)?;
            let tcp = self.tcp.serve(&mut output, registry)?;
            self.dns.serve(&mut output)?;
            let udp = self.udp.serve(&mut output, &mut self.answers)?;
            let exposed = self.exposed.serve(&mut output, registry)?;
            let echoes = self.echoes.serve(&mut output)?;
            if !(tcp || udp || exposed || echoes) {
                self.answers.serve(&mut output)?;
                return Ok(false);
            }
            if output.stats.bytes_to_guest - start >= BYTES {
                break;
            }
        }
        Ok(true)
    }

    /// A segment that belongs to no flow of this engine.
    fn stray(&self, key: &FlowKey, segment: &TcpSegment) -> Head {
        let framer = Framer {
            config: &self.config,
            guest: self.guest,
        };
        framer.stray_segment(key, segment)
    }

    /// Ends all flows. Without a registry the event loop has ended.
    pub fn reset(&mut self, mut registry: Option<&mut (dyn Registry + '_)>) {
        self.answers.clear();
        self.fragments.clear();
        self.stop_control(registry.as_deref_mut());
        let journal = &mut self.journal;
        self.tcp.clear(registry.as_deref_mut(), journal);
        self.udp.clear(registry.as_deref_mut(), journal);
        self.exposed.clear(registry.as_deref_mut(), journal);
        self.echoes.clear(registry.as_deref_mut());
        self.dns.clear(registry.as_deref_mut());
        self.name_clients.clear();
        let now = registry.as_deref().map_or_else(Instant::now, Registry::now);
        self.journal.report(&mut *self.policy, now, None);
        self.journal.stop(registry.as_deref_mut());
        for timer in [self.fragments_timer.take(), self.rates.take_timer()] {
            if let (Some(registry), Some(timer)) = (registry.as_deref_mut(), timer) {
                registry.cancel_timer(timer);
            }
        }
    }
}

/// The flows of an engine, during one call.
struct Flows<'a> {
    tcp: &'a mut TcpFlows,
    udp: &'a mut UdpFlows,
    echoes: &'a mut Echoes,
    dns: &'a mut DnsProxy,
    exposed: &'a mut ExposedPorts,
}
