//! The server: one session of a driver with a set of shares.

mod attributes;
mod entries;
mod extended;
mod files;
mod listing;
mod ownership;
mod session;
mod state;
mod watching;

use std::ffi::CString;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use self::session::Session;
use self::watching::Watching;
use crate::abi::{self, ROOT_ID};
use crate::buffers::Buffers;
use crate::config::{ChownPolicy, FsConfig, ShareError, ShareOptions, ShareOwner, reopened};
use crate::directories::{Directories, Directory, open_below};
use crate::handles::Handles;
use crate::inode::{Inode, OVERRIDES};
use crate::job::{Job, Task};
use crate::nodes::{NodeIndex, Nodes};
use crate::reply;
use crate::request::{Caller, FORGETS_AT, Operation, RequestError, parse};
use crate::saved::HandleStateV1;

/// A request that has been served, or the rest of it.
#[derive(Debug)]
#[must_use]
pub enum Served {
    /// The reply is written, and has this many bytes; 0 if there was no space for one.
    Reply(usize),
    /// The request has no reply.
    NoReply,
    /// The job writes the reply, on any thread, with the buffers of the request.
    Job(Job),
}

/// Numbers of the objects that a server holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FsCounts {
    /// Inodes that the guest knows, beside the shares.
    pub nodes: usize,
    /// Files and directories that the guest has open.
    pub handles: usize,
    /// Descriptors of directories that are kept for later use.
    pub directories: usize,
}

/// The reply of an operation that succeeded.
enum Answer {
    /// None at all.
    Silence,
    /// One without a body.
    Empty,
    /// The bytes in [`Server::reply`].
    Reply,
    /// A job writes it.
    Task(Task),
}

/// A share in use.
#[derive(Debug)]
struct SharedDirectory {
    name: CString,
    /// The only entry, if the share is one of a file.
    file: Option<CString>,
    options: ShareOptions,
    directory: Arc<Directory>,
    /// Owners are stored at files.
    overrides: bool,
}

/// A FUSE server of directories.
///
/// One thread at a time serves requests; only the [`Job`]s that it returns may be performed
/// on others, at the same time. Names and attributes are those of the host at the time of
/// the request, and no descriptor is held for files that are not open.
///
/// All bytes of a request are untrusted: they neither cause a panic, nor an access outside
/// of the shares, nor memory or descriptors beyond the limits of [`FsConfig`].
#[derive(Debug)]
pub struct Server {
    shares: Vec<SharedDirectory>,
    /// The user that runs this server.
    user: u32,
    nodes: Nodes,
    directories: Directories,
    handles: Handles,
    session: Option<Session>,
    /// Handles of a restored session, which are opened with the first request.
    pending: Vec<HandleStateV1>,
    /// Body of the request.
    scratch: Vec<u8>,
    /// Body of the reply.
    reply: Vec<u8>,
    /// Entries as getdents(2) returns them.
    listed: Vec<u8>,
    watching: Option<Watching>,
}

impl Server {
    /// Creates a server.
    ///
    /// # Errors
    /// Shares with equal or too many names, or a directory that cannot be opened.
    pub fn new(config: FsConfig) -> Result<Self, ShareError> {
        config.check()?;
        let user = rustix::process::geteuid().as_raw();
        let mut shares = Vec::with_capacity(config.shares.len());
        let mut identities = Vec::with_capacity(config.shares.len());
        for share in config.shares {
            let failed = |errno: Errno| ShareError::Open {
                name: share.name.to_string_lossy().into_owned(),
                source: errno.into(),
            };
            let fd = reopened(&share)?;
            identities.push(Inode::of(&fd).map_err(failed)?.identity());
            let options = share.options;
            let changes_owners = options.owner == ShareOwner::Keep && user == 0;
            let overrides = options.chown == ChownPolicy::Override && !changes_owners;
            let marked = overrides && is_marked(&fd);
            shares.push(SharedDirectory {
                name: share.name,
                file: share.file,
                options,
                directory: Arc::new(Directory::new(fd, marked)),
                overrides,
            });
        }
        Ok(Self {
            nodes: Nodes::new(&identities, config.max_nodes),
            directories: Directories::new(config.max_directories),
            handles: Handles::new(config.max_handles),
            shares,
            user,
            session: None,
            pending: Vec::new(),
            scratch: Vec::new(),
            reply: Vec::new(),
            listed: Vec::new(),
            watching: config.watches.map(Watching::new),
        })
    }

    /// Returns true if there is no share, so that nothing can be mounted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shares.is_empty()
    }

    /// Returns the numbers of objects that the server holds.
    #[must_use]
    pub fn counts(&self) -> FsCounts {
        FsCounts {
            nodes: self.nodes.len(),
            handles: self.handles.len(),
            directories: self.directories.len(),
        }
    }

    /// Serves one request. The reply may have to be completed by a [`Job`].
    pub fn serve(&mut self, buffers: &mut impl Buffers) -> Served {
        if !self.pending.is_empty() {
            self.open_pending();
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        let extended = self
            .session
            .is_some_and(|session| session.has_setxattr_ext());
        let served = match parse(buffers, &mut scratch, extended) {
            Ok((caller, operation)) => self.answer(buffers, caller, operation),
            Err(RequestError::Unanswerable) => Served::NoReply,
            Err(RequestError::Body { unique, errno }) => {
                Served::Reply(reply::empty(buffers, unique, Err(errno)))
            }
        };
        self.scratch = scratch;
        served
    }

    fn answer(
        &mut self,
        buffers: &mut impl Buffers,
        caller: Caller,
        operation: Operation<'_>,
    ) -> Served {
        if let Operation::BatchForget { count } = operation {
            self.forget_all(buffers, count);
            return Served::NoReply;
        }
        self.reply.clear();
        let unique = caller.unique;
        let space = buffers.reply_capacity().saturating_sub(abi::OUT_HEADER_LEN);
        let change = self.own_change(&operation);
        let performed = self.perform(caller, operation, space);
        if let Some(change) = change
            && performed.is_ok()
        {
            self.note_own(caller.node, &change);
        }
        match performed {
            Ok(Answer::Silence) => Served::NoReply,
            Ok(Answer::Empty) => Served::Reply(reply::empty(buffers, unique, Ok(()))),
            Ok(Answer::Reply) => Served::Reply(reply::bytes(buffers, unique, Ok(&self.reply))),
            Ok(Answer::Task(task)) => Served::Job(task.into_job(unique)),
            Err(errno) => Served::Reply(reply::empty(buffers, unique, Err(errno))),
        }
    }

    fn perform(
        &mut self,
        caller: Caller,
        operation: Operation<'_>,
        space: usize,
    ) -> Result<Answer, Errno> {
        match operation {
            Operation::Forget { count } => {
                self.forget(caller.node, count);
                return Ok(Answer::Silence);
            }
            Operation::Init {
                major,
                minor,
                max_readahead,
                flags,
            } => return self.init(major, minor, max_readahead, flags),
            Operation::Destroy => {
                self.end_session();
                return Ok(Answer::Empty);
            }
            _ if self.session.is_none() => return Err(Errno::IO),
            _ => {}
        }
        // A handle outlives its node, if the guest has forgotten that.
        match operation {
            Operation::Read(args) => self.read(caller.node, &args),
            Operation::Write(args) => self.write(caller.node, &args),
            Operation::Flush { handle } => self.flush(caller.node, handle),
            Operation::Release { handle } | Operation::Releasedir { handle } => {
                self.handles.remove(handle, caller.node)?;
                Ok(Answer::Empty)
            }
            Operation::Fsync { handle, data_only } => self.fsync(caller.node, handle, data_only),
            Operation::Fallocate(args) => self.fallocate(caller.node, &args),
            Operation::Lseek(args) => self.lseek(caller.node, &args),
            Operation::CopyFileRange(args) => self.copy_file_range(caller.node, &args),
            Operation::Fsyncdir { handle, data_only } => {
                self.fsyncdir(caller.node, handle, data_only)
            }
            _ => self.perform_on_node(caller, operation, space),
        }
    }

    fn perform_on_node(
        &mut self,
        caller: Caller,
        operation: Operation<'_>,
        space: usize,
    ) -> Result<Answer, Errno> {
        let node = self.nodes.find(caller.node)?;
        match operation {
            Operation::Lookup { name } => self.lookup(node, name),
            Operation::Getattr { handle } => self.getattr(node, handle),
            Operation::Setattr(args) => self.setattr(node, &args),
            Operation::Readlink => self.readlink(node),
            Operation::Symlink { name, target } => self.symlink(node, caller, name, target),
            Operation::Mknod { name, mode } => self.mknod(node, caller, name, mode),
            Operation::Mkdir { name, mode } => self.mkdir(node, caller, name, mode),
            Operation::Unlink { name } => self.remove(node, name, false),
            Operation::Rmdir { name } => self.remove(node, name, true),
            Operation::Rename {
                name,
                new_parent,
                new_name,
                flags,
            } => {
                let new_parent = self.nodes.find(new_parent)?;
                self.rename((node, name), (new_parent, new_name), flags)
            }
            Operation::Link { node: old, name } => {
                let old = self.nodes.find(old)?;
                self.link(old, node, name)
            }
            Operation::Create { name, args } => self.create(node, caller, name, &args),
            Operation::Open(args) => self.open(node, &args),
            Operation::Opendir => self.opendir(node),
            Operation::Readdir { args, plus } => self.readdir(node, &args, plus, space),
            Operation::Statfs => self.statfs(node),
            Operation::Syncfs => self.syncfs(node),
            Operation::Access { mask } => self.access(node, mask),
            Operation::Setxattr { name, value, flags } => self.setxattr(node, name, value, flags),
            Operation::Getxattr { name, size } => self.getxattr(node, name, size),
            Operation::Listxattr { size } => self.listxattr(node, size),
            Operation::Removexattr { name } => self.removexattr(node, name),
            Operation::Ioctl => Err(Errno::NOTTY),
            _ => Err(Errno::NOSYS),
        }
    }

    /// Removes references of the guest to node number `id`.
    fn forget(&mut self, id: u64, count: u64) {
        let Ok(node) = self.nodes.find(id) else {
            return;
        };
        let Ok(known) = self.nodes.get(node) else {
            return;
        };
        let is_directory = known.identity.kind == abi::linux::S_IFDIR;
        let parent = known.parent.map(|parent| self.nodes.id(parent));
        if self.nodes.forget(node, count) {
            if is_directory {
                self.directories.remove(id);
            }
            self.unwatch(id, parent);
        }
    }

    fn forget_all(&mut self, buffers: &impl Buffers, count: usize) {
        for index in 0..count {
            let mut one = abi::ForgetOne::default();
            let at = FORGETS_AT + index * size_of::<abi::ForgetOne>();
            if !buffers.read_request(at, one.as_mut_bytes()) {
                return;
            }
            self.forget(one.nodeid, one.nlookup);
        }
    }

    /// Appends a structure to the reply.
    fn put(&mut self, part: impl IntoBytes + Immutable) -> Answer {
        self.reply.extend_from_slice(part.as_bytes());
        Answer::Reply
    }

    /// Returns the share of a node.
    ///
    /// # Errors
    /// `EPERM` for the root of all shares.
    fn share_of(&self, node: NodeIndex) -> Result<&SharedDirectory, Errno> {
        let share = usize::from(self.nodes.get(node)?.share);
        self.shares.get(share).ok_or(Errno::PERM)
    }

    /// Returns the share of a node that may be changed.
    ///
    /// # Errors
    /// `EROFS` if the share is read-only.
    fn writable_share(&self, node: NodeIndex) -> Result<&SharedDirectory, Errno> {
        let share = self.share_of(node)?;
        if share.options.read_only {
            return Err(Errno::ROFS);
        }
        Ok(share)
    }

    /// Returns true if `node` is a directory that exists only here: the root of all shares,
    /// or that of a share of one file.
    fn is_synthetic(&self, node: NodeIndex) -> bool {
        node == NodeIndex::ROOT
            || self.nodes.is_pinned(node)
                && self.share_of(node).is_ok_and(|share| share.file.is_some())
    }

    /// Returns an open descriptor of a directory, whose entries may be changed if it is not
    /// that of a share of one file.
    ///
    /// # Errors
    /// `ENOTDIR`; `ESTALE` if it is not at its last place any more.
    fn directory(&mut self, node: NodeIndex) -> Result<Arc<Directory>, Errno> {
        if self.nodes.is_pinned(node) {
            return Ok(Arc::clone(&self.share_of(node)?.directory));
        }
        let id = self.nodes.id(node);
        if let Some(directory) = self.directories.get(id) {
            return Ok(directory);
        }
        let known = self.nodes.get(node)?.identity;
        if known.kind != abi::linux::S_IFDIR {
            return Err(Errno::NOTDIR);
        }
        let path = self.nodes.path(node)?;
        let fd = self.with_descriptors(|server| {
            let share = server.share_of(node)?;
            let names = path.iter().map(|step| match server.nodes.get(*step) {
                Ok(node) => node.name().to_bytes(),
                Err(_) => b"",
            });
            open_below(share.directory.as_fd(), names, share.options.submounts)
        })?;
        if Inode::of(&fd)?.identity() != known {
            return Err(Errno::STALE);
        }
        let marked = self.share_of(node)?.overrides && is_marked(&fd);
        let directory = Arc::new(Directory::new(fd, marked));
        self.directories.insert(id, Arc::clone(&directory));
        Ok(directory)
    }

    /// Runs `open`, and once more if it lacked descriptors and some could be closed.
    fn with_descriptors<T>(
        &mut self,
        open: impl Fn(&Self) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match open(self) {
            Err(Errno::MFILE | Errno::NFILE) if self.directories.shrink() => open(self),
            result => result,
        }
    }

    /// Returns the directory and the name of the last place of a node that is not the root
    /// of a share.
    ///
    /// # Errors
    /// `ESTALE` if it is not known.
    fn place(&mut self, node: NodeIndex) -> Result<(Arc<Directory>, CString), Errno> {
        let known = self.nodes.get(node)?;
        let name = known.name().to_owned();
        let parent = known.parent.ok_or(Errno::STALE)?;
        Ok((self.directory(parent)?, name))
    }
}

/// Returns true if an entry of the directory may have a stored owner.
fn is_marked(fd: &std::os::fd::OwnedFd) -> bool {
    let mut none = [0u8; 8];
    rustix::fs::fgetxattr(fd.as_fd(), OVERRIDES, &mut none[..]).is_ok()
}

// The root's number is that of its position in the table.
const _: () = assert!(ROOT_ID == 1);
