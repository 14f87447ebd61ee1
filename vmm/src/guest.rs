//! What the supervisor needs of a machine, and what a machine tells it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::{EventfdFlags, eventfd};
use sm_control::launch::{SnapshotReport, StageTimes};
use sm_control::publish::PublishedPort;
use sm_snapshot::Error;
use sm_snapshot::capture::Hold;
use sm_snapshot::manifest::Layer;
use sm_snapshot::store::SnapshotStore;

/// What a machine was started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// A kernel was booted.
    Boot,
    /// A snapshot of this layer was restored.
    Restored(Layer),
}

/// A running machine, seen from its supervisor.
pub(crate) trait Guest {
    /// Opens a stream to a vsock port of the guest. A refusal shows as the end
    /// of the stream.
    fn connect(&mut self, port: u32) -> io::Result<UnixStream>;
    /// What it was started from.
    fn start(&self) -> Start {
        Start::Boot
    }
    /// The agent is there and has nothing to do yet: the moment to make a base
    /// snapshot of, before the machine is given its image and identity. True if it is
    /// held for that: [`Notice::Captured`] follows.
    fn agent_ready(&mut self) -> Result<bool, String> {
        Ok(false)
    }
    /// Puts the image into its drive.
    fn insert_image(&mut self) {}
    /// Whether an image snapshot is to be made, of a guest that is frozen first.
    fn wants_root(&self) -> bool {
        false
    }
    /// The root file system is mounted and nothing of it has run: the moment to
    /// make an image snapshot of. True if it is held for that: [`Notice::Captured`]
    /// follows.
    fn root_attached(&mut self) -> Result<bool, String> {
        Ok(false)
    }
    /// The workload runs.
    fn workload_started(&mut self) {}
    /// The snapshot it was restored from, if that was made on the way to others.
    fn cached_source(&self) -> Option<String> {
        None
    }
    /// The guest did not come up as it should have. If it was restored from a snapshot
    /// that was made on the way to others, that is removed when the machine has ended;
    /// returns its name.
    fn give_up_source(&mut self) -> Option<String> {
        None
    }
    /// Whether a snapshot of this name could be published; a clause if not. Asked
    /// before anything is done for it. Another process may still be first.
    fn check_snapshot(&self, name: &str) -> Result<(), String> {
        let _ = name;
        Ok(())
    }
    /// Captures the machine with its workload, which must be frozen, as the
    /// snapshot `name`. Returns at once, with the machine held; [`Notice::Captured`]
    /// follows and, after [`Self::captured`], [`Notice::Snapshot`].
    fn snapshot(&mut self, plan: SnapshotPlan) -> Result<(), String> {
        let _ = plan;
        Err("this machine cannot be captured".to_owned())
    }
    /// To be called when the machine was captured, or could not be.
    fn captured(&mut self, then: AfterCapture) -> Result<(), String> {
        let _ = then;
        Ok(())
    }
    /// Has the machine held no longer than it must be: [`Notice::Captured`], with a
    /// failure, follows soon.
    fn give_up_capture(&self) {}
    /// Puts the machine back to the snapshot that it was started from, with another
    /// identity to be. Every stream to it ends.
    fn reset(&mut self) -> Result<(), String> {
        Err("this machine cannot be put back".to_owned())
    }
    /// Holds all vCPUs.
    fn pause(&mut self) -> Result<(), String>;
    /// Lets them run again.
    fn resume(&mut self) -> Result<(), String>;
    /// Begins to measure where the time of its connections goes, or ends it.
    fn profile(&self, on: bool) -> Vec<StageTimes> {
        let _ = on;
        Vec::new()
    }
    /// The last `lines` lines that the guest wrote to its console.
    fn console_tail(&self, lines: usize) -> String;
    /// Its ports that are published.
    fn published(&self) -> Vec<PublishedPort>;
    /// Listens no more for connections to these; those there are go on.
    fn close_published(&mut self) {}
    /// Whether something that the guest has sent to published ports is still on its
    /// way; [`Notice::Delivered`] follows then.
    fn is_delivering(&mut self) -> bool {
        false
    }
    /// Ends the machine; [`Self::end`] follows.
    fn stop(&mut self);
    /// Becomes, and stays, readable when the machine has ended.
    fn end_event(&self) -> BorrowedFd<'_>;
    /// How it ended, once it has.
    fn end(&self) -> Option<GuestEnd>;
}

/// The next state of a machine that was held to be captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterCapture {
    /// It runs on, and its snapshot is published.
    Run,
    /// It stays held, and its snapshot is published.
    Stay,
    /// It runs on, and nothing is published.
    Forget,
}

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GuestEnd {
    /// It was stopped by its supervisor.
    Stopped,
    /// The guest did it: a clause such as "the guest powered off".
    Guest(String),
    /// Something on the host failed; a clause.
    Host(String),
}

/// A snapshot to be made of a running workload.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotPlan {
    /// Its name.
    pub(crate) name: String,
    /// Whether the last VM that uses it removes it.
    pub(crate) ephemeral: bool,
    /// Hold the machine afterwards.
    pub(crate) stay: bool,
}

/// What the supervisor is told from other threads.
#[derive(Debug)]
pub(crate) enum Notice {
    /// The agent has dialled.
    Agent(UnixStream),
    /// The memory of a machine that is held was copied, or could not be; a clause.
    Captured(Result<(), String>),
    /// A snapshot that the supervisor asked for was made, or could not be; a
    /// clause.
    Snapshot(Result<SnapshotMade, String>),
    /// The guest cannot be reached any more, as its driver broke the device; why.
    Unreachable(String),
    /// All that the guest has sent to published ports has left.
    Delivered,
}

/// A snapshot that is on disk.
#[derive(Debug)]
pub(crate) struct SnapshotMade {
    pub(crate) report: SnapshotReport,
    /// Keeps it there.
    pub(crate) kept: Option<Kept>,
}

/// Keeps a snapshot from being removed while whoever asked for it has not opened it.
/// One that was made for clones only goes then, unless it was opened.
#[derive(Debug)]
pub(crate) struct Kept {
    hold: Option<Hold>,
    ephemeral: Option<(SnapshotStore, String)>,
}

impl Kept {
    pub(crate) fn new(hold: Hold, ephemeral: Option<(SnapshotStore, String)>) -> Self {
        Self {
            hold: Some(hold),
            ephemeral,
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.hold = None;
        if let Some((store, name)) = self.ephemeral.take() {
            // Refused while a clone lives: the last one removes it.
            match store.remove(&name) {
                Ok(()) => tracing::info!(name, "removed a snapshot that nobody used"),
                Err(Error::NotFound { .. } | Error::InUse { .. }) => {}
                Err(error) => tracing::warn!(name, %error, "a snapshot is not removed"),
            }
        }
    }
}

/// Hands notices to the supervisor, from any thread.
#[derive(Clone, Debug)]
pub(crate) struct NoticeSender {
    sender: Sender<Notice>,
    wake: Arc<OwnedFd>,
}

impl NoticeSender {
    pub(crate) fn send(&self, notice: Notice) {
        // A supervisor that is gone needs no notice; a full counter is awake.
        let _ = self.sender.send(notice);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

/// The supervisor's end.
#[derive(Debug)]
pub(crate) struct NoticeReceiver {
    receiver: Receiver<Notice>,
    wake: Arc<OwnedFd>,
}

impl NoticeReceiver {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(crate) fn next(&mut self) -> Option<Notice> {
        self.receiver.try_recv().ok()
    }

    /// Resets readiness. Call before [`Self::next`], so that nothing is missed.
    pub(crate) fn clear(&mut self) {
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
    }
}

pub(crate) fn notices() -> io::Result<(NoticeSender, NoticeReceiver)> {
    let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let (sender, receiver) = channel();
    Ok((
        NoticeSender {
            sender,
            wake: Arc::clone(&wake),
        },
        NoticeReceiver { receiver, wake },
    ))
}
