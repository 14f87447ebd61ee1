//! Listing directories: OPENDIR, READDIR, READDIRPLUS.
//!
//! Positions in a directory are those of the host, so the server remembers none. An entry
//! that cannot be examined is listed without attributes, never left out.

use std::sync::Arc;

use rustix::fs::{FileType, RawDir};
use rustix::io::Errno;
use zerocopy::IntoBytes as _;

use super::{Answer, Server};
use crate::abi::{self, Dirent, EntryOut, flag, linux};
use crate::config::CacheMode;
use crate::directories::Directory;
use crate::handles::Handle;
use crate::nodes::NodeIndex;

/// Maximum length of a reply in bytes, whatever the guest requests.
const MAX_LISTING: usize = 128 << 10;
/// Bounds of the buffer for getdents(2) in bytes. The least holds an entry of any name.
const MIN_BUFFER: usize = 1 << 10;
const MAX_BUFFER: usize = 32 << 10;

impl Server {
    pub(super) fn opendir(&mut self, node: NodeIndex) -> Result<Answer, Errno> {
        if !self.handles.has_room() {
            return Err(Errno::NFILE);
        }
        let mut open_flags = 0;
        let directory = if self.is_synthetic(node) {
            None
        } else {
            let directory = self.directory(node)?;
            // A directory that may only be searched has a descriptor that cannot be read.
            if rustix::fs::fcntl_getfl(&*directory)?.contains(rustix::fs::OFlags::PATH) {
                return Err(Errno::ACCESS);
            }
            if self.share_of(node)?.options.cache == CacheMode::Exclusive {
                open_flags = flag::FOPEN_CACHE_DIR | flag::FOPEN_KEEP_CACHE;
            }
            Some(directory)
        };
        let id = self.nodes.id(node);
        let fh = self.handles.insert(id, Handle::Directory(directory))?;
        Ok(self.put(abi::OpenOut {
            fh,
            open_flags,
            padding: 0,
        }))
    }

    pub(super) fn readdir(
        &mut self,
        node: NodeIndex,
        args: &abi::ReadIn,
        plus: bool,
        space: usize,
    ) -> Result<Answer, Errno> {
        let size = usize::try_from(args.size).map_err(|_| Errno::INVAL)?;
        let space = size.min(space).min(MAX_LISTING);
        let directory = match self.handles.get(args.fh, self.nodes.id(node))? {
            Handle::Directory(directory) => directory.clone(),
            Handle::File { .. } => return Err(Errno::NOTDIR),
            Handle::Lost => return Err(Errno::IO),
        };
        match directory {
            Some(directory) => self.list(node, &directory, args.offset, plus, space)?,
            None => self.list_synthetic(node, args.offset, plus, space)?,
        }
        Ok(Answer::Reply)
    }

    fn list(
        &mut self,
        node: NodeIndex,
        directory: &Arc<Directory>,
        offset: u64,
        plus: bool,
        space: usize,
    ) -> Result<(), Errno> {
        directory.seek(offset)?;
        // As many entries as the reply holds, so that few are read again.
        let expected = if plus { space / 4 } else { space };
        let mut listed = std::mem::take(&mut self.listed);
        listed.clear();
        listed.reserve_exact(MAX_BUFFER);
        let buffer = listed.spare_capacity_mut();
        let len = expected.clamp(MIN_BUFFER, MAX_BUFFER).min(buffer.len());
        let mut entries = RawDir::new(&**directory, &mut buffer[..len]);
        let mut position = Some(offset);
        let result = loop {
            let entry = match entries.next() {
                None => break Ok(()),
                Some(Err(errno)) => break Err(errno),
                Some(Ok(entry)) => entry,
            };
            let name = entry.file_name();
            let next = entry.next_entry_cookie();
            if !fits(self.reply.len(), name.to_bytes(), plus, space) {
                position = None;
                break Ok(());
            }
            // Without a node, the guest looks an entry up when it uses it.
            let looks_up = plus && !self.nodes.is_crowded();
            let known = if looks_up && !matches!(name.to_bytes(), b"." | b"..") {
                self.find_entry(node, directory, name).unwrap_or_default()
            } else {
                EntryOut::default()
            };
            let number = if known.nodeid != 0 {
                known.attr.ino
            } else {
                entry.ino()
            };
            let dirent = Dirent {
                ino: number,
                off: next,
                namelen: 0,
                kind: kind(entry.file_type()),
            };
            append(
                &mut self.reply,
                plus.then_some(known),
                dirent,
                name.to_bytes(),
            );
            position = Some(next);
        };
        directory.set_position(position);
        self.listed = listed;
        // An error after some entries is repeated by the next request.
        if self.reply.is_empty() {
            result?;
        }
        Ok(())
    }

    /// Lists the root of all shares, or the entry of a share of one file.
    fn list_synthetic(
        &mut self,
        node: NodeIndex,
        offset: u64,
        plus: bool,
        space: usize,
    ) -> Result<(), Errno> {
        let directory = linux::S_IFDIR >> 12;
        let mut names: Vec<(Vec<u8>, u32)> =
            vec![(b".".to_vec(), directory), (b"..".to_vec(), directory)];
        if node == NodeIndex::ROOT {
            let shares = self.shares.iter();
            names.extend(shares.map(|share| (share.name.as_bytes().to_vec(), directory)));
        } else if let Some(file) = &self.share_of(node)?.file {
            names.push((file.as_bytes().to_vec(), linux::S_IFREG >> 12));
        }
        let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
        for (off, (name, kind)) in (1..).zip(&names).skip(skipped) {
            if !fits(self.reply.len(), name, plus, space) {
                break;
            }
            let dirent = Dirent {
                ino: Self::synthetic_attr().ino,
                off,
                namelen: 0,
                kind: *kind,
            };
            // Without a node, so that the guest looks entries up when it uses them.
            append(&mut self.reply, plus.then(EntryOut::default), dirent, name);
        }
        Ok(())
    }
}

/// Returns the length of an entry in a reply.
fn length(name: &[u8], plus: bool) -> usize {
    let attributes = if plus { size_of::<EntryOut>() } else { 0 };
    attributes + (size_of::<Dirent>() + name.len()).next_multiple_of(8)
}

/// Returns true if an entry fits into a reply of `space` bytes, of which `used` are used.
fn fits(used: usize, name: &[u8], plus: bool, space: usize) -> bool {
    used + length(name, plus) <= space
}

fn append(reply: &mut Vec<u8>, known: Option<EntryOut>, mut dirent: Dirent, name: &[u8]) {
    if let Some(known) = known {
        reply.extend_from_slice(known.as_bytes());
    }
    // Names of directory entries have at most 255 bytes.
    dirent.namelen = u32::try_from(name.len()).unwrap_or(0);
    reply.extend_from_slice(dirent.as_bytes());
    reply.extend_from_slice(name);
    reply.resize(reply.len().next_multiple_of(8), 0);
}

/// Returns the type of an entry, as in the upper bits of `mode`.
fn kind(file_type: FileType) -> u32 {
    match file_type {
        FileType::Unknown => 0,
        known => (known.as_raw_mode() & linux::S_IFMT) >> 12,
    }
}
