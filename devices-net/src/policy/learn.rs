//! Rules that a run needed.

use std::collections::{BTreeMap, BTreeSet};

use super::rule::{NetRule, RuleTarget};
use crate::engine::{FlowProtocol, NetEvent};

/// Targets that are distinguished.
const MAX_TARGETS: usize = 4096;
/// Ports of one target that are distinguished: more than that are all of them.
const MAX_PORTS: usize = 16;

/// Learns from events of an engine which rules a run needed.
///
/// The run is one whose policy allows what it may need, so that names and addresses are those
/// that it reached. What was refused is not learnt.
#[derive(Clone, Debug, Default)]
pub struct RuleLearner {
    /// The texts of targets, and the ports that were used; none for echo requests.
    targets: BTreeMap<(String, u8), LearntPorts>,
    lost: u64,
}

#[derive(Clone, Debug)]
struct LearntPorts {
    target: RuleTarget,
    protocol: FlowProtocol,
    ports: BTreeSet<u16>,
    all: bool,
}

impl RuleLearner {
    /// Creates a learner that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes note of an event.
    pub fn observe(&mut self, event: &NetEvent) {
        match event {
            NetEvent::Opened(flow) if !flow.from_host => {
                let rule = flow.rule.as_deref().map(str::parse::<NetRule>);
                match rule {
                    Some(Ok(rule)) => self.learn(rule, flow.protocol, flow.remote.port()),
                    _ => self.lost = self.lost.saturating_add(1),
                }
            }
            NetEvent::Lost(count) => self.lost = self.lost.saturating_add(*count),
            _ => {}
        }
    }

    fn learn(&mut self, rule: NetRule, protocol: FlowProtocol, port: u16) {
        let number = match protocol {
            FlowProtocol::Tcp => 0,
            FlowProtocol::Udp => 1,
            FlowProtocol::Echo => 2,
        };
        let key = (rule.target().to_string(), number);
        if self.targets.len() >= MAX_TARGETS && !self.targets.contains_key(&key) {
            self.lost = self.lost.saturating_add(1);
            return;
        }
        let learnt = self.targets.entry(key).or_insert_with(|| LearntPorts {
            target: rule.target().clone(),
            protocol,
            ports: BTreeSet::new(),
            all: protocol == FlowProtocol::Echo,
        });
        learnt.ports.insert(port);
        if learnt.ports.len() > MAX_PORTS {
            learnt.all = true;
            learnt.ports.clear();
        }
    }

    /// Returns true if no event was lost: the rules are then all that the run needed.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.lost == 0
    }

    /// Returns rules that allow what was seen and as little else as rules can: one for each
    /// target, protocol and range of ports, in the order of their targets. Flows to many ports of
    /// one target are a rule without ports.
    #[must_use]
    pub fn rules(&self) -> Vec<NetRule> {
        let mut rules = Vec::new();
        for learnt in self.targets.values() {
            let (protocol, target) = (Some(learnt.protocol), &learnt.target);
            if learnt.all {
                rules.push(NetRule::new(protocol, target.clone(), 0));
                continue;
            }
            let mut ports = learnt.ports.iter().copied().peekable();
            while let Some(first) = ports.next() {
                let mut last = first;
                while let Some(next) = ports.next_if(|port| last.checked_add(1) == Some(*port)) {
                    last = next;
                }
                rules.push(NetRule::of_ports(protocol, target.clone(), first..=last));
            }
        }
        rules
    }
}

/// Returns the rules that the run of these events needed.
#[must_use]
pub fn learn_rules<'e>(events: impl IntoIterator<Item = &'e NetEvent>) -> Vec<NetRule> {
    let mut learner = RuleLearner::new();
    events.into_iter().for_each(|event| learner.observe(event));
    learner.rules()
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};
    use std::time::Instant;

    use proptest::prelude::*;

    use super::super::{DnsPins, HostAddresses, NetPolicy};
    use super::*;
    use crate::engine::{EgressPolicy as _, EgressRequest, EngineConfig};
    use crate::policy::PolicyGate;

    /// The event of a flow that a gate allows.
    fn opened(gate: &mut PolicyGate, protocol: FlowProtocol, remote: SocketAddr) -> NetEvent {
        let request = EgressRequest {
            protocol,
            destination: remote,
        };
        let rule = gate.narrowest_rule(&request);
        NetEvent::opened_for_test(protocol, remote, rule)
    }

    #[test]
    fn rules_are_those_that_the_run_needed() {
        let everything = NetPolicy::new(vec!["all".parse().unwrap()], Vec::new());
        let mut gate = PolicyGate::new(everything, &EngineConfig::default(), Vec::new());
        for (name, last) in [("www.example.com", 7), ("cdn.example.com", 8)] {
            gate.resolved(name, IpAddr::from([198, 51, 100, last]), 60);
        }
        let mut learner = RuleLearner::new();
        for (protocol, remote) in [
            (FlowProtocol::Tcp, "198.51.100.7:443"),
            (FlowProtocol::Tcp, "198.51.100.7:80"),
            (FlowProtocol::Tcp, "198.51.100.7:81"),
            (FlowProtocol::Tcp, "198.51.100.7:443"),
            (FlowProtocol::Tcp, "198.51.100.8:443"),
            (FlowProtocol::Udp, "[2001:db8::1]:123"),
            (FlowProtocol::Tcp, "100.96.0.1:5432"),
            (FlowProtocol::Echo, "198.51.100.7:0"),
        ] {
            learner.observe(&opened(&mut gate, protocol, remote.parse().unwrap()));
        }
        assert!(learner.is_complete());
        let rules: Vec<String> = learner.rules().iter().map(NetRule::to_string).collect();
        let expected = [
            "udp:[2001:db8::1]:123",
            "tcp:cdn.example.com:443",
            "tcp:host:5432",
            "tcp:www.example.com:80-81",
            "tcp:www.example.com:443",
            "icmp:www.example.com",
        ];
        assert_eq!(rules, expected);
        learner.observe(&NetEvent::Lost(1));
        assert!(!learner.is_complete());
        assert_eq!(learn_rules([]), []);
    }

    proptest! {
        /// The learnt rules allow each flow of the run, and no port of another.
        #[test]
        fn what_was_seen_is_allowed_and_no_more(
            flows in prop::collection::vec((0u8..3, 0u8..4, 1u16..40), 1..60),
        ) {
            let everything = NetPolicy::new(vec!["all".parse().unwrap()], Vec::new());
            let mut gate = PolicyGate::new(everything, &EngineConfig::default(), Vec::new());
            gate.resolved("a.example", IpAddr::from([198, 51, 100, 0]), 60);
            let protocols = [FlowProtocol::Tcp, FlowProtocol::Udp, FlowProtocol::Echo];
            let flow = |(protocol, last, port): (u8, u8, u16)| {
                let protocol = protocols[usize::from(protocol)];
                let port = if protocol == FlowProtocol::Echo { 0 } else { port };
                (protocol, SocketAddr::from(([198, 51, 100, last], port)))
            };
            let seen: Vec<_> = flows.into_iter().map(flow).collect();
            let mut learner = RuleLearner::new();
            for (protocol, remote) in &seen {
                learner.observe(&opened(&mut gate, *protocol, *remote));
            }
            let learnt = NetPolicy::new(learner.rules(), Vec::new());
            let mut pins = DnsPins::new(10);
            let now = Instant::now();
            pins.pin("a.example", IpAddr::from([198, 51, 100, 0]), 60, now);
            for protocol in protocols {
                for (last, port) in (0..5u8).flat_map(|last| (0..42u16).map(move |it| (last, it))) {
                    if (protocol == FlowProtocol::Echo) != (port == 0) {
                        continue;
                    }
                    let remote = SocketAddr::from(([198, 51, 100, last], port));
                    let host = HostAddresses::default();
                    let allowed = learnt.judge(protocol, remote, &host, &pins, now).is_allowed();
                    let same = |it: &&(FlowProtocol, SocketAddr)| {
                        it.0 == protocol && it.1.ip() == remote.ip()
                    };
                    let ports: BTreeSet<u16> =
                        seen.iter().filter(same).map(|it| it.1.port()).collect();
                    let expected = ports.contains(&port) || ports.len() > MAX_PORTS;
                    prop_assert_eq!(allowed, expected, "{:?} {}", protocol, remote);
                }
            }
        }
    }
}
