//! The fake machine.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use sm_control::launch::{BalloonReport, SnapshotReport};
use sm_devices_fs::HostChange;
use sm_guest_proto::control::Refresh;
use sm_snapshot::manifest::Layer;

use crate::guest::{
    AfterCapture, EventSender, GuestEnd, GuestMachine, MergeEnd, MergeStep, PublishedSnapshot,
    SnapshotPlan, SupervisorEvent,
};

/// A machine without a guest: streams to it go to the test.
pub(crate) struct FakeGuest {
    pub(super) connections: Sender<(u32, UnixStream)>,
    pub(super) state: Arc<FakeState>,
    pub(super) restored: Option<Layer>,
    pub(super) events: EventSender,
    pub(super) wants_root: bool,
    pub(super) slow_copies: bool,
}

#[derive(Debug)]
pub(crate) struct FakeState {
    pub(super) ended: OwnedFd,
    pub(crate) end: Mutex<Option<GuestEnd>>,
    pub(crate) paused: Mutex<bool>,
    /// True if the host has disk space.
    pub(crate) space: Mutex<bool>,
    /// True if a disk has many layers.
    pub(crate) full: Mutex<bool>,
    /// Each limit of its memory.
    pub(crate) limits: Mutex<Vec<Option<u64>>>,
    /// The rules of its network, allowing and denying ones, each time they were replaced.
    pub(crate) rules: Mutex<Vec<(Vec<String>, Vec<String>)>>,
    /// The host's changes of files, and a descriptor that is readable when there are some.
    pub(crate) changes: Mutex<Vec<HostChange>>,
    pub(super) changed: OwnedFd,
    /// Number of merges.
    pub(crate) merges: Mutex<u32>,
    pub(crate) console: Mutex<String>,
    /// The last snapshot request.
    pub(crate) snapshot: Mutex<Option<SnapshotPlan>>,
    /// The state of the machine after its memory was copied.
    pub(crate) captured: Mutex<Option<AfterCapture>>,
    pub(crate) capture_cancelled: Mutex<bool>,
    /// True if its published ports are closed.
    pub(crate) closed: Mutex<bool>,
    /// True if bytes that it has sent are still in flight.
    pub(crate) delivers: Mutex<bool>,
    /// Receives a message when the supervisor asks whether bytes to clients of commands are
    /// in flight. They are until the test sets this to `None`.
    pub(crate) commands: Mutex<Option<Sender<()>>>,
    /// What happened, in order.
    pub(crate) order: Mutex<Vec<&'static str>>,
    /// Number of image snapshots.
    pub(crate) roots: Mutex<u32>,
    pub(crate) source_discarded: Mutex<bool>,
}

impl FakeState {
    pub(crate) fn end(&self, end: GuestEnd) {
        self.end.lock().unwrap().get_or_insert(end);
        rustix::io::write(&self.ended, &1u64.to_ne_bytes()).unwrap();
    }
}

#[cfg(test)]
impl FakeState {
    /// Changes a file of the host.
    pub(crate) fn change(&self, path: &str) {
        let mut change = HostChange::default();
        change.share = b"0".to_vec();
        change.path = path.as_bytes().to_vec();
        self.changes.lock().unwrap().push(change);
        rustix::io::write(&self.changed, &1u64.to_ne_bytes()).unwrap();
    }
}

impl Drop for FakeGuest {
    fn drop(&mut self) {
        self.state.order.lock().unwrap().push("released");
    }
}

impl GuestMachine for FakeGuest {
    fn describe_network(&self, _refresh: &mut Refresh) {}

    fn set_network_rules(&mut self, allow: Vec<String>, deny: Vec<String>) -> Result<(), String> {
        if allow.iter().any(|rule| rule == "none") {
            return Err("a rule is invalid".to_owned());
        }
        self.state.rules.lock().unwrap().push((allow, deny));
        Ok(())
    }

    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.connections.send((port, theirs)).unwrap();
        Ok(ours)
    }
    fn restored(&self) -> Option<Layer> {
        self.restored
    }
    fn wants_root(&self) -> bool {
        self.wants_root
    }
    fn root_attached(&mut self) -> Result<bool, String> {
        *self.state.roots.lock().unwrap() += 1;
        if !self.slow_copies {
            self.events.send(SupervisorEvent::Captured(Ok(())));
        }
        Ok(true)
    }
    fn cached_source(&self) -> Option<String> {
        self.restored.is_some().then(|| "image-x".to_owned())
    }
    fn discard_source(&mut self) -> Option<String> {
        *self.state.source_discarded.lock().unwrap() = true;
        self.restored.is_some().then(|| "image-x".to_owned())
    }
    fn check_snapshot(&self, name: &str) -> Result<(), String> {
        match name {
            "taken" => Err("a snapshot named \"taken\" exists already".to_owned()),
            _ => Ok(()),
        }
    }
    fn snapshot(&mut self, plan: SnapshotPlan) -> Result<Option<String>, String> {
        // For "large", the test sends the event that memory is copied.
        if plan.name != "large" {
            self.events.send(SupervisorEvent::Captured(Ok(())));
        }
        *self.state.snapshot.lock().unwrap() = Some(plan);
        Ok(Some("a file is lost".to_owned()))
    }
    fn captured(&mut self, then: AfterCapture) -> Result<(), String> {
        *self.state.captured.lock().unwrap() = Some(then);
        let plan = self.state.snapshot.lock().unwrap();
        let published = match plan.as_ref().map(|plan| plan.name.as_str()) {
            _ if then == AfterCapture::Discard => return Ok(()),
            Some("raced") => Err("a snapshot named \"raced\" exists already".to_owned()),
            // For these, the test sends the event that the snapshot is published.
            None | Some("slow" | "large") => return Ok(()),
            Some(_) => Ok(SnapshotReport {
                pages: 7,
                ..SnapshotReport::default()
            }),
        };
        let published = published.map(|report| PublishedSnapshot {
            report,
            guard: None,
        });
        self.events.send(SupervisorEvent::Snapshot(published));
        Ok(())
    }
    fn cancel_capture(&self) {
        *self.state.capture_cancelled.lock().unwrap() = true;
    }
    fn reset(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn limit_memory(&mut self, bytes: Option<u64>) {
        self.state.limits.lock().unwrap().push(bytes);
    }
    fn balloon(&self) -> Option<BalloonReport> {
        let limits = self.state.limits.lock().unwrap();
        Some(BalloonReport {
            target: limits.last().copied().flatten().unwrap_or(0),
            ..BalloonReport::default()
        })
    }
    fn host_changes(&self) -> Option<BorrowedFd<'_>> {
        Some(self.state.changed.as_fd())
    }
    fn take_host_changes(&self, _limit: usize) -> Vec<HostChange> {
        let _ = rustix::io::read(&self.state.changed, &mut [0; 8]);
        std::mem::take(&mut *self.state.changes.lock().unwrap())
    }
    fn console_tail(&self, _lines: usize) -> String {
        self.state.console.lock().unwrap().clone()
    }
    fn published(&self) -> Vec<sm_control::publish::PublishedPort> {
        Vec::new()
    }
    fn close_published(&mut self) {
        *self.state.closed.lock().unwrap() = true;
    }
    fn is_delivering(&mut self) -> bool {
        *self.state.delivers.lock().unwrap()
    }
    fn is_delivering_commands(&mut self) -> bool {
        let commands = self.state.commands.lock().unwrap();
        commands
            .as_ref()
            .is_some_and(|commands| commands.send(()).is_ok())
    }
    fn is_full(&self) -> bool {
        *self.state.full.lock().unwrap()
    }
    fn merge(&mut self, in_need: bool) -> bool {
        if in_need {
            *self.state.merges.lock().unwrap() += 1;
        }
        in_need
    }
    fn merge_step(&mut self, step: MergeStep) -> Option<MergeEnd> {
        match step {
            MergeStep::Written(Ok(_)) => None,
            MergeStep::Durable(Ok(())) => {
                *self.state.full.lock().unwrap() = false;
                Some(MergeEnd::Done)
            }
            MergeStep::Written(Err(_)) | MergeStep::Durable(Err(_)) => Some(MergeEnd::Failed),
        }
    }
    fn has_space(&self) -> bool {
        *self.state.space.lock().unwrap()
    }
    fn pause(&mut self) -> Result<(), String> {
        *self.state.paused.lock().unwrap() = true;
        Ok(())
    }
    fn resume(&mut self) -> Result<(), String> {
        *self.state.paused.lock().unwrap() = false;
        Ok(())
    }
    fn stop(&mut self) {
        self.state.end(GuestEnd::Stopped);
    }
    fn end_event(&self) -> BorrowedFd<'_> {
        self.state.ended.as_fd()
    }
    fn end(&self) -> Option<GuestEnd> {
        self.state.end.lock().unwrap().clone()
    }
}
