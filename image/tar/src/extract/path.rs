//! Paths of an archive, and their directories.

use std::ffi::OsStr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::rc::Rc;

use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;

use crate::MAX_PATH;

/// Maximum length of a name in bytes (Linux `NAME_MAX`).
const MAX_NAME: usize = 255;

/// Attempts to resolve a path while other processes rename directories in it.
const ATTEMPTS: u32 = 16;

/// Splits a path into its names, without `.`.
///
/// # Errors
/// The path leaves the destination, or is not valid in a file system.
pub(super) fn components(path: &[u8]) -> Result<Vec<Vec<u8>>, &'static str> {
    if path.len() > MAX_PATH {
        return Err("its path is longer than 4095 bytes");
    }
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err("its path leaves the destination (\"..\")"),
            name if name.len() > MAX_NAME => {
                return Err("a name in its path is longer than 255 bytes");
            }
            name if name.contains(&0) => return Err("its path contains a zero byte"),
            name => names.push(name.to_vec()),
        }
    }
    Ok(names)
}

/// Returns true if a relative symbolic link in the directory `parent` leads out of the
/// destination. An absolute one is an absolute path for its readers, and is not followed
/// by the extraction.
pub(super) fn leaves(parent: &[Vec<u8>], target: &[u8]) -> bool {
    if target.starts_with(b"/") {
        return false;
    }
    let mut depth = parent.len();
    for name in target.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => match depth.checked_sub(1) {
                Some(above) => depth = above,
                None => return true,
            },
            _ => depth += 1,
        }
    }
    false
}

/// Opens directories below the destination.
pub(super) struct Parents<'a> {
    root: BorrowedFd<'a>,
    /// The last directory, because most entries are in the directory of the entry before.
    last: Option<(Vec<Vec<u8>>, Rc<OwnedFd>)>,
}

impl<'a> Parents<'a> {
    pub(super) fn new(root: BorrowedFd<'a>) -> Self {
        Self { root, last: None }
    }

    /// Opens a directory, and creates missing ones with the mode 0755.
    pub(super) fn open(&mut self, names: &[Vec<u8>]) -> Result<Rc<OwnedFd>, Errno> {
        if let Some((last, directory)) = &self.last
            && last == names
        {
            return Ok(Rc::clone(directory));
        }
        let opened = match self.open_existing(names) {
            Err(Errno::NOENT) => self.create(names)?,
            opened => opened?,
        };
        let opened = Rc::new(opened);
        self.last = Some((names.to_vec(), Rc::clone(&opened)));
        Ok(opened)
    }

    pub(super) fn open_existing(&self, names: &[Vec<u8>]) -> Result<OwnedFd, Errno> {
        self.resolve(names, OFlags::PATH)
    }

    /// Opens a directory such that its attributes can be changed.
    pub(super) fn open_to_read(&self, names: &[Vec<u8>]) -> Result<OwnedFd, Errno> {
        self.resolve(names, OFlags::RDONLY)
    }

    fn resolve(&self, names: &[Vec<u8>], flags: OFlags) -> Result<OwnedFd, Errno> {
        let mut path = PathBuf::from(".");
        path.extend(names.iter().map(|name| OsStr::from_bytes(name)));
        let flags = flags | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let mut attempts = 0;
        loop {
            match openat2(self.root, &path, flags, Mode::empty(), resolve) {
                // A rename elsewhere prevents the kernel from excluding an escape.
                Err(Errno::AGAIN | Errno::INTR) if attempts < ATTEMPTS => attempts += 1,
                opened => return opened,
            }
        }
    }

    fn create(&self, names: &[Vec<u8>]) -> Result<OwnedFd, Errno> {
        let mut directory = self.resolve(&[], OFlags::PATH)?;
        for (index, name) in names.iter().enumerate() {
            let prefix = names.get(..=index).unwrap_or(names);
            directory = match self.open_existing(prefix) {
                Err(Errno::NOENT) => {
                    let mode = Mode::from_raw_mode(0o755);
                    match mkdirat(&directory, name.as_slice(), mode) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(errno),
                    }
                    self.open_existing(prefix)?
                }
                opened => opened?,
            };
        }
        Ok(directory)
    }
}
