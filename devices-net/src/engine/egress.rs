//! The decision whether the guest may reach an address.

use std::net::SocketAddr;

/// The transport of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FlowProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo requests of ICMP; the port is zero.
    Echo,
}

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
    /// The guest is notified that the destination is prohibited.
    Prohibit,
}

/// A policy, which is asked once for each flow, before a host socket exists.
pub trait EgressPolicy: Send {
    /// Decides about a flow.
    fn judge(&mut self, request: &EgressRequest) -> EgressVerdict;
}

impl<F: FnMut(&EgressRequest) -> EgressVerdict + Send> EgressPolicy for F {
    fn judge(&mut self, request: &EgressRequest) -> EgressVerdict {
        self(request)
    }
}
