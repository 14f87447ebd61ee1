//! A policy in front of an engine.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::host::{HostWatch, local_addresses};
use super::{DnsPins, HostAddresses, NetPolicy, PolicyVerdict, effective_address};
use crate::engine::{
    EgressPolicy, EgressRequest, EgressVerdict, EngineConfig, EngineHandle, RefusalReason,
};

/// Names of addresses that are stored.
const PINS: usize = 4096;

/// Called with each packet that would begin a flow and is refused: as often as the guest likes,
/// so an observer that writes must limit itself.
pub type RefusalObserver = Box<dyn FnMut(&EgressRequest, &PolicyVerdict) + Send>;

/// Asks a [`NetPolicy`] for an engine. The gateway's addresses stand for the loopback
/// addresses of the host, so only a policy that allows the host has services there.
///
/// A [`PolicyHandle`] changes it while the engine has it.
pub struct PolicyGate {
    state: Arc<Mutex<GateState>>,
    refused: RefusalObserver,
}

/// The part of a gate that its handles change.
#[derive(Debug)]
struct GateState {
    policy: NetPolicy,
    host: HostAddresses,
    /// Notices changes of the host's addresses, if they are followed.
    watch: Option<HostWatch>,
    pins: DnsPins,
    gateways: [IpAddr; 2],
    /// The engine that asks.
    engine: Option<EngineHandle>,
}

impl GateState {
    fn set_host(&mut self, host: &[IpAddr]) {
        self.host = HostAddresses::new([host, &self.gateways].concat());
    }

    /// Takes over the host's addresses if they have changed.
    fn follow_host(&mut self) {
        if self.watch.as_ref().is_some_and(HostWatch::has_changed) {
            self.set_host(&local_addresses());
        }
    }

    /// Decides about a flow to `destination`; the verdict is about the address that it reaches,
    /// which is returned, too.
    fn judge(&mut self, request: &EgressRequest) -> (PolicyVerdict, EgressRequest) {
        self.follow_host();
        let mut reached = *request;
        let now = Instant::now();
        let judge = |request: &EgressRequest| {
            let destination = request.destination;
            (self.policy).judge(request.protocol, destination, &self.host, &self.pins, now)
        };
        let mut verdict = judge(&reached);
        let gateway = effective_address(reached.destination.ip());
        if verdict.is_allowed() && self.gateways.contains(&gateway) {
            reached.destination.set_ip(match gateway {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
            // A range around the gateway's address is not meant for the host.
            verdict = judge(&reached);
        }
        (verdict, reached)
    }
}

/// The reason of a refusal.
fn reason(verdict: &PolicyVerdict) -> RefusalReason {
    RefusalReason {
        rule: match verdict {
            PolicyVerdict::NotAllowed(rule) | PolicyVerdict::HidesNames(rule) => {
                Some(rule.to_string())
            }
            _ => None,
        },
        text: verdict.to_string(),
    }
}

fn lock(state: &Mutex<GateState>) -> MutexGuard<'_, GateState> {
    // A panic in the middle of a change leaves either the old rules or the new ones.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for PolicyGate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PolicyGate")
            .field("policy", &lock(&self.state).policy)
            .finish_non_exhaustive()
    }
}

impl PolicyGate {
    /// Creates a gate for an engine with this configuration, on a host with these addresses.
    #[must_use]
    pub fn new(policy: NetPolicy, config: &EngineConfig, host: Vec<IpAddr>) -> Self {
        let gateways = [config.gateway_v4.into(), config.gateway_v6.into()];
        let state = GateState {
            policy,
            host: HostAddresses::new([&host[..], &gateways].concat()),
            watch: None,
            pins: DnsPins::new(PINS),
            gateways,
            engine: None,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            refused: Box::new(|_, _| {}),
        }
    }

    /// Creates a gate that follows the addresses of the calling thread's network namespace, which
    /// is to be that of the engine's thread. It notices a change before it judges the next flow,
    /// at the cost of one system call for each flow and none for packets.
    ///
    /// # Errors
    /// The kernel provides no socket for notifications.
    pub fn following_host(policy: NetPolicy, config: &EngineConfig) -> io::Result<Self> {
        // A change between the two is noticed.
        let watch = HostWatch::open()?;
        let gate = Self::new(policy, config, local_addresses());
        lock(&gate.state).watch = Some(watch);
        Ok(gate)
    }

    /// Sets the function that is called with each flow that is refused.
    #[must_use]
    pub fn on_refusal(mut self, refused: RefusalObserver) -> Self {
        self.refused = refused;
        self
    }

    /// Returns a handle that changes this gate while an engine has it.
    #[must_use]
    pub fn handle(&self) -> PolicyHandle {
        PolicyHandle {
            state: Arc::clone(&self.state),
        }
    }
}

/// Changes a [`PolicyGate`] while an engine has it, from any thread. Clones change the same gate.
#[derive(Clone, Debug)]
pub struct PolicyHandle {
    state: Arc<Mutex<GateState>>,
}

impl PolicyHandle {
    /// Returns the policy.
    #[must_use]
    pub fn policy(&self) -> NetPolicy {
        lock(&self.state).policy.clone()
    }

    /// Replaces the policy. It holds for the next flow; flows that exist are judged again, and
    /// reset if it refuses them. Names of addresses are kept.
    pub fn set_policy(&self, policy: NetPolicy) {
        self.change(|state| state.policy = policy);
    }

    /// Replaces the addresses of the host, and has flows judged again. A gate that follows the
    /// host replaces them at the next change.
    pub fn set_host(&self, host: &[IpAddr]) {
        self.change(|state| state.set_host(host));
    }

    fn change(&self, change: impl FnOnce(&mut GateState)) {
        let mut state = lock(&self.state);
        change(&mut state);
        let engine = state.engine.clone();
        drop(state);
        if let Some(engine) = engine {
            engine.judge_again();
        }
    }
}

impl EgressPolicy for PolicyGate {
    fn attached(&mut self, engine: EngineHandle) {
        lock(&self.state).engine = Some(engine);
    }

    fn judge(&mut self, request: &EgressRequest) -> EgressVerdict {
        let (verdict, reached) = lock(&self.state).judge(request);
        if !verdict.is_allowed() {
            (self.refused)(request, &verdict);
            return EgressVerdict::Prohibit;
        }
        let destination = reached.destination;
        let state = lock(&self.state);
        match (state.policy).needs_name(request.protocol, destination.port()) {
            true => EgressVerdict::ConnectNamed(destination),
            false => EgressVerdict::Connect(destination),
        }
    }

    fn may_continue(&mut self, request: &EgressRequest) -> bool {
        lock(&self.state).judge(request).0.is_allowed()
    }

    fn may_name(
        &mut self,
        request: &EgressRequest,
        name: Option<&str>,
    ) -> Result<(), RefusalReason> {
        let mut state = lock(&self.state);
        let (_, reached) = state.judge(request);
        let (protocol, destination) = (request.protocol, reached.destination);
        if !state.policy.needs_name(protocol, destination.port()) {
            return Ok(());
        }
        let (host, pins) = (&state.host, &state.pins);
        let verdict = (state.policy).judge_name(destination, name, host, pins, Instant::now());
        drop(state);
        if verdict.is_allowed() {
            return Ok(());
        }
        (self.refused)(request, &verdict);
        Err(reason(&verdict))
    }

    fn explain(&mut self, request: &EgressRequest) -> RefusalReason {
        reason(&lock(&self.state).judge(request).0)
    }

    fn explain_name(&mut self, name: &str) -> RefusalReason {
        match lock(&self.state).policy.denies_name(name) {
            Some(rule) => RefusalReason {
                text: format!("denied by \"{rule}\""),
                rule: None,
            },
            None => RefusalReason {
                text: format!("not allowed; \"{name}\" would allow it"),
                rule: Some(name.to_owned()),
            },
        }
    }

    fn explain_answer(&mut self, address: IpAddr) -> RefusalReason {
        let state = lock(&self.state);
        let rule = state.policy.rule_for_answer(address, &state.host);
        RefusalReason {
            text: format!("an answer has {address}; \"{rule}\" would allow it"),
            rule: Some(rule.to_string()),
        }
    }

    fn name_of(&mut self, request: &EgressRequest) -> Option<String> {
        let state = lock(&self.state);
        let address = request.destination.ip();
        let name = state.policy.name_of(address, &state.pins, Instant::now());
        name.map(str::to_owned)
    }

    fn narrowest_rule(&mut self, request: &EgressRequest) -> Option<String> {
        let mut state = lock(&self.state);
        let (_, reached) = state.judge(request);
        let rule = state.policy.narrowest_rule(
            request.protocol,
            reached.destination,
            &state.host,
            &state.pins,
            Instant::now(),
        );
        Some(rule.to_string())
    }

    fn flow_opened(&mut self, request: &EgressRequest) {
        lock(&self.state).pins.hold(request.destination.ip());
    }

    fn flow_ended(&mut self, request: &EgressRequest) {
        lock(&self.state).pins.release(request.destination.ip());
    }

    fn may_resolve(&mut self, name: &str) -> bool {
        lock(&self.state).policy.may_resolve(name)
    }

    fn resolved(&mut self, name: &str, address: IpAddr, ttl: u32) -> bool {
        let mut state = lock(&self.state);
        state.follow_host();
        let accepted = state.policy.may_answer(address, &state.host);
        if accepted {
            state.pins.pin(name, address, ttl, Instant::now());
        }
        accepted
    }

    fn may_answer(&mut self, address: IpAddr) -> bool {
        let mut state = lock(&self.state);
        state.follow_host();
        state.policy.may_answer(address, &state.host)
    }

    fn restricts_names(&self) -> bool {
        lock(&self.state).policy.has_names()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::FlowProtocol;

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
            EgressVerdict::ConnectNamed(request.destination)
        );
        assert_eq!(gate.may_name(&request, Some("www.example.com")), Ok(()));
        assert!(gate.may_name(&request, Some("a.example.com")).is_err());
        assert!(gate.may_name(&request, None).is_err());
        assert!(!gate.resolved("www.example.com", Ipv4Addr::LOCALHOST.into(), 60));
    }
}
