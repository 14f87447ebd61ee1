//! Flows that have ended, until the policy is notified of them.

use super::egress::{EgressRequest, FlowProtocol};
use super::flow::FlowKey;

/// Flows that have ended during one call of the engine.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    ended: Vec<EgressRequest>,
}

impl Journal {
    /// Notes that a flow has ended.
    pub(crate) fn ended(&mut self, protocol: FlowProtocol, key: &FlowKey) {
        self.ended.push(EgressRequest {
            protocol,
            destination: key.remote,
        });
    }

    /// Returns a flow that has ended, once.
    pub(crate) fn take_ended(&mut self) -> Option<EgressRequest> {
        self.ended.pop()
    }
}
