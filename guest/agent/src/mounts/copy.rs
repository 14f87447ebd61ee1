//! The first use of a volume: the files that the image has at its target are copied to it,
//! with owners, permissions, times, links and extended attributes, as Docker does.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid,
    XattrFlags, chownat, fchmod, fchown, fgetxattr, flistxattr, fsetxattr, fstat, futimens, linkat,
    mkdirat, mknodat, openat, openat2, readlinkat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;

/// Depth of directories. Deeper ones have longer paths than Linux accepts.
const MAX_DEPTH: usize = 1024;
/// Longest list of names of attributes, and longest attribute, in bytes (`XATTR_LIST_MAX`).
const MAX_XATTR: usize = 64 << 10;

const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK);

/// Copies the content and the attributes of a directory to another one, if that is empty,
/// and stays so until the first file is copied. Both are directories; `from` may be open as a path only.
///
/// # Errors
/// A file cannot be read or written. What was copied until then is left.
pub(super) fn fill_if_empty(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let to = openat(to, ".", READ | OFlags::DIRECTORY, Mode::empty())?;
    if names(&to)?.next().is_some() {
        return Ok(());
    }
    let from = openat(from, ".", READ | OFlags::DIRECTORY, Mode::empty())?;
    let mut copy = Copy {
        device: fstat(&from)?.st_dev,
        links: HashMap::new(),
        target: to.try_clone()?,
    };
    match copy.directory(&from, &to, "", 0) {
        // A VM that shares the directory fills it at the same time, and was first.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        copied => copied,
    }
}

fn names(directory: &OwnedFd) -> io::Result<impl Iterator<Item = io::Result<CString>> + use<>> {
    let entries = Dir::read_from(directory)?;
    let names = entries.filter_map(|entry| match entry {
        Ok(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => None,
        Ok(entry) => Some(Ok(entry.file_name().to_owned())),
        Err(error) => Some(Err(error.into())),
    });
    Ok(names)
}

struct Copy {
    /// Of the source: other file systems below it are not copied.
    device: u64,
    /// Paths in the target of files with several names.
    links: HashMap<u64, String>,
    target: OwnedFd,
}

impl Copy {
    fn directory(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        path: &str,
        depth: usize,
    ) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for name in names(from)? {
            let name = name?;
            let below = match name.to_str() {
                Ok(name) => format!("{path}{name}"),
                // Such a file is copied once for each of its names.
                Err(_) => String::new(),
            };
            self.entry(from, to, &name, &below, depth)?;
        }
        attributes(from, to, &fstat(from)?)
    }

    fn entry(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        path: &str,
        depth: usize,
    ) -> io::Result<()> {
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if stat.st_dev != self.device && kind == FileType::Directory {
            return Ok(());
        }
        if kind != FileType::Directory && stat.st_nlink > 1 && !path.is_empty() {
            if let Some(first) = self.links.get(&stat.st_ino) {
                return Ok(linkat(
                    &self.target,
                    first.as_str(),
                    to,
                    name,
                    AtFlags::empty(),
                )?);
            }
            self.links.insert(stat.st_ino, path.to_owned());
        }
        match kind {
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                let from = openat(from, name, READ | OFlags::DIRECTORY, Mode::empty())?;
                let to = openat(to, name, READ | OFlags::DIRECTORY, Mode::empty())?;
                return self.directory(&from, &to, &format!("{path}/"), depth + 1);
            }
            FileType::RegularFile => {
                let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
                let from = openat2(from, name, READ, Mode::empty(), resolve)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let to = openat(to, name, flags, Mode::RUSR | Mode::WUSR)?;
                let (mut source, mut target) = (std::fs::File::from(from), std::fs::File::from(to));
                io::copy(&mut source, &mut target)?;
                return attributes(&source.into(), &target.into(), &stat);
            }
            FileType::Symlink => {
                let target = readlinkat(from, name, Vec::new())?;
                symlinkat(target, to, name)?;
            }
            // Devices and sockets: as files they do nothing (the mount has `nodev`).
            _ => mknodat(to, name, kind, Mode::RUSR | Mode::WUSR, stat.st_rdev)?,
        }
        chownat(
            to,
            name,
            owner(&stat),
            group(&stat),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        if kind != FileType::Symlink {
            rustix::fs::chmodat(
                to,
                name,
                Mode::from_raw_mode(stat.st_mode),
                AtFlags::empty(),
            )?;
        }
        Ok(utimensat(
            to,
            name,
            &times(&stat),
            AtFlags::SYMLINK_NOFOLLOW,
        )?)
    }
}

fn owner(stat: &Stat) -> Option<Uid> {
    Some(Uid::from_raw(stat.st_uid))
}

fn group(stat: &Stat) -> Option<Gid> {
    Some(Gid::from_raw(stat.st_gid))
}

fn times(stat: &Stat) -> Timestamps {
    let time = |seconds, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
    };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}

/// Copies owner, extended attributes, permissions and times, in this order: a change of owner
/// clears set-user-ID bits and capabilities.
fn attributes(from: &OwnedFd, to: &OwnedFd, stat: &Stat) -> io::Result<()> {
    fchown(to, owner(stat), group(stat))?;
    for name in xattr_names(from.as_fd())? {
        let mut value = Vec::with_capacity(MAX_XATTR);
        match fgetxattr(from, &*name, spare_capacity(&mut value)) {
            Ok(_) => {}
            Err(Errno::NODATA) => continue,
            Err(error) => return Err(error.into()),
        }
        match fsetxattr(to, &*name, &value, XattrFlags::empty()) {
            // An attribute of the overlay, or of a security module that is absent here.
            Err(Errno::OPNOTSUPP | Errno::PERM) => {}
            other => other?,
        }
    }
    fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
    Ok(futimens(to, &times(stat))?)
}

fn xattr_names(file: impl AsFd) -> io::Result<Vec<CString>> {
    let mut list = Vec::with_capacity(MAX_XATTR);
    match flistxattr(file, spare_capacity(&mut list)) {
        Ok(_) => {}
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    }
    let names = list
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    Ok(names.filter_map(|name| CString::new(name).ok()).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::path::Path;

    use rustix::fs::open;

    use super::*;

    fn opened(path: &Path) -> OwnedFd {
        open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap()
    }

    #[test]
    fn a_directory_is_copied_once_with_all_that_belongs_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("sub/deep")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("file"), "content").unwrap();
        fs::hard_link(from.join("file"), from.join("sub/other")).unwrap();
        symlink("../file", from.join("sub/link")).unwrap();
        symlink("/nowhere", from.join("dangling")).unwrap();
        fs::set_permissions(from.join("file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o750)).unwrap();
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            from.join("fifo"),
            Mode::from_raw_mode(0o620),
        )
        .unwrap();
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        let file = fs::File::open(from.join("file")).unwrap();
        file.set_times(fs::FileTimes::new().set_modified(old))
            .unwrap();
        let _ = rustix::fs::setxattr(from.join("file"), "user.sm", b"x", XattrFlags::empty());

        fill_if_empty(&opened(&from), &opened(&to)).unwrap();
        let read = |path: &str| fs::read_to_string(to.join(path)).unwrap();
        assert_eq!(
            (read("file"), read("sub/other")),
            ("content".into(), "content".into())
        );
        let stat = |path: &str| fs::symlink_metadata(to.join(path)).unwrap();
        assert_eq!(stat("file").ino(), stat("sub/other").ino());
        assert_eq!(stat("file").mode() & 0o7777, 0o4751);
        assert_eq!(stat("file").modified().unwrap(), old);
        assert_eq!(stat("").mode() & 0o7777, 0o750);
        let fifo = fs::symlink_metadata(from.join("fifo")).unwrap();
        assert_eq!(stat("fifo").mode(), fifo.mode());
        assert_eq!(
            fs::read_link(to.join("sub/link")).unwrap(),
            Path::new("../file")
        );
        assert_eq!(
            fs::read_link(to.join("dangling")).unwrap(),
            Path::new("/nowhere")
        );
        assert!(to.join("sub/deep").is_dir());

        // A directory that has something stays as it is.
        fs::write(from.join("later"), "").unwrap();
        fill_if_empty(&opened(&from), &opened(&to)).unwrap();
        assert!(!to.join("later").exists());
    }

    /// VMs that share a directory may start at the same time.
    #[test]
    fn one_of_several_fills_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        for name in 0..20 {
            let below = from.join(name.to_string());
            fs::create_dir_all(&below).unwrap();
            (0..5).for_each(|name| fs::write(below.join(name.to_string()), "x").unwrap());
        }
        for round in 0..20 {
            let to = dir.path().join(format!("to{round}"));
            fs::create_dir(&to).unwrap();
            let start = std::sync::Barrier::new(3);
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        start.wait();
                        fill_if_empty(&opened(&from), &opened(&to)).unwrap();
                    });
                }
            });
            for name in 0..20 {
                let below = fs::read_dir(to.join(name.to_string())).unwrap();
                assert_eq!(below.count(), 5, "{name}");
            }
        }
    }
}
