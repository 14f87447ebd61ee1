//! File trees, read from directories.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Component, Path, PathBuf};

use crate::random::{DIRECTORY_TIMES, FILE_TIMES};

/// The file at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    mode: u32,
    owner: (u32, u32),
    /// Time from the entry; `None` if the file was changed later.
    time: Option<u64>,
    xattrs: Vec<(String, Vec<u8>)>,
    device: Option<u64>,
    contents: Option<Vec<u8>>,
    target: Option<PathBuf>,
    /// First path of the same inode.
    same_as: PathBuf,
}

impl Seen {
    fn is_directory(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }

    /// Returns true if the file looks like a directory that only the paths of other
    /// entries imply, whose group may come from its parent.
    pub(crate) fn implied(&self) -> bool {
        self.mode & !0o2000 == 0o40755 && self.owner.0 == 0 && self.time.is_none()
    }

    fn is(&self, theirs: &Self) -> bool {
        let ours = Self {
            time: theirs.time,
            ..self.clone()
        };
        ours == *theirs && self.has_time_of(theirs)
    }

    /// Compares times. An applier changes the times of directories by its operations in
    /// them, and containerd sets a directory's time on the file at its path at the end of
    /// the layer.
    fn has_time_of(&self, theirs: &Self) -> bool {
        let set_later = |time: u64| times(DIRECTORY_TIMES).contains(&time);
        self.time == theirs.time || self.is_directory() || theirs.time.is_some_and(set_later)
    }
}

pub(crate) type Tree = BTreeMap<PathBuf, Seen>;

/// Range of the times of entries.
fn times(first: u64) -> Range<u64> {
    first..first + 1_000_000
}

pub(crate) fn read(root: &Path) -> Tree {
    let mut seen = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let path = root.join(&relative);
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            let children = fs::read_dir(&path).unwrap();
            let mut children: Vec<_> = children
                .map(|child| relative.join(child.unwrap().file_name()))
                .collect();
            children.sort_by(|a, b| b.cmp(a));
            pending.extend(children);
        }
        let kind = meta.file_type();
        let device = kind.is_char_device() || kind.is_block_device();
        let same_as = inodes.entry(meta.ino()).or_insert_with(|| relative.clone());
        let time = u64::try_from(meta.mtime()).unwrap();
        let stated = times(FILE_TIMES).contains(&time) || times(DIRECTORY_TIMES).contains(&time);
        let entry = Seen {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            time: stated.then_some(time),
            xattrs: xattrs(&path),
            device: device.then(|| meta.rdev()),
            contents: meta.is_file().then(|| fs::read(&path).unwrap()),
            target: fs::read_link(&path).ok(),
            same_as: same_as.clone(),
        };
        seen.insert(relative, entry);
    }
    seen
}

fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = [0; 4096];
    let len = rustix::fs::llistxattr(path, &mut names).unwrap();
    let names = names[..len].split(|byte| *byte == 0);
    let mut xattrs: Vec<_> = names
        .filter(|name| !name.is_empty())
        .map(|name| {
            let name = String::from_utf8_lossy(name).into_owned();
            let mut value = [0; 4096];
            let len = rustix::fs::lgetxattr(path, &name, &mut value).unwrap();
            (name, value[..len].to_vec())
        })
        .collect();
    xattrs.sort();
    xattrs
}

/// Resolves a path in a tree through links, if it exists.
pub(crate) fn resolve(tree: &Tree, path: &str) -> Option<PathBuf> {
    let mut at = PathBuf::new();
    let mut left: Vec<Component<'_>> = Path::new(path).components().rev().collect();
    let mut links = 0;
    while let Some(component) = left.pop() {
        match component {
            Component::ParentDir => {
                at.pop();
            }
            Component::Normal(name) => {
                let next = at.join(name);
                match &tree.get(&next)?.target {
                    None => at = next,
                    Some(target) => {
                        links += 1;
                        // The limit of containerd (continuity fs/path.go).
                        if links > 255 {
                            return None;
                        }
                        left.extend(target.components().rev());
                    }
                }
            }
            Component::RootDir => at = PathBuf::new(),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Some(at)
}

fn line(path: &Path, seen: &Seen) -> String {
    let contents = seen
        .contents
        .as_ref()
        .map(|data| String::from_utf8_lossy(data).into_owned());
    let mut text = format!("/{} {:o} {:?}", path.display(), seen.mode, seen.owner);
    if let Some(contents) = contents {
        let _ = write!(text, " {contents:?}");
    }
    if let Some(target) = &seen.target {
        let _ = write!(text, " -> {}", target.display());
    }
    if let Some(device) = seen.device {
        let _ = write!(text, " device {device:#x}");
    }
    if let Some(time) = seen.time {
        let _ = write!(text, " time {time}");
    }
    for (name, value) in &seen.xattrs {
        let _ = write!(text, " {name}={}", String::from_utf8_lossy(value));
    }
    if seen.same_as != path {
        let _ = write!(text, " = /{}", seen.same_as.display());
    }
    text
}

/// Returns lines with `-` for files of `theirs` only, and with `+` for files of `ours`
/// only.
pub(crate) fn difference(ours: &Tree, theirs: &Tree) -> String {
    let mut text = String::new();
    let same = |path: &PathBuf| match (ours.get(path), theirs.get(path)) {
        (Some(ours), Some(theirs)) => ours.is(theirs),
        _ => false,
    };
    for (path, seen) in theirs {
        if !same(path) {
            let _ = writeln!(text, "    - {}", line(path, seen));
        }
    }
    for (path, seen) in ours {
        if !same(path) {
            let _ = writeln!(text, "    + {}", line(path, seen));
        }
    }
    text
}
