//! The root of a container as an image: differences, layers and archives.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{OpenTreeFlags, open_tree};
use sm_guest_proto::files::{ChangeKind, FileChange, PathBytes};
use sm_tar::{TarHeader, TarKind, TarWriter};

use super::changes::{Differences, Trees, is_own};
use super::operations::{put, unsent};
use super::{FileFailure, View};

/// Size of the buffer of a stream in bytes.
const BUFFER: usize = 64 << 10;

/// Time limit for freezing the container's processes.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);

/// Prefix of the name of a deleted file in a layer (OCI image-spec layer.md, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Name in a directory that hides those of lower layers.
const OPAQUE: &str = ".wh..wh..opq";

/// Opens the container's root without the file systems that are mounted in it, and makes it
/// the working directory: relative paths lead to its files.
fn enter_root() -> Result<OwnedFd, FileFailure> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(rustix::fs::CWD, "/", flags)
        .and_then(|root| rustix::process::fchdir(&root).map(|()| root))
        .map_err(|errno| FileFailure::of("cannot open the container's root", errno))
}

fn failed(error: io::Error) -> FileFailure {
    FileFailure::of("cannot read the container's root", error)
}

// ---- differences ----

pub(super) fn changes(view: View<'_>, output: File) -> Result<(), FileFailure> {
    let root = enter_root()?;
    let trees = Trees {
        upper: view.upper,
        lower: view.lower,
        merged: root.as_fd(),
    };
    let mut listing = Listing {
        trees,
        entered: Vec::new(),
        output: BufWriter::new(output),
    };
    trees.compare(&mut listing).map_err(failed)?;
    listing.output.flush().map_err(unsent)
}

/// Lists differences.
struct Listing<'a, W> {
    trees: Trees<'a>,
    /// The directories around the current file, and whether they are listed.
    entered: Vec<(PathBuf, bool)>,
    output: W,
}

impl<W: Write> Listing<'_, W> {
    fn list(&mut self, path: &Path, kind: ChangeKind) -> io::Result<()> {
        let mut entered = std::mem::take(&mut self.entered);
        for (directory, is_listed) in &mut entered {
            if !std::mem::replace(is_listed, true) {
                self.line(directory, ChangeKind::Changed)?;
            }
        }
        self.entered = entered;
        self.line(path, kind)
    }

    fn line(&mut self, path: &Path, kind: ChangeKind) -> io::Result<()> {
        let path = PathBytes([b"/", path.as_os_str().as_bytes()].concat());
        put(&mut self.output, &FileChange { path, kind }).map_err(io::Error::other)
    }
}

impl<W: Write> Differences for Listing<'_, W> {
    fn enter(&mut self, path: &Path, differs: bool) -> io::Result<()> {
        if differs {
            self.list(path, ChangeKind::Changed)?;
        }
        self.entered.push((path.to_owned(), differs));
        Ok(())
    }

    fn leave(&mut self) -> io::Result<()> {
        self.entered.pop();
        Ok(())
    }

    fn file(&mut self, path: &Path, kind: ChangeKind) -> io::Result<()> {
        self.list(path, kind)
    }

    fn deleted(&mut self, path: &Path) -> io::Result<()> {
        self.list(path, ChangeKind::Deleted)
    }

    fn subtree(&mut self, path: &Path, kind: ChangeKind, _: bool) -> io::Result<()> {
        self.list(path, kind)?;
        let trees = self.trees;
        trees.compare_subtree(path, &mut |path, kind| self.line(path, kind))
    }
}

// ---- layers ----

pub(super) fn layer(view: View<'_>, pause: bool, output: File) -> Result<(), FileFailure> {
    let root = enter_root()?;
    if pause {
        // The agent thaws the processes when this one has ended.
        freeze(view.cgroup)
            .map_err(|error| FileFailure::of("cannot pause the container", error))?;
    }
    let trees = Trees {
        upper: view.upper,
        lower: view.lower,
        merged: root.as_fd(),
    };
    let mut layer = Layer {
        entered: Vec::new(),
        writer: TarWriter::new(BufWriter::with_capacity(BUFFER, output)),
    };
    trees.compare(&mut layer).map_err(failed)?;
    layer.writer.finish().map(drop).map_err(unsent)
}

/// Freezes the container's processes.
fn freeze(cgroup: BorrowedFd<'_>) -> io::Result<()> {
    let open = |name: &str, flags| -> io::Result<File> {
        Ok(openat(cgroup, name, flags | OFlags::CLOEXEC, Mode::empty())?.into())
    };
    open("cgroup.freeze", OFlags::WRONLY)?.write_all(b"1")?;
    let events = open("cgroup.events", OFlags::RDONLY)?;
    let deadline = Instant::now() + FREEZE_TIMEOUT;
    loop {
        let mut text = [0; 1024];
        let count = rustix::io::pread(&events, &mut text, 0)?;
        let text = String::from_utf8_lossy(text.get(..count).unwrap_or_default());
        if text.lines().any(|line| line == "frozen 1") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(rustix::io::Errno::TIMEDOUT.into());
        }
        let limit = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        // The kernel reports changes of the file.
        poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&limit))?;
    }
}

/// Writes differences as a layer.
struct Layer<W> {
    /// The directories around the current file, and whether they are in the layer.
    entered: Vec<(PathBuf, bool)>,
    writer: TarWriter<W>,
}

impl<W: Write> Layer<W> {
    /// Appends the file at `path`, after the directories that contain it. Returns true if it
    /// is a directory.
    fn append(&mut self, path: &Path) -> io::Result<bool> {
        self.append_entered()?;
        self.append_one(path)
    }

    fn append_entered(&mut self) -> io::Result<()> {
        let mut entered = std::mem::take(&mut self.entered);
        for (directory, is_written) in &mut entered {
            if !std::mem::replace(is_written, true) {
                self.append_one(directory)?;
            }
        }
        self.entered = entered;
        Ok(())
    }

    fn append_one(&mut self, path: &Path) -> io::Result<bool> {
        let name = path.as_os_str().as_bytes();
        let keep = |xattr: &[u8]| !xattr.starts_with(b"trusted.overlay.");
        let kind = self
            .writer
            .append_with(&Path::new(".").join(path), name, keep)?;
        Ok(kind == Some(TarKind::Directory))
    }

    fn append_below(&mut self, path: &Path) -> io::Result<()> {
        let mut names = match std::fs::read_dir(Path::new(".").join(path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            children => children?
                .map(|child| Ok(child?.file_name()))
                .collect::<io::Result<Vec<_>>>()?,
        };
        names.sort_unstable();
        for name in names {
            let path = path.join(name);
            if !is_own(path.as_os_str().as_bytes()) && self.append_one(&path)? {
                self.append_below(&path)?;
            }
        }
        Ok(())
    }
}

impl<W: Write> Differences for Layer<W> {
    fn enter(&mut self, path: &Path, differs: bool) -> io::Result<()> {
        if differs {
            self.append(path)?;
        }
        self.entered.push((path.to_owned(), differs));
        Ok(())
    }

    fn leave(&mut self) -> io::Result<()> {
        self.entered.pop();
        Ok(())
    }

    fn file(&mut self, path: &Path, _: ChangeKind) -> io::Result<()> {
        self.append(path).map(drop)
    }

    fn deleted(&mut self, path: &Path) -> io::Result<()> {
        self.append_entered()?;
        let name = path.file_name().unwrap_or_default().as_bytes();
        let whiteout = [WHITEOUT, name].concat();
        let path = path.with_file_name(OsStr::from_bytes(&whiteout));
        self.writer.append_empty(path.as_os_str().as_bytes())
    }

    fn subtree(&mut self, path: &Path, _: ChangeKind, replaces: bool) -> io::Result<()> {
        if !self.append(path)? {
            return Ok(());
        }
        if replaces {
            let opaque = path.join(OPAQUE);
            self.writer.append_empty(opaque.as_os_str().as_bytes())?;
        }
        self.append_below(path)
    }
}

// ---- export ----

/// Files of the agent whose contents belong to the guest and not to the root.
const EMPTIED: [&[u8]; 5] = [
    b"etc/hostname",
    b"etc/hosts",
    b"etc/machine-id",
    b"etc/resolv.conf",
    b"run/sm-epoch",
];

pub(super) fn export(output: File) -> Result<(), FileFailure> {
    let _root = enter_root()?;
    let mut writer = TarWriter::new(BufWriter::with_capacity(BUFFER, output));
    writer
        .append_tree(Path::new("."), b".", &|name| EMPTIED.contains(&name))
        .map_err(failed)?;
    for name in EMPTIED {
        let path = Path::new(OsStr::from_bytes(name));
        if std::fs::symlink_metadata(path).is_ok() {
            let header = TarHeader {
                path: name.to_vec(),
                kind: TarKind::File,
                mode: 0o644,
                uid: 0,
                gid: 0,
                mtime: (0, 0),
                size: 0,
                sparse: None,
                xattrs: Vec::new(),
            };
            writer.append(&header).map_err(unsent)?;
        }
    }
    writer.finish().map(drop).map_err(unsent)
}
