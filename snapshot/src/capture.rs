//! Capture of a snapshot from a paused machine.
//!
//! A capture has two steps, so that the machine is paused only during the first:
//! [`Capture::begin`] copies guest memory into a draft; [`Capture::finish`], while the
//! machine runs again or has exited, computes digests, writes state and manifest, and
//! publishes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use rustix::fs::{FlockOperation, flock};
use sm_vmm_core::memory::MachineMemory;

use crate::Error;
use crate::chain::{Chain, MAX_DEPTH, MAX_PIECES, MEMORY_SECTION};
use crate::cpu::CpuFeatures;
use crate::extents::{ExtentKind, MemoryIndex, PAGE};
use crate::manifest::{DeviceEntry, FORMAT, Layer, Manifest, MemoryEntry, ParentRef, StateEntry};
use crate::memory_file::{self, Base, ChangedPages};
use crate::pagemap;
use crate::runs::{self, Run};
use crate::state_file::{Section, StateFile};
use crate::store::{Draft, SnapshotStore};

/// The members of a manifest that the caller provides; the others are derived from the
/// capture.
#[derive(Clone, Debug)]
pub struct Description {
    /// The layer that the snapshot contains.
    pub layer: Layer,
    /// Version of sm.
    pub sm_version: String,
    /// Version of the machine's address map and devices.
    pub machine_version: u32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// SHA-256 of the guest kernel.
    pub kernel: String,
    /// SHA-256 of the initial RAM file system, which is the guest's agent.
    pub agent: String,
    /// CPU features that the guest sees.
    pub cpu: CpuFeatures,
    /// Version of the protocol between host and agent.
    pub protocol: u32,
    /// The machine's devices.
    pub devices: Vec<DeviceEntry>,
    /// Labels chosen by the writer.
    pub labels: BTreeMap<String, String>,
}

/// The origin of a machine's memory, on which its next snapshot builds.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Ancestry<'a> {
    /// The machine was booted: its memory is anonymous.
    Booted,
    /// The machine's memory was mapped from this chain. The snapshot stores the changes.
    Diff(&'a Chain),
    /// As [`Self::Diff`], and these pages were copied before the guest used them (see
    /// [`crate::working_set`]). They are compared with the chain to detect changes.
    Copied(&'a Chain, &'a [Run]),
    /// The machine's memory was filled from this chain on first access. All private pages
    /// are compared with the chain to detect changes.
    Filled(&'a Chain),
    /// The machine was restored from this chain. The snapshot stores all pages and has no
    /// parent.
    Full(&'a Chain),
}

impl<'a> Ancestry<'a> {
    /// Returns the ancestry of a machine that was restored from `chain`. Its memory was
    /// `filled` on first access, or it was mapped and the pages `copied` were prefetched
    /// for writing. A chain of [`MAX_DEPTH`] members yields [`Self::Full`].
    #[must_use]
    pub fn of(chain: &'a Chain, filled: bool, copied: &'a [Run]) -> Self {
        match chain.members().len() {
            MAX_DEPTH.. => Self::Full(chain),
            _ if filled => Self::Filled(chain),
            _ => Self::Copied(chain, copied),
        }
    }
}

/// A published snapshot.
#[derive(Debug)]
pub struct Captured {
    /// The manifest.
    pub manifest: Manifest,
    /// Prevents removal of the snapshot.
    pub removal_guard: RemovalGuard,
}

/// Prevents removal of a snapshot from its publication until the value is dropped; see
/// [`crate::store::Lease`] for a hold with access to the snapshot.
#[derive(Debug)]
pub struct RemovalGuard {
    _memory: File,
}

/// An unpublished snapshot whose memory has been copied.
#[derive(Debug)]
pub struct Capture {
    draft: Draft,
    file: File,
    index: MemoryIndex,
    parent: Option<ParentRef>,
}

impl Capture {
    /// Copies the memory of a machine, which must be paused, into a draft. A diff that
    /// would consist of more than [`MAX_PIECES`] pieces is stored as a full snapshot
    /// instead.
    ///
    /// # Errors
    /// A file system operation fails, or the chain is too deep. The draft is then
    /// removed.
    pub fn begin(
        store: &SnapshotStore,
        memory: &MachineMemory,
        ancestry: Ancestry<'_>,
    ) -> Result<Self, Error> {
        Self::begin_cancellable(store, memory, ancestry, &AtomicBool::new(false))
    }

    /// As [`Self::begin`], with cancellation by another thread: setting `cancelled` ends
    /// the capture within the time that copying 256 KiB takes, unless the file system
    /// blocks.
    ///
    /// # Errors
    /// As [`Self::begin`], and [`Error::Cancelled`].
    pub fn begin_cancellable(
        store: &SnapshotStore,
        memory: &MachineMemory,
        ancestry: Ancestry<'_>,
        cancelled: &AtomicBool,
    ) -> Result<Self, Error> {
        let (chain, base) = match ancestry {
            Ancestry::Booted => (None, Base::Nothing),
            Ancestry::Full(chain) => (Some(chain), Base::Nothing),
            Ancestry::Diff(chain) => (Some(chain), Base::Parent),
            Ancestry::Filled(chain) => (Some(chain), Base::Filled(chain)),
            Ancestry::Copied(chain, pages) => (Some(chain), Base::Copied(chain, pages)),
        };
        let mut parent = match (chain, base) {
            (None, _) | (_, Base::Nothing) => None,
            (Some(chain), _) => Some(parent_ref(chain)?),
        };
        let draft = store.draft()?;
        let path = draft.path().join("memory.bin");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(Error::io("create", &path))?;
        flock(&file, FlockOperation::NonBlockingLockShared)
            .map_err(|e| Error::io("lock", &path)(e.into()))?;
        let private = pagemap::private(&memory.guest)?;
        // Discarded pages have no memory, as unchanged ones, and are zero.
        let zero = match chain {
            Some(chain) => {
                let discarded = runs::subtract(&memory.discarded().runs(), &private);
                runs::intersect(&discarded, &chain.stored())
            }
            None => Vec::new(),
        };
        let write = |written: &[Run], zero: &[Run], base| {
            let changed = ChangedPages { written, zero };
            memory_file::write(&memory.guest, changed, base, &file, &path, cancelled)
        };
        // Pages that are not recorded in a full snapshot are zero.
        let whole = |written: &[Run], chain: &Chain| {
            let written = runs::subtract(&runs::union(written, &chain.stored()), &zero);
            write(&written, &[], Base::Nothing)
        };
        let mut index = match (chain, &parent) {
            (Some(chain), None) => whole(&private, chain)?,
            _ => write(&private, &zero, base)?,
        };
        if let (Some(chain), Some(_)) = (chain, &parent)
            && chain.pieces_of_child(&index.extents) > MAX_PIECES
        {
            // Pages that the file contains already are written again at the same offset.
            let recorded = index.extents.iter();
            let recorded: Vec<Run> = recorded.map(|e| (e.first, e.pages)).collect();
            index = whole(&recorded, chain)?;
            parent = None;
        }
        Ok(Self {
            draft,
            file,
            index,
            parent,
        })
    }

    /// Gives the snapshot a further file, by `link`, which gets its path.
    ///
    /// # Errors
    /// That of `link`.
    pub fn add_file<E>(
        &self,
        name: &str,
        link: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<(), E> {
        link(&self.draft.path().join(name))
    }

    /// Returns the number of stored pages.
    #[must_use]
    pub fn data_pages(&self) -> u64 {
        self.index.count(ExtentKind::Data)
    }

    /// Writes state and manifest and publishes the snapshot as `name`. `sections` are the
    /// machine's state, saved in the same pause as the memory.
    ///
    /// # Errors
    /// A file system operation fails, or the name is in use. The draft is then removed.
    pub fn finish(
        mut self,
        store: &SnapshotStore,
        name: &str,
        description: Description,
        sections: Vec<Section>,
    ) -> Result<Captured, Error> {
        let memory_path = self.draft.path().join("memory.bin");
        self.index.digests = memory_file::digests(&self.file, &memory_path, &self.index.extents)?;
        let state = encode_state(&memory_path, &self.index, sections)?;
        let mut manifest = describe(description, &self.index, self.parent.take());
        write_state(&self.draft, &state, &mut manifest)?;
        write_manifest(&self.draft, &mut manifest)?;
        store.publish(self.draft, name)?;
        Ok(Captured {
            manifest,
            removal_guard: RemovalGuard { _memory: self.file },
        })
    }
}

fn parent_ref(chain: &Chain) -> Result<ParentRef, Error> {
    let tip = &chain.tip().lease;
    if chain.members().len() >= MAX_DEPTH {
        return Err(Error::TooDeep {
            name: tip.name().to_owned(),
            limit: MAX_DEPTH - 1,
        });
    }
    Ok(ParentRef {
        name: tip.name().to_owned(),
        digest: tip.manifest().digest.clone(),
    })
}

fn describe(d: Description, index: &MemoryIndex, parent: Option<ParentRef>) -> Manifest {
    let len = index.pages() * PAGE;
    Manifest {
        format: FORMAT,
        layer: d.layer,
        created_ms: now_ms(),
        sm_version: d.sm_version,
        machine_version: d.machine_version,
        memory_bytes: len,
        page_bytes: Some(crate::restore::host_page_bytes()),
        vcpus: d.vcpus,
        kernel: d.kernel,
        agent: d.agent,
        protocol: d.protocol,
        cpu: d.cpu,
        devices: d.devices,
        parent,
        state: StateEntry::default(),
        memory: MemoryEntry {
            len,
            data_pages: index.count(ExtentKind::Data),
            zero_pages: index.count(ExtentKind::Zero),
        },
        labels: d.labels,
        digest: String::new(),
    }
}

fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()
        .and_then(|d| u64::try_from(d.as_millis()).ok())
        .unwrap_or(0)
}

/// Combines the page index and the machine's sections, in this order.
pub(crate) fn encode_state(
    path: &Path,
    index: &MemoryIndex,
    sections: Vec<Section>,
) -> Result<StateFile, Error> {
    let (name, version) = MEMORY_SECTION;
    let payload = postcard::to_stdvec(index)
        .map_err(|e| Error::damaged(path, format!("its page index cannot be written: {e}")))?;
    let mut all = vec![Section {
        name: name.to_owned(),
        version,
        payload,
    }];
    all.extend(sections.into_iter().filter(|section| section.name != name));
    Ok(StateFile { sections: all })
}

pub(crate) fn write_state(
    draft: &Draft,
    state: &StateFile,
    manifest: &mut Manifest,
) -> Result<(), Error> {
    let path = draft.path().join("state.bin");
    let (bytes, digest) = state.encode();
    manifest.state = StateEntry {
        len: bytes.len() as u64,
        digest,
    };
    fs::write(&path, bytes).map_err(Error::io("write", &path))
}

pub(crate) fn write_manifest(draft: &Draft, manifest: &mut Manifest) -> Result<(), Error> {
    let path = draft.path().join("manifest.json");
    let bytes = manifest
        .encode()
        .map_err(|e| Error::damaged(&path, format!("it cannot be written: {e}")))?;
    fs::write(&path, bytes).map_err(Error::io("write", &path))
}
