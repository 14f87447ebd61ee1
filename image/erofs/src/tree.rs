//! A tree in memory, for programs without a tree of their own.

mod directory;
#[cfg(feature = "tar")]
mod tar;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use crate::Error;
use crate::source::{Data, FileTree, InodeId, Kind, Meta, ROOT};
use crate::writer::MAX_NAME;

/// Type of an [`Entry`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A file with these contents.
    Bytes(Vec<u8>),
    /// A file with the first `size` bytes of the host's file at `path`, which is opened
    /// when the image is written.
    Path {
        /// The host's file; not a symbolic link.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
    },
    /// A file with a part of an open file.
    Extent {
        /// The open file.
        file: Arc<File>,
        /// Offset of the contents in it.
        offset: u64,
        /// Length of the contents in bytes.
        size: u64,
    },
    /// A file whose contents follow the image; see [`Data::Behind`].
    Behind {
        /// Distance from the image's end in bytes; a multiple of the block size.
        offset: u64,
        /// Length of the contents in bytes.
        size: u64,
    },
    /// A symbolic link to this target.
    Symlink(Vec<u8>),
    /// A character device: major and minor number.
    CharDevice(u32, u32),
    /// A block device: major and minor number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// Name and value of an extended attribute.
type Xattr = (Vec<u8>, Vec<u8>);

/// A file, directory or other object to be added to a [`Tree`].
#[derive(Clone, Debug)]
pub struct Entry {
    kind: EntryKind,
    meta: Meta,
    xattrs: Vec<Xattr>,
}

impl Entry {
    /// Creates an entry owned by root, without time and extended attributes, with a
    /// default mode: 0755 for directories, 0777 for symbolic links, 0644 otherwise.
    #[must_use]
    pub fn new(kind: EntryKind) -> Self {
        let mode = match kind {
            EntryKind::Directory => 0o755,
            EntryKind::Symlink(_) => 0o777,
            _ => 0o644,
        };
        let meta = Meta {
            mode,
            ..Meta::default()
        };
        Self {
            kind,
            meta,
            xattrs: Vec::new(),
        }
    }

    /// Sets owner, mode and time.
    #[must_use]
    pub fn meta(self, meta: Meta) -> Self {
        Self { meta, ..self }
    }

    /// Adds an extended attribute, such as `user.comment`, or replaces its value.
    #[must_use]
    pub fn xattr(mut self, name: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        self.xattrs.push((name.into(), value.into()));
        self
    }
}

#[derive(Debug)]
enum Node {
    Directory {
        parent: InodeId,
        children: BTreeMap<Vec<u8>, InodeId>,
    },
    Other(EntryKind),
}

#[derive(Debug)]
struct Inode {
    node: Node,
    meta: Meta,
    /// Number of the set of extended attributes.
    xattrs: u32,
}

/// Files and directories in memory. Contents are read when the image is written.
#[derive(Debug)]
pub struct Tree {
    inodes: Vec<Inode>,
    /// Sets of extended attributes; the first is empty.
    sets: Vec<Vec<Xattr>>,
    numbers: HashMap<Vec<Xattr>, u32>,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// Creates a tree with an empty root directory.
    #[must_use]
    pub fn new() -> Self {
        let root = Entry::new(EntryKind::Directory);
        Self {
            inodes: vec![Inode {
                node: Node::Directory {
                    parent: ROOT,
                    children: BTreeMap::new(),
                },
                meta: root.meta,
                xattrs: 0,
            }],
            sets: vec![Vec::new()],
            numbers: HashMap::from([(Vec::new(), 0)]),
        }
    }

    /// Adds an entry at `path`, which is relative to the root with or without a leading
    /// slash. Missing parent directories are created. An existing entry at the path is
    /// replaced; if both are directories, only owner, mode, time and attributes are
    /// replaced.
    ///
    /// # Errors
    /// [`Error::Entry`] if the path contains `..`, a zero byte or a name longer than 255
    /// bytes, or a parent is not a directory.
    pub fn add(&mut self, path: &[u8], entry: Entry) -> Result<InodeId, Error> {
        let refused = |reason| Error::Entry {
            path: path.to_vec(),
            reason,
        };
        let names = names(path).map_err(refused)?;
        let is_directory = matches!(entry.kind, EntryKind::Directory);
        let xattrs = self.set_of(entry.xattrs)?;
        let Some((name, parents)) = names.split_last() else {
            if !is_directory {
                return Err(refused("the root is a directory"));
            }
            self.inodes[ROOT as usize].meta = entry.meta;
            self.inodes[ROOT as usize].xattrs = xattrs;
            return Ok(ROOT);
        };
        let parent = self.parent_of(parents).map_err(refused)?;
        if is_directory
            && let Some(known) = self.child(parent, name)
            && let Some(inode) = self.inodes.get_mut(known as usize)
            && matches!(inode.node, Node::Directory { .. })
        {
            inode.meta = entry.meta;
            inode.xattrs = xattrs;
            return Ok(known);
        }
        let node = match entry.kind {
            EntryKind::Directory => Node::Directory {
                parent,
                children: BTreeMap::new(),
            },
            kind => Node::Other(kind),
        };
        let id = self.push(node, entry.meta, xattrs).map_err(refused)?;
        self.name(parent, name, id);
        Ok(id)
    }

    /// Adds another name for the file at `target`.
    ///
    /// # Errors
    /// [`Error::Entry`] as for [`Self::add`], or if there is no file at `target`.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Error> {
        let refused = |reason| Error::Entry {
            path: path.to_vec(),
            reason,
        };
        let mut linked = ROOT;
        for name in names(target).map_err(refused)? {
            linked = self
                .child(linked, name)
                .ok_or_else(|| refused("it is a hard link to a path that does not exist"))?;
        }
        self.link_inode(path, linked)
    }

    /// Adds a name for an inode.
    fn link_inode(&mut self, path: &[u8], linked: InodeId) -> Result<(), Error> {
        let refused = |reason| Error::Entry {
            path: path.to_vec(),
            reason,
        };
        if matches!(self.node(linked), Node::Directory { .. }) {
            return Err(refused("it is a hard link to a directory"));
        }
        let names = names(path).map_err(refused)?;
        let Some((name, parents)) = names.split_last() else {
            return Err(refused("the root is a directory"));
        };
        let parent = self.parent_of(parents).map_err(refused)?;
        self.name(parent, name, linked);
        Ok(())
    }

    /// Returns the directory with these names, and creates missing ones.
    fn parent_of(&mut self, names: &[&[u8]]) -> Result<InodeId, &'static str> {
        let mut at = ROOT;
        for name in names {
            at = match self.child(at, name) {
                Some(known) => known,
                None => {
                    let node = Node::Directory {
                        parent: at,
                        children: BTreeMap::new(),
                    };
                    let meta = Entry::new(EntryKind::Directory).meta;
                    let id = self.push(node, meta, 0)?;
                    self.name(at, name, id);
                    id
                }
            };
            if !matches!(self.node(at), Node::Directory { .. }) {
                return Err("its parent is not a directory");
            }
        }
        Ok(at)
    }

    fn push(&mut self, node: Node, meta: Meta, xattrs: u32) -> Result<InodeId, &'static str> {
        let id = u32::try_from(self.inodes.len()).map_err(|_| "there are too many files")?;
        self.inodes.push(Inode { node, meta, xattrs });
        Ok(id)
    }

    fn node(&self, id: InodeId) -> &Node {
        &self.inodes[id as usize].node
    }

    fn child(&self, directory: InodeId, name: &[u8]) -> Option<InodeId> {
        match self.node(directory) {
            Node::Directory { children, .. } => children.get(name).copied(),
            Node::Other(_) => None,
        }
    }

    fn name(&mut self, directory: InodeId, name: &[u8], id: InodeId) {
        if let Node::Directory { children, .. } = &mut self.inodes[directory as usize].node {
            children.insert(name.to_vec(), id);
        }
    }

    fn set_of(&mut self, mut xattrs: Vec<Xattr>) -> Result<u32, Error> {
        // The last of several values of a name is used.
        xattrs.reverse();
        xattrs.sort_by(|a, b| a.0.cmp(&b.0));
        xattrs.dedup_by(|other, last| other.0 == last.0);
        if let Some(known) = self.numbers.get(&xattrs) {
            return Ok(*known);
        }
        let number = u32::try_from(self.sets.len())
            .map_err(|_| Error::TooLarge("it has too many extended attributes"))?;
        self.sets.push(xattrs.clone());
        self.numbers.insert(xattrs, number);
        Ok(number)
    }
}

/// Splits a path into names.
fn names(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err("its path contains \"..\""),
            name if name.len() > MAX_NAME => return Err("a name is longer than 255 bytes"),
            name if name.contains(&0) => return Err("its path contains a zero byte"),
            name => names.push(name),
        }
    }
    Ok(names)
}

/// Opens a file that is expected to be a regular one.
fn open(path: &std::path::Path) -> io::Result<File> {
    // Links are not followed, and opening a pipe does not block, in case the file was
    // replaced.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

impl FileTree for Tree {
    fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    fn kind(&self, id: InodeId) -> Kind<'_> {
        let file = |data, size| Kind::File { data, size };
        match self.node(id) {
            Node::Directory { .. } | Node::Other(EntryKind::Directory) => Kind::Directory,
            Node::Other(kind) => match kind {
                EntryKind::Directory => Kind::Directory,
                EntryKind::Bytes(bytes) => file(Data::Image, bytes.len() as u64),
                EntryKind::Path { size, .. } | EntryKind::Extent { size, .. } => {
                    file(Data::Image, *size)
                }
                EntryKind::Behind { offset, size } => file(Data::Behind(*offset), *size),
                EntryKind::Symlink(target) => Kind::Symlink(target),
                EntryKind::CharDevice(major, minor) => Kind::CharDevice(*major, *minor),
                EntryKind::BlockDevice(major, minor) => Kind::BlockDevice(*major, *minor),
                EntryKind::Fifo => Kind::Fifo,
            },
        }
    }

    fn meta(&self, id: InodeId) -> Meta {
        self.inodes[id as usize].meta
    }

    fn parent(&self, directory: InodeId) -> InodeId {
        match self.node(directory) {
            Node::Directory { parent, .. } => *parent,
            Node::Other(_) => ROOT,
        }
    }

    fn children<'t>(&'t self, directory: InodeId, children: &mut Vec<(&'t [u8], InodeId)>) {
        if let Node::Directory { children: own, .. } = self.node(directory) {
            children.extend(own.iter().map(|(name, id)| (name.as_slice(), *id)));
        }
    }

    fn xattr_set(&self, id: InodeId) -> u32 {
        self.inodes[id as usize].xattrs
    }

    fn xattr_sets(&self) -> usize {
        self.sets.len()
    }

    fn xattrs<'t>(&'t self, set: u32, attributes: &mut Vec<(&'t [u8], &'t [u8])>) {
        let set = self.sets.get(set as usize).map_or(&[][..], Vec::as_slice);
        attributes.extend(set.iter().map(|(name, value)| (&name[..], &value[..])));
    }

    fn read_at(&self, file: InodeId, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self.node(file) {
            Node::Other(EntryKind::Bytes(bytes)) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                let part = bytes.get(from..).and_then(|rest| rest.get(..buffer.len()));
                buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            Node::Other(EntryKind::Path { path, .. }) => open(path)?.read_exact_at(buffer, offset),
            Node::Other(EntryKind::Extent {
                file,
                offset: begin,
                ..
            }) => file.read_exact_at(buffer, begin.saturating_add(offset)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}
