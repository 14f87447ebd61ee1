//! Rules, and their text.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use thiserror::Error;

use super::{AddressClass, effective_address};
use crate::engine::FlowProtocol;

/// Longest name in bytes (RFC 1035 2.3.4).
const MAX_NAME: usize = 253;
/// Longest part of a name in bytes.
const MAX_LABEL: usize = 63;

/// Reason why a rule is malformed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum NetRuleError {
    /// There is no target.
    #[error("\"{0}\" has no target")]
    Empty(String),
    /// The target is neither a name, an address, a range nor a group.
    #[error(
        "\"{0}\" is neither a name, an address, a range of addresses nor one of all, public, private, host and metadata"
    )]
    Target(String),
    /// A name has characters that are not of host names.
    #[error(
        "\"{0}\" is not a host name; names in other scripts are written in their \"xn--\" form"
    )]
    Name(String),
    /// The length of a prefix is wrong, or bits behind it are set.
    #[error(
        "\"{0}\" is not a range of addresses: an address with zeroes behind the prefix, and the prefix's length"
    )]
    Range(String),
    /// The ports are neither a number nor a range.
    #[error("\"{0}\" is neither a port nor a range of ports")]
    Ports(String),
    /// Echo requests have no ports.
    #[error("\"{0}\" has ports, which echo requests have not")]
    PortsOfEcho(String),
}

/// A range of addresses with a common prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressRange {
    address: IpAddr,
    prefix: u8,
}

impl AddressRange {
    /// Returns the range of one address.
    #[must_use]
    pub fn host(address: IpAddr) -> Self {
        let address = effective_address(address);
        Self {
            address,
            prefix: bits(address),
        }
    }

    /// Creates a range; `None` if the prefix is longer than the address, or bits behind it are
    /// set.
    #[must_use]
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let range = Self { address, prefix };
        let behind = number(address) & !mask(address, prefix);
        (prefix <= bits(address) && behind == 0).then_some(range)
    }

    /// Returns true if it has an address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let mask = mask(self.address, self.prefix);
        self.address.is_ipv4() == address.is_ipv4()
            && number(address) & mask == number(self.address)
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The address as a number of 128 bits, those of IPv4 in the upper ones.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn mask(address: IpAddr, prefix: u8) -> u128 {
    let behind = u32::from(128 - prefix.min(bits(address)));
    u128::MAX.checked_shl(behind).unwrap_or(0)
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix == bits(self.address) {
            true => write!(f, "{}", self.address),
            false => write!(f, "{}/{}", self.address, self.prefix),
        }
    }
}

/// A name, or all names below one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NamePattern {
    /// In lower case, without a dot at the end.
    name: String,
    below: bool,
}

impl NamePattern {
    /// Returns the pattern of one name; `None` if it is not a host name.
    #[must_use]
    pub fn exact(name: &str) -> Option<Self> {
        Some(Self {
            name: normalized(name)?,
            below: false,
        })
    }

    /// Returns true for a name of the pattern. `*.example.com` has `a.b.example.com`, and not
    /// `example.com`.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name);
        if !self.below {
            return name.eq_ignore_ascii_case(&self.name);
        }
        let Some(start) = name.len().checked_sub(self.name.len()) else {
            return false;
        };
        let (Some(below), Some(end)) = (name.get(..start), name.get(start..)) else {
            return false;
        };
        below.len() > 1 && below.ends_with('.') && end.eq_ignore_ascii_case(&self.name)
    }
}

/// Returns a host name in lower case; `None` if it is not one.
fn normalized(name: &str) -> Option<String> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_label = |label: &str| {
        // Underscores are of services and of hosts that ignore the rule.
        let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        (1..=MAX_LABEL).contains(&label.len())
            && label.bytes().all(is_valid)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_name = name.len() <= MAX_NAME && name.split('.').all(is_label);
    is_name.then(|| name.to_ascii_lowercase())
}

impl FromStr for NamePattern {
    type Err = NetRuleError;

    fn from_str(text: &str) -> Result<Self, NetRuleError> {
        let (name, below) = match text.strip_prefix("*.") {
            Some(name) => (name, true),
            None => (text, false),
        };
        let name = normalized(name).ok_or_else(|| NetRuleError::Name(text.to_owned()))?;
        Ok(Self { name, below })
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.name)
    }
}

/// The hosts of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RuleTarget {
    /// All addresses. A rule that allows them leaves out those of metadata services.
    All,
    /// Public addresses.
    Public,
    /// Addresses of private networks.
    Private,
    /// The host.
    Host,
    /// Metadata services, and link-local addresses.
    Metadata,
    /// Addresses. A rule that allows them leaves out those of metadata services.
    Range(AddressRange),
    /// Addresses that the guest got for such a name.
    Name(NamePattern),
}

impl RuleTarget {
    /// Returns true for an address of a class that a rule with this target allows; never for
    /// names.
    #[must_use]
    pub fn contains(&self, address: IpAddr, class: AddressClass) -> bool {
        match self {
            Self::All => class != AddressClass::Metadata,
            Self::Public => class == AddressClass::Public,
            Self::Private => class == AddressClass::Private,
            Self::Host => class == AddressClass::Host,
            Self::Metadata => class == AddressClass::Metadata,
            Self::Range(range) => class != AddressClass::Metadata && range.contains(address),
            Self::Name(_) => false,
        }
    }
}

impl FromStr for RuleTarget {
    type Err = NetRuleError;

    fn from_str(text: &str) -> Result<Self, NetRuleError> {
        Ok(match text {
            "" => return Err(NetRuleError::Empty(text.to_owned())),
            "all" => Self::All,
            "public" => Self::Public,
            "private" => Self::Private,
            "host" => Self::Host,
            "metadata" => Self::Metadata,
            _ => match parse_range(text)? {
                Some(range) => Self::Range(range),
                None if is_numeric(text) => return Err(NetRuleError::Target(text.to_owned())),
                None => Self::Name(text.parse()?),
            },
        })
    }
}

/// Returns true for what would be an address with a mistake in it: no name's last part is a
/// number (RFC 1123 2.1).
fn is_numeric(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let last = name.rsplit('.').next().unwrap_or_default();
    name.contains(':') || last.bytes().all(|byte| byte.is_ascii_digit())
}

/// Parses an address or a range; `None` if it is neither.
fn parse_range(text: &str) -> Result<Option<AddressRange>, NetRuleError> {
    let bare = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let bare = bare.unwrap_or(text);
    let Some((address, prefix)) = bare.split_once('/') else {
        return Ok(bare.parse().ok().map(AddressRange::host));
    };
    let malformed = || NetRuleError::Range(text.to_owned());
    let address: IpAddr = address.parse().map_err(|_| malformed())?;
    let prefix = prefix.parse().map_err(|_| malformed())?;
    AddressRange::new(address, prefix)
        .map(Some)
        .ok_or_else(malformed)
}

impl fmt::Display for RuleTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Public => f.write_str("public"),
            Self::Private => f.write_str("private"),
            Self::Host => f.write_str("host"),
            Self::Metadata => f.write_str("metadata"),
            Self::Range(range) if range.address.is_ipv6() => write!(f, "[{range}]"),
            Self::Range(range) => range.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// A rule: `[tcp:|udp:|icmp:]TARGET[:PORT|:FIRST-LAST]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NetRule {
    /// The protocol; `None` for all.
    protocol: Option<FlowProtocol>,
    pub(super) target: RuleTarget,
    /// The ports; `None` for all.
    ports: Option<RangeInclusive<u16>>,
}

impl NetRule {
    /// Creates a rule for one port, or for all if it is zero.
    #[must_use]
    pub fn new(protocol: Option<FlowProtocol>, target: RuleTarget, port: u16) -> Self {
        let ports = (port != 0).then_some(port..=port);
        Self {
            protocol,
            target,
            ports,
        }
    }

    /// Creates a rule for some ports.
    pub(super) fn of_ports(
        protocol: Option<FlowProtocol>,
        target: RuleTarget,
        ports: RangeInclusive<u16>,
    ) -> Self {
        Self {
            protocol,
            target,
            ports: Some(ports),
        }
    }

    /// Returns the hosts of the rule.
    #[must_use]
    pub fn target(&self) -> &RuleTarget {
        &self.target
    }

    /// Returns true for flows of a protocol and to a port. A rule with ports does not cover
    /// echo requests.
    #[must_use]
    pub fn covers(&self, protocol: FlowProtocol, port: u16) -> bool {
        let has_port = match (&self.ports, protocol) {
            (None, _) => true,
            (Some(_), FlowProtocol::Echo) => false,
            (Some(ports), _) => ports.contains(&port),
        };
        has_port && self.protocol.is_none_or(|it| it == protocol)
    }

    /// Returns true for a rule about some ports of one protocol.
    pub(super) fn is_specific(&self) -> bool {
        self.protocol.is_some() && self.ports.is_some()
    }

    /// Returns true for a rule about all protocols and ports.
    pub(super) fn is_general(&self) -> bool {
        self.protocol.is_none() && self.ports.is_none()
    }
}

impl FromStr for NetRule {
    type Err = NetRuleError;

    fn from_str(text: &str) -> Result<Self, NetRuleError> {
        let protocols = [
            ("tcp:", FlowProtocol::Tcp),
            ("udp:", FlowProtocol::Udp),
            ("icmp:", FlowProtocol::Echo),
        ];
        let found = protocols.iter().find_map(|(prefix, protocol)| {
            let rest = text.strip_prefix(prefix)?;
            Some((Some(*protocol), rest))
        });
        let (protocol, rest) = found.unwrap_or((None, text));
        if rest.is_empty() {
            return Err(NetRuleError::Empty(text.to_owned()));
        }
        let (target, ports) = split_ports(rest);
        let ports = ports.map(parse_ports).transpose()?;
        if protocol == Some(FlowProtocol::Echo) && ports.is_some() {
            return Err(NetRuleError::PortsOfEcho(text.to_owned()));
        }
        Ok(Self {
            protocol,
            target: target.parse()?,
            ports,
        })
    }
}

/// Splits ports off. The colons of an IPv6 address without brackets are its own.
fn split_ports(text: &str) -> (&str, Option<&str>) {
    let address = text.split('/').next().unwrap_or_default();
    if address.parse::<Ipv6Addr>().is_ok() {
        return (text, None);
    }
    match text.rsplit_once(':') {
        Some((target, ports)) if !ports.contains(']') => (target, Some(ports)),
        _ => (text, None),
    }
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, NetRuleError> {
    let malformed = || NetRuleError::Ports(text.to_owned());
    let port = |text: &str| {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let port = text.parse().ok().filter(|port| digits && *port > 0);
        port.ok_or_else(malformed)
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err(malformed());
    }
    Ok(first..=last)
}

impl fmt::Display for NetRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            None => {}
            Some(FlowProtocol::Tcp) => f.write_str("tcp:")?,
            Some(FlowProtocol::Udp) => f.write_str("udp:")?,
            Some(FlowProtocol::Echo) => f.write_str("icmp:")?,
        }
        self.target.fmt(f)?;
        match &self.ports {
            None => Ok(()),
            Some(ports) if ports.start() == ports.end() => write!(f, ":{}", ports.start()),
            Some(ports) => write!(f, ":{}-{}", ports.start(), ports.end()),
        }
    }
}
