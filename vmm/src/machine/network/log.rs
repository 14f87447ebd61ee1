//! The log of a network, which is bounded in size.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use sm_control::network::{NETWORK_LOG, NetworkEvent, NetworkEventKind, OLDER_NETWORK_LOG};
use sm_control::timings::unix_nanos;
use sm_devices_net::engine::{FlowEnd, FlowProtocol, FlowRecord, NetEvent, RefusalReason};

/// Bytes after which the file is renamed, and another begun.
const MAX_FILE: u64 = 2 << 20;

/// The log of a network. The engine bounds the rate of its events.
#[derive(Debug)]
pub(super) struct NetworkLog {
    directory: PathBuf,
    file: Option<File>,
    len: u64,
    failed: bool,
}

impl NetworkLog {
    /// Creates the log of the VM with this directory. The file exists from the first line on.
    pub(super) fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            file: None,
            len: 0,
            failed: false,
        }
    }

    /// Writes an event, on the thread of the network: into the page cache. Returns false if it
    /// cannot be written.
    pub(super) fn note(&mut self, event: NetEvent) -> bool {
        let written = self.write(&line(event));
        if let Err(error) = &written
            && !std::mem::replace(&mut self.failed, true)
        {
            tracing::warn!(%error, "the log of the network is not written");
        }
        written.is_ok()
    }

    fn write(&mut self, event: &NetworkEvent) -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        let path = self.directory.join(NETWORK_LOG);
        if self.len >= MAX_FILE && self.file.take().is_some() {
            fs::rename(&path, self.directory.join(OLDER_NETWORK_LOG))?;
        }
        let file = match &mut self.file {
            Some(file) => file,
            file => {
                let mut options = OpenOptions::new();
                let opened = options.create(true).append(true).mode(0o600).open(&path)?;
                self.len = opened.metadata()?.len();
                file.insert(opened)
            }
        };
        file.write_all(&line)?;
        self.len += line.len() as u64;
        Ok(())
    }
}

/// Returns the form of an event in the log.
fn line(event: NetEvent) -> NetworkEvent {
    let new = |kind| NetworkEvent::new(unix_nanos(), kind);
    match event {
        NetEvent::Opened(flow) => with_flow(new(NetworkEventKind::Opened), flow),
        NetEvent::Ended(flow, summary) => {
            let mut line = with_flow(new(NetworkEventKind::Ended), flow);
            line.from_guest = Some(summary.from_guest);
            line.to_guest = Some(summary.to_guest);
            line.duration_ms =
                Some(u64::try_from(summary.duration.as_millis()).unwrap_or(u64::MAX));
            line.end = Some(end(summary.end).to_owned());
            line
        }
        NetEvent::Refused(refused) => {
            let mut line = with_reason(
                new(NetworkEventKind::Refused),
                refused.reason,
                refused.count,
            );
            line.protocol = Some(protocol(refused.protocol).to_owned());
            line.destination = Some(refused.remote);
            line.name = refused.name;
            line
        }
        NetEvent::NameRefused(refused) => {
            let line = new(NetworkEventKind::NameRefused);
            let mut line = with_reason(line, refused.reason, refused.count);
            line.name = Some(refused.name);
            line
        }
        NetEvent::Limited(what) => {
            let mut line = new(NetworkEventKind::Limited);
            line.reason = Some(what.to_owned());
            line
        }
        NetEvent::Lost(count) => {
            let mut line = new(NetworkEventKind::Lost);
            line.count = Some(count);
            line
        }
        _ => new(NetworkEventKind::Other),
    }
}

fn with_flow(mut line: NetworkEvent, flow: FlowRecord) -> NetworkEvent {
    line.protocol = Some(protocol(flow.protocol).to_owned());
    line.guest = Some(flow.guest);
    line.destination = Some(flow.remote);
    line.name = flow.name;
    line.rule = flow.rule;
    line
}

fn with_reason(mut line: NetworkEvent, reason: RefusalReason, count: u64) -> NetworkEvent {
    line.reason = Some(reason.text);
    line.allow = reason.rule;
    line.count = (count > 1).then_some(count);
    line
}

fn protocol(protocol: FlowProtocol) -> &'static str {
    match protocol {
        FlowProtocol::Tcp => "tcp",
        FlowProtocol::Udp => "udp",
        _ => "icmp",
    }
}

fn end(end: FlowEnd) -> &'static str {
    match end {
        FlowEnd::Closed => "closed",
        FlowEnd::ResetByGuest => "reset_by_guest",
        FlowEnd::ResetByPeer => "reset_by_peer",
        FlowEnd::Refused => "refused",
        FlowEnd::Unreachable => "unreachable",
        FlowEnd::TimedOut => "timed_out",
        FlowEnd::Prohibited => "prohibited",
        FlowEnd::Evicted => "evicted",
        FlowEnd::Stopped => "stopped",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(directory: &Path, name: &str) -> Vec<NetworkEvent> {
        let text = fs::read_to_string(directory.join(name)).unwrap_or_default();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }

    #[test]
    fn events_are_lines() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = NetworkLog::new(directory.path());
        assert!(!directory.path().join(NETWORK_LOG).exists());
        assert!(log.note(NetEvent::Limited("the limit of UDP flows")));
        assert!(log.note(NetEvent::Lost(3)));
        let lines = lines(directory.path(), NETWORK_LOG);
        assert_eq!(lines[0].event, NetworkEventKind::Limited);
        assert_eq!(lines[0].reason.as_deref(), Some("the limit of UDP flows"));
        assert_eq!(
            (lines[1].event, lines[1].count),
            (NetworkEventKind::Lost, Some(3))
        );
        let mut gone = NetworkLog::new(&directory.path().join("gone"));
        assert!(!gone.note(NetEvent::Lost(1)));
    }

    #[test]
    fn a_refusal_has_the_rule_that_would_help() {
        let reason = RefusalReason {
            text: "not allowed".to_owned(),
            rule: Some("tcp:host:80".to_owned()),
        };
        let line = with_reason(
            NetworkEvent::new(0, NetworkEventKind::Refused),
            reason.clone(),
            1,
        );
        assert_eq!(line.allow.as_deref(), Some("tcp:host:80"));
        assert_eq!(
            (line.reason.as_deref(), line.count),
            (Some("not allowed"), None)
        );
        let line = with_reason(NetworkEvent::new(0, NetworkEventKind::Refused), reason, 9);
        assert_eq!(line.count, Some(9));
    }

    #[test]
    fn the_log_has_an_end() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = NetworkLog::new(directory.path());
        let size = |name: &str| {
            fs::metadata(directory.path().join(name)).map_or(0, |metadata| metadata.len())
        };
        for number in 0..60_000 {
            assert!(log.note(NetEvent::Lost(number)));
        }
        assert!(size(OLDER_NETWORK_LOG) >= MAX_FILE && size(OLDER_NETWORK_LOG) < MAX_FILE + 1024);
        assert!((1..MAX_FILE).contains(&size(NETWORK_LOG)));
        let last = lines(directory.path(), NETWORK_LOG).pop().unwrap();
        assert_eq!(last.count, Some(59_999));
    }
}
