//! Notifying programs of changes of shared directories by the host.
//!
//! The agent's own mount of the shared directories has the inodes that the workload's mounts
//! have. A request to set the times of a file has this kernel notify who watches the file, and
//! its answer has the new attributes; the host's server recognises the times, and changes
//! nothing.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, openat2, utimensat,
};
use sm_guest_proto::control::{HostFileChange, TOUCH};

use super::{DIRECTORY, shares_at};

/// The server's names are of the host, and lead nowhere else.
const BELOW: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Touches changed files of the shared directories that are mounted below `directory`, the
/// agent's own. Files that are gone, and changes of which the host's server says that they are
/// the guest's own, are left out.
pub(crate) fn touch(directory: &Path, changes: &[HostFileChange]) {
    for change in changes {
        // The next change of the file is another attempt.
        let _ = touch_one(&shares_at(directory), change);
    }
}

fn touch_one(shares: &Path, change: &HostFileChange) -> io::Result<()> {
    let open = |at: &OwnedFd, path: &str| {
        openat2(at, path, OFlags::PATH | DIRECTORY, Mode::empty(), BELOW)
    };
    let flags = OFlags::PATH | DIRECTORY;
    let share = rustix::fs::openat(CWD, shares.join(&change.share), flags, Mode::empty())?;
    let (parent, name) = match change.path.rsplit_once('/') {
        Some((parent, name)) => (open(&share, parent)?, name),
        None => (share, change.path.as_str()),
    };
    let name = if name.is_empty() { "." } else { name };
    let times = times(change.is_directory);
    Ok(utimensat(&parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Linux reports a change of both times as one of attributes, and of the second alone as one
/// of contents (`fsnotify_change`).
fn times(is_directory: bool) -> Timestamps {
    let (tv_sec, nanoseconds) = TOUCH;
    let touch = Timespec {
        tv_sec,
        tv_nsec: nanoseconds.into(),
    };
    let omit = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_OMIT,
    };
    Timestamps {
        last_access: if is_directory { touch } else { omit },
        last_modification: touch,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    /// On file systems whose server does not know these times, which are those of tests only.
    #[test]
    fn files_below_the_share_are_touched() {
        let directory = tempfile::tempdir().unwrap();
        let share = shares_at(directory.path()).join("0");
        fs::create_dir_all(share.join("a/b")).unwrap();
        fs::write(share.join("a/b/f"), "").unwrap();
        fs::write(share.join("g"), "").unwrap();
        fs::write(directory.path().join("outside"), "").unwrap();
        std::os::unix::fs::symlink("a", share.join("link")).unwrap();
        let change = |path: &str, is_directory| HostFileChange {
            share: "0".to_owned(),
            path: path.to_owned(),
            is_directory,
        };
        let changes = [
            change("missing/f", false),
            change("../../outside", false),
            change("link/b/f", false),
            change("g", false),
            change("a/b", true),
            change("", true),
        ];
        let before = fs::metadata(share.join("g")).unwrap();
        touch(directory.path(), &changes);
        let touched = |path: &str| {
            let metadata = fs::metadata(share.join(path)).unwrap();
            let is = |seconds: i64| seconds < 0 || seconds == i64::from(i32::MIN);
            (is(metadata.atime()), is(metadata.mtime()))
        };
        assert_eq!(touched("g"), (false, true));
        assert_eq!(
            fs::metadata(share.join("g")).unwrap().atime(),
            before.atime()
        );
        assert_eq!(touched("a/b"), (true, true));
        assert_eq!(touched("."), (true, true));
        assert_eq!(touched("a/b/f"), (false, false));
        assert_eq!(touched("../../outside"), (false, false));
    }
}
