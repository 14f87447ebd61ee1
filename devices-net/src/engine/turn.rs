//! The parts of an engine that all its protocols use during one call.

use std::net::IpAddr;
use std::time::Instant;

use sm_event_loop::Registry;

use super::answers::Answers;
use super::config::EngineConfig;
use super::egress::{EgressPolicy, EgressRequest, EgressVerdict};
use super::flow::FlowKey;
use super::output::Framer;
use super::stats::EngineStats;
use crate::wire::{IcmpUnreachable, IpProtocol, MacAddress, QUOTED_TRANSPORT};

/// One call of an engine.
pub(crate) struct Turn<'a> {
    pub(crate) config: &'a EngineConfig,
    pub(crate) policy: &'a mut dyn EgressPolicy,
    pub(crate) stats: &'a mut EngineStats,
    pub(crate) answers: &'a mut Answers,
    pub(crate) registry: &'a mut dyn Registry,
    /// Ethernet address of the guest.
    pub(crate) guest: MacAddress,
    pub(crate) now: Instant,
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
        let verdict = self.policy.judge(request);
        if verdict == EgressVerdict::Prohibit {
            self.stats.prohibited += 1;
        }
        verdict
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
            let remote = key.remote;
            tracing::warn!(%remote, "the limit of {what} of the guest is reached");
        }
        self.stats.limited += 1;
    }
}
