//! Circles of modules, which are siblings that use each other directly or indirectly, and
//! modules that must use nothing outside of themselves, because they will become crates.
//!
//! A module and its descendants count as one; a child may use its parent. Uses by tests
//! do not count.

use std::collections::{BTreeMap, BTreeSet};

use super::{RepositoryFile, lines};

/// Path of a module in its crate; that of the root is empty.
type ModulePath = Vec<String>;
/// Uses between the children of a module, by name.
type Uses = BTreeMap<String, BTreeSet<String>>;

/// Returns the circles that are not in `list`, and lines of it that are no circles any
/// more. A line is a crate's folder, a colon, and the modules of a circle.
pub(super) fn check(files: &[RepositoryFile], list: &str) -> Vec<String> {
    let found = circles(files);
    let known: BTreeSet<&str> = lines(list).collect();
    let mut faults: Vec<String> = known
        .iter()
        .filter(|line| !found.contains(**line))
        .map(|line| format!("circles.txt: this is no circle any more: {line}"))
        .collect();
    faults.extend(
        found
            .iter()
            .filter(|circle| !known.contains(circle.as_str()))
            .map(|circle| format!("modules use each other in a circle: {circle}")),
    );
    faults
}

/// Returns uses that leave a module of `list`. A line is a crate's folder, a colon, and a
/// module.
pub(super) fn check_sealed(files: &[RepositoryFile], list: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for line in lines(list) {
        let (folder, sealed) = line.split_once(": ").unwrap_or((line, ""));
        let module: ModulePath = sealed.split("::").map(str::to_owned).collect();
        let sources = sources(files, folder);
        if !sources.contains_key(&module) {
            faults.push(format!("sealed.txt: there is no such module: {line}"));
        }
        for (from, text) in sources.iter().filter(|(from, _)| from.starts_with(&module)) {
            let targets = targets(text, from, &sources);
            for to in targets.iter().filter(|to| !to.starts_with(&module)) {
                let (from, to) = (from.join("::"), to.join("::"));
                faults.push(format!(
                    "{folder}: {from} uses crate::{to}, and {sealed} is to use nothing outside of it"
                ));
            }
        }
    }
    faults
}

/// Returns the modules of the crate in `folder`, with their texts.
fn sources<'t>(files: &'t [RepositoryFile], folder: &str) -> BTreeMap<ModulePath, &'t str> {
    files
        .iter()
        .filter_map(|file| Some((module(&file.path, folder)?, file.text.as_str())))
        .collect()
}

fn circles(files: &[RepositoryFile]) -> BTreeSet<String> {
    let crates = files
        .iter()
        .filter_map(|file| file.path.strip_suffix("/Cargo.toml"));
    let mut circles = BTreeSet::new();
    for folder in crates {
        for (parent, uses) in uses(&sources(files, folder)) {
            for circle in strongly_connected(&uses) {
                let names: Vec<String> = circle
                    .iter()
                    .map(|name| {
                        [&parent[..], std::slice::from_ref(name)]
                            .concat()
                            .join("::")
                    })
                    .collect();
                circles.insert(format!("{folder}: {}", names.join(" ")));
            }
        }
    }
    circles
}

/// Returns the module of a file of the crate in `folder`; `None` for files of others, and
/// for tests.
fn module(path: &str, folder: &str) -> Option<ModulePath> {
    let path = path.strip_prefix(folder)?.strip_prefix("/src/")?;
    let path = path.strip_suffix(".rs")?;
    let mut module: ModulePath = path.split('/').map(str::to_owned).collect();
    // Programs have roots of their own and share no module with the library.
    if module
        .last()
        .is_some_and(|name| matches!(name.as_str(), "mod" | "lib" | "main"))
    {
        module.pop();
    }
    (!module.iter().any(|name| name == "tests")).then_some(module)
}

/// Returns, for each module, the uses between its children.
fn uses(sources: &BTreeMap<ModulePath, &str>) -> BTreeMap<ModulePath, Uses> {
    let mut all: BTreeMap<ModulePath, Uses> = BTreeMap::new();
    for (module, text) in sources {
        for target in targets(text, module, sources) {
            let shared = module
                .iter()
                .zip(&target)
                .take_while(|(a, b)| a == b)
                .count();
            // Otherwise one of the modules is an ancestor of the other.
            if let (Some(from), Some(to)) = (module.get(shared), target.get(shared)) {
                let parent = module[..shared].to_vec();
                let uses = all.entry(parent).or_default();
                uses.entry(from.clone()).or_default().insert(to.clone());
            }
        }
    }
    all
}

/// Returns the modules that the text of `module` names by `crate::` and `super::`.
fn targets(
    text: &str,
    module: &ModulePath,
    sources: &BTreeMap<ModulePath, &str>,
) -> BTreeSet<ModulePath> {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let code: String = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect();
    let code: String = code.chars().filter(|c| !c.is_whitespace()).collect();
    let mut targets = BTreeSet::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            // Of several `super`, the first one is followed.
            if code[..at].ends_with("super::") || ends_with_word(&code[..at]) {
                continue;
            }
            let mut paths = Vec::new();
            tree(&code[at..], &mut Vec::new(), &mut paths);
            for path in paths {
                targets.extend(resolve(&path, module, sources));
            }
        }
    }
    targets
}

/// Returns true if a path after `text` would be the end of a longer word. (Blanks were
/// removed, so words that may precede a path do not count.)
fn ends_with_word(text: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let before = text.trim_end_matches(word).len();
    let last = &text[before..];
    text.ends_with('$')
        || (!last.is_empty()
            && !["use", "in", "dyn", "mut", "impl", "return", "as"]
                .iter()
                .any(|keyword| last.ends_with(keyword)))
}

/// Reads a path, and all paths of a `use` tree; returns the rest of the text.
fn tree<'t>(text: &'t str, before: &mut Vec<&'t str>, paths: &mut Vec<Vec<&'t str>>) -> &'t str {
    let len = before.len();
    let mut rest = text;
    loop {
        let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
        let (name, after) = rest.split_at(end.unwrap_or(rest.len()));
        before.push(name);
        let Some(after) = after.strip_prefix("::") else {
            paths.push(before.clone());
            rest = after;
            break;
        };
        if let Some(mut inner) = after.strip_prefix('{') {
            while !inner.starts_with('}') && !inner.is_empty() {
                let after = tree(inner, before, paths);
                let skipped = after.find([',', '}']).unwrap_or(after.len());
                inner = &after[skipped..];
                inner = inner.strip_prefix(',').unwrap_or(inner);
            }
            rest = inner.strip_prefix('}').unwrap_or(inner);
            break;
        }
        rest = after;
    }
    before.truncate(len);
    rest
}

/// Returns the module to which a path leads.
fn resolve(
    path: &[&str],
    module: &ModulePath,
    sources: &BTreeMap<ModulePath, &str>,
) -> Option<ModulePath> {
    let mut at: ModulePath = module.clone();
    for name in path {
        match *name {
            "crate" => at.clear(),
            "super" => {
                at.pop()?;
            }
            name => {
                at.push(name.to_owned());
                if !sources.contains_key(&at) {
                    at.pop();
                    break;
                }
            }
        }
    }
    Some(at)
}

/// Returns the sets of two or more names that can all be reached from each other.
fn strongly_connected(uses: &Uses) -> BTreeSet<BTreeSet<String>> {
    let reached: BTreeMap<&String, BTreeSet<&String>> =
        uses.keys().map(|from| (from, reach(from, uses))).collect();
    let mut circles = BTreeSet::new();
    for (from, to) in &reached {
        let circle: BTreeSet<String> = to
            .iter()
            .filter(|name| reached.get(*name).is_some_and(|back| back.contains(from)))
            .map(|name| (*name).clone())
            .collect();
        if circle.len() > 1 {
            circles.insert(circle);
        }
    }
    circles
}

fn reach<'u>(from: &'u String, uses: &'u Uses) -> BTreeSet<&'u String> {
    let mut reached = BTreeSet::new();
    let mut pending = vec![from];
    while let Some(name) = pending.pop() {
        for next in uses.get(name).into_iter().flatten() {
            if reached.insert(next) {
                pending.push(next);
            }
        }
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(sources: &[(&str, &str)]) -> Vec<RepositoryFile> {
        let manifest = ("a/Cargo.toml", "");
        [manifest]
            .iter()
            .chain(sources)
            .map(|(path, text)| RepositoryFile {
                path: (*path).to_owned(),
                text: (*text).to_owned(),
            })
            .collect()
    }

    fn found(sources: &[(&str, &str)]) -> Vec<String> {
        circles(&files(sources)).into_iter().collect()
    }

    #[test]
    fn siblings_must_not_use_each_other_in_a_circle() {
        let circle = found(&[
            ("a/src/lib.rs", "mod one; mod two; mod three;"),
            ("a/src/one.rs", "use crate::{Error, two::{self, Two}};"),
            ("a/src/two/mod.rs", "mod deep;"),
            ("a/src/two/deep.rs", "fn f() -> super::super::three::X {}"),
            ("a/src/three.rs", "use crate::one::One;"),
            ("a/src/four.rs", "use crate::one::One;"),
        ]);
        assert_eq!(circle, ["a: one three two"]);
    }

    #[test]
    fn children_may_use_their_parents_and_tests_anything() {
        let none = found(&[
            ("a/src/lib.rs", "mod one; use one::X;"),
            (
                "a/src/one.rs",
                "mod child; use self::child::Y;\nuse crate::two::Z;",
            ),
            ("a/src/one/child.rs", "use super::X;"),
            (
                "a/src/two.rs",
                "// crate::one::X\n#[cfg(test)]\nmod tests {\n    use crate::one::X;\n}\n",
            ),
            ("a/src/two/tests.rs", "use crate::one::X;"),
        ]);
        assert_eq!(none, [""; 0]);
    }

    #[test]
    fn circles_below_a_module_have_its_name() {
        let circle = found(&[
            ("a/src/lib.rs", ""),
            ("a/src/m.rs", ""),
            ("a/src/m/x.rs", "use super::y::Y;"),
            ("a/src/m/y.rs", "fn f() { crate::m::x::g() }"),
        ]);
        assert_eq!(circle, ["a: m::x m::y"]);
    }

    #[test]
    fn a_sealed_module_uses_nothing_outside_of_it() {
        let files = files(&[
            ("a/src/lib.rs", "mod x; mod y;"),
            ("a/src/x/mod.rs", "mod in_it; use self::in_it::A;"),
            ("a/src/x/in_it.rs", "use super::B; use crate::x::C;"),
            (
                "a/src/x/out.rs",
                "use crate::y::D; fn f() -> crate::Error {}",
            ),
            ("a/src/x/tests.rs", "use crate::y::D;"),
            ("a/src/y.rs", "use crate::x::A;"),
        ]);
        assert_eq!(
            check_sealed(&files, "a: x\n"),
            [
                "a: x::out uses crate::, and x is to use nothing outside of it",
                "a: x::out uses crate::y, and x is to use nothing outside of it",
            ]
        );
        assert_eq!(
            check_sealed(&files, "a: z\n"),
            ["sealed.txt: there is no such module: a: z"]
        );
    }

    #[test]
    fn known_circles_are_left_out_and_must_be_there() {
        let files = files(&[
            ("a/src/x.rs", "use crate::y::Y;"),
            ("a/src/y.rs", "use crate::x::X;"),
        ]);
        assert_eq!(check(&files, "a: x y\n"), [""; 0]);
        assert_eq!(
            check(&files, "a: x z\n"),
            [
                "circles.txt: this is no circle any more: a: x z",
                "modules use each other in a circle: a: x y"
            ]
        );
    }
}
