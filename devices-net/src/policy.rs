//! Rules about what a guest may reach.
//!
//! A [`NetPolicy`] has rules that allow and rules that deny; a [`PolicyGate`] asks it for an
//! engine. Denying rules win. Without an allowing rule, public addresses are allowed. Addresses
//! of cloud metadata services are allowed only by a rule whose target is `metadata`. A rule that
//! denies a name denies its addresses only as long as an answer that the guest got for the name
//! is valid: it is no boundary for a guest that knows them from elsewhere.
//!
//! ```
//! use std::time::Instant;
//!
//! use sm_devices_net::engine::FlowProtocol;
//! use sm_devices_net::policy::{DnsPins, HostAddresses, NetPolicy};
//!
//! # fn main() -> Result<(), sm_devices_net::policy::NetRuleError> {
//! let policy = NetPolicy::new(vec!["tcp:*.example.com:443".parse()?], Vec::new());
//! let (host, mut pins) = (HostAddresses::default(), DnsPins::new(100));
//! let address = "198.51.100.7:443".parse().unwrap();
//! let now = Instant::now();
//! let verdict = policy.judge(FlowProtocol::Tcp, address, &host, &pins, now);
//! assert!(!verdict.is_allowed());
//! // The guest has asked for the name, and got this address.
//! pins.pin("www.example.com", address.ip(), 60, now);
//! let verdict = policy.judge(FlowProtocol::Tcp, address, &host, &pins, now);
//! assert!(verdict.is_allowed());
//! # Ok(())
//! # }
//! ```
//!
//! Architecture invariants: an address in another form (mapped, translated) is judged as the
//! one that it reaches; a name never allows an address of the host or a metadata service; only
//! a rule about the host allows its loopback addresses behind a [`PolicyGate`]'s gateway.

mod address;
mod gate;
mod host;
mod learn;
mod pins;
mod rule;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use crate::engine::FlowProtocol;

pub use self::address::{AddressClass, HostAddresses, effective_address};
pub use self::gate::{PolicyGate, PolicyHandle, RefusalObserver};
pub use self::host::local_addresses;
pub use self::learn::{RuleLearner, learn_rules};
pub use self::pins::DnsPins;
pub use self::rule::{AddressRange, NamePattern, NetRule, NetRuleError, RuleTarget};

/// Port of HTTPS, on which flows prove their names.
const HTTPS_PORT: u16 = 443;

/// Rules about what a guest may reach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetPolicy {
    allow: Vec<NetRule>,
    deny: Vec<NetRule>,
}

/// The decision about a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PolicyVerdict {
    /// A rule allows it.
    Allowed(NetRule),
    /// It is public, and no rule says what is allowed.
    AllowedByDefault,
    /// A rule denies it.
    Denied(NetRule),
    /// No rule allows it; this one would.
    NotAllowed(NetRule),
    /// Rules have names, and those of such a flow cannot be read: QUIC, encrypted questions to
    /// name servers, or questions to neighbours. This rule would allow it nevertheless.
    HidesNames(NetRule),
    /// It is allowed by its name only, and its first bytes are no TLS ClientHello with a name.
    Unnamed,
    /// It is allowed by its name only, and that in its TLS ClientHello is one for which the guest
    /// did not get the address.
    WrongName(String),
    /// Its address is not that of one host.
    NotUnicast,
}

impl PolicyVerdict {
    /// Returns true if the flow is allowed.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        matches!(self, Self::Allowed(_) | Self::AllowedByDefault)
    }
}

impl fmt::Display for PolicyVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed(rule) => write!(f, "allowed by \"{rule}\""),
            Self::AllowedByDefault => f.write_str("public"),
            Self::Denied(rule) => write!(f, "denied by \"{rule}\""),
            Self::NotAllowed(rule) => write!(f, "not allowed; \"{rule}\" would allow it"),
            Self::HidesNames(rule) => {
                write!(
                    f,
                    "names in it cannot be checked; \"{rule}\" would allow it"
                )
            }
            Self::Unnamed => f.write_str("allowed by name only, and it has no TLS name"),
            Self::WrongName(name) => write!(f, "\"{name}\" does not have this address"),
            Self::NotUnicast => f.write_str("not the address of one host"),
        }
    }
}

impl NetPolicy {
    /// Creates a policy.
    #[must_use]
    pub fn new(allow: Vec<NetRule>, deny: Vec<NetRule>) -> Self {
        Self { allow, deny }
    }

    /// Decides about a flow to `destination`, whose port is zero for echo requests.
    #[must_use]
    pub fn judge(
        &self,
        protocol: FlowProtocol,
        destination: SocketAddr,
        host: &HostAddresses,
        pins: &DnsPins,
        now: Instant,
    ) -> PolicyVerdict {
        let (address, port) = (effective_address(destination.ip()), destination.port());
        let class = host.classify(address);
        if class == AddressClass::NotUnicast {
            return PolicyVerdict::NotUnicast;
        }
        let covers = |rule: &&NetRule| {
            rule.covers(protocol, port)
                && match &rule.target {
                    RuleTarget::Name(pattern) => {
                        pins.names(address, now).any(|name| pattern.matches(name))
                    }
                    target => target.contains(address, class),
                }
        };
        // A rule that denies addresses denies each form of them, and metadata services too.
        let denies = |rule: &&NetRule| {
            let by_address = match &rule.target {
                RuleTarget::All => true,
                RuleTarget::Range(range) => {
                    range.contains(address) || range.contains(destination.ip())
                }
                _ => false,
            };
            (by_address && rule.covers(protocol, port)) || covers(rule)
        };
        if let Some(rule) = self.deny.iter().find(denies) {
            return PolicyVerdict::Denied(rule.clone());
        }
        // A server of names decides about the addresses of a name, not about those of the
        // host or of services that trust it.
        let by_name = matches!(class, AddressClass::Public | AddressClass::Private);
        let allows = |rule: &&NetRule| {
            let is_name = matches!(rule.target, RuleTarget::Name(_));
            covers(rule) && (by_name || !is_name)
        };
        let hides = self.has_names() && hides_names(protocol, port);
        let is_meant = |rule: &&NetRule| !hides || rule.is_specific();
        if let Some(rule) = (self.allow.iter()).find(|rule| allows(rule) && is_meant(rule)) {
            return PolicyVerdict::Allowed(rule.clone());
        }
        let by_default = self.allow.is_empty() && class == AddressClass::Public;
        if hides && (by_default || self.allow.iter().any(|rule| allows(&rule))) {
            let rule = self.narrowest_rule(protocol, destination, host, pins, now);
            return PolicyVerdict::HidesNames(rule);
        }
        if by_default {
            return PolicyVerdict::AllowedByDefault;
        }
        let rule = self.narrowest_rule(protocol, destination, host, pins, now);
        PolicyVerdict::NotAllowed(rule)
    }

    /// Returns true if a flow that is allowed has to prove its name: one to the port of HTTPS that
    /// rules about names allow, or deny.
    #[must_use]
    pub fn needs_name(&self, protocol: FlowProtocol, port: u16) -> bool {
        protocol == FlowProtocol::Tcp && port == HTTPS_PORT && self.has_names()
    }

    /// Decides about a flow whose first bytes have a name, or none: a denied name is denied by any
    /// address, and a flow that is allowed by its name only has to have one that is allowed, and for
    /// which the guest got the address.
    #[must_use]
    pub fn judge_name(
        &self,
        destination: SocketAddr,
        name: Option<&str>,
        host: &HostAddresses,
        pins: &DnsPins,
        now: Instant,
    ) -> PolicyVerdict {
        let (protocol, port) = (FlowProtocol::Tcp, destination.port());
        let address = effective_address(destination.ip());
        let matches = |rule: &&NetRule| match &rule.target {
            RuleTarget::Name(pattern) => {
                rule.covers(protocol, port) && name.is_some_and(|name| pattern.matches(name))
            }
            _ => false,
        };
        if let Some(rule) = self.deny.iter().find(matches) {
            return PolicyVerdict::Denied(rule.clone());
        }
        let verdict = self.judge(protocol, destination, host, pins, now);
        let PolicyVerdict::Allowed(_) = verdict else {
            return verdict;
        };
        let class = host.classify(address);
        let by_address =
            |rule: &&NetRule| rule.covers(protocol, port) && rule.target.contains(address, class);
        if let Some(rule) = self.allow.iter().find(by_address) {
            return PolicyVerdict::Allowed(rule.clone());
        }
        let is_pinned = |name| pins.names(address, now).any(|pinned| pinned == name);
        let Some(name) = name else {
            return PolicyVerdict::Unnamed;
        };
        match self.allow.iter().find(matches) {
            Some(rule) if is_pinned(name) => PolicyVerdict::Allowed(rule.clone()),
            Some(_) => PolicyVerdict::WrongName(name.to_owned()),
            None => match NamePattern::exact(name) {
                Some(name) => PolicyVerdict::NotAllowed(NetRule::new(
                    Some(protocol),
                    RuleTarget::Name(name),
                    port,
                )),
                None => PolicyVerdict::Unnamed,
            },
        }
    }

    /// Returns a rule that allows a flow to `destination` and as little else as possible: by the
    /// name that the guest asked for, if it got the address for one, and by one that a rule allows
    /// rather than by another.
    #[must_use]
    pub fn narrowest_rule(
        &self,
        protocol: FlowProtocol,
        destination: SocketAddr,
        host: &HostAddresses,
        pins: &DnsPins,
        now: Instant,
    ) -> NetRule {
        let address = effective_address(destination.ip());
        let name = || {
            self.name_of(address, pins, now)
                .and_then(NamePattern::exact)
        };
        let target = match host.classify(address) {
            AddressClass::Host => RuleTarget::Host,
            AddressClass::Metadata => RuleTarget::Metadata,
            _ => match name() {
                Some(name) => RuleTarget::Name(name),
                None => RuleTarget::Range(AddressRange::host(address)),
            },
        };
        NetRule::new(Some(protocol), target, destination.port())
    }

    /// Returns the name of an address: one that a rule allows, or the last that the guest has asked
    /// for.
    #[must_use]
    pub fn name_of<'p>(&self, address: IpAddr, pins: &'p DnsPins, now: Instant) -> Option<&'p str> {
        let address = effective_address(address);
        let is_allowed = |name: &&str| {
            (self.allow.iter())
                .any(|rule| matches!(&rule.target, RuleTarget::Name(it) if it.matches(name)))
        };
        let names = || pins.names(address, now);
        names().filter(is_allowed).last().or_else(|| names().last())
    }

    /// Returns the rule about addresses that would allow answers with this one.
    #[must_use]
    pub fn rule_for_answer(&self, address: IpAddr, host: &HostAddresses) -> NetRule {
        let address = effective_address(address);
        let target = match host.classify(address) {
            AddressClass::Host => RuleTarget::Host,
            AddressClass::Metadata => RuleTarget::Metadata,
            _ => RuleTarget::Range(AddressRange::host(address)),
        };
        NetRule::new(None, target, 0)
    }

    /// Returns the rule that denies a name, for all protocols and ports.
    #[must_use]
    pub fn denies_name(&self, name: &str) -> Option<&NetRule> {
        let matches = |rule: &&NetRule| match &rule.target {
            RuleTarget::Name(pattern) => pattern.matches(name),
            _ => false,
        };
        (self.deny.iter()).find(|rule| rule.is_general() && matches(rule))
    }

    /// Returns true if only flows to certain names are allowed: others need not be resolved,
    /// and a flow has to prove its name.
    #[must_use]
    pub fn is_by_name(&self) -> bool {
        let is_name = |rule: &NetRule| matches!(rule.target, RuleTarget::Name(_));
        !self.allow.is_empty() && self.allow.iter().all(is_name)
    }

    /// Returns true if a rule has a name: answers of name servers then matter.
    #[must_use]
    pub fn has_names(&self) -> bool {
        let mut rules = self.allow.iter().chain(&self.deny);
        rules.any(|rule| matches!(rule.target, RuleTarget::Name(_)))
    }

    /// Returns true if the guest may ask for the addresses of `name`.
    #[must_use]
    pub fn may_resolve(&self, name: &str) -> bool {
        let matches = |rule: &NetRule| match &rule.target {
            RuleTarget::Name(pattern) => pattern.matches(name),
            _ => false,
        };
        // A rule for some ports leaves the others.
        self.denies_name(name).is_none() && (!self.is_by_name() || self.allow.iter().any(matches))
    }

    /// Returns true if `address` may be in an answer for a name. Those that are not public may
    /// only if a rule allows them as addresses: otherwise a server of names could have a guest
    /// reach them (DNS rebinding).
    #[must_use]
    pub fn may_answer(&self, address: IpAddr, host: &HostAddresses) -> bool {
        let address = effective_address(address);
        let class = host.classify(address);
        let contains = |rule: &NetRule| rule.target.contains(address, class);
        match class {
            AddressClass::Public => true,
            AddressClass::NotUnicast => false,
            _ => self.allow.iter().any(contains),
        }
    }
}

/// Returns true for flows in which names are not readable: QUIC (RFC 9114), DNS over TLS and QUIC
/// (RFC 7858, 9250), and questions to neighbours (RFC 6762, 4795). Programs do without them.
fn hides_names(protocol: FlowProtocol, port: u16) -> bool {
    match protocol {
        FlowProtocol::Tcp => matches!(port, 853 | 5355),
        FlowProtocol::Udp => matches!(port, 443 | 853 | 5353 | 5355),
        FlowProtocol::Echo => false,
    }
}

#[cfg(test)]
mod tests;
