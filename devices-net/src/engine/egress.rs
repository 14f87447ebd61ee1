//! The decision whether the guest may reach an address.

use std::net::{IpAddr, SocketAddr};

pub use super::flow::FlowProtocol;
use super::handle::EngineHandle;

/// A flow that the guest begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct EgressRequest {
    /// The transport.
    pub protocol: FlowProtocol,
    /// The address in the guest's packets.
    pub destination: SocketAddr,
}

/// The decision about a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EgressVerdict {
    /// The flow reaches this address from the host, which need not be that in the packets.
    Connect(SocketAddr),
    /// The same, if the name in the guest's TLS ClientHello passes [`EgressPolicy::may_name`]:
    /// no byte of the guest is sent before. This is for TCP.
    ConnectNamed(SocketAddr),
    /// The guest is notified that the destination is prohibited.
    Prohibit,
}

impl EgressVerdict {
    /// Returns the address that the flow reaches from the host; `None` if it is prohibited.
    #[must_use]
    pub fn address(self) -> Option<SocketAddr> {
        match self {
            Self::Connect(address) | Self::ConnectNamed(address) => Some(address),
            Self::Prohibit => None,
        }
    }
}

/// Reason of a refusal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct RefusalReason {
    /// The reason for a reader.
    pub text: String,
    /// The text of a rule that would allow it, if one would.
    pub rule: Option<String>,
}

/// A policy, which is asked once for each flow, before a host socket exists.
pub trait EgressPolicy: Send {
    /// Called when an engine takes the policy. One whose rules change calls
    /// [`EngineHandle::judge_again`] then.
    fn attached(&mut self, engine: EngineHandle) {
        let _ = engine;
    }

    /// Decides about a flow.
    fn judge(&mut self, request: &EgressRequest) -> EgressVerdict;

    /// Returns true if a flow that was allowed may go on. [`Self::judge`] decides by default.
    fn may_continue(&mut self, request: &EgressRequest) -> bool {
        self.judge(request) != EgressVerdict::Prohibit
    }

    /// Returns the reason why a flow is refused, for a log.
    fn explain(&mut self, request: &EgressRequest) -> RefusalReason {
        let _ = request;
        RefusalReason::default()
    }

    /// Returns the reason why a name is refused, for a log.
    fn explain_name(&mut self, name: &str) -> RefusalReason {
        let _ = name;
        RefusalReason::default()
    }

    /// Returns the reason why an answer with an address is withheld, for a log.
    fn explain_answer(&mut self, address: IpAddr) -> RefusalReason {
        let _ = address;
        RefusalReason::default()
    }

    /// Returns the name of a flow's destination, for a log.
    fn name_of(&mut self, request: &EgressRequest) -> Option<String> {
        let _ = request;
        None
    }

    /// Returns the text of the narrowest rule that allows a flow, for a log.
    fn narrowest_rule(&mut self, request: &EgressRequest) -> Option<String> {
        let _ = request;
        None
    }

    /// Decides about a flow of TCP whose first bytes have a name: that in a TLS ClientHello, or
    /// `None` if it has none, is malformed or has not come in time. All may go on by default.
    ///
    /// # Errors
    /// The reason why the flow may not go on.
    fn may_name(
        &mut self,
        request: &EgressRequest,
        name: Option<&str>,
    ) -> Result<(), RefusalReason> {
        let _ = (request, name);
        Ok(())
    }

    /// Called when a flow of TCP or UDP exists that was allowed.
    fn flow_opened(&mut self, request: &EgressRequest) {
        let _ = request;
    }

    /// Called when that flow has ended.
    fn flow_ended(&mut self, request: &EgressRequest) {
        let _ = request;
    }

    /// Returns true if the guest may ask for records of a name, which is in lower case. All
    /// names may be asked for by default.
    fn may_resolve(&mut self, name: &str) -> bool {
        let _ = name;
        true
    }

    /// Takes note of an address in the answer for a name, which is valid for `ttl` seconds;
    /// returns false if the guest must not have the answer. All are passed on by default.
    fn resolved(&mut self, name: &str, address: IpAddr, ttl: u32) -> bool {
        let _ = (name, address, ttl);
        true
    }

    /// Returns true if the guest may have an answer with an address that is not of the name in
    /// question, such as that of a mail server. It is true by default.
    fn may_answer(&mut self, address: IpAddr) -> bool {
        let _ = address;
        true
    }

    /// Returns true if answers matter: the engine then reads all of them, those over TCP and of
    /// other name servers included. It is false by default.
    fn restricts_names(&self) -> bool {
        false
    }
}

impl<F: FnMut(&EgressRequest) -> EgressVerdict + Send> EgressPolicy for F {
    fn judge(&mut self, request: &EgressRequest) -> EgressVerdict {
        self(request)
    }
}
