//! Comparison of the results of all three appliers, and classification of differences.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::containerd::Containerd;
use crate::others::{Bench, Disk, OurRefusal};
use crate::random::{self, Layer};
use crate::straight::straight;
use crate::support;
use crate::tree::{self, Tree};

/// Layers, and their tar streams.
#[derive(Clone, Debug)]
pub(crate) struct Stack {
    pub(crate) layers: Vec<Layer>,
    pub(crate) tars: Vec<Vec<u8>>,
}

impl Stack {
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        let tars = layers.iter().map(|layer| support::tar(layer)).collect();
        Self { layers, tars }
    }

    /// Returns the stack without one entry of a layer.
    fn without(&self, layer: usize, entry: usize) -> Self {
        let mut layers = self.layers.clone();
        layers[layer].remove(entry);
        Self::new(layers)
    }

    /// Returns the lowest `count` layers.
    fn lowest(&self, count: usize) -> Self {
        Self {
            layers: self.layers[..count].to_vec(),
            tars: self.tars[..count].to_vec(),
        }
    }
}

/// The layer that was refused, and the reason.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub(crate) layer: usize,
    pub(crate) text: String,
}

/// Outcome of comparing a stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All three results are equal.
    Same,
    /// Containerd and this crate refuse the same layer.
    Refused,
    /// A difference of a known class.
    Known(&'static str),
    /// Only containerd refuses a directory that does not exist at the end of its layer.
    /// The values are the numbers of layer and entry.
    Gone(usize, usize),
    Different(Verdict),
}

/// A difference of no known class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Name of the kind of difference; differences with equal names are considered equal.
    pub(crate) class: &'static str,
    pub(crate) details: String,
}

const OTHER_TREE: &str = "another tree than containerd's";

/// Returns the stack without the cause of a class of differences, if it has that cause.
type Variant = fn(&Appliers, &Stack, &Verdict) -> Option<Stack>;

const VARIANTS: [(Variant, &str); 5] = [
    (
        // Containerd decides by the names that a layer has unpacked (archive/tar.go,
        // `unpackedPaths`), this crate by the entries: an entry whose parent a marker has
        // removed is forgotten.
        |_, stack, verdict| {
            let implied = |line: &str| {
                let line = line.trim_start();
                line.starts_with("- ") && line.contains(" 40755 (0, 0)")
            };
            let theirs = verdict.class == OTHER_TREE && verdict.details.lines().all(implied);
            let split = theirs.then(|| split(&stack.layers))?;
            changed(stack, split)
        },
        "containerd keeps an implied directory with the name of an entry that a marker hid",
    ),
    (
        // As in the kernel, by which Docker resolves all paths.
        |_, stack, _| changed(stack, cleaned(&stack.layers)),
        "containerd takes `..` behind a link or file in a target by its text, we as the kernel",
    ),
    (
        // Containerd looks for `a/b` below the target of the link `a`, and treats the
        // result as a link at that path (continuity fs/path.go, `walkLinks`).
        |appliers, stack, verdict| {
            let containerd = !verdict.class.starts_with("umoci");
            let ours = containerd.then(|| appliers.ours(stack)).flatten()?;
            let umoci = appliers.bench.umoci().ok()?;
            if !but_for_implied(&ours, &umoci) {
                return None;
            }
            changed(stack, straight(appliers, stack)?.layers)
        },
        "containerd follows a link behind a link from the wrong place, umoci as we do",
    ),
    (
        |_, stack, verdict| {
            let umoci = verdict.class.starts_with("umoci");
            let split = umoci.then(|| split(&stack.layers))?;
            changed(stack, split)
        },
        // By the specification (OCI image-spec layer.md, "Whiteouts"), markers hide
        // contents of lower layers. Containerd also removes earlier entries of the
        // marker's own layer.
        "umoci keeps what a layer has hidden of its own",
    ),
    (
        |_, stack, verdict| {
            let umoci = verdict.class.starts_with("umoci");
            let plain = umoci.then(|| plain(&split(&stack.layers)))?;
            changed(stack, plain)
        },
        "umoci leaves a file as it is when a hard link's header says otherwise",
    ),
];

fn changed(stack: &Stack, layers: Vec<Layer>) -> Option<Stack> {
    let changed = Stack::new(layers);
    (changed.tars != stack.tars).then_some(changed)
}

/// The three appliers, with a directory of their own.
pub(crate) struct Appliers {
    directory: PathBuf,
    containerd: Containerd,
    disk: Disk,
    bench: Bench,
}

impl Appliers {
    pub(crate) fn start(directory: &Path) -> Self {
        let containerd = directory.join("containerd");
        fs::create_dir_all(&containerd).unwrap();
        Self {
            directory: directory.to_owned(),
            containerd: Containerd::start(&containerd),
            disk: Disk::new(directory),
            bench: Bench::new(&directory.join("bench")),
        }
    }

    /// Starts again with an empty store, which otherwise only grows.
    pub(crate) fn clear(&mut self) {
        let work = self.directory.join("bench");
        fs::remove_dir_all(&work).unwrap();
        self.bench = Bench::new(&work);
    }

    /// Returns the outcomes of these stacks. A directory that only containerd refuses is
    /// left out of its stack.
    pub(crate) fn compare(&self, stacks: &[Stack]) -> Vec<Outcome> {
        let mut outcomes = self.compare_once(stacks);
        let mut stacks = stacks.to_vec();
        loop {
            let mut again = Vec::new();
            for (number, (stack, outcome)) in stacks.iter_mut().zip(&outcomes).enumerate() {
                if let Outcome::Gone(layer, at) = outcome {
                    *stack = stack.without(*layer, *at);
                    again.push(number);
                }
            }
            if again.is_empty() {
                return outcomes;
            }
            let less: Vec<_> = again.iter().map(|number| stacks[*number].clone()).collect();
            for (number, outcome) in again.into_iter().zip(self.compare_once(&less)) {
                outcomes[number] = outcome;
            }
        }
    }

    fn compare_once(&self, stacks: &[Stack]) -> Vec<Outcome> {
        let mut outcomes = self.compare_all(stacks);
        let mut stacks = stacks.to_vec();
        // Some differences disappear together with their known cause. Where another one
        // appears instead, the stack has two causes, and the next is looked for in what is
        // left of it.
        for (variant, class) in VARIANTS {
            let mut again = Vec::new();
            for (number, outcome) in outcomes.iter().enumerate() {
                if let Outcome::Different(verdict) = outcome {
                    let stack = variant(self, &stacks[number], verdict);
                    again.extend(stack.map(|stack| (number, stack)));
                }
            }
            if again.is_empty() {
                continue;
            }
            let (numbers, again): (Vec<_>, Vec<_>) = again.into_iter().unzip();
            let compared = self.compare_all(&again);
            for ((number, stack), outcome) in numbers.into_iter().zip(again).zip(compared) {
                match (&outcome, &outcomes[number]) {
                    (Outcome::Different(new), Outcome::Different(old)) => {
                        if new.class != old.class {
                            (stacks[number], outcomes[number]) = (stack, outcome);
                        }
                    }
                    _ => outcomes[number] = Outcome::Known(class),
                }
            }
        }
        outcomes
    }

    fn compare_all(&self, stacks: &[Stack]) -> Vec<Outcome> {
        let theirs = self.containerd.apply(stacks, &self.bench.work);
        let pairs = stacks.iter().zip(theirs);
        pairs
            .map(|(stack, theirs)| {
                self.bench.write(stack);
                let ours = self.bench.ours(stack, &self.disk);
                self.judge(stack, ours, theirs)
            })
            .collect()
    }

    /// Prepares a stack for comparison: unchanged, or without the entries that this crate
    /// refuses, which would end the comparison. Links that lead to themselves through
    /// growing paths are removed in both cases, because containerd takes seconds to
    /// refuse them.
    pub(crate) fn prepared(&self, layers: Vec<Layer>, as_it_is: bool) -> Stack {
        let mut stack = Stack::new(layers);
        loop {
            self.bench.write(&stack);
            match self.bench.accepted(&stack) {
                Ok(()) => break,
                Err(refused) if as_it_is && !refused.by_links() => return stack,
                Err(refused) => stack = without(&stack, &refused),
            }
        }
        let mut layer = 0;
        while let Some(entries) = stack.layers.get(layer) {
            let directory = entries.iter().position(|entry| entry.kind == b'5');
            let link = entries.iter().rposition(|entry| entry.kind == b'2');
            let gone = (directory.is_some() && directory < link)
                .then(|| self.gone(&stack, layer))
                .flatten();
            match gone {
                Some(entry) => stack = stack.without(layer, entry),
                None => layer += 1,
            }
        }
        stack
    }

    fn judge(
        &self,
        stack: &Stack,
        ours: Result<Tree, OurRefusal>,
        theirs: Result<Tree, Refusal>,
    ) -> Outcome {
        let different = |class, details: String| Outcome::Different(Verdict { class, details });
        match (ours, theirs) {
            (Ok(ours), Ok(theirs)) => {
                let difference = tree::difference(&ours, &theirs);
                if !difference.is_empty() {
                    return different(OTHER_TREE, difference);
                }
                self.judge_umoci(&theirs)
            }
            (Err(ours), Err(theirs))
                if stack.tars[ours.refusal.layer] == stack.tars[theirs.layer] =>
            {
                Outcome::Refused
            }
            (Err(ours), Err(theirs)) if ours.refusal.layer < theirs.layer => {
                different("only we refuse a layer", ours.refusal.text)
            }
            (_, Err(theirs)) => match self.gone(stack, theirs.layer) {
                Some(entry) => Outcome::Gone(theirs.layer, entry),
                None => different("containerd refuses a layer", theirs.text),
            },
            (Err(ours), Ok(_)) => different("only we refuse it", ours.refusal.text),
        }
    }

    fn judge_umoci(&self, theirs: &Tree) -> Outcome {
        let different = |class, details: String| Outcome::Different(Verdict { class, details });
        match self.bench.umoci() {
            Ok(tree) => {
                let difference = tree::difference(&tree, theirs);
                if difference.is_empty() {
                    return Outcome::Same;
                }
                match but_for_implied(theirs, &tree) {
                    true => Outcome::Known(
                        "umoci makes directories without entries not for markers, and with set-group-ID",
                    ),
                    false => different("umoci has another tree than both", difference),
                }
            }
            Err(error) if error.contains("SecureJoin") => {
                Outcome::Known("umoci refuses a way along links that never ends")
            }
            Err(error) => different("umoci refuses it", error),
        }
    }

    /// Returns the tree that this crate produces, unless it refuses the stack.
    pub(crate) fn ours(&self, stack: &Stack) -> Option<Tree> {
        self.bench.write(stack);
        self.bench.ours(stack, &self.disk).ok()
    }

    /// Returns a directory of a layer that does not exist at its end. Containerd refuses
    /// it, because it sets the times of a layer's directories last, by their paths
    /// (containerd archive/tar.go, `applyNaive`).
    fn gone(&self, stack: &Stack, layer: usize) -> Option<usize> {
        let tree = self.ours(&stack.lowest(layer + 1))?;
        stack.layers[layer].iter().position(|entry| {
            let path = String::from_utf8_lossy(&entry.path);
            entry.kind == b'5' && tree::resolve(&tree, &path).is_none()
        })
    }
}

/// Returns the stack without the refused entry.
fn without(stack: &Stack, refused: &OurRefusal) -> Stack {
    let entry = refused.entry.trim_end_matches('/');
    let markers = [random::hidden(entry), format!("{entry}/.wh..wh..opq")];
    let layer = refused.refusal.layer;
    let at = stack.layers[layer].iter().rposition(|candidate| {
        let path = String::from_utf8_lossy(&candidate.path);
        let path = path.trim_end_matches('/');
        path == entry
            || markers
                .iter()
                .any(|marker| marker.trim_start_matches('/') == path)
    });
    let at = at.unwrap_or_else(|| panic!("not in its layer: {}", refused.refusal.text));
    stack.without(layer, at)
}

/// Returns true if umoci's tree is containerd's except for directories without their own
/// entry.
fn but_for_implied(containerd: &Tree, umoci: &Tree) -> bool {
    let left: Tree = containerd
        .iter()
        .filter_map(|(path, seen)| match umoci.get(path) {
            Some(other) if seen.implied() && other.implied() => Some((path, other)),
            None if seen.implied() => None,
            _ => Some((path, seen)),
        })
        .map(|(path, seen)| (path.clone(), seen.clone()))
        .collect();
    tree::difference(umoci, &left).is_empty()
}

/// Returns the stack with a separate layer for the entries before each marker.
fn split(layers: &[Layer]) -> Vec<Layer> {
    let mut made: Vec<Layer> = Vec::new();
    for layer in layers {
        made.push(Layer::new());
        for entry in layer {
            let last = made.last_mut().unwrap();
            match random::is_marker(entry) && !last.iter().all(random::is_marker) {
                true => made.push(vec![entry.clone()]),
                false => last.push(entry.clone()),
            }
        }
    }
    made
}

/// Removes every `name/..` from the targets of links where `name` is that of an entry
/// other than a directory: the kernel cannot resolve `..` through a file.
fn cleaned(layers: &[Layer]) -> Vec<Layer> {
    let others = |entry: &&support::Entry| entry.kind != b'5';
    let names: BTreeSet<String> = layers
        .iter()
        .flatten()
        .filter(others)
        .filter_map(|entry| {
            let path = String::from_utf8_lossy(&entry.path);
            path.rsplit('/').next().map(str::to_owned)
        })
        .collect();
    let mut layers = layers.to_vec();
    for entry in layers.iter_mut().flatten() {
        if entry.kind == b'2' {
            let target = String::from_utf8_lossy(&entry.link).into_owned();
            entry.link = clean(&target, &names).into_bytes();
        }
    }
    layers
}

fn clean(target: &str, names: &BTreeSet<String>) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in target.split('/').filter(|part| !matches!(*part, "" | ".")) {
        match parts.last() {
            Some(last) if part == ".." && names.contains(*last) => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    match (target.starts_with('/'), parts.as_slice()) {
        (true, parts) => format!("/{}", parts.join("/")),
        (false, []) => ".".to_owned(),
        (false, parts) => parts.join("/"),
    }
}

/// Returns the stack with equal attributes for all entries except directories.
fn plain(layers: &[Layer]) -> Vec<Layer> {
    let mut layers = layers.to_vec();
    for entry in layers.iter_mut().flatten() {
        if entry.kind != b'5' {
            let same = support::entry("", entry.kind);
            entry.mode = same.mode;
            entry.owner = same.owner;
            entry.mtime = random::FILE_TIMES;
            entry.pax.clear();
        }
    }
    layers
}

/// Removes everything from a stack that its verdict does not depend on.
pub(crate) fn shrink(appliers: &Appliers, stack: &Stack, verdict: Verdict) -> (Stack, Verdict) {
    let mut least = (stack.clone(), verdict);
    loop {
        let mut smaller = Vec::new();
        for (number, layer) in least.0.layers.iter().enumerate() {
            if least.0.layers.len() > 1 {
                let mut layers = least.0.layers.clone();
                layers.remove(number);
                smaller.push(Stack::new(layers));
            }
            for at in 0..layer.len() {
                smaller.push(least.0.without(number, at));
            }
        }
        let outcomes = appliers.compare(&smaller);
        let found = smaller
            .into_iter()
            .zip(outcomes)
            .find_map(|(stack, outcome)| match outcome {
                Outcome::Different(found) if found.class == least.1.class => Some((stack, found)),
                _ => None,
            });
        match found {
            Some(found) => least = found,
            None => return least,
        }
    }
}

/// Counts of each outcome.
#[derive(Default)]
pub(crate) struct Tally(BTreeMap<&'static str, u64>);

impl Tally {
    pub(crate) fn count(&mut self, outcome: &Outcome) {
        let class = match outcome {
            Outcome::Same => "the same tree of all three",
            Outcome::Refused => "refused by containerd and by us",
            Outcome::Known(class) => class,
            Outcome::Gone(..) => "refused by containerd alone",
            Outcome::Different(_) => "different",
        };
        *self.0.entry(class).or_default() += 1;
    }

    pub(crate) fn lines(&self) -> String {
        self.0
            .iter()
            .map(|(class, count)| format!("  {count:6} {class}\n"))
            .collect()
    }
}
