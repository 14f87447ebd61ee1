//! The working set of a snapshot: recorded by the first machine that starts
//! from it, mapped ahead of use by later ones.

use std::thread::JoinHandle;

use sm_snapshot::chain::Chain;
use sm_snapshot::store::SnapshotStore;
use sm_snapshot::working_set::WorkingSet;
use sm_vmm_core::memory::MachineMemory;

use crate::doctor::with_causes;

/// What is known of a snapshot's working set.
pub(crate) struct Prefetch {
    /// The snapshot that has no record yet.
    missing: Option<String>,
}

impl Prefetch {
    /// Begins to map the pages that earlier machines used. It goes on beside
    /// whatever the caller does next.
    pub(crate) fn begin(chain: &Chain, memory: &MachineMemory) -> Self {
        let lease = &chain.tip().lease;
        let Some(set) = WorkingSet::load(lease.dir()) else {
            return Self {
                missing: Some(lease.name().to_owned()),
            };
        };
        let memory = memory.clone();
        let thread = std::thread::Builder::new()
            .name("sm-prefetch".to_owned())
            .spawn(move || set.prefetch(&memory));
        if let Err(error) = thread {
            tracing::warn!(%error, "the working set is not prefetched");
        }
        Self { missing: None }
    }

    /// Records what has been used by now, unless a record exists. Returns the
    /// thread that does it. (The snapshot cannot be another: the machine uses it.)
    pub(crate) fn record(
        self,
        memory: &MachineMemory,
        store: &SnapshotStore,
    ) -> Option<JoinHandle<()>> {
        let name = self.missing?;
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
