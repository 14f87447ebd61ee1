//! Extraction of archives of untrusted origin.
//!
//! Every path of an archive is resolved below the destination by `openat2(2)`, without
//! following links and without leaving the destination, whatever the archive or another
//! process changes there meanwhile. Existing files are replaced, not written to.

mod path;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
    chmodat, chownat, fchmod, fchown, fsetxattr, futimens, linkat, mkdirat, mknodat, openat,
    statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use thiserror::Error;

use self::path::{Parents, components, leaves};
use super::{TarError, TarHeader, TarKind, TarReader, shown};

/// Size of the buffer for contents in bytes.
const CHUNK: usize = 128 << 10;

/// The extended attributes that are extracted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum XattrPolicy {
    /// None.
    #[default]
    None,
    /// Those in the namespace `user`, which give no privileges.
    User,
    /// All except those of overlay file systems (`trusted.overlay`).
    All,
}

/// Options for extracting an archive. By default nothing in the archive gives a privilege:
/// files belong to the user of this process, and set-user-ID bits, set-group-ID bits and
/// extended attributes are left out, and devices are refused.
#[derive(Clone, Debug, Default)]
pub struct ExtractOptions {
    owners: bool,
    special_modes: bool,
    devices: bool,
    xattrs: XattrPolicy,
    only: Option<Only>,
}

#[derive(Clone, Debug)]
struct Only {
    name: Vec<u8>,
    is_directory: bool,
}

/// Counts of an extraction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Extracted {
    /// Number of entries.
    pub entries: u64,
    /// Size of the contents of files in bytes.
    pub bytes: u64,
}

/// Failure of an extraction. Entries before the one that failed remain.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ExtractionError {
    /// The stream is not a valid archive, or cannot be read.
    #[error("the archive cannot be used: {0}")]
    Archive(#[from] TarError),
    /// An entry is refused, for this reason.
    #[error("the archive's entry {} is refused: {reason}", shown(.entry))]
    Refused {
        /// Path of the entry.
        entry: Vec<u8>,
        /// A clause about the entry.
        reason: String,
    },
    /// A directory would replace another file, or another file a directory.
    #[error("cannot overwrite {} with {}: {}", kind_of(*.existing_directory),
        kind_of(!*.existing_directory), shown(.entry))]
    Conflict {
        /// Path of the entry.
        entry: Vec<u8>,
        /// True if the existing file is the directory.
        existing_directory: bool,
    },
    /// A file cannot be created.
    #[error("cannot create {}", shown(.entry))]
    Io {
        /// Path of the entry.
        entry: Vec<u8>,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn kind_of(is_directory: bool) -> &'static str {
    match is_directory {
        true => "directory",
        false => "non-directory",
    }
}

impl ExtractOptions {
    /// Creates the default options.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the owners and groups in the archive, which usually requires privileges, and
    /// set-user-ID and set-group-ID bits.
    #[must_use]
    pub fn owners(mut self, owners: bool) -> Self {
        self.owners = owners;
        self
    }

    /// Sets set-user-ID and set-group-ID bits, also without owners.
    #[must_use]
    pub fn special_modes(mut self, special_modes: bool) -> Self {
        self.special_modes = special_modes;
        self
    }

    /// Creates device nodes, which requires privileges.
    #[must_use]
    pub fn devices(mut self, devices: bool) -> Self {
        self.devices = devices;
        self
    }

    /// Sets the extended attributes that are extracted.
    #[must_use]
    pub fn xattrs(mut self, xattrs: XattrPolicy) -> Self {
        self.xattrs = xattrs;
        self
    }

    /// Accepts only the entry `name` in the destination and, if it is expected to be a
    /// directory, entries below it. Other entries are refused.
    #[must_use]
    pub fn only(mut self, name: impl Into<Vec<u8>>, is_directory: bool) -> Self {
        self.only = Some(Only {
            name: name.into(),
            is_directory,
        });
        self
    }

    /// Extracts the archive `stream` in the directory `into`. Missing directories are
    /// created; existing files are replaced, and the attributes of existing directories
    /// changed, except those of `into`.
    ///
    /// # Errors
    /// See [`ExtractionError`].
    pub fn extract(
        &self,
        stream: impl Read,
        into: BorrowedFd<'_>,
    ) -> Result<Extracted, ExtractionError> {
        let mut extraction = Extraction {
            options: self,
            parents: Parents::new(into),
            open_directories: Vec::new(),
            chunk: vec![0; CHUNK],
            done: Extracted::default(),
        };
        let mut reader = TarReader::new(stream);
        while let Some(header) = reader.next_entry()? {
            extraction.entry(&header, &mut reader)?;
        }
        extraction.leave_directories(&[])?;
        Ok(extraction.done)
    }
}

/// State of an extraction.
struct Extraction<'a> {
    options: &'a ExtractOptions,
    parents: Parents<'a>,
    /// Directories whose attributes are set when the archive leaves them, outermost first:
    /// each contains the next one.
    open_directories: Vec<OpenDirectory>,
    chunk: Vec<u8>,
    done: Extracted,
}

struct OpenDirectory {
    components: Vec<Vec<u8>>,
    header: TarHeader,
}

impl Extraction<'_> {
    fn entry<R: Read>(
        &mut self,
        header: &TarHeader,
        reader: &mut TarReader<R>,
    ) -> Result<(), ExtractionError> {
        let refused = |reason: &str| ExtractionError::Refused {
            entry: header.path.clone(),
            reason: reason.to_owned(),
        };
        let parts = components(&header.path).map_err(refused)?;
        self.check_only(&parts, header.kind == TarKind::Directory)
            .map_err(refused)?;
        self.leave_directories(&parts)?;
        self.done.entries += 1;
        let Some((name, parent)) = parts.split_last() else {
            // The destination itself, whose attributes are its own.
            return match header.kind {
                TarKind::Directory => Ok(()),
                _ => Err(refused("it replaces the destination")),
            };
        };
        let failed = |source: io::Error| ExtractionError::Io {
            entry: header.path.clone(),
            source,
        };
        let directory = self.parents.open(parent).map_err(|errno| match errno {
            Errno::LOOP => refused("a directory in its path is a symbolic link"),
            Errno::XDEV => refused("its path leaves the destination"),
            Errno::NOTDIR => refused("a directory in its path is another file"),
            errno => failed(errno.into()),
        })?;
        let exists = existing(&directory, name).map_err(|errno| failed(errno.into()))?;
        let is_directory = header.kind == TarKind::Directory;
        match exists {
            Some(existing_directory) if existing_directory != is_directory => {
                return Err(ExtractionError::Conflict {
                    entry: header.path.clone(),
                    existing_directory,
                });
            }
            Some(false) => unlinkat(&directory, name.as_slice(), AtFlags::empty())
                .map_err(|errno| failed(errno.into()))?,
            _ => {}
        }
        match &header.kind {
            TarKind::Directory => {
                if exists.is_none() {
                    mkdirat(&directory, name.as_slice(), Mode::RWXU)
                        .map_err(|errno| failed(errno.into()))?;
                }
                self.open_directories.push(OpenDirectory {
                    components: parts,
                    header: header.clone(),
                });
                Ok(())
            }
            TarKind::File => {
                self.file(&directory, name, header, reader)
                    .map_err(|error| match error {
                        FileFailure::Archive(error) => TarError::from(error).into(),
                        FileFailure::File(error) => failed(error),
                    })
            }
            TarKind::Symlink(target) => {
                if leaves(parent, target) {
                    return Err(refused("it is a link that leaves the destination"));
                }
                symlinkat(target.as_slice(), &directory, name.as_slice())
                    .and_then(|()| self.attributes_at(&directory, name, header))
                    .map_err(|errno| failed(errno.into()))
            }
            TarKind::Hardlink(target) => self.hardlink(&directory, name, target, header),
            TarKind::Fifo => mknodat(
                &directory,
                name.as_slice(),
                FileType::Fifo,
                Mode::RUSR | Mode::WUSR,
                0,
            )
            .and_then(|()| self.attributes_at(&directory, name, header))
            .map_err(|errno| failed(errno.into())),
            TarKind::CharDevice(major, minor) | TarKind::BlockDevice(major, minor) => {
                if !self.options.devices {
                    return Err(refused("it is a device"));
                }
                let kind = match header.kind {
                    TarKind::CharDevice(..) => FileType::CharacterDevice,
                    _ => FileType::BlockDevice,
                };
                let number = rustix::fs::makedev(*major, *minor);
                let mode = Mode::RUSR | Mode::WUSR;
                mknodat(&directory, name.as_slice(), kind, mode, number)
                    .and_then(|()| self.attributes_at(&directory, name, header))
                    .map_err(|errno| failed(errno.into()))
            }
        }
    }

    fn check_only(&self, parts: &[Vec<u8>], is_directory: bool) -> Result<(), &'static str> {
        let Some(only) = &self.options.only else {
            return Ok(());
        };
        if parts.first() != Some(&only.name) {
            return Err("it was not asked for");
        }
        match parts.len() {
            1 if is_directory && !only.is_directory => Err("it is a directory, and was none"),
            1 if !is_directory && only.is_directory => Err("it is no directory, and was one"),
            1 => Ok(()),
            _ if only.is_directory => Ok(()),
            _ => Err("it was not asked for"),
        }
    }

    /// Creates a file with its contents. One whose contents are incomplete is removed.
    fn file<R: Read>(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        header: &TarHeader,
        reader: &mut TarReader<R>,
    ) -> Result<(), FileFailure> {
        let flags = OFlags::WRONLY
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::NOCTTY
            | OFlags::CLOEXEC;
        let file = File::from(openat(directory, name, flags, Mode::RUSR | Mode::WUSR)?);
        let written = self
            .contents(&file, header, reader)
            .and_then(|()| Ok(self.attributes(&file, header)?));
        if written.is_err() {
            let _ = unlinkat(directory, name, AtFlags::empty());
        }
        written
    }

    fn contents<R: Read>(
        &mut self,
        file: &File,
        header: &TarHeader,
        reader: &mut TarReader<R>,
    ) -> Result<(), FileFailure> {
        if let Some(extents) = &header.sparse {
            for (offset, len) in extents {
                self.copy(reader, *len, |bytes, at| {
                    file.write_all_at(bytes, offset.saturating_add(at))
                })?;
            }
            file.set_len(header.size)?;
            return Ok(());
        }
        self.copy(reader, header.size, |bytes, _| {
            (&mut &*file).write_all(bytes)
        })
    }

    /// Copies `len` bytes to `write`, which also gets their offset.
    fn copy<R: Read>(
        &mut self,
        reader: &mut TarReader<R>,
        len: u64,
        mut write: impl FnMut(&[u8], u64) -> io::Result<()>,
    ) -> Result<(), FileFailure> {
        let mut at = 0;
        while at < len {
            let room = usize::try_from(len - at).map_or(CHUNK, |left| left.min(CHUNK));
            let chunk = self.chunk.get_mut(..room).unwrap_or_default();
            let count = match reader.read(chunk) {
                Ok(0) => return Err(FileFailure::Archive(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(FileFailure::Archive(error)),
            };
            write(chunk.get(..count).unwrap_or_default(), at)?;
            let count = u64::try_from(count).unwrap_or(u64::MAX);
            at = at.saturating_add(count);
            self.done.bytes = self.done.bytes.saturating_add(count);
        }
        Ok(())
    }

    fn hardlink(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        target: &[u8],
        header: &TarHeader,
    ) -> Result<(), ExtractionError> {
        let refused = |reason: &str| ExtractionError::Refused {
            entry: header.path.clone(),
            reason: reason.to_owned(),
        };
        let parts = components(target).map_err(|_| refused("it is a link to an invalid path"))?;
        self.check_only(&parts, false)
            .map_err(|_| refused("it is a link to a file that was not asked for"))?;
        let missing = || refused("it is a link to a file that is not there");
        let (file, parent) = parts.split_last().ok_or_else(missing)?;
        let parent = self.parents.open_existing(parent).map_err(|_| missing())?;
        let found = statat(&parent, file.as_slice(), AtFlags::SYMLINK_NOFOLLOW);
        let found = found.map_err(|_| missing())?;
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            return Err(refused("it is a link to a directory"));
        }
        // The attributes are those of the target.
        linkat(&parent, file.as_slice(), directory, name, AtFlags::empty()).map_err(|errno| {
            ExtractionError::Io {
                entry: header.path.clone(),
                source: errno.into(),
            }
        })
    }

    // ---- attributes ----

    fn mode(&self, header: &TarHeader) -> Mode {
        let mask = match self.options.owners || self.options.special_modes {
            true => 0o7777,
            false => 0o1777,
        };
        Mode::from_raw_mode(u32::from(header.mode & mask))
    }

    /// Sets the attributes of an open file or directory.
    fn attributes(&self, file: &File, header: &TarHeader) -> rustix::io::Result<()> {
        if self.options.owners {
            let (uid, gid) = (Uid::from_raw(header.uid), Gid::from_raw(header.gid));
            fchown(file, Some(uid), Some(gid))?;
        }
        // After the owner, whose change removes bits of the mode and capabilities.
        fchmod(file, self.mode(header))?;
        for (name, value) in &header.xattrs {
            let is_extracted = match self.options.xattrs {
                XattrPolicy::None => false,
                XattrPolicy::User => name.starts_with(b"user."),
                XattrPolicy::All => !name.starts_with(b"trusted.overlay."),
            };
            if is_extracted {
                match fsetxattr(file, name.as_slice(), value, XattrFlags::empty()) {
                    // The file system has none, or not these.
                    Ok(()) | Err(Errno::OPNOTSUPP) => {}
                    Err(errno) => return Err(errno),
                }
            }
        }
        futimens(file, &times(header))
    }

    /// Sets the attributes of a link, pipe or device.
    fn attributes_at(
        &self,
        directory: &OwnedFd,
        name: &[u8],
        header: &TarHeader,
    ) -> rustix::io::Result<()> {
        if self.options.owners {
            let (uid, gid) = (Uid::from_raw(header.uid), Gid::from_raw(header.gid));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            chownat(directory, name, Some(uid), Some(gid), flags)?;
        }
        if !matches!(header.kind, TarKind::Symlink(_)) {
            // It was created by this process; one that replaces it with a link in the
            // meantime could change the mode itself.
            chmodat(directory, name, self.mode(header), AtFlags::empty())?;
        }
        utimensat(directory, name, &times(header), AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Sets the attributes of directories that do not contain `next`.
    fn leave_directories(&mut self, next: &[Vec<u8>]) -> Result<(), ExtractionError> {
        while let Some(last) = self
            .open_directories
            .pop_if(|last| !next.starts_with(&last.components))
        {
            let set = || -> rustix::io::Result<()> {
                let opened = self.parents.open_to_read(&last.components)?;
                self.attributes(&File::from(opened), &last.header)
            };
            set().map_err(|errno| ExtractionError::Io {
                entry: last.header.path.clone(),
                source: errno.into(),
            })?;
        }
        Ok(())
    }
}

/// Failure of creating a file.
enum FileFailure {
    /// The archive cannot be read.
    Archive(io::Error),
    /// The file cannot be written.
    File(io::Error),
}

impl From<io::Error> for FileFailure {
    fn from(error: io::Error) -> Self {
        Self::File(error)
    }
}

impl From<Errno> for FileFailure {
    fn from(errno: Errno) -> Self {
        Self::File(errno.into())
    }
}

/// Returns whether the existing file `name` is a directory; `None` if there is none.
fn existing(directory: &OwnedFd, name: &[u8]) -> rustix::io::Result<Option<bool>> {
    match statat(directory.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => {
            let kind = FileType::from_raw_mode(found.st_mode);
            Ok(Some(kind == FileType::Directory))
        }
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn times(header: &TarHeader) -> Timestamps {
    let (seconds, nanos) = header.mtime;
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: seconds,
            tv_nsec: i64::from(nanos),
        },
    }
}
