//! Parts of the store that a verification found to be damaged.

use std::path::{Path, PathBuf};

/// A damaged file or directory, and its identity when it was checked.
#[derive(Debug)]
pub(super) struct Damaged {
    path: PathBuf,
    inode: u64,
}

impl Damaged {
    /// Returns the file or directory at `path`, if there is one.
    pub(super) fn at(path: &Path) -> Option<Self> {
        inode_of(path).map(|inode| Self {
            path: path.to_owned(),
            inode,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns true if the path still refers to the object that was checked, and not to
    /// one that replaced it.
    pub(super) fn is_current(&self) -> bool {
        inode_of(&self.path) == Some(self.inode)
    }
}

fn inode_of(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    path.metadata().ok().map(|meta| meta.ino())
}
