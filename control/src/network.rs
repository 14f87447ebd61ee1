//! Events of a VM's network, which its process writes to a log.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Name of the log in the directory of a VM's record: lines of JSON, each a [`NetworkEvent`].
pub const NETWORK_LOG: &str = "network.log";
/// Name of the log's older half.
pub const OLDER_NETWORK_LOG: &str = "network.log.1";

/// An event of a VM's network. Members are added, but not renamed or removed; those that an
/// event does not have are left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NetworkEvent {
    /// Time in nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// Its kind.
    pub event: NetworkEventKind,
    /// The protocol: `tcp`, `udp` or `icmp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// The guest's end of a flow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<SocketAddr>,
    /// The address in the guest's packets. The port is zero for `icmp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<SocketAddr>,
    /// The name for which the guest got that address, or for which it asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The rule that allows the flow, if there are rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Reason of a refusal, or the name of a limit; a phrase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The rule that would allow what was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<String>,
    /// Bytes of payload that the guest has sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_guest: Option<u64>,
    /// Bytes of payload that the guest has received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_guest: Option<u64>,
    /// Milliseconds for which a flow existed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
    /// Reason of a flow's end, such as `closed` or `reset_by_peer`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<String>,
    /// Number of refusals, or of events that were lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
}

/// Kind of a [`NetworkEvent`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NetworkEventKind {
    /// A connection was made, or the first datagram or echo request to a destination was sent.
    Opened,
    /// A connection or a flow of datagrams has ended.
    Ended,
    /// A connection, a datagram or an echo request was not permitted.
    Refused,
    /// A name was not resolved.
    NameRefused,
    /// A limit was reached for the first time.
    Limited,
    /// Events were too many to be written.
    Lost,
    /// A kind that only a later version knows.
    #[serde(other)]
    Other,
}

impl NetworkEvent {
    /// Returns an event without details.
    #[must_use]
    pub fn new(time_ns: u64, event: NetworkEventKind) -> Self {
        Self {
            time_ns,
            event,
            protocol: None,
            guest: None,
            destination: None,
            name: None,
            rule: None,
            reason: None,
            allow: None,
            from_guest: None,
            to_guest: None,
            duration_ms: None,
            end: None,
            count: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_written_and_read() {
        let mut event = NetworkEvent::new(7, NetworkEventKind::Refused);
        event.protocol = Some("tcp".into());
        event.destination = Some("127.0.0.1:80".parse().unwrap());
        event.reason = Some("not allowed".into());
        event.allow = Some("tcp:host:80".into());
        let line = r#"{"time_ns":7,"event":"refused","protocol":"tcp","destination":"127.0.0.1:80","reason":"not allowed","allow":"tcp:host:80"}"#;
        assert_eq!(serde_json::to_string(&event).unwrap(), line);
        assert_eq!(serde_json::from_str::<NetworkEvent>(line).unwrap(), event);
        let later = line
            .replace("refused", "held")
            .replace("}", r#","color":"red"}"#);
        let later: NetworkEvent = serde_json::from_str(&later).unwrap();
        assert_eq!(later.event, NetworkEventKind::Other);
    }
}
