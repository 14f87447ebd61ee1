//! Records of flows, refusals and limits, for a log.
//!
//! An engine passes [`NetEvent`]s to an [`EventSink`], which must not wait: an event that it does
//! not take is counted, and the number follows as [`NetEvent::Lost`]. Memory and rate are bounded
//! whatever the guest does: refusals of one destination are one event in ten seconds, with their
//! number.

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use super::egress::{FlowProtocol, RefusalReason};

/// Takes events on the engine's thread; returns false for one that it has no room for. It must
/// not wait.
pub type EventSink = Box<dyn FnMut(NetEvent) -> bool + Send>;

/// Returns a sink, and the receiver of what it takes: at most `limit` events wait. The receiver
/// ends when the engine is dropped.
#[must_use]
pub fn event_channel(limit: usize) -> (EventSink, Receiver<NetEvent>) {
    let (sender, receiver) = sync_channel(limit.max(1));
    let sink = move |event| sender.try_send(event).is_ok();
    (Box::new(sink), receiver)
}

/// An event of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NetEvent {
    /// A flow exists: the host is connected, or has sent a datagram or an echo request. Echo
    /// requests, and questions to a name server that the guest has chosen, have no end; those of
    /// one destination that follow each other are one event.
    Opened(FlowRecord),
    /// A flow has ended. One of TCP that could not connect has no [`Self::Opened`].
    Ended(FlowRecord, FlowSummary),
    /// The policy has refused flows.
    Refused(RefusedFlow),
    /// The policy has refused a name, or an answer for it.
    NameRefused(RefusedName),
    /// A limit of the engine is reached for the first time; it is named as in "the limit of
    /// UDP flows".
    Limited(&'static str),
    /// So many events were lost, because they came too fast or the sink had no room.
    Lost(u64),
}

/// A flow.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlowRecord {
    /// The transport.
    pub protocol: FlowProtocol,
    /// The guest's end. With `remote` and `protocol` it identifies a flow while that exists.
    pub guest: SocketAddr,
    /// The other end, as the guest sees it.
    pub remote: SocketAddr,
    /// The name for which the guest got the address, if it got it for one; at the end, that which
    /// the flow has proven, if it had to.
    pub name: Option<String>,
    /// The text of the narrowest rule that allows the flow, if the policy has rules.
    pub rule: Option<String>,
    /// A client of an exposed port has begun it.
    pub from_host: bool,
}

/// The account of a flow that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlowSummary {
    /// Bytes of payload that the guest has sent.
    pub from_guest: u64,
    /// Bytes of payload that the guest has received.
    pub to_guest: u64,
    /// Time for which the flow existed.
    pub duration: Duration,
    /// The reason of the end.
    pub end: FlowEnd,
}

/// Reason why a flow has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FlowEnd {
    /// Both sides have ended it.
    Closed,
    /// The guest has reset it, or cancelled it before it was connected.
    ResetByGuest,
    /// The peer has reset it, or the host's connection has failed otherwise.
    ResetByPeer,
    /// The peer has refused the connection.
    Refused,
    /// The peer cannot be reached.
    Unreachable,
    /// The guest does not answer any more, or a flow of datagrams was not used.
    TimedOut,
    /// The policy does not allow it any more.
    Prohibited,
    /// Its place was needed for another one, or the host lacks something.
    Evicted,
    /// The guest's device was reset, or the engine has ended.
    Stopped,
}

/// Flows to one destination that were refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RefusedFlow {
    /// The transport.
    pub protocol: FlowProtocol,
    /// The destination, as the guest sees it.
    pub remote: SocketAddr,
    /// The name for which the guest got the address, if it got it for one.
    pub name: Option<String>,
    /// The reason, and the rule that would help.
    pub reason: RefusalReason,
    /// The number of refusals: one for the first, which is reported at once.
    pub count: u64,
}

/// A name that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RefusedName {
    /// The name.
    pub name: String,
    /// The reason, and the rule that would help.
    pub reason: RefusalReason,
    /// The number of refusals: one for the first, which is reported at once.
    pub count: u64,
}

#[cfg(test)]
impl NetEvent {
    /// The event of a flow that was opened.
    pub(crate) fn opened_for_test(
        protocol: FlowProtocol,
        remote: SocketAddr,
        rule: Option<String>,
    ) -> Self {
        Self::Opened(FlowRecord {
            protocol,
            guest: SocketAddr::from(([100, 96, 0, 2], 1)),
            remote,
            name: None,
            rule,
            from_host: false,
        })
    }
}
