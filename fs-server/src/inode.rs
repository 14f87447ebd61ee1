//! Inodes of the host, and their attributes as a guest sees them.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, Statx, StatxAttributes, StatxFlags, StatxTimestamp, statx};
use rustix::io::Errno;

use crate::abi::{Attr, linux};
use crate::config::ShareOwner;
use crate::nodes::Identity;

/// Owner of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Extended attribute with the owner that a guest sees: `UID:GID:MODE`, with numbers in
/// decimal and the mode in octal, as Podman writes it. The mode is not used here.
pub(crate) const OWNER: &CStr = c"user.containers.override_stat";
/// Extended attribute of directories with an entry that has [`OWNER`]: other directories'
/// entries are not searched for it.
pub(crate) const OVERRIDES: &CStr = c"user.sm.overrides";

/// An inode, as statx(2) shows it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inode {
    pub(crate) stat: Statx,
    /// The owner that is stored at it.
    pub(crate) stored: Option<Ids>,
}

const MASK: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

impl Inode {
    /// Examines the entry `name` of a directory.
    ///
    /// # Errors
    /// The operating system's error.
    #[inline]
    pub(crate) fn at(directory: impl AsFd, name: &CStr) -> Result<Self, Errno> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = statx(directory, name, flags, MASK)?;
        Ok(Self { stat, stored: None })
    }

    /// Examines an open file.
    ///
    /// # Errors
    /// The operating system's error.
    pub(crate) fn of(file: impl AsFd) -> Result<Self, Errno> {
        let stat = statx(file, c"", AtFlags::EMPTY_PATH, MASK)?;
        Ok(Self { stat, stored: None })
    }

    #[inline]
    pub(crate) fn identity(&self) -> Identity {
        let stat = &self.stat;
        let born = &stat.stx_btime;
        let known = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        let seconds = born.tv_sec.cast_unsigned().wrapping_mul(1_000_000_000);
        Identity {
            device: u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor),
            inode: stat.stx_ino,
            born: if known {
                seconds.wrapping_add(born.tv_nsec.into())
            } else {
                0
            },
            kind: self.kind(),
        }
    }

    /// Returns the time of the last change of the inode in nanoseconds since 1970.
    pub(crate) fn changed(&self) -> i128 {
        let time = &self.stat.stx_ctime;
        i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
    }

    /// Returns type and permissions.
    pub(crate) fn mode(&self) -> u32 {
        self.stat.stx_mode.into()
    }

    /// Returns the file type, as in `mode`.
    pub(crate) fn kind(&self) -> u32 {
        self.mode() & linux::S_IFMT
    }

    pub(crate) fn is_regular(&self) -> bool {
        self.kind() == linux::S_IFREG
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.kind() == linux::S_IFDIR
    }

    pub(crate) fn is_link(&self) -> bool {
        self.kind() == linux::S_IFLNK
    }

    /// Returns true for the root of a mounted file system.
    pub(crate) fn is_mount(&self) -> bool {
        self.stat
            .stx_attributes
            .contains(StatxAttributes::MOUNT_ROOT)
    }

    /// Returns the owner on the host.
    pub(crate) fn host_owner(&self) -> Ids {
        Ids {
            uid: self.stat.stx_uid,
            gid: self.stat.stx_gid,
        }
    }

    /// Returns the owner that a guest sees without one that is stored.
    pub(crate) fn natural_owner(&self, owner: ShareOwner, user: u32) -> Ids {
        match owner {
            ShareOwner::Squash { uid, gid } if self.stat.stx_uid == user => Ids { uid, gid },
            ShareOwner::Squash { .. } | ShareOwner::Keep => self.host_owner(),
            ShareOwner::Fixed { uid, gid } => Ids { uid, gid },
        }
    }

    /// Returns the owner that a guest sees.
    pub(crate) fn owner(&self, owner: ShareOwner, user: u32) -> Ids {
        self.stored
            .unwrap_or_else(|| self.natural_owner(owner, user))
    }

    /// Returns the attributes with the given owner.
    #[inline]
    pub(crate) fn attributes(&self, owner: Ids) -> Attr {
        let stat = &self.stat;
        let (atime, atimensec) = time(&stat.stx_atime);
        let (mtime, mtimensec) = time(&stat.stx_mtime);
        let (ctime, ctimensec) = time(&stat.stx_ctime);
        Attr {
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime,
            mtime,
            ctime,
            atimensec,
            mtimensec,
            ctimensec,
            mode: self.mode(),
            nlink: stat.stx_nlink,
            uid: owner.uid,
            gid: owner.gid,
            rdev: device_number(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
            flags: 0,
        }
    }
}

fn time(time: &StatxTimestamp) -> (u64, u32) {
    (time.tv_sec.cast_unsigned(), time.tv_nsec)
}

/// Returns a device number in the encoding of Linux (`new_encode_dev`).
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | major << 8 | (minor & !0xff) << 12
}

/// Attributes of a directory that does not exist on the host.
pub(crate) fn synthetic(ino: u64) -> Attr {
    Attr {
        ino,
        mode: linux::S_IFDIR | 0o555,
        nlink: 2,
        blksize: 4096,
        ..Attr::default()
    }
}

/// Returns the owner that is stored at an open file.
pub(crate) fn stored_owner(file: BorrowedFd<'_>) -> Option<Ids> {
    let mut bytes = [0u8; 64];
    let len = rustix::fs::fgetxattr(file, OWNER, &mut bytes[..]).ok()?;
    parse_owner(bytes.get(..len)?)
}

fn parse_owner(bytes: &[u8]) -> Option<Ids> {
    let mut parts = std::str::from_utf8(bytes).ok()?.split(':');
    let mut number = || parts.next()?.parse().ok();
    Some(Ids {
        uid: number()?,
        gid: number()?,
    })
}

/// Returns the text of [`OWNER`].
pub(crate) fn owner_text(ids: Ids, mode: u32) -> String {
    format!("{}:{}:0{:o}", ids.uid, ids.gid, mode & 0o7777)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_stored_as_podman_does() {
        let ids = Ids { uid: 999, gid: 0 };
        assert_eq!(owner_text(ids, 0o100_644), "999:0:0644");
        for text in ["999:0:0644", "999:0", "999:0:0644:block-8-1"] {
            assert_eq!(parse_owner(text.as_bytes()), Some(ids), "{text}");
        }
        for text in ["", "999", "999:", "-1:0", "a:b:c", "4294967296:0:0"] {
            assert_eq!(parse_owner(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn identity_distinguishes_types_and_inodes() {
        let folder = tempfile::tempdir().unwrap();
        let directory = std::fs::File::open(folder.path()).unwrap();
        std::fs::write(folder.path().join("a"), "").unwrap();
        std::fs::hard_link(folder.path().join("a"), folder.path().join("b")).unwrap();
        std::fs::write(folder.path().join("c"), "").unwrap();
        let identity = |name: &CStr| Inode::at(&directory, name).unwrap().identity();
        assert_eq!(identity(c"a"), identity(c"b"));
        assert_ne!(identity(c"a"), identity(c"c"));
        let root = Inode::of(&directory).unwrap();
        assert!(root.is_directory());
        assert_ne!(root.identity(), identity(c"a"));
    }
}
