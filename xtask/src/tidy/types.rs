//! One word names one public type in the workspace, and libraries have documented items.

use std::collections::BTreeMap;

use super::{RepositoryFile, Violation};

/// Names that every crate has by Rust's custom.
const OF_EACH_CRATE: [&str; 3] = ["Error", "ErrorKind", "Result"];
/// Parts of paths that select one of several alternatives.
const ALTERNATIVES: [&str; 5] = ["aarch64", "linux", "unix", "windows", "x86_64"];
const KINDS: [&str; 5] = ["struct", "enum", "trait", "type", "union"];

/// Returns names of public types of libraries that have several definitions; the path of
/// each is the name. Alternatives for architectures and systems are one definition.
pub(super) fn with_several_meanings(files: &[RepositoryFile]) -> Vec<Violation> {
    let mut definitions: BTreeMap<&str, BTreeMap<String, &str>> = BTreeMap::new();
    for file in files.iter().filter(|file| is_library(&file.path)) {
        for name in file.text.lines().filter_map(public_type) {
            if !OF_EACH_CRATE.contains(&name) {
                let meanings = definitions.entry(name).or_default();
                meanings.insert(without_alternatives(&file.path), &file.path);
            }
        }
    }
    definitions
        .into_iter()
        .filter(|(_, meanings)| meanings.len() > 1)
        .map(|(name, meanings)| Violation {
            path: name.to_owned(),
            message: format!(
                "several public types have this name, in {}",
                meanings.into_values().collect::<Vec<_>>().join(", ")
            ),
        })
        .collect()
}

/// Returns libraries whose public items may lack documentation.
pub(super) fn undocumented(files: &[RepositoryFile]) -> Vec<Violation> {
    let attribute = "![warn(missing_docs)]";
    files
        .iter()
        .filter(|file| is_library(&file.path))
        .filter_map(|file| {
            let is_root = file.path.ends_with("/src/lib.rs");
            let message = if is_root && !file.text.contains(attribute) {
                format!("it lacks #{attribute}")
            } else if ["allow(missing_docs", "expect(missing_docs"]
                .iter()
                .any(|exempt| file.text.contains(exempt))
            {
                "it exempts items from documentation".to_owned()
            } else {
                return None;
            };
            let path = file.path.clone();
            Some(Violation { path, message })
        })
        .collect()
}

/// Sources of crates that others may use.
fn is_library(path: &str) -> bool {
    let foreign = ["benches/", "cli/", "fuzz/", "tests/", "xtask/"];
    path.ends_with(".rs")
        && path.contains("/src/")
        && !path.contains("/tests/")
        && !foreign.iter().any(|folder| path.starts_with(folder))
}

/// Returns the name of the public type that the line defines.
fn public_type(line: &str) -> Option<&str> {
    let definition = line.trim_start().strip_prefix("pub ")?;
    let definition = definition.strip_prefix("unsafe ").unwrap_or(definition);
    let (kind, rest) = definition.split_once(' ')?;
    let is_word = |character: char| character.is_alphanumeric() || character == '_';
    let name = rest.split(|character| !is_word(character)).next()?;
    (KINDS.contains(&kind) && !name.is_empty()).then_some(name)
}

fn without_alternatives(path: &str) -> String {
    let part = |part: &str| {
        let stem = part.strip_suffix(".rs").unwrap_or(part);
        match ALTERNATIVES.contains(&stem) {
            true => "*".to_owned(),
            false => part.to_owned(),
        }
    };
    path.split('/').map(part).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> RepositoryFile {
        RepositoryFile {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }

    #[test]
    fn a_name_has_one_public_type() {
        let files = [
            file("a/src/lib.rs", "pub struct Place;\npub enum Error {}\n"),
            file("b/src/x/y.rs", "pub type Place = u8;\npub enum Error {}\n"),
            // Neither private types nor tests count, nor alternatives of one type.
            file("c/src/lib.rs", "pub(crate) struct Place;\nstruct Place;\n"),
            file("c/tests/t.rs", "pub struct Place;\n"),
            file("a/src/x86_64.rs", "pub struct Registers<T>(T);\n"),
            file("a/src/aarch64.rs", "pub struct Registers;\n"),
        ];
        let found = with_several_meanings(&files);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].path, "Place");
        assert!(found[0].message.ends_with("in a/src/lib.rs, b/src/x/y.rs"));
    }

    #[test]
    fn libraries_warn_of_missing_documentation() {
        let files = [
            file("a/src/lib.rs", "#![warn(missing_docs)]\n"),
            file("b/src/lib.rs", "pub fn f() {}\n"),
            file("a/src/b.rs", "#[allow(missing_docs)]\n"),
            file("xtask/src/lib.rs", ""),
        ];
        let found: Vec<_> = undocumented(&files).into_iter().map(|b| b.path).collect();
        assert_eq!(found, ["b/src/lib.rs", "a/src/b.rs"]);
    }
}
