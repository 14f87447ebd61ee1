//! Random stacks of layers become what containerd and umoci make of them.
//!
//! Every stack is converted and its disk mounted, applied by containerd's applier
//! (on a containerd of the test's own, with its native snapshotter) and unpacked by
//! `umoci`; the three trees are compared entry by entry. Where the two references
//! differ from each other, containerd is right, and [`umoci_differs`] must know the
//! class.
//!
//! Needs `containerd`, `umoci`, `erofs-utils` and root (`cargo xtask test` installs
//! the tools); left out only where `SM_IMAGE_NO_MOUNT=1` says so. `SM_TEST_STACKS=N`
//! sets the number of stacks, `SM_TEST_FULL` makes it 20,000, `SM_TEST_SEED=N` tries
//! one seed only.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use sm_image::{Compression, Config, LayoutBuilder, PullOptions, Reference, Store};
use support::{Entry, dir, entry, file, hardlink, symlink, tar, whiteout};

/// Stacks in an ordinary run.
const STACKS: u64 = 300;
/// Stacks where time does not matter.
const STACKS_FULL: u64 = 20_000;
/// Stacks between two starts of containerd, whose store only grows.
const BATCH: usize = 500;
/// Seeds that have found something once. They are tried first.
const KEPT: &[u64] = &[3, 9, 22, 23, 59, 74, 158, 189, 201, 205, 206];

// ---- Making stacks ----

/// SplitMix64: the same stacks everywhere, by their seeds.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        let at = usize::try_from(self.below(of.len() as u64)).unwrap();
        of[at]
    }
}

type Layer = Vec<Entry>;

/// What is being made, and what it has spoken of so far.
struct Maker {
    random: Random,
    /// Paths and types of the entries so far, however deep they are hidden.
    known: Vec<(String, u8)>,
}

impl Maker {
    fn name(&mut self) -> &'static str {
        self.random.pick(&["a", "b", "c", "d"])
    }

    fn known(&mut self, wanted: impl Fn(u8) -> bool) -> Option<String> {
        let fitting: Vec<_> = self
            .known
            .iter()
            .filter(|(_, kind)| wanted(*kind))
            .collect();
        let len = u64::try_from(fitting.len()).unwrap();
        if len == 0 {
            return None;
        }
        let at = usize::try_from(self.random.below(len)).unwrap();
        Some(fitting[at].0.clone())
    }

    /// A path whose parents may be directories, links or nothing, and rarely files,
    /// below which there can be nothing.
    fn path(&mut self) -> String {
        match self.random.below(8) {
            0 | 1 => self.fresh(),
            2 => {
                let parent = self.known(|kind| kind == b'2');
                match parent {
                    Some(parent) => format!("{parent}/{}", self.name()),
                    None => self.fresh(),
                }
            }
            3 | 4 => {
                let parent = self.known(|kind| kind == b'5' || kind == b'2');
                match parent {
                    Some(parent) => format!("{parent}/{}", self.name()),
                    None => self.fresh(),
                }
            }
            _ => self.known(|_| true).unwrap_or_else(|| self.fresh()),
        }
    }

    fn fresh(&mut self) -> String {
        let depth = 1 + self.random.below(3);
        let names: Vec<_> = (0..depth).map(|_| self.name()).collect();
        let path = names.join("/");
        let below_a_file = self.known.iter().any(|(file, kind)| {
            !matches!(kind, b'2' | b'5')
                && path
                    .strip_prefix(file.as_str())
                    .is_some_and(|rest| rest.starts_with('/'))
        });
        match below_a_file && !self.random.one_in(10) {
            true => self.name().to_owned(),
            false => path,
        }
    }

    fn target(&mut self) -> String {
        let known = self.path();
        match self.random.below(8) {
            0 => format!("/{known}"),
            1 => format!("../{known}"),
            2 => "..".to_owned(),
            3 => "/".to_owned(),
            4 => ".".to_owned(),
            5 => format!("../../{known}"),
            _ => known,
        }
    }

    /// One entry, or some that belong together.
    fn entries(&mut self, count: u32, lowest: bool, layer: &mut Layer) {
        let at = self.path();
        let opaque = |at: &str| whiteout(&format!("{at}/.wh..wh..opq"));
        let mut add = |kind, entry| {
            self.known.push((at.clone(), kind));
            layer.push(entry);
        };
        match self.random.below(if lowest { 9 } else { 20 }) {
            0..=2 => {
                let data = count.to_string();
                add(b'0', file(&at, data));
            }
            3 | 4 => add(b'5', dir(format!("{at}/")).mode(0o700 + count % 8)),
            5 | 6 => {
                let target = self.target();
                self.known.push((at.clone(), b'2'));
                layer.push(symlink(&at, target));
            }
            7 => {
                let target = self
                    .known(|kind| kind != b'5')
                    .unwrap_or_else(|| self.fresh());
                if target == at && !self.random.one_in(20) {
                    return;
                }
                self.known.push((at.clone(), b'1'));
                layer.push(hardlink(&at, target));
            }
            8 => match self.random.below(3) {
                0 => add(b'3', entry(&at, b'3').device(1, 3)),
                1 => add(b'4', entry(&at, b'4').device(259, 70_000)),
                _ => add(b'6', entry(&at, b'6')),
            },
            9..=11 => layer.push(whiteout(&hidden(&at))),
            12 => layer.push(opaque(&at)),
            13 => {
                add(b'5', dir(format!("{at}/")));
                layer.push(opaque(&at));
                layer.push(file(format!("{at}/{}", self.name()), b"after"));
            }
            14 => {
                add(b'5', dir(format!("{at}/")));
                layer.push(file(format!("{at}/{}", self.name()), b"before"));
                layer.push(opaque(&at));
            }
            15 => {
                layer.push(opaque(&at));
                layer.push(dir(format!("{at}/")));
                self.known.push((at, b'5'));
            }
            // A link that becomes a directory, as overlayfs has it told.
            16..=18 => {
                let Some(link) = self.known(|kind| kind == b'2') else {
                    return;
                };
                layer.push(dir(format!("{link}/")));
                match self.random.below(3) {
                    0 => layer.push(whiteout(&format!("{link}/.wh.{}", self.name()))),
                    _ => layer.push(opaque(&link)),
                }
                layer.push(file(format!("{link}/{}", self.name()), b"new"));
                self.known.push((link, b'5'));
            }
            _ => {
                layer.push(whiteout(&hidden(&at)));
                self.known.push((at.clone(), b'0'));
                layer.push(file(&at, b"again"));
            }
        }
    }
}

fn hidden(path: &str) -> String {
    match path.rsplit_once('/') {
        Some((parent, name)) => format!("{parent}/.wh.{name}"),
        None => format!(".wh.{path}"),
    }
}

/// Two to five layers of few entries.
fn stack(seed: u64) -> Vec<Layer> {
    let mut maker = Maker {
        random: Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d)),
        known: Vec::new(),
    };
    let layers = 2 + maker.random.below(4);
    let mut count = 0;
    (0..layers)
        .map(|number| {
            let mut layer = Vec::new();
            for _ in 0..1 + maker.random.below(if number == 0 { 12 } else { 6 }) {
                count += 1;
                maker.entries(count, number == 0, &mut layer);
            }
            layer
        })
        .collect()
}

/// How a stack is spoken of when it fails.
fn describe(stack: &[Layer]) -> String {
    let mut text = String::new();
    for (number, layer) in stack.iter().enumerate() {
        let _ = writeln!(text, "  layer {number}:");
        for entry in layer {
            let path = String::from_utf8_lossy(&entry.path);
            let link = String::from_utf8_lossy(&entry.link);
            let what = match entry.kind {
                b'0' => format!("file {path} {:o}", entry.mode),
                b'1' => format!("hard link {path} => {link}"),
                b'2' => format!("symlink {path} -> {link}"),
                b'5' => format!("directory {path} {:o}", entry.mode),
                kind => format!("type {} {path} {:?}", char::from(kind), entry.device),
            };
            let _ = writeln!(text, "    {what}");
        }
    }
    text
}

// ---- Trees ----

/// What there is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    device: Option<u64>,
    contents: Option<Vec<u8>>,
    target: Option<PathBuf>,
    /// First path of the same inode.
    same_as: PathBuf,
}

type Tree = BTreeMap<PathBuf, Seen>;

fn tree(root: &Path) -> Tree {
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
        let entry = Seen {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            device: device.then(|| meta.rdev()),
            contents: meta.is_file().then(|| fs::read(&path).unwrap()),
            target: fs::read_link(&path).ok(),
            same_as: same_as.clone(),
        };
        seen.insert(relative, entry);
    }
    seen
}

fn line(path: &Path, seen: &Seen) -> String {
    let contents = seen
        .contents
        .as_ref()
        .map(|data| String::from_utf8_lossy(data).into_owned());
    let mut text = format!("/{} {:o}", path.display(), seen.mode);
    if let Some(contents) = contents {
        let _ = write!(text, " {contents:?}");
    }
    if let Some(target) = &seen.target {
        let _ = write!(text, " -> {}", target.display());
    }
    if let Some(device) = seen.device {
        let _ = write!(text, " device {device:#x}");
    }
    if seen.same_as != path {
        let _ = write!(text, " = /{}", seen.same_as.display());
    }
    text
}

/// Lines with `-` of what only `theirs` has, with `+` of what only `ours` has.
fn difference(ours: &Tree, theirs: &Tree) -> String {
    let mut text = String::new();
    for (path, seen) in theirs {
        if ours.get(path) != Some(seen) {
            let _ = writeln!(text, "    - {}", line(path, seen));
        }
    }
    for (path, seen) in ours {
        if theirs.get(path) != Some(seen) {
            let _ = writeln!(text, "    + {}", line(path, seen));
        }
    }
    text
}

// ---- Those that are compared ----

fn output(command: &mut Command) -> Result<String, String> {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?} is needed by this test: {error}"));
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(said.lines().next_back().unwrap_or_default().to_owned())
        }
    }
}

/// What a program in a guest would see.
fn ours(layout: &Path, work: &Path) -> Result<Tree, String> {
    let store = Store::open(&work.join("store")).unwrap();
    let reference = Reference::parse(&format!("oci:{}:latest", layout.display())).unwrap();
    let image = store
        .open_image(&reference, &PullOptions::default())
        .map_err(|error| error.to_string())?;
    let path = work.join("disk.erofs");
    let mut disk = File::create(&path).unwrap();
    for segment in &image.segments {
        io::copy(&mut segment.open().unwrap(), &mut disk).unwrap();
    }
    let at = work.join("mnt");
    fs::create_dir(&at).unwrap();
    let mount = ["-t", "erofs", "-o", "loop,ro"];
    output(Command::new("mount").args(mount).arg(&path).arg(&at)).unwrap();
    let tree = tree(&at);
    output(Command::new("umount").arg(&at)).unwrap();
    Ok(tree)
}

fn umoci(layout: &Path, work: &Path) -> Result<Tree, String> {
    let bundle = work.join("bundle");
    let image = format!("{}:latest", layout.display());
    output(
        Command::new("umoci")
            .args(["unpack", "--image", &image])
            .arg(&bundle),
    )?;
    Ok(tree(&bundle.join("rootfs")))
}

/// A containerd of our own.
struct Containerd {
    directory: tempfile::TempDir,
    process: Child,
}

impl Containerd {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().display();
        let config = format!(
            "version = 2\nroot = '{at}/root'\nstate = '{at}/state'\n\
             disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.internal.v1.opt', \
             'io.containerd.internal.v1.tracing', 'io.containerd.snapshotter.v1.btrfs', \
             'io.containerd.snapshotter.v1.devmapper']\n\
             [grpc]\naddress = '{at}/socket'\n[ttrpc]\naddress = '{at}/socket.ttrpc'\n"
        );
        let path = directory.path().join("config.toml");
        fs::write(&path, config).unwrap();
        let mut process = Command::new("containerd")
            .arg("--config")
            .arg(&path)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("containerd is needed by this test");
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut said = String::new();
        loop {
            let line = lines
                .next()
                .unwrap_or_else(|| panic!("containerd did not start: {said}"))
                .unwrap();
            said.push_str(&line);
            said.push('\n');
            if line.contains("containerd successfully booted") {
                break;
            }
        }
        // Whoever does not read what it says stops it in the end.
        thread::spawn(move || lines.for_each(drop));
        Self { directory, process }
    }

    /// Its tree of the image in this layout; `marker` is a file of the last layer that
    /// no other image has.
    fn unpack(&self, layout: &Path, marker: &str, work: &Path) -> Result<Tree, String> {
        let archive = work.join("layout.tar");
        let mut builder = tar::Builder::new(File::create(&archive).unwrap());
        builder.append_dir_all(".", layout).unwrap();
        builder.finish().unwrap();
        output(
            Command::new("ctr")
                .arg("--address")
                .arg(self.directory.path().join("socket"))
                .args([
                    "images",
                    "import",
                    "--snapshotter",
                    "native",
                    "--base-name",
                    marker,
                ])
                .arg(&archive),
        )?;
        let snapshots = self
            .directory
            .path()
            .join("root/io.containerd.snapshotter.v1.native/snapshots");
        let found = fs::read_dir(&snapshots)
            .unwrap()
            .map(|child| child.unwrap().path())
            .find(|path| path.join(marker).exists());
        Ok(tree(&found.unwrap_or_else(|| {
            panic!("containerd has no snapshot with {marker}")
        })))
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

// ---- Comparing ----

/// Stacks that containerd and we refuse.
static REFUSED: AtomicU64 = AtomicU64::new(0);
/// Stacks that only containerd refuses, for a reason that [`containerds_own`] names.
static REFUSED_ALONE: AtomicU64 = AtomicU64::new(0);
static NEXT: AtomicU64 = AtomicU64::new(0);

/// What became of a stack.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Verdict {
    /// Names the kind of difference; all of one name are taken for the same.
    class: &'static str,
    details: String,
}

/// The same stack with each marker before what its own layer has at or below the path
/// that it hides. By the specification (OCI image-spec layer.md, "Whiteouts") that is
/// the same; containerd takes away what a layer has put there before.
fn markers_first(stack: &[Layer]) -> Vec<Layer> {
    let mut stack = stack.to_vec();
    for layer in &mut stack {
        for at in 0..layer.len() {
            let path = String::from_utf8(layer[at].path.clone()).unwrap();
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
            let Some(name) = name.strip_prefix(".wh.") else {
                continue;
            };
            let below = match (name, parent) {
                (".wh..opq", parent) => format!("{parent}/"),
                (name, "") => format!("{name}/"),
                (name, parent) => format!("{parent}/{name}/"),
            };
            let hidden = |entry: &Entry| {
                let mut path = entry.path.clone();
                if path.last() != Some(&b'/') {
                    path.push(b'/');
                }
                path.starts_with(below.as_bytes())
                    && (name != ".wh..opq" || path != below.as_bytes())
            };
            if let Some(first) = layer[..at].iter().position(hidden) {
                let marker = layer.remove(at);
                layer.insert(first, marker);
            }
        }
    }
    stack
}

fn compare(containerd: &Containerd, stack: &[Layer]) -> Option<Verdict> {
    let verdict = compare_as_is(containerd, stack)?;
    if !verdict.class.starts_with("umoci") {
        return Some(verdict);
    }
    // Unlike containerd, umoci keeps what a layer has hidden of its own.
    let sorted = markers_first(stack);
    let moved = describe(&sorted) != describe(stack);
    match moved && compare_as_is(containerd, &sorted).is_none() {
        true => None,
        false => Some(verdict),
    }
}

/// The stack without the entries that we refuse, which would be the end of it.
fn repaired(stack: &[Layer]) -> Vec<Layer> {
    let mut stack = stack.to_vec();
    for _ in 0..40 {
        let work = tempfile::tempdir().unwrap();
        let layout = work.path().join("layout");
        image(&layout, &stack, "marker");
        let store = Store::open(&work.path().join("store")).unwrap();
        let reference = Reference::parse(&format!("oci:{}:latest", layout.display())).unwrap();
        let Err(error) = store.open_image(&reference, &PullOptions::default()) else {
            break;
        };
        let error = error.to_string();
        let refused = error
            .split_once("entry \"")
            .and_then(|(_, rest)| rest.split_once('"'))
            .unwrap_or_else(|| panic!("no entry is named: {error}"))
            .0
            .trim_end_matches('/');
        let (mut hidden, mut opaque) = (hidden(refused), format!("{refused}/.wh..wh..opq"));
        hidden.push('/');
        opaque.push('/');
        let named = |entry: &Entry| {
            let mut path = String::from_utf8(entry.path.clone()).unwrap();
            if !path.ends_with('/') {
                path.push('/');
            }
            path.trim_end_matches('/') == refused || path == hidden || path == opaque
        };
        let before: usize = stack.iter().map(Vec::len).sum();
        // It is the highest layer with it that can be spared first.
        for layer in stack.iter_mut().rev() {
            let len = layer.len();
            if let Some(at) = layer.iter().rposition(named) {
                layer.remove(at);
            }
            if layer.len() < len {
                break;
            }
        }
        let after: usize = stack.iter().map(Vec::len).sum();
        assert!(after < before, "{refused} is not in the stack: {error}");
    }
    stack
}

/// Writes the layout of a stack; `marker` is a file of its last layer.
fn image(layout: &Path, stack: &[Layer], marker: &str) {
    let mut builder = LayoutBuilder::new(layout, Compression::None).unwrap();
    for (number, layer) in stack.iter().enumerate() {
        let mut layer = layer.clone();
        if number + 1 == stack.len() {
            layer.push(file(marker, b""));
        }
        builder.layer(tar(&layer).as_slice()).unwrap();
    }
    builder.finish("latest", Config::default()).unwrap();
}

fn compare_as_is(containerd: &Containerd, stack: &[Layer]) -> Option<Verdict> {
    let work = tempfile::tempdir().unwrap();
    let marker = format!("stack-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let layout = work.path().join("layout");
    image(&layout, stack, &marker);
    let ours = ours(&layout, work.path());
    let theirs = containerd.unpack(&layout, &marker, work.path());
    let verdict = |class, details: String| Some(Verdict { class, details });
    let theirs = match (ours, theirs) {
        (Ok(ours), Ok(theirs)) if ours == theirs => theirs,
        (Ok(ours), Ok(theirs)) if known_difference(&ours, &theirs) => return None,
        (Ok(ours), Ok(theirs)) => {
            return verdict("another tree than containerd's", difference(&ours, &theirs));
        }
        (Err(_), Err(_)) => {
            REFUSED.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        (Ok(_), Err(error)) if containerds_own(&error).is_some() => {
            REFUSED_ALONE.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        (Ok(_), Err(error)) => return verdict("containerd refuses it", error),
        (Err(error), Ok(_)) => return verdict("only we refuse it", error),
    };
    match umoci(&layout, work.path()) {
        Ok(tree) if tree == theirs => None,
        Ok(tree) => {
            if umoci_differs(&tree, &theirs).is_some() {
                return None;
            }
            verdict(
                "umoci has another tree than both",
                difference(&tree, &theirs),
            )
        }
        // It refuses a way along links that never ends, which the others make.
        Err(error) if error.contains("SecureJoin") => None,
        Err(error) => verdict("umoci refuses it", error),
    }
}

/// Why only containerd refuses a stack, if the reason is a known one.
fn containerds_own(error: &str) -> Option<&'static str> {
    if error.contains("failed call to UtimesNanoAt")
        || error.contains(": lstat ") && !error.contains("root path")
        || error.contains(": too many links")
    {
        // It sets the times of a layer's directories in the end, by their paths.
        return Some("a directory of the layer is gone at the end of the layer");
    }
    if (error.contains("mkparent") || error.contains("root path"))
        && error.contains("not a directory")
    {
        return Some("there is something to hide below a file, where there is nothing");
    }
    if error.contains("root path") && error.contains("too many levels of symbolic links") {
        return Some("there is something to hide below links that lead to themselves");
    }
    let words: Vec<_> = error.split_whitespace().collect();
    words
        .windows(3)
        .any(|words| {
            words[0] == "link" && {
                let to = words[2].trim_end_matches(':');
                Path::new(words[1]).starts_with(to)
            }
        })
        .then_some("a hard link to itself or to what is below it: it has removed that by then")
}

fn known_difference(ours: &Tree, theirs: &Tree) -> bool {
    // The native snapshotter's copies keep the hard links of regular files only.
    let files = |tree: &Tree| -> Tree {
        let seen = tree.iter().map(|(path, seen)| {
            let mut seen = seen.clone();
            if seen.contents.is_none() {
                seen.same_as.clone_from(path);
            }
            (path.clone(), seen)
        });
        seen.collect()
    };
    files(ours) == files(theirs)
}

/// The class of a difference between umoci and containerd, if it is a known one.
fn umoci_differs(umoci: &Tree, containerd: &Tree) -> Option<&'static str> {
    let left = containerd.iter().filter(|(path, seen)| {
        umoci.contains_key(*path) || seen.mode != 0o40755 || seen.owner != (0, 0)
    });
    left.eq(umoci.iter())
        .then_some("it makes no directories on the way to what is hidden")
}

/// Leaves out of a stack what its verdict does not need.
fn shrink(containerd: &Containerd, stack: &[Layer], verdict: Verdict) -> (Vec<Layer>, Verdict) {
    let mut least = (stack.to_vec(), verdict);
    let mut again = true;
    while again {
        again = false;
        for number in (0..least.0.len()).rev() {
            let mut without = Vec::new();
            if least.0.len() > 1 {
                let mut less = least.0.clone();
                less.remove(number);
                without.push(less);
            }
            for at in (0..least.0[number].len()).rev() {
                let mut less = least.0.clone();
                less[number].remove(at);
                without.push(less);
            }
            for less in without {
                let found = compare(containerd, &less).filter(|found| found.class == least.1.class);
                if let Some(found) = found {
                    least = (less, found);
                    again = true;
                    break;
                }
            }
            if again {
                break;
            }
        }
    }
    least
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is a number")),
    )
}

fn seeds() -> Vec<u64> {
    if let Some(seed) = number("SM_TEST_SEED") {
        return vec![seed];
    }
    let full = std::env::var_os("SM_TEST_FULL").is_some();
    let count = number("SM_TEST_STACKS").unwrap_or(if full { STACKS_FULL } else { STACKS });
    let kept = KEPT.iter().copied();
    kept.chain(0..count).collect()
}

#[test]
fn random_stacks_become_what_containerd_makes_of_them() {
    if std::env::var_os("SM_IMAGE_NO_MOUNT").is_some() {
        eprintln!("not compared: SM_IMAGE_NO_MOUNT is set");
        return;
    }
    assert!(
        rustix::process::geteuid().is_root(),
        "mounting needs root; SM_IMAGE_NO_MOUNT=1 leaves it out"
    );
    let seeds = seeds();
    eprintln!("{} stacks", seeds.len());
    let failures = Mutex::new(Vec::new());
    for batch in seeds.chunks(BATCH) {
        let containerd = Containerd::start();
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(seed) = batch.get(next.fetch_add(1, Ordering::Relaxed)) {
                // Some are compared with what is wrong with them.
                let stack = match seed % 4 {
                    0 => stack(*seed),
                    _ => repaired(&stack(*seed)),
                };
                if let Some(verdict) = compare(&containerd, &stack) {
                    let (least, verdict) = shrink(&containerd, &stack, verdict);
                    let text = format!(
                        "seed {seed}: {}\n{}  (- theirs, + ours)\n{}",
                        verdict.class,
                        describe(&least),
                        verdict.details
                    );
                    eprintln!("{text}");
                    failures
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(text);
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(work);
            }
        });
    }
    eprintln!(
        "{} refused by containerd and by us, {} by containerd alone",
        REFUSED.load(Ordering::Relaxed),
        REFUSED_ALONE.load(Ordering::Relaxed)
    );
    let failures = failures
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    assert!(
        failures.is_empty(),
        "{} stacks differ:\n{}",
        failures.len(),
        failures.join("\n")
    );
}
