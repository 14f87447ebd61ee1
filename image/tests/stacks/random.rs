//! Random stacks of layers, determined by their seeds.

use std::fmt::Write as _;

use crate::support::{Entry, dir, entry, file, hardlink, symlink, whiteout};

/// First time of directories' entries.
pub(crate) const DIRECTORY_TIMES: u64 = 1_000_000_000;
/// First time of all other entries.
pub(crate) const FILE_TIMES: u64 = 1_100_000_000;
/// Extended attributes: name and value. Before Linux 6.6, tmpfs does not support `user.`;
/// containerd ignores those of `trusted.` in images.
const XATTRS: [(&str, &[u8]); 4] = [
    ("security.sm-a", b"one"),
    ("security.sm-a", b"two"),
    ("security.sm-b", b"three"),
    // `cap_net_raw=ep`, version 2 (linux/capability.h, `vfs_cap_data`).
    (
        "security.capability",
        b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    ),
];

/// The SplitMix64 generator, whose sequence depends only on the seed.
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

    fn choose<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        let at = usize::try_from(self.below(of.len() as u64)).unwrap();
        &of[at]
    }
}

pub(crate) type Layer = Vec<Entry>;

/// The stack under construction, and the paths used so far.
struct Maker {
    random: Random,
    /// Paths and types of the entries so far, including hidden ones.
    known: Vec<(String, u8)>,
    /// Also generate features that the first seeds, of which some are kept, do not have.
    wide: bool,
}

impl Maker {
    fn name(&mut self) -> &'static str {
        self.random.choose::<&str>(&["a", "b", "c", "d"])
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

    /// Returns a path whose parents may be directories, links or missing, and rarely
    /// files, which cannot have children.
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
        let ways = if self.wide { 11 } else { 8 };
        match self.random.below(ways) {
            0 => format!("/{known}"),
            1 => format!("../{known}"),
            2 => "..".to_owned(),
            3 => "/".to_owned(),
            4 => ".".to_owned(),
            5 => format!("../../{known}"),
            8 => format!("{}/../{known}", self.name()),
            9 => format!("/{known}/./{}/..", self.name()),
            10 => format!("{known}//{}", self.name()),
            _ => known,
        }
    }

    /// Adds one entry, or several that belong together.
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
            // A link that becomes a directory, in the form that overlayfs produces.
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

/// Returns true if an entry is a whiteout or an opaque marker.
pub(crate) fn is_marker(entry: &Entry) -> bool {
    let path = String::from_utf8_lossy(&entry.path);
    path.rsplit('/')
        .next()
        .is_some_and(|name| name.starts_with(".wh."))
}

/// Returns the path of the whiteout of a path.
pub(crate) fn hidden(path: &str) -> String {
    match path.rsplit_once('/') {
        Some((parent, name)) => format!("{parent}/.wh.{name}"),
        None => format!(".wh.{path}"),
    }
}

/// Generates two to five layers with a few entries each.
pub(crate) fn stack(seed: u64) -> Vec<Layer> {
    let mut maker = Maker {
        random: Random(seed.wrapping_mul(0x2545_f491_4f6c_dd1d)),
        known: Vec::new(),
        wide: seed >= 300,
    };
    let layers = 2 + maker.random.below(4);
    let mut count = 0;
    let mut layers: Vec<Layer> = (0..layers)
        .map(|number| {
            let mut layer = Vec::new();
            for _ in 0..1 + maker.random.below(if number == 0 { 12 } else { 6 }) {
                count += 1;
                maker.entries(count, number == 0, &mut layer);
            }
            layer
        })
        .collect();
    // A separate generator leaves the entries themselves unchanged.
    attributes(Random(!seed), &mut layers);
    layers
}

/// Gives entries owners, times, unusual modes and extended attributes.
fn attributes(mut random: Random, layers: &mut [Layer]) {
    for (entry, number) in layers.iter_mut().flatten().zip(0..) {
        let directory = entry.kind == b'5';
        entry.mtime = number
            + if directory {
                DIRECTORY_TIMES
            } else {
                FILE_TIMES
            };
        if random.one_in(3) {
            entry.owner = (1000 + random.below(2), 2000 + random.below(2));
        }
        if random.one_in(4) {
            entry.mode = *random.choose(&[0o4755, 0o2711, 0o1777, 0, 0o600]);
        }
        // For directories, containerd keeps the attributes of lower layers with the
        // native snapshotter, and drops them with overlayfs.
        if matches!(entry.kind, b'0' | b'1') && random.one_in(4) {
            let (name, value) = random.choose(&XATTRS);
            *entry = entry.clone().pax(&format!("SCHILY.xattr.{name}"), value);
        }
    }
}

/// Describes a stack that fails.
pub(crate) fn describe(stack: &[Layer]) -> String {
    let mut text = String::new();
    for (number, layer) in stack.iter().enumerate() {
        let _ = writeln!(text, "  layer {number}:");
        for entry in layer {
            let path = String::from_utf8_lossy(&entry.path);
            let link = String::from_utf8_lossy(&entry.link);
            let what = match entry.kind {
                b'0' => format!("file {path}"),
                b'1' => format!("hard link {path} => {link}"),
                b'2' => format!("symlink {path} -> {link}"),
                b'5' => format!("directory {path}"),
                kind => format!("type {} {path} {:?}", char::from(kind), entry.device),
            };
            let (mode, owner, time) = (entry.mode, entry.owner, entry.mtime);
            let _ = write!(text, "    {what}: {mode:o} {owner:?} {time}");
            for (name, value) in &entry.pax {
                let _ = write!(text, " {name}={}", String::from_utf8_lossy(value));
            }
            text.push('\n');
        }
    }
    text
}
