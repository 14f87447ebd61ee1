//! The shares of a server, and its limits.

use std::ffi::CString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use rustix::fs::FileType;
use thiserror::Error;

use crate::names::Name;
use crate::watches::Watches;

/// Owners that a guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ShareOwner {
    /// Files of the user that runs the server belong to `uid` and `gid` of the guest, other
    /// files keep their numbers. New files belong to that user on the host; those of other
    /// users of the guest are marked as [`ChownPolicy`] says.
    Squash {
        /// User in the guest.
        uid: u32,
        /// Group in the guest.
        gid: u32,
    },
    /// Files keep their numbers. If the server runs as root, new files belong to the user
    /// of the guest that creates them, and chown(2) changes the host's owner.
    Keep,
    /// All files belong to `uid` and `gid`.
    Fixed {
        /// User in the guest.
        uid: u32,
        /// Group in the guest.
        gid: u32,
    },
}

/// Effect of chown(2) in a guest, except where [`ShareOwner::Keep`] changes the host's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChownPolicy {
    /// The owner is stored in the extended attribute `user.containers.override_stat` of the
    /// file, which Podman and libkrun use as well.
    Override,
    /// It has no effect, and succeeds.
    Ignore,
    /// It fails with `EPERM`, unless it changes nothing.
    Deny,
}

/// Validity of the data, attributes and names that a guest caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheMode {
    /// The host may change files at any time: names and attributes are valid for one second,
    /// and data until the file is opened again.
    Auto,
    /// Nobody else changes files: everything is valid for a day. If all shares of a server
    /// have this mode, the guest also delays writes.
    Exclusive,
}

/// Options of a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShareOptions {
    /// Every change is refused with `EROFS`, by the server.
    pub read_only: bool,
    /// Owners that the guest sees.
    pub owner: ShareOwner,
    /// Effect of chown(2).
    pub chown: ChownPolicy,
    /// Validity of what the guest caches.
    pub cache: CacheMode,
    /// File systems that are mounted below the share are part of it. Otherwise their roots
    /// are entries that cannot be used (`EXDEV`).
    pub submounts: bool,
    /// The guest is to be notified of changes by the host ([`FsConfig::watches`]), in up to
    /// [`MAX_WATCHES`](crate::MAX_WATCHES) directories that it knows.
    pub watch: bool,
}

impl Default for ShareOptions {
    /// A writable share whose owners are kept.
    fn default() -> Self {
        Self {
            read_only: false,
            owner: ShareOwner::Keep,
            chown: ChownPolicy::Override,
            cache: CacheMode::Auto,
            submounts: false,
            watch: false,
        }
    }
}

impl ShareOptions {
    /// Sets [`Self::read_only`].
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Sets [`Self::owner`].
    #[must_use]
    pub fn owner(mut self, owner: ShareOwner) -> Self {
        self.owner = owner;
        self
    }

    /// Sets [`Self::chown`].
    #[must_use]
    pub fn chown(mut self, chown: ChownPolicy) -> Self {
        self.chown = chown;
        self
    }

    /// Sets [`Self::cache`].
    #[must_use]
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// Sets [`Self::watch`].
    #[must_use]
    pub fn watch(mut self, watch: bool) -> Self {
        self.watch = watch;
        self
    }

    /// Sets [`Self::submounts`].
    #[must_use]
    pub fn submounts(mut self, submounts: bool) -> Self {
        self.submounts = submounts;
        self
    }
}

/// Reason why a directory cannot be shared.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ShareError {
    /// A name is empty, longer than 255 bytes, `.`, `..`, or contains `/` or NUL.
    #[error("\"{name}\" is not a name of a directory entry")]
    Name {
        /// The name.
        name: String,
    },
    /// Two shares have one name.
    #[error("two shares are named \"{name}\"")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// There are more than [`MAX_SHARES`].
    #[error("{count} shares are more than {MAX_SHARES}")]
    TooMany {
        /// Number of shares.
        count: usize,
    },
    /// The descriptor is not one of a directory.
    #[error("share \"{name}\" is not a directory")]
    NotDirectory {
        /// Name of the share.
        name: String,
    },
    /// The directory cannot be examined or opened.
    #[error("cannot open share \"{name}\"")]
    Open {
        /// Name of the share.
        name: String,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
}

/// Maximum number of shares of a server.
pub const MAX_SHARES: usize = 1024;

/// A directory of the host, or one file of it, as an entry of the server's root.
#[derive(Debug)]
pub struct Share {
    pub(crate) name: CString,
    pub(crate) directory: OwnedFd,
    pub(crate) file: Option<CString>,
    pub(crate) options: ShareOptions,
}

/// Checks the name of an entry.
fn checked(name: &[u8]) -> Result<CString, ShareError> {
    let refused = || ShareError::Name {
        name: String::from_utf8_lossy(name).into_owned(),
    };
    let name = CString::new(name).map_err(|_| refused())?;
    Name::new(&name).map_err(|_| refused())?;
    Ok(name)
}

impl Share {
    /// Creates a share of `directory`, which may have been opened with `O_PATH`, as entry
    /// `name` of the server's root.
    ///
    /// # Errors
    /// An invalid name, or a descriptor of something else.
    pub fn new(
        name: impl AsRef<[u8]>,
        directory: OwnedFd,
        options: ShareOptions,
    ) -> Result<Self, ShareError> {
        let name = checked(name.as_ref())?;
        let stat = rustix::fs::fstat(&directory).map_err(|errno| ShareError::Open {
            name: name.to_string_lossy().into_owned(),
            source: errno.into(),
        })?;
        if !FileType::from_raw_mode(stat.st_mode).is_dir() {
            return Err(ShareError::NotDirectory {
                name: name.to_string_lossy().into_owned(),
            });
        }
        Ok(Self {
            name,
            directory,
            file: None,
            options,
        })
    }

    /// Creates a share of the one entry `file` of `directory`: in the guest, a directory
    /// with that name only, in which nothing can be created, removed or renamed.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn file(
        name: impl AsRef<[u8]>,
        directory: OwnedFd,
        file: impl AsRef<[u8]>,
        options: ShareOptions,
    ) -> Result<Self, ShareError> {
        let mut share = Self::new(name, directory, options)?;
        share.file = Some(checked(file.as_ref())?);
        Ok(share)
    }
}

/// Shares and limits of a server.
#[derive(Debug)]
#[non_exhaustive]
pub struct FsConfig {
    /// The shares, with different names; at most [`MAX_SHARES`].
    pub shares: Vec<Share>,
    /// Maximum number of inodes that the guest knows at once, beside the shares, of some 130
    /// bytes each. Beyond three quarters of it, the guest forgets what it does not use; if it
    /// uses more, further ones are listed, but cannot be used (`ENFILE`). 262,144 unless set;
    /// at most 2^31.
    pub max_nodes: u32,
    /// Maximum number of files and directories that the guest has open at once, each with a
    /// descriptor; further ones are refused with `ENFILE`. 4,096 unless set.
    pub max_handles: u32,
    /// Maximum number of descriptors of directories that are kept for later use, at least
    /// 16. 1,024 unless set.
    pub max_directories: u32,
    /// Watches for shares with [`ShareOptions::watch`]. It needs a `/proc`.
    pub watches: Option<Arc<Watches>>,
}

impl Default for FsConfig {
    /// No share, and the limits that the fields document.
    fn default() -> Self {
        Self {
            shares: Vec::new(),
            max_nodes: 1 << 18,
            max_handles: 1 << 12,
            max_directories: 1 << 10,
            watches: None,
        }
    }
}

impl FsConfig {
    /// Adds a share.
    #[must_use]
    pub fn share(mut self, share: Share) -> Self {
        self.shares.push(share);
        self
    }

    /// Sets [`Self::max_nodes`].
    #[must_use]
    pub fn max_nodes(mut self, max_nodes: u32) -> Self {
        self.max_nodes = max_nodes;
        self
    }

    /// Sets [`Self::max_handles`].
    #[must_use]
    pub fn max_handles(mut self, max_handles: u32) -> Self {
        self.max_handles = max_handles;
        self
    }

    /// Sets [`Self::max_directories`].
    #[must_use]
    pub fn max_directories(mut self, max_directories: u32) -> Self {
        self.max_directories = max_directories;
        self
    }

    /// Sets [`Self::watches`].
    #[must_use]
    pub fn watches(mut self, watches: Arc<Watches>) -> Self {
        self.watches = Some(watches);
        self
    }

    /// Checks number and names of the shares.
    pub(crate) fn check(&self) -> Result<(), ShareError> {
        let count = self.shares.len();
        if count > MAX_SHARES {
            return Err(ShareError::TooMany { count });
        }
        let mut names: Vec<&CString> = self.shares.iter().map(|share| &share.name).collect();
        names.sort();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(ShareError::Duplicate {
                name: pair[0].to_string_lossy().into_owned(),
            }),
            None => Ok(()),
        }
    }
}

/// Returns a descriptor of the directory itself that can be read, for operations that
/// `O_PATH` does not allow; without the permission to read it, one by which its entries can
/// be reached.
pub(crate) fn reopened(share: &Share) -> Result<OwnedFd, ShareError> {
    use rustix::fs::{Mode, OFlags, openat};
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let open = |flags| openat(share.directory.as_fd(), c".", flags, Mode::empty());
    open(flags | OFlags::RDONLY)
        .or_else(|_| open(flags | OFlags::PATH))
        .map_err(|errno| ShareError::Open {
            name: share.name.to_string_lossy().into_owned(),
            source: errno.into(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> OwnedFd {
        std::fs::File::open("/").unwrap().into()
    }

    #[test]
    fn shares_have_names_and_directories() {
        let options = ShareOptions::default();
        for bad in ["", ".", "..", "a/b", "a\0b"] {
            let share = Share::new(bad, directory(), options);
            assert!(matches!(share, Err(ShareError::Name { .. })), "{bad:?}");
            let share = Share::file("a", directory(), bad, options);
            assert!(matches!(share, Err(ShareError::Name { .. })), "{bad:?}");
        }
        let file = tempfile::tempfile().unwrap();
        let share = Share::new("a", file.into(), options);
        assert!(matches!(share, Err(ShareError::NotDirectory { .. })));

        let share = || Share::new("a", directory(), options).unwrap();
        let config = FsConfig::default().share(share()).share(share());
        assert!(matches!(config.check(), Err(ShareError::Duplicate { .. })));
    }
}
