//! Lookup of directories by their paths, through symbolic links.

use super::{BYTES_PER_STEP, IMPLIED, InodeId, Kind, ROOT, Reason, Tree};

/// Maximum number of symbolic links followed to an entry's parent (as in Linux).
const MAX_LINKS: u32 = 40;
/// Maximum number of path components visited, including those of links.
const MAX_PARTS: u32 = 4096;
/// The set-group-ID bit.
const SETGID: u16 = 0o2000;

impl Tree {
    /// Returns the directory at `path`. Symbolic links are followed as if the tree were
    /// the whole file system: `..` of the root is the root. With `create`, missing
    /// directories are created; otherwise the result is `None` if there is no directory.
    /// The path `missing/..` creates no directory, as in containerd's and umoci's
    /// appliers.
    pub(super) fn walk(&mut self, path: &[u8], create: bool) -> Result<Option<InodeId>, Reason> {
        let mut trail = std::mem::take(&mut self.trail);
        trail.clear();
        trail.push(ROOT);
        let found = self.walk_on(path, create, &mut trail);
        self.trail = trail;
        found
    }

    fn walk_on(
        &mut self,
        path: &[u8],
        create: bool,
        trail: &mut Vec<InodeId>,
    ) -> Result<Option<InodeId>, Reason> {
        // Remaining path, once a link has been followed.
        let mut rewritten: Vec<u8>;
        let mut left = path;
        let (mut links, mut parts) = (0, 0);
        // Missing components after the trail. Those that a later `..` leaves again are
        // never created.
        let mut missing: Vec<Vec<u8>> = Vec::new();
        while !left.is_empty() {
            let (part, rest) = match left.iter().position(|byte| *byte == b'/') {
                Some(at) => (&left[..at], &left[at + 1..]),
                None => (left, &[][..]),
            };
            left = rest;
            parts += 1;
            self.step(1)?;
            if parts > MAX_PARTS {
                return Err("its path has too many components".into());
            }
            let here = trail.last().copied().unwrap_or(ROOT);
            match part {
                b"" | b"." => continue,
                b".." => {
                    if missing.pop().is_none() && trail.len() > 1 {
                        trail.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let child = match missing.is_empty() {
                true => self.child(here, part),
                false => None,
            };
            let Some(id) = child else {
                missing.push(part.to_vec());
                continue;
            };
            match self.kind(id) {
                Kind::Directory => trail.push(id),
                Kind::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        let text = "there are too many symbolic links in its path";
                        return Err(text.into());
                    }
                    let target = self.text(target);
                    if target.starts_with(b"/") {
                        trail.truncate(1);
                    }
                    rewritten = [target, b"/", left].concat();
                    // Copying counts as steps.
                    self.step(rewritten.len() / BYTES_PER_STEP)?;
                    left = &rewritten;
                }
                _ if create => return Err("its parent is not a directory".into()),
                _ => return Ok(None),
            }
        }
        if !create && !missing.is_empty() {
            return Ok(None);
        }
        for name in &missing {
            let parent = trail.last().copied().unwrap_or(ROOT);
            let id = self.new_inode(Kind::Directory)?;
            self.insert(parent, name, id, IMPLIED)?;
            self.inherit_group(id, parent);
            trail.push(id);
        }
        Ok(trail.last().copied())
    }

    /// Gives a new directory the group of a parent with the set-group-ID bit, as Linux
    /// does (inode(7)), but not the bit itself, which containerd resets.
    fn inherit_group(&mut self, id: InodeId, parent: InodeId) {
        let parent = self.inodes[parent as usize];
        if parent.mode & SETGID != 0 {
            self.inodes[id as usize].gid = parent.gid;
        }
    }
}
