//! The interface between the supervisor and a machine: operations and events.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::{EventfdFlags, eventfd};
use sm_control::launch::{BalloonReport, SnapshotReport, StageTimes};
use sm_control::publish::PublishedPort;
use sm_devices_fs::HostChange;
use sm_guest_proto::control::Refresh;
use sm_snapshot::Error;
use sm_snapshot::capture::RemovalGuard;
use sm_snapshot::manifest::Layer;
use sm_snapshot::store::SnapshotStore;
use sm_vmm_core::virtio::layered::DiskLayer;

/// The operations of a running machine that its supervisor uses.
pub(crate) trait GuestMachine {
    /// Opens a stream to a vsock port of the guest. If the guest refuses the connection,
    /// the stream ends.
    fn connect(&mut self, port: u32) -> io::Result<UnixStream>;
    /// Returns the layer of the snapshot that was restored; `None` if a kernel was
    /// booted.
    fn restored(&self) -> Option<Layer> {
        None
    }
    /// Adds the guest's network to its identity.
    fn describe_network(&self, refresh: &mut Refresh);
    /// Replaces the rules of the network.
    ///
    /// # Errors
    /// One of them is invalid, in a sentence; the rules are as before.
    fn set_network_rules(&mut self, allow: Vec<String>, deny: Vec<String>) -> Result<(), String>;
    /// Called when the agent is ready and idle, before the machine gets its image and
    /// identity: the state of a base snapshot. Returns true if the machine is paused for
    /// one: [`SupervisorEvent::Captured`] follows.
    fn agent_ready(&mut self) -> Result<bool, String> {
        Ok(false)
    }
    /// Inserts the image into its drive.
    fn insert_image(&mut self) {}
    /// Called before clients are notified of the VM's end.
    fn is_ending(&mut self) {}
    /// Inserts the disks of volumes.
    fn insert_volumes(&mut self) {}
    /// Returns true if an image snapshot is wanted, for which the guest has to be frozen
    /// first.
    fn wants_root(&self) -> bool {
        false
    }
    /// Called when the root file system is mounted and no program of it runs: the state
    /// of an image snapshot. Returns true if the machine is paused for one:
    /// [`SupervisorEvent::Captured`] follows.
    fn root_attached(&mut self) -> Result<bool, String> {
        Ok(false)
    }
    /// Called when the workload runs.
    fn workload_started(&mut self) {}
    /// Asks the guest to use at most `bytes` bytes of its memory, or all of it.
    fn limit_memory(&mut self, bytes: Option<u64>) {
        let _ = bytes;
    }
    /// Returns the memory that the guest has returned to the host.
    fn balloon(&self) -> Option<BalloonReport> {
        None
    }
    /// Returns the name of the automatic snapshot from which it was restored, if any.
    fn cached_source(&self) -> Option<String> {
        None
    }
    /// Called when the guest did not start properly. If it was restored from an automatic
    /// snapshot, that is removed when the machine has ended; returns its name.
    fn discard_source(&mut self) -> Option<String> {
        None
    }
    /// Checks that a snapshot of this name can be published; the error is a clause.
    /// Called before any other work for it; another process may still take the name
    /// first.
    fn check_snapshot(&self, name: &str) -> Result<(), String> {
        let _ = name;
        Ok(())
    }
    /// Captures the machine with its frozen workload as the snapshot `name`. Returns at
    /// once, with the machine paused; [`SupervisorEvent::Captured`] follows and, after
    /// [`Self::captured`], [`SupervisorEvent::Snapshot`]. The text is a warning about what
    /// clones cannot have; a sentence.
    fn snapshot(&mut self, plan: SnapshotPlan) -> Result<Option<String>, String> {
        let _ = plan;
        Err("this machine cannot be captured".to_owned())
    }
    /// Returns a descriptor that is readable when the host has changed files of which the
    /// guest is to be notified.
    fn host_changes(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Returns up to `limit` such changes since the last call, each once.
    fn take_host_changes(&self, limit: usize) -> Vec<HostChange> {
        let _ = limit;
        Vec::new()
    }
    /// Must be called after the machine was captured, or the capture failed.
    fn captured(&mut self, then: AfterCapture) -> Result<(), String> {
        let _ = then;
        Ok(())
    }
    /// Returns true if a disk has so many layers that some should be merged before the next
    /// snapshot.
    fn is_full(&self) -> bool {
        false
    }
    /// Merges layers of a disk that has many of them, or, in need, more than a few. Returns
    /// true if a merge is in progress: [`SupervisorEvent::Merge`] follows.
    fn merge(&mut self, in_need: bool) -> bool {
        let _ = in_need;
        false
    }
    /// Must be called for each step of a merge; returns its result when it has ended.
    fn merge_step(&mut self, step: MergeStep) -> Option<MergeEnd> {
        let _ = step;
        None
    }
    /// Cancels the copy of memory to shorten the pause: [`SupervisorEvent::Captured`], with a
    /// failure, follows soon.
    fn cancel_capture(&self) {}
    /// Resets the machine to the snapshot from which it was started; it gets a new
    /// identity later. Every stream to it ends.
    fn reset(&mut self) -> Result<(), String> {
        Err("this machine cannot be reset".to_owned())
    }
    /// Returns true if the host has space for what the guest writes, as far as it is known.
    fn has_space(&self) -> bool {
        true
    }
    /// Pauses all vCPUs.
    fn pause(&mut self) -> Result<(), String>;
    /// Resumes the vCPUs.
    fn resume(&mut self) -> Result<(), String>;
    /// Starts or stops the measurement of connection stages. Returns the results when
    /// stopped.
    fn profile(&self, on: bool) -> Vec<StageTimes> {
        let _ = on;
        Vec::new()
    }
    /// Returns the last `lines` lines of the guest's console.
    fn console_tail(&self, lines: usize) -> String;
    /// Returns its published ports.
    fn published(&self) -> Vec<PublishedPort>;
    /// Closes the listeners of published ports; connections continue.
    fn close_published(&mut self) {}
    /// Returns true if bytes that the guest has sent to published ports are still in
    /// flight; [`SupervisorEvent::Delivered`] follows then.
    fn is_delivering(&mut self) -> bool {
        false
    }
    /// Returns true if bytes that the guest has sent to clients of its commands are still in
    /// flight; [`SupervisorEvent::Delivered`] follows then. Also after the machine's end.
    fn is_delivering_commands(&mut self) -> bool {
        false
    }
    /// Stops the machine; [`Self::end`] becomes available.
    fn stop(&mut self);
    /// Returns a descriptor that becomes, and stays, readable when the machine has ended.
    fn end_event(&self) -> BorrowedFd<'_>;
    /// Returns the cause of its end, once it has ended.
    fn end(&self) -> Option<GuestEnd>;
}

/// The state of a machine after its capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterCapture {
    /// The machine runs, and its snapshot is published.
    Run,
    /// The machine stays paused, and its snapshot is published.
    LeavePaused,
    /// The machine runs, and the snapshot is discarded.
    Discard,
}

/// The cause of a machine's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GuestEnd {
    /// The supervisor stopped it.
    Stopped,
    /// The guest caused it: a clause such as "the guest powered off".
    Guest(String),
    /// A failure on the host; a clause.
    Host(String),
}

/// Parameters of a snapshot of a running workload.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotPlan {
    /// Its name.
    pub(crate) name: String,
    /// True if the last VM that uses it removes it.
    pub(crate) ephemeral: bool,
    /// True to leave the machine paused afterwards.
    pub(crate) leave_paused: bool,
}

/// An event from other threads to the supervisor.
#[derive(Debug)]
pub(crate) enum SupervisorEvent {
    /// The agent has connected.
    Agent(UnixStream),
    /// The memory of a paused machine was copied, or the copy failed with a clause.
    Captured(Result<(), String>),
    /// A snapshot that the supervisor requested was published, or failed with a clause.
    Snapshot(Result<PublishedSnapshot, String>),
    /// A merge of layers has made a step.
    Merge(MergeStep),
    /// The guest became unreachable because its driver broke the vsock device; the cause.
    Unreachable(String),
    /// The host has no space for what the guest writes. The request is executed again after
    /// the next pause.
    NoSpace,
    /// All bytes that the guest has sent to published ports, or to clients of its commands,
    /// were delivered.
    Delivered,
}

/// A step of a merge of layers; errors are clauses.
#[derive(Debug)]
pub(crate) enum MergeStep {
    /// The merged layer was written.
    Written(Result<DiskLayer, String>),
    /// Its place among the layers is durable.
    Durable(Result<(), String>),
}

/// The result of a merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MergeEnd {
    /// The disk has fewer layers.
    Done,
    /// The disk is as before.
    Failed,
}

/// A published snapshot.
#[derive(Debug)]
pub(crate) struct PublishedSnapshot {
    pub(crate) report: SnapshotReport,
    /// Prevents its removal.
    pub(crate) guard: Option<SnapshotGuard>,
}

/// Prevents the removal of a snapshot until the client that requested it has opened it.
/// An ephemeral snapshot that was not opened is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct SnapshotGuard {
    removal_guard: Option<RemovalGuard>,
    ephemeral: Option<(SnapshotStore, String)>,
}

impl SnapshotGuard {
    pub(crate) fn new(
        removal_guard: RemovalGuard,
        ephemeral: Option<(SnapshotStore, String)>,
    ) -> Self {
        Self {
            removal_guard: Some(removal_guard),
            ephemeral,
        }
    }
}

impl Drop for SnapshotGuard {
    fn drop(&mut self) {
        self.removal_guard = None;
        if let Some((store, name)) = self.ephemeral.take() {
            // The store refuses while a clone lives: the last clone removes it.
            match store.remove(&name) {
                Ok(()) => tracing::info!(name, "removed an unused snapshot"),
                Err(Error::NotFound { .. } | Error::InUse { .. }) => {}
                Err(error) => tracing::warn!(name, %error, "a snapshot is not removed"),
            }
        }
    }
}

/// Sends events to the supervisor, from any thread.
#[derive(Clone, Debug)]
pub(crate) struct EventSender {
    sender: Sender<SupervisorEvent>,
    wake: Arc<OwnedFd>,
}

impl EventSender {
    pub(crate) fn send(&self, event: SupervisorEvent) {
        // A send fails only after the supervisor has ended; a full eventfd counter is
        // readable.
        let _ = self.sender.send(event);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

/// The supervisor's end of the event queue.
#[derive(Debug)]
pub(crate) struct EventReceiver {
    receiver: Receiver<SupervisorEvent>,
    wake: Arc<OwnedFd>,
}

impl EventReceiver {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(crate) fn next(&mut self) -> Option<SupervisorEvent> {
        self.receiver.try_recv().ok()
    }

    /// Resets readiness. It must be called before [`Self::next`], so that no event is
    /// missed.
    pub(crate) fn clear(&mut self) {
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
    }
}

pub(crate) fn event_channel() -> io::Result<(EventSender, EventReceiver)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = channel();
    Ok((
        EventSender {
            sender,
            wake: Arc::clone(&wake),
        },
        EventReceiver { receiver, wake },
    ))
}
