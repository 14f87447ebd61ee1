//! The pages that a restored guest accesses first: recorded once, prefetched later.
//!
//! After the first restore of a snapshot, when the workload has started, the page
//! tables of the VMM process show the pages that were accessed; kernel fault-around adds
//! neighbours, which are likely to be accessed next. Later restores map these pages with
//! one system call per run instead of one fault per page. Pages that were written get
//! their private copy at that time: the copy is needed in any case, and a page that is
//! writable already can save the guest a second fault. The record is a hint: a missing,
//! corrupt or outdated one costs time and never affects correctness. `mincore` is no
//! substitute, because it reports the contents of the shared page cache instead of the
//! accesses of this guest; `userfaultfd` would report the order of accesses, at the cost
//! of a round trip for each.

use std::fs;
use std::path::Path;

use rustix::mm::{Advice, madvise};
use serde::{Deserialize, Serialize};
use sm_vmm_core::memory::MachineMemory;

use crate::Error;
use crate::chain::Chain;
use crate::extents::{PAGE, Source};
use crate::pagemap::Pagemap;
use crate::runs::Run;
use crate::state_file::{Section, StateFile};
use crate::store::{Lease, SnapshotStore, read_capped};

/// Name of the file in the snapshot's directory.
pub const FILE: &str = "working-set.bin";
const SECTION: (&str, u32) = ("working-set", 2);
/// Maximum size of a record in bytes.
const MAX_LEN: u64 = 16 * 1024 * 1024;
/// Maximum number of pages that are copied before use. Guests write fewer pages before
/// their workload starts.
const MOST_WRITTEN: u64 = 4096;
/// Runs that are closer than this number of pages are joined, because mapping a short gap
/// costs less than another system call.
const JOIN: u64 = 16;

/// The pages that a guest accessed, as runs in RAM order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// First page and number of pages of each run, ascending.
    pub runs: Vec<Run>,
    /// Runs of the pages that were written, ascending.
    pub written: Vec<Run>,
}

impl WorkingSet {
    /// Records the pages of `memory` that are mapped in this process now.
    ///
    /// # Errors
    /// The page map cannot be read.
    pub fn record(memory: &MachineMemory) -> Result<Self, Error> {
        let proc_path = Path::new("/proc/self/pagemap");
        let pagemap = Pagemap::open().map_err(Error::io("open", proc_path))?;
        let mut set = Self::default();
        let mut written = 0;
        for region in &memory.regions {
            let Some(address) = memory.host_address(region) else {
                continue;
            };
            let base = region.offset / PAGE;
            pagemap
                .visit(address.as_ptr() as u64, region.len / PAGE, |page, state| {
                    if state.is_present() {
                        add(&mut set.runs, base + page, JOIN);
                    }
                    // A written page that is not recorded costs a fault, but one that is
                    // copied in vain costs memory. Written runs are therefore not joined
                    // across gaps.
                    if state.is_private() && written < MOST_WRITTEN {
                        add(&mut set.written, base + page, 1);
                        written += 1;
                    }
                })
                .map_err(Error::io("read", proc_path))?;
        }
        Ok(set)
    }

    /// Returns a working set of all pages that the members of `chain` store.
    #[must_use]
    pub fn all(chain: &Chain) -> Self {
        let stored = chain.pieces().iter();
        let stored = stored.filter(|piece| matches!(piece.source, Source::Member(_)));
        Self {
            runs: stored.map(|piece| (piece.first, piece.pages)).collect(),
            written: Vec::new(),
        }
    }

    /// Returns the number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let pages = self.runs.iter().map(|(_, pages)| *pages);
        pages.fold(0, u64::saturating_add)
    }

    /// Stores the record in the directory of a snapshot, and replaces an earlier one
    /// atomically.
    ///
    /// # Errors
    /// A file system operation fails.
    pub fn save(&self, store: &SnapshotStore, lease: &Lease) -> Result<(), Error> {
        let path = lease.dir().join(FILE);
        let payload = postcard::to_stdvec(self)
            .map_err(|e| Error::damaged(&path, format!("it cannot be written: {e}")))?;
        let file = StateFile {
            sections: vec![Section {
                name: SECTION.0.to_owned(),
                version: SECTION.1,
                payload,
            }],
        };
        let (bytes, digest) = file.encode();
        // The file is written in a draft and not in the snapshot's directory, where it
        // would remain if this process were killed.
        let draft = store.draft()?;
        let written = draft.path().join(FILE);
        fs::write(&written, [digest.as_bytes(), &bytes].concat())
            .map_err(Error::io("write", &written))?;
        fs::rename(&written, &path).map_err(Error::io("publish", &path))
    }

    /// Loads the record of a snapshot; `None` if there is no usable one.
    #[must_use]
    pub fn load(snapshot_dir: &Path) -> Option<Self> {
        let path = snapshot_dir.join(FILE);
        let bytes = read_capped(&path, MAX_LEN).ok()?;
        let (digest, body) = bytes.split_first_chunk::<64>()?;
        let digest = std::str::from_utf8(digest).ok()?;
        let file = StateFile::decode(&path, body, digest).ok()?;
        let section = file.section(&path, SECTION.0, SECTION.1..=SECTION.1).ok()?;
        let (set, rest): (Self, _) = postcard::take_from_bytes(section.1).ok()?;
        // Runs that overlap could request the same pages without end.
        if !rest.is_empty() || !is_ascending(&set.runs) || !is_ascending(&set.written) {
            return None;
        }
        // This software never writes a record with more pages to copy.
        let written = set.written.iter().map(|(_, pages)| *pages);
        let written = written.fold(0, u64::saturating_add);
        (written <= MOST_WRITTEN).then_some(set)
    }

    /// Maps the pages of the record into this process and reads them from disk if they
    /// are not in the page cache. Pages outside `memory` are ignored. Returns the number
    /// of requested pages.
    #[must_use]
    pub fn prefetch(&self, memory: &MachineMemory) -> u64 {
        // Written pages come first, because the guest may be waiting for them already.
        let _ = populate_all(memory, &self.written, Advice::LinuxPopulateWrite);
        populate_all(memory, &self.runs, Advice::LinuxPopulateRead)
    }
}

/// Appends a page, or extends the last run if it ends less than `join` pages before it.
fn add(runs: &mut Vec<Run>, page: u64, join: u64) {
    match runs.last_mut() {
        Some((first, pages)) if page < *first + *pages + join => *pages = page + 1 - *first,
        _ => runs.push((page, 1)),
    }
}

/// Returns true if each run starts at or after the end of the one before it.
fn is_ascending(runs: &[Run]) -> bool {
    let mut end = 0;
    runs.iter().all(|&(first, pages)| {
        let starts_after = first >= end;
        end = first.saturating_add(pages);
        starts_after
    })
}

/// Maps the pages of `runs` that are in `memory` and returns their number.
fn populate_all(memory: &MachineMemory, runs: &[Run], how: Advice) -> u64 {
    let mut requested = 0;
    for region in &memory.regions {
        let base = region.offset / PAGE;
        let end = base + region.len / PAGE;
        let Some(address) = memory.host_address(region) else {
            continue;
        };
        for &(first, pages) in runs {
            let from = first.max(base);
            let to = first.saturating_add(pages).min(end);
            if from >= to {
                continue;
            }
            if populate(address.as_ptr(), from - base, to - from, how) {
                requested += to - from;
            }
        }
    }
    requested
}

/// Maps `pages` pages from page `first` of the mapping at `base`, for reading or writing.
#[expect(unsafe_code, reason = "madvise takes an address")]
fn populate(base: *mut u8, first: u64, pages: u64, how: Advice) -> bool {
    let (Ok(offset), Ok(len)) = (usize::try_from(first * PAGE), usize::try_from(pages * PAGE))
    else {
        return false;
    };
    // SAFETY: the caller has limited the range to a region of live guest memory, and
    // populating changes neither contents nor protection.
    unsafe { madvise(base.wrapping_add(offset).cast(), len, how) }.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sm_vmm_core::memory::{MIN_MEMORY, MemoryConfig};
    use vm_memory::{Bytes as _, GuestAddress};

    #[test]
    fn touched_pages_are_recorded_saved_and_prefetched() {
        let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
        for page in [3u64, 4, 500] {
            memory
                .guest
                .write_obj(1u8, GuestAddress(page * PAGE))
                .unwrap();
        }
        let set = WorkingSet::record(&memory).unwrap();
        assert_eq!(set.runs, [(3, 2), (500, 1)]);
        assert_eq!(set.written, set.runs);
        let (dir, store) = crate::store::tests::store();
        crate::store::tests::publish(&store, "name", None);
        let lease = store.lease("name").unwrap();
        set.save(&store, &lease).unwrap();
        assert_eq!(WorkingSet::load(lease.dir()), Some(set.clone()));
        let left = fs::read_dir(dir.path().join("snapshots")).unwrap();
        assert_eq!(left.count(), 2, "the snapshot, and the lock");
        let other = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
        assert_eq!(set.prefetch(&other), 3);
        assert_eq!(WorkingSet::record(&other).unwrap(), set);
    }

    #[test]
    fn a_damaged_or_foreign_record_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(WorkingSet::load(dir.path()), None);
        fs::write(dir.path().join(FILE), [0; 200]).unwrap();
        assert_eq!(WorkingSet::load(dir.path()), None);
        let memory = MachineMemory::anonymous(&MemoryConfig::new(MIN_MEMORY)).unwrap();
        let far = WorkingSet {
            runs: vec![(u64::MAX - 1, 9), (1 << 40, 1)],
            written: vec![(u64::MAX - 1, 9)],
        };
        assert_eq!(far.prefetch(&memory), 0);
    }

    #[test]
    fn a_record_whose_runs_overlap_is_ignored() {
        let (_dir, store) = crate::store::tests::store();
        crate::store::tests::publish(&store, "name", None);
        let lease = store.lease("name").unwrap();
        for (runs, usable) in [
            (vec![(0, 2), (2, 3), (9, 1)], true),
            (vec![(0, 3), (2, 3)], false),
            (vec![(9, 1), (2, 3)], false),
            (vec![(1, u64::MAX), (u64::MAX, 5)], true),
            (vec![(1, u64::MAX), (7, 5)], false),
        ] {
            for written in [Vec::new(), runs.clone()] {
                let set = WorkingSet {
                    runs: if written.is_empty() {
                        runs.clone()
                    } else {
                        Vec::new()
                    },
                    written,
                };
                let usable = usable && set.written.iter().all(|run| run.1 < 9);
                set.save(&store, &lease).unwrap();
                let loaded = WorkingSet::load(lease.dir());
                let _ = loaded.as_ref().map(WorkingSet::pages);
                assert_eq!(loaded, usable.then_some(set));
            }
        }
    }

    #[test]
    fn a_record_that_would_copy_much_memory_is_ignored() {
        let (_dir, store) = crate::store::tests::store();
        crate::store::tests::publish(&store, "name", None);
        let lease = store.lease("name").unwrap();
        for (written, usable) in [
            (vec![(7, MOST_WRITTEN)], true),
            (vec![(7, MOST_WRITTEN), (9000, 1)], false),
            (vec![(0, u64::MAX), (1, u64::MAX)], false),
        ] {
            let runs = Vec::new();
            let set = WorkingSet { runs, written };
            set.save(&store, &lease).unwrap();
            let loaded = WorkingSet::load(lease.dir());
            assert_eq!(loaded, usable.then_some(set));
        }
    }
}
