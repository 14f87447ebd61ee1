//! The parts of an engine that all its protocols use during one call.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Instant;

use sm_event_loop::Registry;

use super::answers::Answers;
use super::config::EngineConfig;
use super::egress::{EgressPolicy, EgressRequest, EgressVerdict, FlowProtocol};
use super::flow::{DNS_PORT, FlowKey};
use super::journal::Journal;
use super::output::Framer;
use super::rate::Rates;
use super::stats::EngineStats;
use crate::wire::{IcmpUnreachable, IpProtocol, MacAddress, QUOTED_TRANSPORT};

/// One call of an engine.
pub(crate) struct Turn<'a> {
    pub(crate) config: &'a EngineConfig,
    pub(crate) policy: &'a mut dyn EgressPolicy,
    pub(crate) stats: &'a mut EngineStats,
    pub(crate) answers: &'a mut Answers,
    pub(crate) journal: &'a mut Journal,
    pub(crate) rates: &'a mut Rates,
    /// Other ends of connections to the gateway's name server.
    pub(crate) name_clients: &'a mut Vec<(FlowKey, OwnedFd)>,
    pub(crate) registry: &'a mut dyn Registry,
    /// Ethernet address of the guest.
    pub(crate) guest: MacAddress,
    pub(crate) now: Instant,
    /// A name server of the host.
    pub(crate) name_server: Option<SocketAddr>,
}

impl Turn<'_> {
    pub(crate) fn framer(&self) -> Framer<'_> {
        Framer {
            config: self.config,
            guest: self.guest,
        }
    }

    /// Asks the policy about a flow.
    pub(crate) fn judge(&mut self, request: &EgressRequest) -> EgressVerdict {
        let verdict = match self.name_server {
            // Long answers: the guest's name server is that of the host.
            Some(server) if self.is_name_server(request) => match self.policy.restricts_names() {
                true => EgressVerdict::Prohibit,
                false => EgressVerdict::Connect(server),
            },
            _ => self.policy.judge(request),
        };
        if verdict == EgressVerdict::Prohibit {
            self.stats.prohibited += 1;
            self.journal.refused(self.policy, request);
        }
        verdict
    }

    /// Returns true for a flow to the gateway's name server that ends in the engine, as answers
    /// matter.
    pub(crate) fn serves_names(&self, request: &EgressRequest) -> bool {
        self.name_server.is_some() && self.is_name_server(request) && self.policy.restricts_names()
    }

    /// Asks the policy about a flow that it has allowed before.
    pub(crate) fn may_continue(&mut self, request: &EgressRequest) -> bool {
        match self.name_server.is_some() && self.is_name_server(request) {
            true => !self.policy.restricts_names(),
            false => self.policy.may_continue(request),
        }
    }

    fn is_name_server(&self, request: &EgressRequest) -> bool {
        request.protocol == FlowProtocol::Tcp
            && request.destination.port() == DNS_PORT
            && self.config.is_gateway(request.destination.ip())
    }

    /// Notes that a flow exists.
    pub(crate) fn opened(&mut self, protocol: FlowProtocol, key: &FlowKey) {
        (self.journal).opened(self.policy, protocol, key, self.now);
    }

    /// Notes that a flow exists that has no end, unless it was noted a short while ago.
    pub(crate) fn opened_once(&mut self, protocol: FlowProtocol, key: &FlowKey) {
        (self.journal).opened_once(self.policy, protocol, key, self.now);
    }

    /// Answers a packet by an error. `transport` is the beginning of its transport header.
    pub(crate) fn unreachable(
        &mut self,
        error: IcmpUnreachable,
        guest: IpAddr,
        remote: IpAddr,
        protocol: IpProtocol,
        transport: [u8; QUOTED_TRANSPORT],
    ) {
        let framer = self.framer();
        let head = framer.unreachable(error, guest, remote, protocol, transport);
        self.answers.push(head);
    }

    /// Notes that a limit prevented a flow.
    pub(crate) fn limited(&mut self, what: &'static str, key: &FlowKey) {
        if self.stats.limited == 0 {
            let remote = key.remote();
            tracing::warn!(%remote, "the limit of {what} of the guest is reached");
        }
        self.stats.limited += 1;
        self.journal.limited(what);
    }
}
