//! Restores the memory of a snapshot.

use sm_control::exit::FailureCause;
use sm_control::launch::Paging;
use sm_control::with_causes;
use sm_snapshot::Error;
use sm_snapshot::chain::Chain;
use sm_snapshot::restore::map_memory;
use sm_snapshot::userfault::{ChainPages, Pager, page_in};
use sm_snapshot::working_set::WorkingSet;
use sm_vmm_core::memory::MachineMemory;

use super::failure::StartFailure;
use super::prefetch::Prefetch;

/// Disables transparent huge pages for this process, which restores a snapshot: a single
/// write to anonymous guest memory, or to an aligned stack of a thread, would otherwise
/// cost each clone 2 MiB. (A process that boots has ordinary memory and the host's
/// setting.)
pub(crate) fn disable_huge_pages() {
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(true) {
        tracing::debug!(%error, "cannot disable transparent huge pages");
    }
}

/// Memory of a machine, with its prefetcher and pager.
pub(crate) struct Paged {
    pub(crate) memory: MachineMemory,
    pub(crate) prefetch: Option<Prefetch>,
    pub(crate) pager: Option<Pager>,
}

impl Paged {
    /// Maps the memory of `chain`.
    ///
    /// # Errors
    /// It cannot be mapped, or this process cannot handle its faults; a sentence.
    pub(crate) fn new(chain: &Chain, paging: Paging) -> Result<Self, StartFailure> {
        let failed = |error| StartFailure {
            message: format!(
                "the memory of the snapshot cannot be mapped: {}",
                with_causes(&error)
            ),
            corrupt: matches!(error, Error::Fragmented { .. }),
            cause: None,
        };
        if paging == Paging::Userfault {
            return Self::by_faults(chain);
        }
        let memory = map_memory(chain).map_err(failed)?;
        if paging == Paging::Prefault {
            // A failure of this advice costs only time.
            let _ = WorkingSet::all(chain).prefetch(&memory);
        }
        Ok(Self {
            prefetch: Some(Prefetch::begin(chain, &memory)),
            memory,
            pager: None,
        })
    }

    fn by_faults(chain: &Chain) -> Result<Self, StartFailure> {
        let failed = |error: sm_snapshot::Error| StartFailure {
            message: format!(
                "cannot fill memory by userfaultfd: {}; it needs root, CAP_SYS_PTRACE or the \
                 sysctl vm.unprivileged_userfaultfd=1",
                with_causes(&error)
            ),
            corrupt: false,
            cause: Some(FailureCause::NoUserfault),
        };
        let source = ChainPages::new(chain).map_err(failed)?;
        let bytes = chain.tip().lease.manifest().memory_bytes;
        let on_failure = |error: std::io::Error| {
            // vCPUs that wait for a page can neither be stopped nor woken.
            tracing::error!(%error, "the memory of the snapshot cannot be read any more");
            std::process::exit(1);
        };
        let (memory, pager) = page_in(bytes, source, Box::new(on_failure)).map_err(failed)?;
        Ok(Self {
            memory,
            prefetch: None,
            pager: Some(pager),
        })
    }
}
