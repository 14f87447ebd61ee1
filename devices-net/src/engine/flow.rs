//! Names of flows.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Port of name servers.
pub(crate) const DNS_PORT: u16 = 53;

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

/// One end of a flow. An address of IPv4 is in its mapped form, which no packet has.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct End {
    address: [u8; 16],
    port: u16,
}

impl End {
    fn new((address, port): (IpAddr, u16)) -> Self {
        let address = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        Self {
            address: address.octets(),
            port,
        }
    }

    fn get(self) -> SocketAddr {
        (Ipv6Addr::from(self.address).to_canonical(), self.port).into()
    }
}

/// The ends of a flow, as the guest sees them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FlowKey {
    guest: End,
    remote: End,
}

impl FlowKey {
    pub(crate) fn new(guest: (IpAddr, u16), remote: (IpAddr, u16)) -> Self {
        Self {
            guest: End::new(guest),
            remote: End::new(remote),
        }
    }

    /// The guest's end.
    pub(crate) fn guest(&self) -> SocketAddr {
        self.guest.get()
    }

    /// The other end.
    pub(crate) fn remote(&self) -> SocketAddr {
        self.remote.get()
    }

    pub(crate) fn is_v6(&self) -> bool {
        self.guest().is_ipv6()
    }
}

impl std::fmt::Debug for FlowKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} - {}", self.guest(), self.remote())
    }
}

/// Kinds of tokens that an engine registers with the event loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// A host socket of a TCP flow.
    Tcp,
    /// The timer of a TCP flow.
    TcpTimer,
    /// TCP flows that are served in another turn.
    Serve,
    /// A host socket of a UDP flow.
    Udp,
    /// The timer of all UDP flows.
    UdpTimer,
    /// The socket of an echo request.
    Echo,
    /// The timer of all echo requests.
    EchoTimer,
    /// The timer of fragments.
    Fragments,
    /// The socket of a question to a name server.
    Dns,
    /// The timer of all these questions.
    DnsTimer,
    /// Changes by handles.
    Handle,
    /// Refusals that are to be reported.
    Journal,
    /// The timer of all flows that have to prove a name.
    NameTimer,
    /// The timer of all flows that wait because of a rate.
    RateTimer,
    /// A client of the name server over TCP.
    NameClient,
    /// An exposed port.
    Exposed,
    /// The timer of all clients of exposed UDP ports.
    ExposedTimer,
}

/// Bit of all tokens of engines, among those of backends.
const ENGINE: u64 = 1 << 61;
const KINDS: [TokenKind; 17] = [
    TokenKind::Tcp,
    TokenKind::TcpTimer,
    TokenKind::Serve,
    TokenKind::Udp,
    TokenKind::UdpTimer,
    TokenKind::Echo,
    TokenKind::EchoTimer,
    TokenKind::Fragments,
    TokenKind::Dns,
    TokenKind::DnsTimer,
    TokenKind::Handle,
    TokenKind::Journal,
    TokenKind::NameTimer,
    TokenKind::RateTimer,
    TokenKind::NameClient,
    TokenKind::Exposed,
    TokenKind::ExposedTimer,
];

/// Returns the token of a slot.
pub(crate) fn token(kind: TokenKind, slot: u32) -> u64 {
    ENGINE | (kind as u64) << 32 | u64::from(slot)
}

/// Returns the kind and the slot of a token; `None` if it is not an engine's.
pub(crate) fn parse_token(token: u64) -> Option<(TokenKind, u32)> {
    let kind = (token & !ENGINE) >> 32;
    let kind = *KINDS.get(usize::try_from(kind).ok()?)?;
    // The lower half.
    let slot = u32::try_from(token & u64::from(u32::MAX)).ok()?;
    (token & ENGINE != 0).then_some((kind, slot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_parsed_as_they_were_made() {
        for kind in KINDS {
            for slot in [0, 7, u32::MAX] {
                assert_eq!(parse_token(token(kind, slot)), Some((kind, slot)));
            }
        }
        assert_eq!(parse_token(7), None);
        assert_eq!(parse_token(ENGINE | 99 << 32), None);
    }
}
