//! Private pages of guest memory: those that a machine may have changed.

use std::path::Path;

pub use sm_vmm_core::pagemap::{PageState, Pagemap};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _};

use crate::Error;
use crate::extents::PAGE;
use crate::runs::{self, Run};

/// Returns the pages of guest memory that are private to this process: written by the
/// guest, or filled on its behalf.
///
/// # Errors
/// The page map cannot be read, or memory is not mapped.
pub fn private(memory: &GuestMemoryMmap) -> Result<Vec<Run>, Error> {
    let path = Path::new("/proc/self/pagemap");
    let pagemap = Pagemap::open().map_err(Error::io("open", path))?;
    let mut all = Vec::new();
    let mut offset = 0;
    for region in memory.iter() {
        let host = memory
            .get_host_address(region.start_addr())
            .map_err(|e| Error::damaged(path, format!("guest memory is not mapped: {e}")))?
            as u64;
        let pages = region.len() / PAGE;
        pagemap
            .private_runs(host, pages, |(first, count)| {
                runs::push(&mut all, (offset + first, count));
            })
            .map_err(Error::io("read", path))?;
        offset += pages;
    }
    Ok(all)
}
