//! Flattening of snapshots without a VMM: copies without a parent.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::Error;
use crate::capture;
use crate::chain::Chain;
use crate::contents::{PAGE_LEN, for_each_batch};
use crate::extents::{ExtentBuilder, ExtentKind, MemoryIndex, PAGE};
use crate::manifest::{Manifest, MemoryEntry};
use crate::memory_file;
use crate::store::{Draft, SnapshotStore};
use crate::working_set;

/// The files that a copy has of its own, or has not at all.
const OWN_FILES: [&str; 4] = [
    "manifest.json",
    "state.bin",
    "memory.bin",
    working_set::FILE,
];

/// Writes a copy of a snapshot that has no parent, as `name`. The copy restores the same
/// machine.
///
/// # Errors
/// A file system operation fails, or the name is in use.
pub fn flatten_to(store: &SnapshotStore, chain: &Chain, name: &str) -> Result<Manifest, Error> {
    let (draft, manifest) = flat_copy(store, chain)?;
    store.publish(draft, name)?;
    Ok(manifest)
}

/// Replaces the snapshot `name` by a copy without a parent. A concurrent reader opens
/// either the old or the new one.
///
/// # Errors
/// The snapshot is absent or corrupt, a machine or another snapshot uses it, or a file
/// system operation fails.
pub fn flatten(store: &SnapshotStore, name: &str) -> Result<Manifest, Error> {
    let chain = Chain::open(store, name)?;
    let (draft, manifest) = flat_copy(store, &chain)?;
    // The lease of this chain would make the snapshot count as used.
    drop(chain);
    store.replace(draft, name)?;
    Ok(manifest)
}

fn flat_copy(store: &SnapshotStore, chain: &Chain) -> Result<(Draft, Manifest), Error> {
    let tip = chain.tip();
    let draft = store.draft()?;
    let path = draft.path().join("memory.bin");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(Error::io("create", &path))?;
    file.set_len(tip.index.pages() * PAGE)
        .map_err(Error::io("set the length of", &path))?;
    let mut builder = ExtentBuilder::new();
    for_each_batch(chain, |first, bytes| {
        for (page, content) in (first..).zip(bytes.chunks(PAGE_LEN)) {
            if content.iter().any(|&byte| byte != 0) {
                builder.push(page, ExtentKind::Data);
                file.write_all_at(content, page * PAGE)
                    .map_err(Error::io("write", &path))?;
            }
        }
        Ok(())
    })?;
    let extents = builder.finish();
    let index = MemoryIndex {
        regions: tip.index.regions.clone(),
        digests: memory_file::digests(&file, &path, &extents)?,
        extents,
    };
    let state = capture::encode_state(&path, &index, tip.state.sections.clone())?;
    let mut manifest = Manifest {
        parent: None,
        memory: MemoryEntry {
            len: index.pages() * PAGE,
            data_pages: index.count(ExtentKind::Data),
            zero_pages: 0,
        },
        ..tip.lease.manifest().clone()
    };
    link_further_files(tip.lease.dir(), draft.path())?;
    capture::write_state(&draft, &state, &mut manifest)?;
    capture::write_manifest(&draft, &mut manifest)?;
    Ok((draft, manifest))
}

/// Gives the copy the files that a capture was given besides its own
/// ([`capture::Capture::add_file`]), which do not change.
fn link_further_files(from: &Path, to: &Path) -> Result<(), Error> {
    let list = |source| Error::io("list", from)(source);
    for entry in fs::read_dir(from).map_err(list)? {
        let name = entry.map_err(list)?.file_name();
        // The working set is that of the chain.
        if OWN_FILES.iter().any(|own| name == **own) {
            continue;
        }
        let path = from.join(&name);
        fs::hard_link(&path, to.join(&name)).map_err(Error::io("link", &path))?;
    }
    Ok(())
}
