//! The file system of a stack of layers, with whiteouts, opaque directories, replacements
//! and hard links resolved (OCI image-spec layer.md).
//!
//! An image may have a million files, so nothing is allocated for each of them: inodes
//! and directory entries are rows of two tables, names and link targets are stored in an
//! arena, and one hash table finds the entry of a directory by its name.

mod arena;
mod walk;

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::io;

use hashbrown::HashTable;

pub(crate) use self::arena::Text;
use self::arena::{Arena, XattrSets};
use crate::error::{Cause, ErrorKind};
use crate::index::{ContentLocation, Entry, EntryKind, IndexReader, Meta, Xattrs, encode_xattrs};
use crate::layer::check_xattrs;
use crate::limits::Limits;
use sm_tar::device_in_range;

/// Index of an inode.
pub(crate) type InodeId = u32;
/// Index of a directory entry.
type DirentId = u32;
/// The root's inode.
pub(crate) const ROOT: InodeId = 0;
/// Value of an index that refers to no row.
const NONE: u32 = u32::MAX;
/// Extended attribute with the capabilities of a program.
const CAPABILITY: &[u8] = b"security.capability";
/// Number of copied bytes that counts as a step.
const BYTES_PER_STEP: usize = 256;

/// Type of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    /// Contents in layer number `layer`.
    File {
        layer: u16,
        location: ContentLocation,
        size: u64,
    },
    Symlink(Text),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// A compact [`Kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Tag {
    Directory,
    BlobFile,
    SmallFile,
    Symlink,
    CharDevice,
    BlockDevice,
    Fifo,
}

#[derive(Clone, Copy, Debug)]
struct Inode {
    seconds: i64,
    /// Offset of a file, first entry of a directory, target of a link, or major number.
    a: u64,
    /// Size of a file, parent of a directory, or minor number.
    b: u64,
    nanoseconds: u32,
    uid: u32,
    gid: u32,
    /// Number of the set of extended attributes.
    xattrs: u32,
    mode: u16,
    layer: u16,
    tag: Tag,
}

#[derive(Clone, Copy, Debug)]
struct Dirent {
    name: Text,
    parent: InodeId,
    inode: InodeId,
    /// The next entry of the same directory.
    next: DirentId,
    /// The last layer with its own entry for this name, in the form of [`unpacked_mark`],
    /// or [`IMPLIED`].
    unpacked: u32,
}

/// Refusal of an entry: its path and a clause with the reason.
#[derive(Debug)]
pub(crate) enum Refused {
    /// The entry itself is invalid.
    Entry { path: Vec<u8>, reason: Cause },
    /// The index cannot be read.
    Index(io::Error),
}

/// Reason of a refusal, returned where the path is not known.
type Reason = Cause;

/// A file system. Rows that are no longer referenced remain in the tables.
pub(crate) struct Tree {
    inodes: Vec<Inode>,
    dirents: Vec<Dirent>,
    by_name: HashTable<DirentId>,
    hasher: RandomState,
    arena: Arena,
    xattrs: XattrSets,
    limits: Limits,
    /// Directories on the path to the current position of a walk; reused for each walk.
    trail: Vec<InodeId>,
    /// Number of steps that walks and opaque markers may still take, for all layers
    /// together.
    steps: usize,
}

/// Number of steps permitted for each possible entry. Paths of real images have about
/// five components; without the limit, a small image with paths through long chains of
/// links could take minutes.
const STEPS_PER_ENTRY: usize = 64;

impl Tree {
    pub(crate) fn new(limits: Limits) -> Self {
        let mut tree = Self {
            steps: limits.entries.saturating_mul(STEPS_PER_ENTRY),
            inodes: Vec::new(),
            dirents: Vec::new(),
            by_name: HashTable::new(),
            hasher: RandomState::new(),
            arena: Arena::default(),
            xattrs: XattrSets::default(),
            limits,
            trail: Vec::new(),
        };
        tree.inodes.push(Inode::of(Kind::Directory));
        tree
    }

    /// Applies layer number `layer`.
    ///
    /// Entries are applied in the order of the layer, each in the state that the previous
    /// ones have created, as in containerd's and umoci's appliers. A whiteout therefore
    /// never reaches through a link of a lower layer that this layer has replaced by a
    /// directory.
    pub(crate) fn apply(&mut self, layer: u16, index: &mut IndexReader) -> Result<(), Refused> {
        index.rewind().map_err(Refused::Index)?;
        while let Some(entry) = index.next().map_err(Refused::Index)? {
            match entry.kind {
                EntryKind::Whiteout => self.hide(entry.path),
                EntryKind::Opaque => self.empty(entry.path, layer),
                _ => self.add(layer, &entry),
            }
            .map_err(|reason| refused(&entry, reason))?;
        }
        Ok(())
    }

    fn hide(&mut self, path: &[u8]) -> Result<(), Reason> {
        let (parent, name) = split(path);
        let parent = self.parent_of_entry(parent)?;
        self.unlink(parent, name);
        Ok(())
    }

    /// Removes the contents of a directory that do not come from an entry of `layer`.
    fn empty(&mut self, path: &[u8], layer: u16) -> Result<(), Reason> {
        let directory = self.parent_of_entry(path)?;
        let mut directories = vec![directory];
        while let Some(directory) = directories.pop() {
            let mut at = self.first_entry(directory);
            let mut remaining = NONE;
            while at != NONE {
                self.step(1)?;
                let entry = self.dirents[at as usize];
                if entry.unpacked == unpacked_mark(layer) {
                    let inode = self.inodes.get(entry.inode as usize);
                    if inode.is_some_and(|inode| inode.tag == Tag::Directory) {
                        directories.push(entry.inode);
                    }
                    self.dirents[at as usize].next = remaining;
                    remaining = at;
                } else {
                    let hash = self.hash(entry.parent, self.arena.get(entry.name));
                    if let Ok(found) = self.by_name.find_entry(hash, |other| *other == at) {
                        found.remove();
                    }
                }
                at = entry.next;
            }
            self.set_first_entry(directory, remaining);
        }
        Ok(())
    }

    /// Returns the parent directory of an entry, and creates it if it is missing.
    fn parent_of_entry(&mut self, path: &[u8]) -> Result<InodeId, Reason> {
        let found = self.walk(path, true)?;
        Ok(found.ok_or("its parent is not a directory")?)
    }

    fn add(&mut self, layer: u16, entry: &Entry<'_>) -> Result<(), Reason> {
        if entry.path.is_empty() {
            return self.set_meta(ROOT, &entry.meta, entry.xattrs);
        }
        let (parent, name) = split(entry.path);
        let parent = self.parent_of_entry(parent)?;
        let kind = match entry.kind {
            EntryKind::Directory => {
                // A directory that replaces a directory keeps its contents.
                if let Some(known) = self.find(parent, name)
                    && let Some(id) = self.child(parent, name)
                    && self.inodes[id as usize].tag == Tag::Directory
                {
                    self.dirents[known as usize].unpacked = unpacked_mark(layer);
                    return self.set_meta(id, &entry.meta, entry.xattrs);
                }
                Kind::Directory
            }
            EntryKind::Hardlink(target) => {
                // The link replaces an existing file of its name, which therefore cannot
                // be its target.
                self.unlink(parent, name);
                let linked = self.link_target(target)?;
                self.relabel(linked, entry)?;
                return self.insert(parent, name, linked, unpacked_mark(layer));
            }
            EntryKind::File { location, size } => Kind::File {
                layer,
                location,
                size,
            },
            EntryKind::Symlink(target) => {
                let text = self.arena.add(target, self.limits.names_bytes)?;
                Kind::Symlink(text)
            }
            EntryKind::CharDevice(major, minor) => {
                device_in_range(major, minor)?;
                Kind::CharDevice(major, minor)
            }
            EntryKind::BlockDevice(major, minor) => {
                device_in_range(major, minor)?;
                Kind::BlockDevice(major, minor)
            }
            EntryKind::Fifo => Kind::Fifo,
            EntryKind::Whiteout | EntryKind::Opaque => return Ok(()),
        };
        let id = self.new_inode(kind)?;
        self.set_meta(id, &entry.meta, entry.xattrs)?;
        self.insert(parent, name, id, unpacked_mark(layer))
    }

    /// Consumes some of the remaining steps.
    fn step(&mut self, count: usize) -> Result<(), Reason> {
        let left = self.steps.checked_sub(count);
        self.steps = left.ok_or_else(|| {
            let text = "the image's paths lead through too many links and directories";
            exceeded(text)
        })?;
        Ok(())
    }

    fn new_inode(&mut self, kind: Kind) -> Result<InodeId, Reason> {
        let most = self.limits.entries;
        let id = u32::try_from(self.inodes.len())
            .ok()
            .filter(|id| (*id as usize) < most)
            .ok_or_else(|| exceeded(format!("the image has more than {most} files")))?;
        self.inodes.push(Inode::of(kind));
        Ok(id)
    }

    fn set_meta(&mut self, id: InodeId, meta: &Meta, xattrs: Xattrs<'_>) -> Result<(), Reason> {
        let set = self.xattrs.number(xattrs, self.limits.names_bytes)?;
        let inode = &mut self.inodes[id as usize];
        inode.mode = match inode.tag {
            // Linux has no other mode for symbolic links.
            Tag::Symlink => 0o777,
            _ => meta.mode,
        };
        inode.uid = meta.uid;
        inode.gid = meta.gid;
        (inode.seconds, inode.nanoseconds) = meta.mtime;
        inode.xattrs = set;
        Ok(())
    }

    /// Applies the header of a hard link to its inode, as containerd and Docker do: they
    /// create the link, then apply the header. Extended attributes are added to the
    /// existing ones, except that a change of owner removes the file's capabilities.
    fn relabel(&mut self, id: InodeId, link: &Entry<'_>) -> Result<(), Reason> {
        let set = self.inodes[id as usize].xattrs;
        let old = self.xattrs.get(set);
        if old.bytes().is_empty() {
            return self.set_meta(id, &link.meta, link.xattrs);
        }
        // Each of many links of a file may have thousands of attributes.
        let bytes = old.bytes().len() + link.xattrs.bytes().len();
        let count = old.iter().count() + link.xattrs.iter().count();
        self.step(count + bytes / BYTES_PER_STEP)?;
        let old = self.xattrs.get(set).iter();
        let mut all: BTreeMap<_, _> = old.filter(|(name, _)| *name != CAPABILITY).collect();
        all.extend(link.xattrs.iter());
        let all = all.into_iter();
        let all: Vec<_> = all.map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
        check_xattrs(&all)?;
        let all = encode_xattrs(&all).ok_or("an extended attribute is too long")?;
        self.set_meta(id, &link.meta, Xattrs::encoded(&all))
    }

    fn link_target(&mut self, target: &[u8]) -> Result<InodeId, Reason> {
        let (parent, name) = split(target);
        let id = self
            .walk(parent, false)?
            .and_then(|parent| self.child(parent, name))
            .ok_or("it is a hard link to a path that does not exist")?;
        if self.inodes[id as usize].tag == Tag::Directory {
            return Err("it is a hard link to a directory".into());
        }
        Ok(id)
    }

    fn hash(&self, parent: InodeId, name: &[u8]) -> u64 {
        self.hasher.hash_one((parent, name))
    }

    fn find(&self, parent: InodeId, name: &[u8]) -> Option<DirentId> {
        self.by_name
            .find(self.hash(parent, name), |id| {
                let dirent = &self.dirents[*id as usize];
                dirent.parent == parent && self.arena.get(dirent.name) == name
            })
            .copied()
    }

    fn child(&self, parent: InodeId, name: &[u8]) -> Option<InodeId> {
        self.find(parent, name)
            .map(|id| self.dirents[id as usize].inode)
            .filter(|inode| *inode != NONE)
    }

    /// Gives an inode a name, which may have belonged to another one.
    fn insert(
        &mut self,
        parent: InodeId,
        name: &[u8],
        inode: InodeId,
        unpacked: u32,
    ) -> Result<(), Reason> {
        if self.inodes[inode as usize].tag == Tag::Directory {
            // A directory has one name.
            self.inodes[inode as usize].b = parent.into();
        }
        if let Some(known) = self.find(parent, name) {
            let dirent = &mut self.dirents[known as usize];
            dirent.inode = inode;
            // A name for which the layer had an entry keeps its mark, even after a marker
            // removed the entry: containerd also decides by names.
            if unpacked != IMPLIED {
                dirent.unpacked = unpacked;
            }
            return Ok(());
        }
        let most = self.limits.entries;
        let id = u32::try_from(self.dirents.len())
            .ok()
            .filter(|id| (*id as usize) < most)
            .ok_or_else(|| exceeded(format!("the image has more than {most} names")))?;
        let text = self.arena.add(name, self.limits.names_bytes)?;
        self.dirents.push(Dirent {
            name: text,
            parent,
            inode,
            next: self.first_entry(parent),
            unpacked,
        });
        self.set_first_entry(parent, id);
        let hash = self.hash(parent, name);
        let Self {
            by_name,
            dirents,
            arena,
            hasher,
            ..
        } = self;
        by_name.insert_unique(hash, id, |id| {
            let dirent = &dirents[*id as usize];
            hasher.hash_one((dirent.parent, arena.get(dirent.name)))
        });
        Ok(())
    }

    /// Removes a name, if it exists. The row remains for a later entry with the name, so
    /// that a layer can remove any number of names.
    fn unlink(&mut self, parent: InodeId, name: &[u8]) {
        if let Some(id) = self.find(parent, name) {
            self.dirents[id as usize].inode = NONE;
        }
    }

    fn first_entry(&self, directory: InodeId) -> DirentId {
        let inode = &self.inodes[directory as usize];
        match inode.tag {
            Tag::Directory => u32::try_from(inode.a).unwrap_or(NONE),
            _ => NONE,
        }
    }

    fn set_first_entry(&mut self, directory: InodeId, first: DirentId) {
        self.inodes[directory as usize].a = first.into();
    }
}

/// Accessors for writing the disk.
impl Tree {
    /// Returns the number of inodes, including unreferenced ones.
    pub(crate) fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    pub(crate) fn kind(&self, id: InodeId) -> Kind {
        self.inodes[id as usize].kind()
    }

    pub(crate) fn meta(&self, id: InodeId) -> Meta {
        let inode = &self.inodes[id as usize];
        Meta {
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            mtime: (inode.seconds, inode.nanoseconds),
        }
    }

    /// Returns the number of an inode's set of extended attributes.
    pub(crate) fn xattr_set(&self, id: InodeId) -> u32 {
        self.inodes[id as usize].xattrs
    }

    /// Returns the extended attributes in the set with this number.
    pub(crate) fn xattrs(&self, set: u32) -> Xattrs<'_> {
        self.xattrs.get(set)
    }

    /// Returns the number of sets.
    pub(crate) fn xattr_sets(&self) -> usize {
        self.xattrs.count()
    }

    pub(crate) fn text(&self, text: Text) -> &[u8] {
        self.arena.get(text)
    }

    /// Returns the parent of a directory. The root is its own parent.
    pub(crate) fn parent(&self, directory: InodeId) -> InodeId {
        u32::try_from(self.inodes[directory as usize].b).unwrap_or(ROOT)
    }

    /// Appends the names and inodes of a directory to `children`, sorted by bytes.
    pub(crate) fn children(&self, directory: InodeId, children: &mut Vec<(Text, InodeId)>) {
        let begin = children.len();
        let mut at = self.first_entry(directory);
        while at != NONE {
            let entry = &self.dirents[at as usize];
            if entry.inode != NONE {
                children.push((entry.name, entry.inode));
            }
            at = entry.next;
        }
        if let Some(new) = children.get_mut(begin..) {
            new.sort_unstable_by(|a, b| self.arena.get(a.0).cmp(self.arena.get(b.0)));
        }
    }
}

impl Inode {
    fn of(kind: Kind) -> Self {
        let (tag, layer, a, b) = match kind {
            Kind::Directory => (Tag::Directory, 0, NONE.into(), 0),
            Kind::File {
                layer,
                location,
                size,
            } => match location {
                ContentLocation::Blob(at) => (Tag::BlobFile, layer, at, size),
                ContentLocation::Small(at) => (Tag::SmallFile, layer, at, size),
            },
            Kind::Symlink(target) => (Tag::Symlink, 0, target.pack(), 0),
            Kind::CharDevice(major, minor) => (Tag::CharDevice, 0, major.into(), minor.into()),
            Kind::BlockDevice(major, minor) => (Tag::BlockDevice, 0, major.into(), minor.into()),
            Kind::Fifo => (Tag::Fifo, 0, 0, 0),
        };
        Self {
            seconds: 0,
            a,
            b,
            nanoseconds: 0,
            uid: 0,
            gid: 0,
            xattrs: 0,
            // The default for a directory that only the paths of other entries imply.
            mode: 0o755,
            layer,
            tag,
        }
    }

    fn kind(&self) -> Kind {
        // Devices were created from numbers of this size.
        let number = |value: u64| u32::try_from(value).unwrap_or(0);
        let device = (number(self.a), number(self.b));
        match self.tag {
            Tag::Directory => Kind::Directory,
            Tag::BlobFile => Kind::File {
                layer: self.layer,
                location: ContentLocation::Blob(self.a),
                size: self.b,
            },
            Tag::SmallFile => Kind::File {
                layer: self.layer,
                location: ContentLocation::Small(self.a),
                size: self.b,
            },
            Tag::Symlink => Kind::Symlink(Text::unpack(self.a)),
            Tag::CharDevice => Kind::CharDevice(device.0, device.1),
            Tag::BlockDevice => Kind::BlockDevice(device.0, device.1),
            Tag::Fifo => Kind::Fifo,
        }
    }
}

/// The mark of names that only the paths of other entries imply.
const IMPLIED: u32 = 0;

/// Returns the mark of names for which `layer` has entries.
fn unpacked_mark(layer: u16) -> u32 {
    u32::from(layer) + 1
}

/// Returns the reason of refusing an image that exceeds a limit.
fn exceeded(text: impl Into<String>) -> Reason {
    Cause::new(ErrorKind::LimitExceeded, text)
}

fn refused(entry: &Entry<'_>, reason: Reason) -> Refused {
    Refused::Entry {
        path: entry.path.to_vec(),
        reason,
    }
}

/// Splits a path into parent and name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
