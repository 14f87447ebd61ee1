//! Changes of the host's files, of which programs in the guest are notified.
//!
//! They are collected for a moment, as an editor or a build makes several, and at most one
//! request is sent to the agent at a time: changes meanwhile are one notification later.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use sm_devices_fs::HostChange;
use sm_guest_proto::control::{ControlReply, ControlRequest, HostFileChange};

use super::stage::{MachineActivity, RunningStage, SupervisorStage};
use super::{Supervisor, SupervisorTimer, printable};
use crate::agent::Purpose;
use crate::guest::GuestMachine;

/// Time in which changes are collected.
const COLLECT: Duration = Duration::from_millis(20);
/// Time after which a request is repeated that the agent could not accept.
const RETRY: Duration = Duration::from_millis(100);
/// Maximum number of changes that are waiting.
const MAX_TAKEN: usize = 4096;
/// Maximum numbers of changes in a request, and of bytes of their paths, each of which may
/// need six bytes in JSON: it has to fit into a frame.
const MAX_CHANGES: usize = 128;
const MAX_BYTES: usize = 6 << 10;

#[derive(Debug, Default, PartialEq, Eq)]
enum Progress {
    /// No timer is set, and no request is outstanding.
    #[default]
    Idle,
    /// Until [`SupervisorTimer::HostChanges`].
    Collecting,
    /// A request with these changes is outstanding.
    Sent(Vec<HostFileChange>),
    /// The agent does not know such requests.
    Unsupported,
}

/// Changes that the guest has not been notified of.
#[derive(Debug, Default)]
pub(super) struct HostChanges {
    progress: Progress,
    waiting: VecDeque<HostFileChange>,
}

impl HostChanges {
    /// Forgets the request to an agent that is gone.
    pub(super) fn restart(&mut self) {
        self.progress = Progress::Idle;
        self.waiting.clear();
    }

    /// Returns the changes of the next request.
    fn next(&mut self) -> Vec<HostFileChange> {
        let (mut changes, mut bytes) = (Vec::new(), 0);
        while let Some(change) = self.waiting.front() {
            bytes += change.path.len();
            if changes.len() >= MAX_CHANGES || bytes > MAX_BYTES && !changes.is_empty() {
                break;
            }
            changes.extend(self.waiting.pop_front());
        }
        changes
    }
}

/// Converts a change; a file whose name is no text is a change of its directory. None if the
/// path is too long for a request.
fn of_guest(change: HostChange) -> Option<HostFileChange> {
    let share = String::from_utf8(change.share).ok()?;
    let mut is_directory = change.is_directory;
    let mut bytes = change.path.as_slice();
    while std::str::from_utf8(bytes).is_err() {
        let parent = bytes.iter().rposition(|byte| *byte == b'/');
        bytes = bytes.get(..parent.unwrap_or(0))?;
        is_directory = true;
    }
    let path = std::str::from_utf8(bytes).ok()?;
    (path.len() <= MAX_BYTES).then(|| HostFileChange {
        share,
        path: path.to_owned(),
        is_directory,
    })
}

impl<G: GuestMachine> Supervisor<G> {
    /// Returns true if programs run that could be notified.
    fn notifies(&self) -> bool {
        let runs = matches!(
            &self.stage,
            SupervisorStage::Running(RunningStage {
                machine: MachineActivity::Free,
                ..
            })
        );
        runs && self.agent.is_some()
    }

    /// Returns the descriptor of changes, if they are waited for.
    pub(super) fn host_changes_interest(&self) -> Option<BorrowedFd<'_>> {
        let waits = self.host_changes.progress == Progress::Idle
            && self.host_changes.waiting.is_empty()
            && self.notifies();
        self.guest.as_ref().filter(|_| waits)?.host_changes()
    }

    /// Handles a change by the host, with which others probably follow.
    pub(super) fn host_has_changed(&mut self) {
        self.host_changes.progress = Progress::Collecting;
        self.set_timer(SupervisorTimer::HostChanges, COLLECT);
    }

    /// Takes the changes that were collected.
    pub(super) fn collect_host_changes(&mut self) {
        self.host_changes.progress = Progress::Idle;
        if self.host_changes.waiting.is_empty()
            && let Some(guest) = &self.guest
        {
            let taken = guest.take_host_changes(MAX_TAKEN);
            let changes = taken.into_iter().filter_map(of_guest);
            self.host_changes.waiting.extend(changes);
        }
    }

    /// Sends collected changes, unless the guest cannot be notified now.
    pub(super) fn send_host_changes(&mut self) {
        if self.host_changes.progress != Progress::Idle || !self.notifies() {
            return;
        }
        let changes = self.host_changes.next();
        if let (false, Some(agent)) = (changes.is_empty(), &mut self.agent) {
            let request = ControlRequest::NoteHostChanges {
                container: self.container.clone(),
                changes: changes.clone(),
            };
            agent.send_request(Purpose::NoteHostChanges, &request);
            self.host_changes.progress = Progress::Sent(changes);
        }
    }

    /// Handles the agent's answer.
    pub(super) fn host_changes_noted(&mut self, reply: ControlReply) {
        let Progress::Sent(sent) = std::mem::take(&mut self.host_changes.progress) else {
            return;
        };
        match reply {
            ControlReply::Done => {}
            ControlReply::Busy => {
                for change in sent.into_iter().rev() {
                    self.host_changes.waiting.push_front(change);
                }
                self.host_changes.progress = Progress::Collecting;
                self.set_timer(SupervisorTimer::HostChanges, RETRY);
            }
            other => {
                let reply = printable(&format!("{other:?}"));
                tracing::warn!(reply, "programs are not notified of changes by the host");
                self.host_changes.waiting.clear();
                self.host_changes.progress = Progress::Unsupported;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(path: &str) -> HostFileChange {
        HostFileChange {
            share: "0".to_owned(),
            path: path.to_owned(),
            is_directory: false,
        }
    }

    #[test]
    fn requests_are_bounded() {
        let mut changes = HostChanges::default();
        let numbers = (0..300).map(|number| number.to_string());
        let long = ["x", "y", "z"].map(|text| text.repeat(MAX_BYTES / 2 + 1));
        let paths = numbers.chain(long).chain(["last".to_owned()]);
        changes.waiting.extend(paths.map(|path| change(&path)));
        let mut counts = Vec::new();
        loop {
            let next = changes.next();
            if next.is_empty() {
                break;
            }
            let request = ControlRequest::NoteHostChanges {
                container: sm_guest_proto::container::ContainerId::default(),
                changes: next.clone(),
            };
            let json = serde_json::to_vec(&request).unwrap();
            assert!(json.len() < 64 << 10);
            counts.push(next.len());
        }
        assert_eq!(counts, [128, 128, 45, 1, 2]);
    }

    #[test]
    fn names_that_are_no_text_are_changes_of_their_directory() {
        let converted = |path: &[u8]| {
            let mut change = HostChange::default();
            change.share = b"0".to_vec();
            change.path = path.to_vec();
            let converted = of_guest(change)?;
            Some((converted.path, converted.is_directory))
        };
        let text = |path: &str, directory| Some((path.to_owned(), directory));
        assert_eq!(converted(b"a/b"), text("a/b", false));
        assert_eq!(converted(b"a/\xff"), text("a", true));
        assert_eq!(converted(b"\xff/b"), text("", true));
        assert_eq!(converted(&[b'a'; MAX_BYTES + 1]), None);
    }
}
