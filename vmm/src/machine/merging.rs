//! Merging layers of a machine's disks on a thread beside it.
//!
//! The thread writes the merged layer; the supervisor's thread, on which disks are frozen
//! and reset, too, puts it in its place; the thread makes its name durable; the supervisor's
//! removes the files of the layers that it replaces.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use sm_control::with_causes;
use sm_vmm_core::virtio::disk::Disk;
use sm_vmm_core::virtio::layered::{DiskLayer, LayerError};

use super::RunningMachine;
use crate::disks::{DiskDirectory, DiskError};
use crate::guest::{EventSender, MergeEnd, MergeStep, SupervisorEvent};

/// The layers to merge.
pub(super) struct MergePlan {
    pub(super) slot: u32,
    pub(super) directory: DiskDirectory,
    /// The disk when the merge began. Until the thread ends, it has the files open that are
    /// removed: freeing the space of large ones takes time.
    pub(super) disk: Arc<Disk>,
    pub(super) layers: Range<usize>,
}

/// A merge in progress. Dropping it cancels the merge.
pub(super) struct Merging {
    slot: u32,
    cancelled: Arc<AtomicBool>,
    /// Notifies the thread that its layer is in its place.
    adopted: Sender<()>,
    thread: Option<JoinHandle<()>>,
    /// A layer that was written while the machine was captured, whose snapshot links the
    /// files by their names.
    waiting: Option<DiskLayer>,
}

impl Drop for Merging {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

impl MergePlan {
    fn write(&self, cancelled: &AtomicBool) -> Result<DiskLayer, DiskError> {
        let layers = self.disk.layers().ok_or(LayerError::Count(0));
        let layers = layers.map_err(|source| DiskError::Layer {
            path: self.directory.path().to_owned(),
            source,
        })?;
        self.directory
            .write_merged(layers, self.layers.clone(), cancelled)
    }

    /// The thread.
    fn run(self, cancelled: &AtomicBool, adopted: &Receiver<()>, events: &EventSender) {
        let clause = |error: DiskError| with_causes(&error);
        let written = self.write(cancelled).map_err(clause);
        let failed = written.is_err();
        events.send(SupervisorEvent::Merge(MergeStep::Written(written)));
        // The machine ends, or the layer does not fit any more.
        if failed || adopted.recv().is_err() {
            return;
        }
        let synced = self.directory.sync().map_err(clause);
        events.send(SupervisorEvent::Merge(MergeStep::Durable(synced)));
        // The files are removed.
        let _ = adopted.recv();
    }
}

impl Merging {
    fn begin(plan: MergePlan, events: EventSender) -> Result<Self, String> {
        let slot = plan.slot;
        let cancelled = Arc::new(AtomicBool::new(false));
        let unless = Arc::clone(&cancelled);
        let (adopted, is_adopted) = channel();
        let thread = std::thread::Builder::new()
            .name("sm-merge".to_owned())
            .spawn(move || plan.run(&unless, &is_adopted, &events))
            .map_err(|error| format!("cannot start a thread: {error}"))?;
        Ok(Self {
            slot,
            cancelled,
            adopted,
            thread: Some(thread),
            waiting: None,
        })
    }
}

impl RunningMachine {
    /// Starts a merge, if one is due and none is in progress.
    pub(super) fn begin_merge(&mut self, in_need: bool) {
        if self.merging.is_some() {
            return;
        }
        let plan = self.disks.iter().find_map(|disk| disk.to_merge(in_need));
        let Some(plan) = plan else { return };
        tracing::debug!(slot = plan.slot, layers = ?plan.layers, "layers of a disk are merged");
        match Merging::begin(plan, self.events.clone()) {
            Ok(merging) => self.merging = Some(merging),
            Err(error) => tracing::warn!(error, "layers of a disk are not merged"),
        }
    }

    /// Goes on with the merge.
    pub(super) fn go_on_with_merge(&mut self, step: MergeStep) -> Option<MergeEnd> {
        let merging = self.merging.as_mut()?;
        let failed = match step {
            MergeStep::Written(Ok(layer)) => {
                merging.waiting = Some(layer);
                self.adopt_merged().err()
            }
            MergeStep::Durable(Ok(())) => {
                let slot = merging.slot;
                let mut disks = self.disks.iter();
                if let Some(disk) = disks.find(|disk| disk.slot() == slot) {
                    disk.remove_merged();
                }
                self.end_merge();
                return Some(MergeEnd::Done);
            }
            // The layers that were merged stay until the disk is opened the next time.
            MergeStep::Written(Err(error)) | MergeStep::Durable(Err(error)) => Some(error),
        };
        failed.map(|error| {
            tracing::warn!(error, "layers of a disk are not merged");
            self.end_merge();
            MergeEnd::Failed
        })
    }

    /// Puts a merged layer in its place, unless the machine is being captured.
    pub(super) fn adopt_merged(&mut self) -> Result<(), String> {
        if self.capturing.is_some() {
            return Ok(());
        }
        let Some(merging) = &mut self.merging else {
            return Ok(());
        };
        let slot = merging.slot;
        let disk = self.disks.iter().find(|disk| disk.slot() == slot);
        if let (Some(layer), Some(disk)) = (merging.waiting.take(), disk) {
            disk.adopt(layer)?;
            // The thread ends after the merge only.
            let _ = merging.adopted.send(());
        }
        Ok(())
    }

    /// Lets the thread end; the last handle of large files may be its.
    fn end_merge(&mut self) {
        if let Some(mut merging) = self.merging.take() {
            self.publishing.add(merging.thread.take());
        }
    }

    /// Cancels the merge, before the machine is dropped.
    pub(super) fn cancel_merge(&mut self) {
        self.end_merge();
    }
}
