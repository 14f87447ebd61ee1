//! Changes by the host in directories that a guest knows.
//!
//! FUSE on virtio-fs has no way to notify a guest. Whoever embeds a [`Server`](crate::Server)
//! reads the changes here, and has the guest set the times of the changed files to [`TOUCH`]:
//! its kernel then notifies the programs that watch them (inotify(7)), and gets fresh
//! attributes in the reply. The server changes nothing for such a request, and refuses it with
//! `ECANCELED` if the last change was the guest's own, of which its programs know.

use std::collections::{BTreeSet, HashMap};
use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

/// Seconds and nanoseconds that a guest sets as time of modification, and for a directory as
/// time of access, too, to be notified of a change: a time in the year -29719.
pub const TOUCH: (i64, u32) = (-1_000_000_007_001, 736_687_623);

/// Maximum number of watched directories of a server.
pub const MAX_WATCHES: usize = 8192;
/// Maximum number of changes that are stored; more are those of whole shares.
const MAX_CHANGES: usize = 4096;
/// Maximum length of a path in bytes: that of Linux (`PATH_MAX`), without its end. A guest can
/// make directories of any depth, but cannot open a longer path to be notified of it.
const MAX_PATH: usize = 4095;

const MASK: WatchFlags = WatchFlags::MODIFY
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::DONT_FOLLOW)
    .union(WatchFlags::EXCL_UNLINK);

/// A file or directory that the host has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct HostChange {
    /// Name of the share.
    pub share: Vec<u8>,
    /// Path below the root of the share, which is the empty one.
    pub path: Vec<u8>,
    /// True for a directory, in which an entry has appeared or disappeared.
    pub is_directory: bool,
}

/// A watched directory.
#[derive(Debug)]
struct Watched {
    watch: i32,
    /// Number of the share.
    share: u16,
    /// Number of the directory in which it is, and its name there; none for the root of a
    /// share.
    place: Option<(u64, Box<[u8]>)>,
}

/// A share of the server.
#[derive(Debug)]
pub(crate) struct WatchedShare {
    pub(crate) name: Vec<u8>,
    /// The only entry, if the share is one of a file.
    pub(crate) file: Option<Vec<u8>>,
}

#[derive(Debug, Default)]
struct WatchTable {
    /// By their numbers.
    shares: Vec<WatchedShare>,
    /// By numbers of nodes.
    directories: HashMap<u64, Watched>,
    nodes: HashMap<i32, u64>,
    changes: BTreeSet<HostChange>,
    /// There were more than are stored: `changes` are whole shares.
    is_everything: bool,
}

/// Watches of directories; see the module's documentation.
#[derive(Debug)]
pub struct Watches {
    inotify: OwnedFd,
    table: Mutex<WatchTable>,
}

impl Watches {
    /// Creates watches, for one server ([`FsConfig::watches`](crate::FsConfig::watches)).
    ///
    /// # Errors
    /// The operating system's error; `EMFILE` if the user has too many already.
    pub fn new() -> io::Result<Arc<Self>> {
        let flags = CreateFlags::NONBLOCK | CreateFlags::CLOEXEC;
        Ok(Arc::new(Self {
            inotify: inotify::init(flags)?,
            table: Mutex::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, WatchTable> {
        // Each change of the table is complete when code can panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns up to `limit` changes since the last call, each once. The descriptor
    /// ([`AsFd`]) is readable when there are new ones; those beyond the limit are left to the
    /// next call.
    pub fn take(&self, limit: usize) -> Vec<HostChange> {
        let mut table = self.lock();
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        let mut read = 0;
        // Bounded, as the host may change files faster than events are read.
        while read < MAX_CHANGES || !reader.is_buffer_empty() {
            match reader.next() {
                Ok(event) => table.note(event.wd(), event.events(), event.file_name()),
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
            read += 1;
        }
        let mut taken = Vec::new();
        while taken.len() < limit
            && let Some(change) = table.changes.pop_first()
        {
            taken.push(change);
        }
        table.is_everything &= !table.changes.is_empty();
        taken
    }

    /// Sets the shares, and forgets all directories.
    pub(crate) fn begin(&self, shares: Vec<WatchedShare>) {
        let mut table = self.lock();
        for watch in std::mem::take(&mut table.nodes).into_keys() {
            let _ = inotify::remove_watch(&self.inotify, watch);
        }
        *table = WatchTable {
            shares,
            ..WatchTable::default()
        };
    }

    /// Watches a directory that the guest knows, `name` in `directory`. Its place is a name in
    /// a node; none for the root of a share. A failure leaves it unwatched.
    pub(crate) fn watch(
        &self,
        (node, share): (u64, u16),
        place: Option<(u64, &CStr)>,
        (directory, name): (BorrowedFd<'_>, &CStr),
    ) {
        let mut table = self.lock();
        let place_now = place.map(|(parent, name)| (parent, name.to_bytes().into()));
        if let Some(watched) = table.directories.get_mut(&node) {
            watched.place = place_now;
            return;
        }
        if table.directories.len() >= MAX_WATCHES {
            return;
        }
        let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
        path.extend_from_slice(name.to_bytes());
        let Ok(watch) = inotify::add_watch(&self.inotify, path, MASK) else {
            return;
        };
        // One directory may be in several shares.
        if let Some(former) = table.nodes.insert(watch, node) {
            table.directories.remove(&former);
        }
        let watched = Watched {
            watch,
            share,
            place: place_now,
        };
        table.directories.insert(node, watched);
    }

    /// Forgets a directory that the guest does not know any more; returns the one in which it
    /// was.
    pub(crate) fn forget(&self, node: u64) -> Option<u64> {
        let mut table = self.lock();
        let watched = table.directories.remove(&node)?;
        table.nodes.remove(&watched.watch);
        let _ = inotify::remove_watch(&self.inotify, watched.watch);
        watched.place.map(|(parent, _)| parent)
    }
}

impl AsFd for Watches {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

impl WatchTable {
    fn note(&mut self, watch: i32, events: ReadFlags, name: Option<&CStr>) {
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            return self.everything();
        }
        let Some(&node) = self.nodes.get(&watch) else {
            return;
        };
        if events.contains(ReadFlags::IGNORED) {
            // The directory is gone.
            self.nodes.remove(&watch);
            self.directories.remove(&node);
            return;
        }
        let Some((share, path)) = self.path(node) else {
            return;
        };
        if share.file.is_some() && share.file.as_deref() != name.map(CStr::to_bytes) {
            return;
        }
        let share = share.name.clone();
        let entries =
            ReadFlags::CREATE | ReadFlags::DELETE | ReadFlags::MOVED_FROM | ReadFlags::MOVED_TO;
        let gone = ReadFlags::DELETE | ReadFlags::MOVED_FROM;
        if let Some(name) = name.map(CStr::to_bytes).filter(|name| !name.is_empty())
            && !events.intersects(gone)
        {
            let mut path = path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            if path.len() <= MAX_PATH {
                self.add(share.clone(), path, events.contains(ReadFlags::ISDIR));
            }
        }
        if events.intersects(entries) {
            self.add(share, path, true);
        }
    }

    fn add(&mut self, share: Vec<u8>, path: Vec<u8>, is_directory: bool) {
        if self.is_everything {
            return;
        }
        if self.changes.len() >= MAX_CHANGES {
            return self.everything();
        }
        self.changes.insert(HostChange {
            share,
            path,
            is_directory,
        });
    }

    /// Notes a change of every watched share.
    fn everything(&mut self) {
        self.is_everything = true;
        self.changes.clear();
        let shares: BTreeSet<_> = self.directories.values().map(|w| w.share).collect();
        for share in shares {
            if let Some(share) = self.shares.get(usize::from(share)) {
                self.changes.insert(HostChange {
                    share: share.name.clone(),
                    path: share.file.clone().unwrap_or_default(),
                    is_directory: true,
                });
            }
        }
    }

    /// Returns the share of a directory, and its path there, if all directories above it are
    /// watched and the path is not too long.
    fn path(&self, node: u64) -> Option<(&WatchedShare, Vec<u8>)> {
        let share = self.directories.get(&node)?.share;
        let mut names: Vec<&[u8]> = Vec::new();
        let (mut at, mut len) = (node, 0);
        while let Some((parent, name)) = &self.directories.get(&at)?.place {
            names.push(name);
            at = *parent;
            len += name.len() + 1;
            // Also for places that contradict each other. The last name has no slash.
            if len > MAX_PATH + 1 {
                return None;
            }
        }
        names.reverse();
        Some((self.shares.get(usize::from(share))?, names.join(&b'/')))
    }
}
