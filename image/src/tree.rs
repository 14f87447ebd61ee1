//! The file system that a stack of layers makes: whiteouts, opaque directories,
//! replacement and hard links resolved (OCI image-spec layer.md).

use std::collections::BTreeMap;

use crate::layer::{Entry, EntryKind, LayerIndex, Meta};

/// Symbolic links followed on the way to an entry's parent.
const MAX_LINKS: u32 = 40;

/// Index of a node in [`Tree::nodes`].
pub(crate) type NodeId = usize;
/// The root's index.
pub(crate) const ROOT: NodeId = 0;

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NodeKind {
    Directory(BTreeMap<Vec<u8>, NodeId>),
    /// Contents at `offset` of the blob of layer number `layer`.
    File {
        layer: usize,
        offset: u64,
        size: u64,
    },
    Symlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// An inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) kind: NodeKind,
}

/// A file system. Nodes that nothing refers to any more stay in the vector.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    pub(crate) nodes: Vec<Node>,
}

fn directory() -> Node {
    Node {
        meta: Meta {
            mode: 0o755,
            ..Meta::default()
        },
        kind: NodeKind::Directory(BTreeMap::new()),
    }
}

/// Why an entry has no place; the entry's path and a clause.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Misplaced {
    pub(crate) path: Vec<u8>,
    pub(crate) reason: &'static str,
}

impl Tree {
    pub(crate) fn new() -> Self {
        Self {
            nodes: vec![directory()],
        }
    }

    /// Puts layer number `layer` on top.
    pub(crate) fn apply(&mut self, layer: usize, index: &LayerIndex) -> Result<(), Misplaced> {
        let misplaced = |entry: &Entry| {
            let path = entry.path.clone();
            move |reason| Misplaced { path, reason }
        };
        // A layer's whiteouts are about the layers below, wherever in the
        // layer they stand.
        for entry in &index.entries {
            match entry.kind {
                EntryKind::Whiteout => self.hide(&entry.path),
                EntryKind::Opaque => self.empty(&entry.path),
                _ => Ok(()),
            }
            .map_err(misplaced(entry))?;
        }
        for entry in &index.entries {
            if !matches!(entry.kind, EntryKind::Whiteout | EntryKind::Opaque) {
                self.add(layer, entry).map_err(misplaced(entry))?;
            }
        }
        Ok(())
    }

    fn hide(&mut self, path: &[u8]) -> Result<(), &'static str> {
        let (parent, name) = split(path);
        if let Some(parent) = self.walk(parent, false)?
            && let Some(children) = self.children_mut(parent)
        {
            children.remove(name);
        }
        Ok(())
    }

    fn empty(&mut self, path: &[u8]) -> Result<(), &'static str> {
        if let Some(directory) = self.walk(path, false)?
            && let Some(children) = self.children_mut(directory)
        {
            children.clear();
        }
        Ok(())
    }

    fn add(&mut self, layer: usize, entry: &Entry) -> Result<(), &'static str> {
        if entry.path.is_empty() {
            self.nodes[ROOT].meta = entry.meta.clone();
            return Ok(());
        }
        let (parent, name) = split(&entry.path);
        let parent = self
            .walk(parent, true)?
            .ok_or("its parent is not a directory")?;
        let existing = self.child(parent, name);
        let kind = match &entry.kind {
            EntryKind::Directory => {
                // A directory over a directory keeps what is in it.
                if let Some(id) = existing
                    && matches!(self.nodes[id].kind, NodeKind::Directory(_))
                {
                    self.nodes[id].meta = entry.meta.clone();
                    return Ok(());
                }
                NodeKind::Directory(BTreeMap::new())
            }
            EntryKind::Hardlink(target) => {
                let linked = self.link_target(target)?;
                return self.place(parent, name, linked);
            }
            EntryKind::File { offset, size } => NodeKind::File {
                layer,
                offset: *offset,
                size: *size,
            },
            EntryKind::Symlink(target) => NodeKind::Symlink(target.clone()),
            EntryKind::CharDevice(major, minor) => NodeKind::CharDevice(*major, *minor),
            EntryKind::BlockDevice(major, minor) => NodeKind::BlockDevice(*major, *minor),
            EntryKind::Fifo => NodeKind::Fifo,
            EntryKind::Whiteout | EntryKind::Opaque => return Ok(()),
        };
        let id = self.nodes.len();
        self.nodes.push(Node {
            meta: entry.meta.clone(),
            kind,
        });
        self.place(parent, name, id)
    }

    fn place(&mut self, parent: NodeId, name: &[u8], id: NodeId) -> Result<(), &'static str> {
        self.children_mut(parent)
            .ok_or("its parent is not a directory")?
            .insert(name.to_vec(), id);
        Ok(())
    }

    fn link_target(&mut self, target: &[u8]) -> Result<NodeId, &'static str> {
        let (parent, name) = split(target);
        let id = self
            .walk(parent, false)?
            .and_then(|parent| self.child(parent, name))
            .ok_or("it is a hard link to a path that does not exist")?;
        if matches!(self.nodes[id].kind, NodeKind::Directory(_)) {
            return Err("it is a hard link to a directory");
        }
        Ok(id)
    }

    fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.nodes[parent].kind {
            NodeKind::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn children_mut(&mut self, id: NodeId) -> Option<&mut BTreeMap<Vec<u8>, NodeId>> {
        match &mut self.nodes[id].kind {
            NodeKind::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// The directory at `path`, following symbolic links as if the tree were
    /// the whole file system: `..` of the root is the root. With `create`,
    /// missing directories are made; otherwise `None` if there is no directory.
    fn walk(&mut self, path: &[u8], create: bool) -> Result<Option<NodeId>, &'static str> {
        let mut trail = vec![ROOT];
        let mut left: Vec<Vec<u8>> = parts(path);
        let mut links = 0;
        while let Some(part) = left.pop() {
            let here = trail.last().copied().unwrap_or(ROOT);
            if part == b".." {
                if trail.len() > 1 {
                    trail.pop();
                }
                continue;
            }
            let Some(id) = self.child(here, &part) else {
                if !create {
                    return Ok(None);
                }
                let id = self.nodes.len();
                self.nodes.push(directory());
                self.place(here, &part, id)?;
                trail.push(id);
                continue;
            };
            match &self.nodes[id].kind {
                NodeKind::Directory(_) => trail.push(id),
                NodeKind::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err("there are too many symbolic links on the way to it");
                    }
                    if target.starts_with(b"/") {
                        trail.truncate(1);
                    }
                    left.extend(parts(target));
                }
                _ if create => return Err("its parent is not a directory"),
                _ => return Ok(None),
            }
        }
        Ok(trail.last().copied())
    }
}

/// Parent and name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

/// Components, the first one last.
fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .rev()
        .filter(|part| !matches!(*part, b"" | b"."))
        .map(<[u8]>::to_vec)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: EntryKind) -> Entry {
        Entry {
            path: path.into(),
            kind,
            meta: Meta {
                mode: 0o700,
                ..Meta::default()
            },
        }
    }

    fn file(path: &str) -> Entry {
        entry(path, EntryKind::File { offset: 0, size: 1 })
    }

    fn link(path: &str, target: &str) -> Entry {
        entry(path, EntryKind::Symlink(target.into()))
    }

    fn merge(layers: &[Vec<Entry>]) -> Result<Tree, Misplaced> {
        let mut tree = Tree::new();
        for (number, entries) in layers.iter().enumerate() {
            let index = LayerIndex {
                entries: entries.clone(),
                ..LayerIndex::default()
            };
            tree.apply(number, &index)?;
        }
        Ok(tree)
    }

    /// Paths of everything but directories, with the layer of files.
    fn paths(tree: &Tree) -> Vec<String> {
        fn visit(tree: &Tree, id: NodeId, path: &str, found: &mut Vec<String>) {
            match &tree.nodes[id].kind {
                NodeKind::Directory(children) => {
                    for (name, child) in children {
                        let name = String::from_utf8_lossy(name);
                        visit(tree, *child, &format!("{path}/{name}"), found);
                    }
                }
                NodeKind::File { layer, .. } => found.push(format!("{path}@{layer}")),
                _ => found.push(path.to_owned()),
            }
        }
        let mut found = Vec::new();
        visit(tree, ROOT, "", &mut found);
        found
    }

    #[test]
    fn whiteouts_hide_lower_layers_only() {
        let tree = merge(&[
            vec![file("a"), file("d/b"), file("d/c")],
            vec![
                file("a"),
                entry("a", EntryKind::Whiteout),
                entry("d/b", EntryKind::Whiteout),
            ],
        ])
        .unwrap();
        assert_eq!(paths(&tree), ["/a@1", "/d/c@0"]);
    }

    #[test]
    fn opaque_directories_lose_what_is_below() {
        let tree = merge(&[
            vec![file("d/a"), file("d/e/b")],
            vec![file("d/new"), entry("d", EntryKind::Opaque)],
        ])
        .unwrap();
        assert_eq!(paths(&tree), ["/d/new@1"]);
    }

    #[test]
    fn a_directory_keeps_its_entries_and_gets_new_metadata() {
        let tree = merge(&[vec![file("d/a")], vec![entry("d", EntryKind::Directory)]]).unwrap();
        assert_eq!(paths(&tree), ["/d/a@0"]);
        let id = tree.child(ROOT, b"d").unwrap();
        assert_eq!(tree.nodes[id].meta.mode, 0o700);
    }

    #[test]
    fn a_file_replaces_a_tree_and_the_reverse() {
        let tree = merge(&[vec![file("d/a"), file("f")], vec![file("d"), file("f2")]]).unwrap();
        assert_eq!(paths(&tree), ["/d@1", "/f@0", "/f2@1"]);
        let error = merge(&[vec![file("f"), file("f/a")]]).unwrap_err();
        assert_eq!(error.reason, "its parent is not a directory");
    }

    #[test]
    fn parents_are_found_through_links_that_cannot_leave() {
        let tree = merge(&[
            vec![link("lib", "usr/lib"), link("out", "../../..//etc")],
            vec![file("lib/a"), file("out/passwd")],
        ])
        .unwrap();
        assert_eq!(
            paths(&tree),
            ["/etc/passwd@1", "/lib", "/out", "/usr/lib/a@1"]
        );
        let error = merge(&[vec![link("a", "b"), link("b", "a"), file("a/x")]]).unwrap_err();
        assert!(error.reason.contains("too many symbolic links"));
    }

    #[test]
    fn hard_links_share_an_inode_across_layers() {
        let linked = |path: &str, target: &str| entry(path, EntryKind::Hardlink(target.into()));
        let tree = merge(&[vec![file("a")], vec![linked("b", "a")]]).unwrap();
        assert_eq!(tree.child(ROOT, b"a"), tree.child(ROOT, b"b"));
        for target in ["nothing", "d"] {
            let layer = vec![entry("d", EntryKind::Directory), linked("b", target)];
            assert!(merge(&[layer]).is_err());
        }
    }
}
