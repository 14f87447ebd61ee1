//! A policy in front of an engine.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use super::{DnsPins, HostAddresses, NetPolicy, PolicyVerdict, effective_address};
use crate::engine::{EgressPolicy, EgressRequest, EgressVerdict, EngineConfig};

/// Names of addresses that are stored.
const PINS: usize = 4096;

/// Called with each packet that would begin a flow and is refused: as often as the guest likes,
/// so an observer that writes must limit itself.
pub type RefusalObserver = Box<dyn FnMut(&EgressRequest, &PolicyVerdict) + Send>;

/// Asks a [`NetPolicy`] for an engine. The gateway's addresses stand for the loopback
/// addresses of the host, so only a policy that allows the host has services there.
pub struct PolicyGate {
    policy: NetPolicy,
    host: HostAddresses,
    pins: DnsPins,
    gateways: [IpAddr; 2],
    refused: RefusalObserver,
}

impl std::fmt::Debug for PolicyGate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PolicyGate")
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

impl PolicyGate {
    /// Creates a gate for an engine with this configuration, on a host with these addresses.
    #[must_use]
    pub fn new(policy: NetPolicy, config: &EngineConfig, host: Vec<IpAddr>) -> Self {
        let gateways = [config.gateway_v4.into(), config.gateway_v6.into()];
        Self {
            policy,
            host: HostAddresses::new([&host[..], &gateways].concat()),
            pins: DnsPins::new(PINS),
            gateways,
            refused: Box::new(|_, _| {}),
        }
    }

    /// Replaces the addresses of the host, which may change while it runs.
    pub fn set_host(&mut self, host: &[IpAddr]) {
        self.host = HostAddresses::new([host, &self.gateways].concat());
    }

    /// Sets the function that is called with each flow that is refused.
    #[must_use]
    pub fn on_refusal(mut self, refused: RefusalObserver) -> Self {
        self.refused = refused;
        self
    }
}

impl EgressPolicy for PolicyGate {
    fn judge(&mut self, request: &EgressRequest) -> EgressVerdict {
        let mut destination = request.destination;
        let now = Instant::now();
        let judge = |destination| {
            (self.policy).judge(request.protocol, destination, &self.host, &self.pins, now)
        };
        let mut verdict = judge(destination);
        let gateway = effective_address(destination.ip());
        if verdict.is_allowed() && self.gateways.contains(&gateway) {
            destination.set_ip(match gateway {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
            // A range around the gateway's address is not meant for the host.
            verdict = judge(destination);
        }
        if !verdict.is_allowed() {
            (self.refused)(request, &verdict);
            return EgressVerdict::Prohibit;
        }
        EgressVerdict::Connect(destination)
    }

    fn may_resolve(&mut self, name: &str) -> bool {
        self.policy.may_resolve(name)
    }

    fn resolved(&mut self, name: &str, address: IpAddr, ttl: u32) -> bool {
        let accepted = self.policy.may_answer(address, &self.host);
        if accepted {
            self.pins.pin(name, address, ttl, Instant::now());
        }
        accepted
    }

    fn may_answer(&mut self, address: IpAddr) -> bool {
        self.policy.may_answer(address, &self.host)
    }

    fn restricts_names(&self) -> bool {
        self.policy.has_names()
    }
}

/// Returns the addresses of the network interfaces in the calling thread's network namespace,
/// as far as `/proc` has them.
#[must_use]
pub fn local_addresses() -> Vec<IpAddr> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let v4 = parse_fib_trie(&read("/proc/thread-self/net/fib_trie"));
    let v6 = parse_if_inet6(&read("/proc/thread-self/net/if_inet6"));
    v4.into_iter().chain(v6).collect()
}

/// Parses the routing tables: a local address is in two lines, "|-- ADDRESS" and
/// "/32 host LOCAL".
fn parse_fib_trie(text: &str) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    let mut last: Option<IpAddr> = None;
    for line in text.lines() {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse().ok();
        } else if line.starts_with("/32 host LOCAL") {
            addresses.extend(last);
        }
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Parses the list of IPv6 addresses, each in 32 digits at the beginning of a line.
fn parse_if_inet6(text: &str) -> Vec<IpAddr> {
    let words = text.lines().filter_map(|line| line.split(' ').next());
    let words = words.filter(|word| word.len() == 32);
    let numbers = words.filter_map(|word| u128::from_str_radix(word, 16).ok());
    numbers
        .map(|number| Ipv6Addr::from(number).into())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::engine::FlowProtocol;

    #[test]
    fn addresses_of_interfaces_are_read() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n\
                    Local:\n     +-- 192.0.2.0/24 2 0 2\n        |-- 192.0.2.0\n           \
                    /24 link UNICAST\n        |-- 192.0.2.2\n           /32 host LOCAL\n        \
                    |-- 192.0.2.255\n           /32 link BROADCAST\n     |-- 127.0.0.1\n        \
                    /32 host LOCAL\n     |-- 192.0.2.2\n           /32 host LOCAL\n";
        let expected = ["127.0.0.1", "192.0.2.2"].map(|it| it.parse::<IpAddr>().unwrap());
        assert_eq!(parse_fib_trie(trie), expected);
        let inet6 = "00000000000000000000000000000001 01 80 10 80       lo\n\
                     fd000000000000000000000000000002 02 40 00 82     eth0\nx\n";
        let expected = ["::1", "fd00::2"].map(|it| it.parse::<IpAddr>().unwrap());
        assert_eq!(parse_if_inet6(inet6), expected);
    }

    #[test]
    fn the_gateway_is_the_loopback_interface_of_the_host() {
        let config = EngineConfig::default();
        let request = |text: &str| EgressRequest {
            protocol: FlowProtocol::Tcp,
            destination: text.parse().unwrap(),
        };
        let refused = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&refused);
        let host = vec!["203.0.113.9".parse().unwrap()];
        let mut closed = PolicyGate::new(NetPolicy::default(), &config, host.clone()).on_refusal(
            Box::new(move |request, verdict| {
                let line = format!("{}: {verdict}", request.destination);
                log.lock().unwrap().push(line);
            }),
        );
        for target in ["100.96.0.1:80", "[fd73:6d00::1]:80", "203.0.113.9:80"] {
            assert_eq!(closed.judge(&request(target)), EgressVerdict::Prohibit);
        }
        let lines = refused.lock().unwrap();
        assert_eq!(
            lines[0],
            "100.96.0.1:80: not allowed; \"tcp:host:80\" would allow it"
        );
        assert_eq!(lines.len(), 3);

        let policy = NetPolicy::new(vec!["host:80".parse().unwrap()], Vec::new());
        let mut open = PolicyGate::new(policy, &config, host);
        for (target, reached) in [
            ("100.96.0.1:80", Some("127.0.0.1:80")),
            ("[fd73:6d00::1]:80", Some("[::1]:80")),
            ("203.0.113.9:80", Some("203.0.113.9:80")),
            ("100.96.0.1:81", None),
        ] {
            let expected = reached.map_or(EgressVerdict::Prohibit, |it| {
                EgressVerdict::Connect(it.parse().unwrap())
            });
            assert_eq!(open.judge(&request(target)), expected, "{target}");
        }
    }

    /// A rule about a network that happens to have the gateway's address is none about the host.
    #[test]
    fn a_range_around_the_gateway_does_not_open_the_host() {
        let rules = |text: &str| text.split(' ').map(|rule| rule.parse().unwrap()).collect();
        let targets = [
            "100.96.0.1:80",
            "[fd73:6d00::1]:80",
            "[64:ff9b::100.96.0.1]:80",
        ];
        let judge = |allow: &str| {
            let policy = NetPolicy::new(rules(allow), Vec::new());
            let mut gate = PolicyGate::new(policy, &EngineConfig::default(), Vec::new());
            targets.map(|target| {
                let request = EgressRequest {
                    protocol: FlowProtocol::Tcp,
                    destination: target.parse().unwrap(),
                };
                gate.judge(&request)
            })
        };
        let reached = |address: &str| EgressVerdict::Connect(address.parse().unwrap());
        let closed = [EgressVerdict::Prohibit; 3];
        assert_eq!(judge("100.64.0.0/10 fd00::/8"), closed);
        let open = [
            reached("127.0.0.1:80"),
            reached("[::1]:80"),
            reached("127.0.0.1:80"),
        ];
        assert_eq!(judge("host"), open);
        assert_eq!(judge("100.64.0.0/10 host"), open);
    }

    #[test]
    fn answers_open_what_rules_allow_by_name() {
        let policy = NetPolicy::new(vec!["*.example.com".parse().unwrap()], Vec::new());
        let mut gate = PolicyGate::new(policy, &EngineConfig::default(), Vec::new());
        assert!(gate.restricts_names());
        assert!(gate.may_resolve("www.example.com") && !gate.may_resolve("example.org"));
        let request = EgressRequest {
            protocol: FlowProtocol::Tcp,
            destination: "198.51.100.1:443".parse().unwrap(),
        };
        assert_eq!(gate.judge(&request), EgressVerdict::Prohibit);
        assert!(gate.resolved("www.example.com", request.destination.ip(), 60));
        assert_eq!(
            gate.judge(&request),
            EgressVerdict::Connect(request.destination)
        );
        assert!(!gate.resolved("www.example.com", Ipv4Addr::LOCALHOST.into(), 60));
    }
}
