//! Captures a machine on a thread beside the supervisor.
//!
//! The machine is paused, its state is saved, and a thread copies its memory, while the
//! supervisor continues to serve its clients. When the copy is complete, or has failed,
//! the supervisor is notified and resumes the machine; the thread publishes the snapshot.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sm_control::with_causes;
use sm_hypervisor::{Hypervisor, X86_64};
use sm_snapshot::capture::{Ancestry, Capture, Captured};
use sm_snapshot::chain::Chain;
use sm_snapshot::runs::Run;
use sm_vmm_core::machine::Machine;
use sm_vmm_core::virtio::disk::Disk;

use super::disks;
use super::saved::{Plan, SavedDisk};

/// The source of a machine's memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Origin {
    /// The snapshot that it was restored from.
    pub(crate) chain: Option<Arc<Chain>>,
    /// True if memory is filled by a pager on access instead of mapped.
    pub(crate) filled: bool,
    /// Pages that were copied before their first access.
    pub(crate) copied: Vec<Run>,
}

impl Origin {
    fn ancestry(&self) -> Ancestry<'_> {
        self.chain.as_ref().map_or(Ancestry::Booted, |chain| {
            Ancestry::of(chain, self.filled, &self.copied)
        })
    }
}

/// The result of a capture.
#[derive(Debug)]
pub(crate) struct PublishedCapture {
    pub(crate) captured: Captured,
    /// The time for which the vCPUs were paused.
    pub(crate) pause: Duration,
}

/// A disk whose layers do not change any more.
#[derive(Debug)]
pub(crate) struct FrozenDisk {
    pub(crate) slot: u32,
    /// The files, the lowest one first.
    pub(crate) layers: Vec<PathBuf>,
    /// Its backing, which has to be flushed.
    pub(crate) backing: Arc<Disk>,
}

impl FrozenDisk {
    fn saved(&self) -> SavedDisk {
        SavedDisk {
            slot: self.slot,
            layers: self.layers.len(),
        }
    }
}

/// Callbacks of the thread that creates a snapshot; errors are clauses.
pub(crate) struct CaptureCallbacks {
    /// Memory was copied, or the copy failed. The thread continues after
    /// [`Capturing::end`].
    pub(crate) copied: Box<dyn FnOnce(Result<(), String>) + Send>,
    /// The snapshot was published, or publishing failed.
    pub(crate) published: Box<dyn FnOnce(Result<PublishedCapture, String>) + Send>,
}

/// A capture of a paused machine. Dropping it cancels the capture: nothing is published,
/// even if the copy is complete.
#[derive(Debug)]
pub(crate) struct Capturing {
    started: Instant,
    cancelled: Arc<AtomicBool>,
    /// Receives the duration of the pause.
    pause_duration: Sender<Duration>,
}

impl Capturing {
    /// Saves the state of a machine and starts to copy its memory. The machine stays
    /// paused until the caller resumes it, which has to be after `callbacks.copied`. The
    /// thread ends after it has published the snapshot.
    ///
    /// # Errors
    /// The machine cannot be paused or saved, or the thread cannot be created; a clause.
    /// No callback is called then, and the machine is resumed if possible.
    pub(crate) fn begin<H: Hypervisor<Arch = X86_64>>(
        mut plan: Plan,
        machine: &mut Machine<H>,
        origin: Origin,
        freeze: impl FnOnce() -> Result<Vec<FrozenDisk>, String>,
        callbacks: CaptureCallbacks,
    ) -> Result<(Self, JoinHandle<()>), String> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let (state_sender, state_receiver) = channel::<(_, Vec<FrozenDisk>)>();
        let (pause_duration, pause_ended) = channel();
        let (memory, vcpus) = (machine.memory().clone(), machine.vcpus());
        let unless = Arc::clone(&cancelled);
        // The thread is created before the pause, since its creation can fail.
        let thread = std::thread::Builder::new()
            .name("sm-snapshot".to_owned())
            .spawn(move || {
                // The sender is dropped without a state if the pause failed.
                let Ok((state, disks)) = state_receiver.recv() else {
                    return;
                };
                let (store, ancestry) = (&plan.store, origin.ancestry());
                let copied = Capture::begin_cancellable(store, &memory, ancestry, &unless)
                    .map_err(|error| with_causes(&error))
                    .and_then(|capture| link_disks(&capture, &disks).map(|()| capture));
                let capture = match copied {
                    Ok(capture) => capture,
                    Err(error) => return (callbacks.copied)(Err(error)),
                };
                drop((memory, origin));
                (callbacks.copied)(Ok(()));
                // The capture was cancelled, and its client was notified of the failure.
                let Ok(pause) = pause_ended.recv() else {
                    return;
                };
                plan.content.disks = disks.iter().map(FrozenDisk::saved).collect();
                let published = flush(&disks).and_then(|()| plan.finish(capture, &state, vcpus));
                drop(disks);
                (callbacks.published)(
                    published.map(|captured| PublishedCapture { captured, pause }),
                );
            })
            .map_err(|error| format!("cannot start a thread: {error}"))?;
        let started = Instant::now();
        let state = machine
            .pause()
            .and_then(|()| machine.save_state())
            .map_err(|error| with_causes(&error))
            .and_then(|state| Ok((state, freeze()?)));
        match state {
            // The thread waits for the state.
            Ok(state) => drop(state_sender.send(state)),
            Err(error) => {
                // The machine reports a failure to resume as its end.
                let _ = machine.resume();
                return Err(error);
            }
        }
        let capturing = Self {
            started,
            cancelled,
            pause_duration,
        };
        Ok((capturing, thread))
    }

    /// Memory was copied, and the machine runs again or stays paused permanently.
    pub(crate) fn end(self) {
        let _ = self.pause_duration.send(self.started.elapsed());
    }

    /// Cancels copying, if it is in progress; the failure is reported soon.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Gives the snapshot the layers of disks. It is done before the machine runs on: later the
/// disks might have been reset to fewer layers.
fn link_disks(capture: &Capture, disks: &[FrozenDisk]) -> Result<(), String> {
    for disk in disks {
        for (number, layer) in disk.layers.iter().enumerate() {
            let name = SavedDisk::file_name(disk.slot, number);
            capture
                .add_file(&name, |path| disks::link(layer, path))
                .map_err(|error| with_causes(&error))?;
        }
    }
    Ok(())
}

fn flush(disks: &[FrozenDisk]) -> Result<(), String> {
    let flush = |disk: &FrozenDisk| disk.backing.flush();
    let flushed = disks.iter().try_for_each(flush);
    flushed.map_err(|error| format!("cannot write back a disk: {}", with_causes(&error)))
}

impl Drop for Capturing {
    fn drop(&mut self) {
        self.cancel();
    }
}
