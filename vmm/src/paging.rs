//! How the memory of a snapshot gets into a machine.

use sm_control::launch::Paging;
use sm_control::with_causes;
use sm_snapshot::Error;
use sm_snapshot::chain::Chain;
use sm_snapshot::restore::map_memory;
use sm_snapshot::userfault::{ChainPages, Pager, page_in};
use sm_snapshot::working_set::WorkingSet;
use sm_vmm_core::memory::MachineMemory;

use super::failure::Failure;
use super::prefetch::Prefetch;

/// Does without transparent huge pages from now on, as a process that restores must:
/// what is written once, in memory of the guest that no file has or in a stack of ours
/// that happens to be aligned, would take 2 MiB from each clone. (One that boots has
/// ordinary memory, and gets what the host is set up to give.)
pub(crate) fn forgo_huge_pages() {
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(true) {
        tracing::debug!(%error, "huge pages are as the host is set up");
    }
}

/// Memory of a machine, and what works on it beside the machine.
pub(crate) struct Paged {
    pub(crate) memory: MachineMemory,
    pub(crate) prefetch: Option<Prefetch>,
    pub(crate) pager: Option<Pager>,
}

impl Paged {
    /// The memory of `chain`.
    ///
    /// # Errors
    /// It cannot be mapped, or this process not handle its faults; a sentence.
    pub(crate) fn new(chain: &Chain, paging: Paging) -> Result<Self, Failure> {
        let failed = |error| Failure {
            message: format!(
                "the memory of the snapshot cannot be mapped: {}",
                with_causes(&error)
            ),
            spoilt: matches!(error, Error::Fragmented { .. }),
        };
        if paging == Paging::Userfault {
            return Ok(Self::by_faults(chain)?);
        }
        let memory = map_memory(chain).map_err(failed)?;
        if paging == Paging::Prefault {
            // Advice that the system does not take costs time later, no more.
            let _ = WorkingSet::all(chain).prefetch(&memory);
        }
        Ok(Self {
            prefetch: Some(Prefetch::begin(chain, &memory)),
            memory,
            pager: None,
        })
    }

    fn by_faults(chain: &Chain) -> Result<Self, String> {
        let failed = |error: sm_snapshot::Error| {
            format!(
                "cannot fill memory by userfaultfd: {}; it needs root, CAP_SYS_PTRACE or the \
                 sysctl vm.unprivileged_userfaultfd=1: leave out --paging userfault",
                with_causes(&error)
            )
        };
        let source = ChainPages::new(chain).map_err(failed)?;
        let bytes = chain.tip().lease.manifest().memory_bytes;
        let on_failure = |error: std::io::Error| {
            // vCPUs that wait for a page can be neither stopped nor woken.
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
