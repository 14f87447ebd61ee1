//! ARP for IPv4 on Ethernet (RFC 826).

use std::net::Ipv4Addr;

use zerocopy::network_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{EtherType, EthernetHeader, Head, MacAddress, MalformedFrame};

const ETHERNET: U16 = U16::new(1);
const REQUEST: U16 = U16::new(1);
const REPLY: U16 = U16::new(2);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Message {
    hardware: U16,
    protocol: EtherType,
    hardware_len: u8,
    protocol_len: u8,
    operation: U16,
    sender: MacAddress,
    sender_ip: [u8; 4],
    target: MacAddress,
    target_ip: [u8; 4],
}

/// The question for the owner of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ArpRequest {
    /// Ethernet address of the sender.
    pub sender: MacAddress,
    /// Its IPv4 address; unspecified while it probes for duplicates of its own (RFC 5227).
    pub sender_ip: Ipv4Addr,
    /// The address in question.
    pub target_ip: Ipv4Addr,
}

impl ArpRequest {
    /// Parses the content of an ARP frame; `None` for other messages than requests.
    ///
    /// # Errors
    /// The message is truncated.
    pub fn parse(content: &[u8]) -> Result<Option<Self>, MalformedFrame> {
        let (message, _) =
            Message::read_from_prefix(content).map_err(|_| MalformedFrame::Truncated)?;
        let understood = message.hardware == ETHERNET
            && message.protocol == EtherType::IPV4
            && (message.hardware_len, message.protocol_len) == (6, 4)
            && message.operation == REQUEST;
        Ok(understood.then_some(Self {
            sender: message.sender,
            sender_ip: message.sender_ip.into(),
            target_ip: message.target_ip.into(),
        }))
    }

    /// Returns the frame of the reply that `owner` has the address in question.
    #[must_use]
    pub fn reply(&self, owner: MacAddress) -> Head {
        let mut head = Head::new();
        head.push(&EthernetHeader {
            destination: self.sender,
            source: owner,
            ether_type: EtherType::ARP,
        });
        head.push(&Message {
            hardware: ETHERNET,
            protocol: EtherType::IPV4,
            hardware_len: 6,
            protocol_len: 4,
            operation: REPLY,
            sender: owner,
            sender_ip: self.target_ip.octets(),
            target: self.sender,
            target_ip: self.sender_ip.octets(),
        });
        head
    }
}
