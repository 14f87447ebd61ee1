//! Operations on single files and directories.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, Dir, FileType as Kind, Mode, OFlags, Stat, fchmod, fstat, ftruncate, mkdirat,
    readlinkat, renameat, statat, unlinkat,
};
use rustix::io::Errno;
use sm_guest_proto::files::{FileStat, FileType, PathBytes, WriteFile};

use super::FileFailure;
use super::place::Places;

pub(super) fn stat(
    places: &Places,
    path: &[u8],
    follow: bool,
    mut output: File,
) -> Result<(), FileFailure> {
    let fail = |errno: Errno| FileFailure::new("look at", path, errno);
    let found = places.find(path, follow).map_err(fail)?;
    let attributes = fstat(&found).map_err(fail)?;
    let target = match Kind::from_raw_mode(attributes.st_mode) {
        Kind::Symlink => Some(link_target(&found, "").map_err(fail)?),
        _ => None,
    };
    let path = places.path(&found).map_err(fail)?;
    put(&mut output, &description(path, &attributes, target))
}

pub(super) fn list(places: &Places, path: &[u8], output: File) -> Result<(), FileFailure> {
    let fail = |errno: Errno| FileFailure::new("list", path, errno);
    let found = places.directory(path).map_err(fail)?;
    let directory = places.reopen(&found, OFlags::RDONLY | OFlags::DIRECTORY);
    let mut output = BufWriter::new(output);
    for entry in Dir::read_from(directory.map_err(fail)?).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let attributes = match statat(&found, name, AtFlags::SYMLINK_NOFOLLOW) {
            // It was removed meanwhile.
            Err(Errno::NOENT) => continue,
            attributes => attributes.map_err(fail)?,
        };
        let target = match Kind::from_raw_mode(attributes.st_mode) {
            Kind::Symlink => link_target(&found, name).ok(),
            _ => None,
        };
        let name = name.to_bytes().to_vec();
        put(&mut output, &description(name, &attributes, target))?;
    }
    output.flush().map_err(unsent)
}

fn link_target(directory: &OwnedFd, name: impl rustix::path::Arg) -> Result<PathBytes, Errno> {
    let target = readlinkat(directory, name, Vec::new())?;
    Ok(PathBytes(target.into_bytes()))
}

fn description(path: Vec<u8>, attributes: &Stat, target: Option<PathBytes>) -> FileStat {
    FileStat {
        path: PathBytes(path),
        kind: match Kind::from_raw_mode(attributes.st_mode) {
            Kind::Directory => FileType::Directory,
            Kind::Symlink => FileType::Symlink,
            Kind::Fifo => FileType::Fifo,
            Kind::CharacterDevice => FileType::CharDevice,
            Kind::BlockDevice => FileType::BlockDevice,
            Kind::Socket => FileType::Socket,
            _ => FileType::File,
        },
        mode: attributes.st_mode & 0o7777,
        uid: attributes.st_uid,
        gid: attributes.st_gid,
        size: u64::try_from(attributes.st_size).unwrap_or(0),
        mtime: (
            attributes.st_mtime,
            u32::try_from(attributes.st_mtime_nsec).unwrap_or(0),
        ),
        target,
    }
}

/// Writes a line of JSON.
pub(super) fn put(
    output: &mut impl Write,
    value: &impl serde::Serialize,
) -> Result<(), FileFailure> {
    let mut line = serde_json::to_vec(value).map_err(|error| unsent(error.into()))?;
    line.push(b'\n');
    output.write_all(&line).map_err(unsent)
}

/// Failure of sending the result.
pub(super) fn unsent(error: io::Error) -> FileFailure {
    FileFailure::of("cannot send the result", error)
}

pub(super) fn read(
    places: &Places,
    path: &[u8],
    offset: u64,
    len: Option<u64>,
    mut output: File,
) -> Result<(), FileFailure> {
    let fail = |error: io::Error| FileFailure::new("read", path, error);
    let found = places
        .find(path, true)
        .map_err(|errno| fail(errno.into()))?;
    regular(&found).map_err(|errno| fail(errno.into()))?;
    let file = places.reopen(&found, OFlags::RDONLY);
    let mut file = File::from(file.map_err(|errno| fail(errno.into()))?);
    if offset > 0 {
        file.seek(SeekFrom::Start(offset)).map_err(fail)?;
    }
    io::copy(&mut file.take(len.unwrap_or(u64::MAX)), &mut output)
        .map(drop)
        .map_err(fail)
}

/// Checks that a file has contents: opening another one may block or have an effect.
fn regular(found: &OwnedFd) -> Result<(), Errno> {
    match Kind::from_raw_mode(fstat(found)?.st_mode) {
        Kind::RegularFile => Ok(()),
        Kind::Directory => Err(Errno::ISDIR),
        _ => Err(Errno::INVAL),
    }
}

pub(super) fn write(
    places: &Places,
    write: &WriteFile,
    mut input: File,
) -> Result<(), FileFailure> {
    let path = &write.path.0;
    let fail = |error: io::Error| FileFailure::new("write", path, error);
    let opened = open_to_write(places, write).map_err(|errno| fail(errno.into()))?;
    let mut file = File::from(opened);
    io::copy(&mut input, &mut file).map(drop).map_err(fail)
}

fn open_to_write(places: &Places, write: &WriteFile) -> Result<OwnedFd, Errno> {
    let path = &write.path.0;
    let is_new = match places.find(path, true) {
        Ok(_) if write.create_new => return Err(Errno::EXIST),
        Ok(found) => {
            regular(&found)?;
            false
        }
        Err(Errno::NOENT) => true,
        Err(errno) => return Err(errno),
    };
    let mode = Mode::from_raw_mode(write.mode & 0o7777);
    let mut flags = OFlags::empty();
    flags.set(OFlags::EXCL, write.create_new);
    flags.set(OFlags::APPEND, write.append);
    let file = places.create(path, flags, mode)?;
    // It may have been replaced since.
    regular(&file)?;
    if is_new {
        // Special bits are not set at creation.
        fchmod(&file, mode)?;
    } else if !write.append {
        ftruncate(&file, 0)?;
    }
    Ok(file)
}

pub(super) fn make_directory(
    places: &Places,
    path: &[u8],
    mode: u32,
    parents: bool,
) -> Result<(), FileFailure> {
    let mode = Mode::from_raw_mode(mode & 0o7777);
    let make = || -> Result<(), Errno> {
        if !parents {
            let (parent, name) = places.parent(path)?;
            return mkdirat(&parent, name, mode);
        }
        // Each prefix of the path is resolved, because it may have links.
        let ends = path.iter().enumerate().skip(1);
        let ends = ends.filter_map(|(index, byte)| (*byte == b'/').then_some(index));
        for end in ends.chain([path.len()]) {
            let prefix = path.get(..end).unwrap_or(path);
            match places.directory(prefix) {
                Ok(_) => {}
                Err(Errno::NOENT) => {
                    let (parent, name) = places.parent(prefix)?;
                    match mkdirat(&parent, name, mode) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(errno),
                    }
                }
                Err(errno) => return Err(errno),
            }
        }
        places.directory(path).map(drop)
    };
    make().map_err(|errno| FileFailure::new("create directory", path, errno))
}

pub(super) fn remove(places: &Places, path: &[u8], recursive: bool) -> Result<(), FileFailure> {
    let remove = || -> io::Result<()> {
        let (parent, name) = places.parent(path)?;
        match unlinkat(&parent, name, AtFlags::empty()) {
            Err(Errno::ISDIR) if recursive => {
                // The function of the standard library follows no links.
                rustix::process::fchdir(places.reopen(&parent, OFlags::RDONLY)?)?;
                fs::remove_dir_all(name)
            }
            Err(Errno::ISDIR) => Ok(unlinkat(&parent, name, AtFlags::REMOVEDIR)?),
            removed => Ok(removed?),
        }
    };
    remove().map_err(|error| FileFailure::new("remove", path, error))
}

pub(super) fn rename(places: &Places, from: &[u8], to: &[u8]) -> Result<(), FileFailure> {
    let rename = || -> Result<(), Errno> {
        let (old, old_name) = places.parent(from)?;
        let (new, new_name) = places.parent(to)?;
        renameat(&old, old_name, &new, new_name)
    };
    rename().map_err(|errno| {
        let (from, to) = (String::from_utf8_lossy(from), String::from_utf8_lossy(to));
        FileFailure::of(format!("cannot rename {from:?} to {to:?}"), errno)
    })
}
