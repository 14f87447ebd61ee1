//! Flows that begin, end or are refused, on their way to the policy and to a log.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use sm_event_loop::{Registry, Timer};

use super::egress::{EgressPolicy, EgressRequest, FlowProtocol, RefusalReason};
use super::events::{
    EventSink, FlowEnd, FlowRecord, FlowSummary, NetEvent, RefusedFlow, RefusedName,
};
use super::flow::{FlowKey, TokenKind, token};

/// Refusals that are distinguished within one window; others are lost.
const MAX_REFUSALS: usize = 256;
/// Time in which refusals of one destination are one event.
const WINDOW: Duration = Duration::from_secs(10);
/// Events about flows: so many at once, and so many in a second.
const BURST: u64 = 2000;
const RATE: u64 = 200;
/// Destinations of echo requests and questions that were reported.
const BRIEF: usize = 16;

/// The account of a flow that exists.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// Microseconds from the journal's start to the flow's.
    start: u64,
    pub(crate) from_guest: u64,
    pub(crate) to_guest: u64,
}

/// A flow that has ended during one call of the engine.
#[derive(Debug)]
struct EndedFlow {
    protocol: FlowProtocol,
    key: FlowKey,
    tally: Tally,
    end: FlowEnd,
    from_host: bool,
    /// The name that it has proven.
    name: Option<Box<str>>,
}

/// A destination or a name that is refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Refused {
    Flow(EgressRequest),
    Name(String),
}

/// Refusals within one window that were not reported.
struct Repeated {
    reason: RefusalReason,
    name: Option<String>,
    count: u64,
}

/// A log, and what it needs to be bounded.
struct Log {
    sink: EventSink,
    lost: u64,
    /// Events that may be reported at once, and the time at which that was so.
    allowance: u64,
    refilled: Instant,
    refused: HashMap<Refused, Repeated>,
    timer: Option<Timer>,
    limits: Vec<&'static str>,
    /// The last of the flows that have no end.
    brief: Vec<(FlowProtocol, SocketAddr)>,
}

/// Notes of one engine.
pub(crate) struct Journal {
    epoch: Instant,
    ended: Vec<EndedFlow>,
    /// Flows that clients of the host have begun, until they are reported.
    opened_by_host: Vec<(FlowProtocol, FlowKey)>,
    log: Option<Log>,
}

impl Journal {
    pub(crate) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            ended: Vec::new(),
            opened_by_host: Vec::new(),
            log: None,
        }
    }

    /// Sets the receiver of events.
    pub(crate) fn set_sink(&mut self, sink: EventSink) {
        self.log = Some(Log {
            sink,
            lost: 0,
            allowance: BURST,
            refilled: Instant::now(),
            refused: HashMap::new(),
            timer: None,
            limits: Vec::new(),
            brief: Vec::new(),
        });
    }

    /// The account of a flow that begins now.
    pub(crate) fn begin(&self, now: Instant) -> Tally {
        let start = now.saturating_duration_since(self.epoch).as_micros();
        Tally {
            start: u64::try_from(start).unwrap_or(u64::MAX),
            ..Tally::default()
        }
    }

    /// Notes that a flow exists.
    pub(crate) fn opened(
        &mut self,
        policy: &mut dyn EgressPolicy,
        protocol: FlowProtocol,
        key: &FlowKey,
        now: Instant,
    ) {
        let Some(log) = &mut self.log else { return };
        if log.may_report(now) {
            let record = record(policy, protocol, key);
            log.send(NetEvent::Opened(record));
        }
    }

    /// Notes that a flow exists that has no end, if it is not one of the last.
    pub(crate) fn opened_once(
        &mut self,
        policy: &mut dyn EgressPolicy,
        protocol: FlowProtocol,
        key: &FlowKey,
        now: Instant,
    ) {
        let Some(log) = &mut self.log else { return };
        let this = (protocol, key.remote());
        if log.brief.contains(&this) {
            return;
        }
        if log.brief.len() >= BRIEF {
            log.brief.remove(0);
        }
        log.brief.push(this);
        self.opened(policy, protocol, key, now);
    }

    /// Notes that a flow has ended.
    pub(crate) fn ended(
        &mut self,
        protocol: FlowProtocol,
        key: FlowKey,
        tally: Tally,
        end: FlowEnd,
    ) {
        self.ended.push(EndedFlow {
            protocol,
            key,
            tally,
            end,
            from_host: false,
            name: None,
        });
    }

    /// Notes that a flow of TCP has ended that has proven a name, if it has.
    pub(crate) fn ended_named(
        &mut self,
        key: FlowKey,
        tally: Tally,
        end: FlowEnd,
        name: Option<Box<str>>,
    ) {
        self.ended(FlowProtocol::Tcp, key, tally, end);
        if let Some(flow) = self.ended.last_mut() {
            flow.name = name;
        }
    }

    /// Notes that a client of the host has begun a flow.
    pub(crate) fn opened_by_host(&mut self, protocol: FlowProtocol, key: FlowKey) {
        if self.log.is_some() {
            self.opened_by_host.push((protocol, key));
        }
    }

    /// Notes that a flow of a client of the host has ended.
    pub(crate) fn ended_by_host(
        &mut self,
        protocol: FlowProtocol,
        key: FlowKey,
        tally: Tally,
        end: FlowEnd,
    ) {
        self.ended(protocol, key, tally, end);
        if let Some(flow) = self.ended.last_mut() {
            flow.from_host = true;
        }
    }

    /// Notes that a flow was refused.
    pub(crate) fn refused(&mut self, policy: &mut dyn EgressPolicy, request: &EgressRequest) {
        let Some(log) = &mut self.log else { return };
        let reason = || (policy.explain(request), policy.name_of(request));
        log.refuse(Refused::Flow(*request), reason);
    }

    /// Notes that a flow was refused because of the name in its first bytes.
    pub(crate) fn refused_name_of_flow(
        &mut self,
        request: &EgressRequest,
        name: Option<String>,
        reason: RefusalReason,
    ) {
        let Some(log) = &mut self.log else { return };
        log.refuse(Refused::Flow(*request), || (reason, name));
    }

    /// Notes that a name, or an answer for it, was refused.
    pub(crate) fn name_refused(&mut self, name: &str, reason: impl FnOnce() -> RefusalReason) {
        let Some(log) = &mut self.log else { return };
        log.refuse(Refused::Name(name.to_owned()), || (reason(), None));
    }

    /// Notes that a limit prevented something.
    pub(crate) fn limited(&mut self, what: &'static str) {
        if let Some(log) = &mut self.log
            && !log.limits.contains(&what)
        {
            log.limits.push(what);
            log.send(NetEvent::Limited(what));
        }
    }

    /// Notifies the policy and the log of flows that have ended, and has `registry` call when
    /// refusals are to be reported.
    pub(crate) fn report(
        &mut self,
        policy: &mut dyn EgressPolicy,
        now: Instant,
        registry: Option<&mut (dyn Registry + '_)>,
    ) {
        while let Some((protocol, key)) = self.opened_by_host.pop() {
            if let Some(log) = self.log.as_mut()
                && log.may_report(now)
            {
                log.send(NetEvent::Opened(record_of_host(protocol, &key)));
            }
        }
        while let Some(flow) = self.ended.pop() {
            let at = self.epoch + Duration::from_micros(flow.tally.start);
            if let Some(log) = self.log.as_mut()
                && log.may_report(now)
            {
                let mut record = match flow.from_host {
                    true => record_of_host(flow.protocol, &flow.key),
                    false => record(policy, flow.protocol, &flow.key),
                };
                if let Some(name) = flow.name {
                    record.name = Some(name.into());
                }
                let summary = FlowSummary {
                    from_guest: flow.tally.from_guest,
                    to_guest: flow.tally.to_guest,
                    duration: now.saturating_duration_since(at),
                    end: flow.end,
                };
                log.send(NetEvent::Ended(record, summary));
            }
            if !flow.from_host {
                policy.flow_ended(&EgressRequest {
                    protocol: flow.protocol,
                    destination: flow.key.remote(),
                });
            }
        }
        if let (Some(log), Some(registry)) = (&mut self.log, registry)
            && log.timer.is_none()
            && (!log.refused.is_empty() || log.lost > 0)
        {
            let token = token(TokenKind::Journal, 0);
            log.timer = registry.set_timer_after(WINDOW, token);
        }
    }

    /// Reports refusals that were repeated.
    pub(crate) fn timer(&mut self) {
        let Some(log) = &mut self.log else { return };
        log.timer = None;
        let mut refused = std::mem::take(&mut log.refused);
        refused.retain(|refused, repeated| {
            let again = repeated.count > 0;
            if again {
                log.send_refused(refused, repeated.clone_reason(), repeated.count);
                repeated.count = 0;
            }
            again
        });
        log.refused = refused;
        log.tell_lost();
    }

    /// Reports what was not reported. Without a registry the event loop has ended.
    pub(crate) fn stop(&mut self, registry: Option<&mut (dyn Registry + '_)>) {
        let timer = self.log.as_mut().and_then(|log| log.timer.take());
        if let (Some(timer), Some(registry)) = (timer, registry) {
            registry.cancel_timer(timer);
        }
        self.timer();
        if let Some(log) = &mut self.log {
            log.refused.clear();
        }
    }
}

impl Repeated {
    fn clone_reason(&self) -> (RefusalReason, Option<String>) {
        (self.reason.clone(), self.name.clone())
    }
}

impl Log {
    /// Returns true if an event about a flow may be reported; counts it as lost otherwise.
    fn may_report(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.refilled).as_millis();
        let more = u64::try_from(since)
            .unwrap_or(u64::MAX)
            .saturating_mul(RATE)
            / 1000;
        if more > 0 {
            self.allowance = self.allowance.saturating_add(more).min(BURST);
            self.refilled = now;
        }
        let allowed = self.allowance > 0;
        if allowed {
            self.allowance -= 1;
        } else {
            self.lost = self.lost.saturating_add(1);
        }
        allowed
    }

    fn refuse(
        &mut self,
        refused: Refused,
        reason: impl FnOnce() -> (RefusalReason, Option<String>),
    ) {
        if let Some(repeated) = self.refused.get_mut(&refused) {
            repeated.count = repeated.count.saturating_add(1);
            return;
        }
        if self.refused.len() >= MAX_REFUSALS {
            self.lost = self.lost.saturating_add(1);
            return;
        }
        let (reason, name) = reason();
        self.send_refused(&refused, (reason.clone(), name.clone()), 1);
        let count = 0;
        self.refused.insert(
            refused,
            Repeated {
                reason,
                name,
                count,
            },
        );
    }

    fn send_refused(
        &mut self,
        refused: &Refused,
        (reason, name): (RefusalReason, Option<String>),
        count: u64,
    ) {
        self.send(match refused {
            Refused::Flow(request) => NetEvent::Refused(RefusedFlow {
                protocol: request.protocol,
                remote: request.destination,
                name,
                reason,
                count,
            }),
            Refused::Name(name) => NetEvent::NameRefused(RefusedName {
                name: name.clone(),
                reason,
                count,
            }),
        });
    }

    fn send(&mut self, event: NetEvent) {
        self.tell_lost();
        if self.lost > 0 || !(self.sink)(event) {
            self.lost = self.lost.saturating_add(1);
        }
    }

    /// Reports how many events were lost, unless that is lost, too.
    fn tell_lost(&mut self) {
        if self.lost > 0 && (self.sink)(NetEvent::Lost(self.lost)) {
            self.lost = 0;
        }
    }
}

fn record(policy: &mut dyn EgressPolicy, protocol: FlowProtocol, key: &FlowKey) -> FlowRecord {
    let (guest, remote): (SocketAddr, SocketAddr) = (key.guest(), key.remote());
    let request = EgressRequest {
        protocol,
        destination: remote,
    };
    FlowRecord {
        protocol,
        guest,
        remote,
        name: policy.name_of(&request),
        rule: policy.narrowest_rule(&request),
        from_host: false,
    }
}

fn record_of_host(protocol: FlowProtocol, key: &FlowKey) -> FlowRecord {
    FlowRecord {
        protocol,
        guest: key.guest(),
        remote: key.remote(),
        name: None,
        rule: None,
        from_host: true,
    }
}

#[cfg(test)]
#[path = "journal/tests.rs"]
mod tests;
