//! The working set of a snapshot: the first machine that starts from it records it, later
//! ones map it before the first access.

use std::thread::JoinHandle;

use sm_control::with_causes;
use sm_snapshot::chain::Chain;
use sm_snapshot::runs::Run;
use sm_snapshot::store::SnapshotStore;
use sm_snapshot::working_set::WorkingSet;
use sm_vmm_core::memory::MachineMemory;

/// The state of a snapshot's working set.
pub(crate) struct Prefetch {
    /// The snapshot, if it has no record yet.
    missing: Option<String>,
    /// Pages that this process copies in advance, because earlier machines wrote to them.
    copied: Vec<Run>,
}

impl Prefetch {
    /// Starts to map the pages that earlier machines used, concurrently with the caller.
    pub(crate) fn begin(chain: &Chain, memory: &MachineMemory) -> Self {
        let lease = &chain.tip().lease;
        let Some(set) = WorkingSet::load(lease.dir()) else {
            return Self {
                missing: Some(lease.name().to_owned()),
                copied: Vec::new(),
            };
        };
        let memory = memory.clone();
        let copied = set.written.clone();
        let thread = std::thread::Builder::new()
            .name("sm-prefetch".to_owned())
            .spawn(move || set.prefetch(&memory));
        if let Err(error) = thread {
            tracing::warn!(%error, "the working set is not prefetched");
        }
        Self {
            missing: None,
            copied,
        }
    }

    /// Returns the pages that are private to this process although the machine may not
    /// have written to them.
    pub(crate) fn copied(&self) -> &[Run] {
        &self.copied
    }

    /// Records the pages accessed so far, unless a record exists. Returns the recording
    /// thread. (The machine uses the snapshot, so its name cannot refer to another one.)
    pub(crate) fn record(
        &mut self,
        memory: &MachineMemory,
        store: &SnapshotStore,
    ) -> Option<JoinHandle<()>> {
        let name = self.missing.take()?;
        let (memory, store) = (memory.clone(), store.clone());
        let save = move || {
            let saved =
                WorkingSet::record(&memory).and_then(|set| set.save(&store, &store.lease(&name)?));
            if let Err(error) = saved {
                tracing::warn!(
                    error = with_causes(&error),
                    "the working set is not recorded"
                );
            }
        };
        std::thread::Builder::new()
            .name("sm-working-set".to_owned())
            .spawn(save)
            .ok()
    }
}
