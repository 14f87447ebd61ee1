//! Names of the workspace that documents mention in code. All must exist, except those in
//! changelogs, which describe the past.
//!
//! | form | rule |
//! |---|---|
//! | `vmm/src/machine.rs`, `docs/src` | exists below the root or beside the document |
//! | `tree.rs`, `tree/walk.rs` | ends the path of a Rust file |
//! | `sm_vmm::testing`, `guest/proto::frame`, `mmio::Transport` | is a module, or an item in one |
//! | `Vm::restore` | both words are in one Rust file |
//!
//! In a row of a table that has paths of Rust files, the last word of each item is in one
//! of these files; so is a type without a path, such as `Vm`. Modules that a table in the
//! documentation of a library lists are modules of that library.

use std::collections::BTreeMap;

use sm_markdown::code_spans;

use super::RepositoryFile;
use super::links::{is_markdown, resolve};

const CHANGELOG: &str = "CHANGELOG.md";
const RUST: &str = ".rs";

/// Returns mentions of paths, modules and items that do not exist.
pub(super) fn unknown(files: &[RepositoryFile], exists: impl Fn(&str) -> bool) -> Vec<String> {
    let workspace = Workspace::new(files);
    let documents = files.iter().filter(|file| is_markdown(&file.path));
    let mut faults = workspace.listed_modules(files);
    for document in documents.filter(|file| !file.path.ends_with(CHANGELOG)) {
        let spans = code_spans(&document.text);
        let rows = rows(document, &spans, files);
        for (line, span) in spans {
            let fault = if is_path(span, files) {
                let from = [Some(span.to_owned()), resolve(&document.path, span)];
                let found = from.iter().flatten().any(|path| exists(path))
                    || (span.ends_with(RUST)
                        && !starts_in(span, files)
                        && ends_a_path(span, files));
                (!found).then(|| "is not in the repository".to_owned())
            } else {
                workspace.missing(span, rows.get(&line).map_or(&[], Vec::as_slice))
            };
            if let Some(fault) = fault {
                faults.push(format!("{}:{line}: \"{span}\" {fault}", document.path));
            }
        }
    }
    faults
}

/// Returns the Rust files that are named in rows of tables, by their lines.
fn rows<'t>(
    document: &RepositoryFile,
    spans: &[(usize, &str)],
    files: &'t [RepositoryFile],
) -> BTreeMap<usize, Vec<&'t RepositoryFile>> {
    let lines: Vec<&str> = document.text.lines().collect();
    let is_row = |line: usize| {
        let text = lines.get(line - 1);
        text.is_some_and(|text| text.trim_start().starts_with('|'))
    };
    let mut rows: BTreeMap<usize, Vec<&RepositoryFile>> = BTreeMap::new();
    for (line, span) in spans {
        if is_row(*line)
            && span.ends_with(RUST)
            && let Some(file) = files.iter().find(|file| file.path == *span)
        {
            rows.entry(*line).or_default().push(file);
        }
    }
    rows
}

/// Returns true for a path below a folder of the repository, one with a folder `src`, and
/// one of a Rust file. Parts in capitals are placeholders.
fn is_path(span: &str, files: &[RepositoryFile]) -> bool {
    let is_part = |part: &str| {
        let mut bytes = part.bytes();
        bytes.all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte)
        })
    };
    !span.starts_with(['/', '.'])
        && span.split('/').all(is_part)
        && (span.ends_with(RUST)
            || span.split('/').skip(1).any(|part| part == "src")
            || (span.contains('/') && starts_in(span, files)))
}

/// Returns true if a path starts with a folder of the repository.
fn starts_in(path: &str, files: &[RepositoryFile]) -> bool {
    let first = |path: &str| path.split_once('/').map(|(folder, _)| folder.to_owned());
    let folder = first(path);
    folder.is_some() && files.iter().any(|file| first(&file.path) == folder)
}

fn ends_a_path(span: &str, files: &[RepositoryFile]) -> bool {
    files.iter().any(|file| {
        let folder = file.path.strip_suffix(span);
        folder.is_some_and(|folder| folder.is_empty() || folder.ends_with('/'))
    })
}

/// Path of a module: the folder of its crate, and the modules to it.
type Module<'t> = Vec<&'t str>;

/// Modules of all crates.
struct Workspace<'t> {
    /// Names of crates by their folders.
    crates: BTreeMap<&'t str, String>,
    modules: Vec<(Module<'t>, &'t str)>,
    rust: Vec<&'t str>,
}

impl<'t> Workspace<'t> {
    fn new(files: &'t [RepositoryFile]) -> Self {
        let crates = files.iter().filter_map(|file| {
            let folder = file.path.strip_suffix("/Cargo.toml")?;
            let (_, rest) = file.text.split_once("name = \"")?;
            let (name, _) = rest.split_once('"')?;
            Some((folder, name.replace('-', "_")))
        });
        let crates: BTreeMap<&str, String> = crates.collect();
        let rust = || files.iter().filter(|file| file.path.ends_with(RUST));
        let mut modules = Vec::new();
        for folder in crates.keys() {
            for file in rust() {
                let path = file.path.strip_prefix(folder);
                let path = path.and_then(|path| path.strip_prefix("/src/")?.strip_suffix(RUST));
                let Some(path) = path else { continue };
                let mut module = vec![*folder];
                module.extend(path.split('/'));
                if let Some(&("mod" | "lib" | "main")) = module.last() {
                    module.pop();
                }
                modules.push((module, file.text.as_str()));
            }
        }
        Self {
            modules,
            rust: rust().map(|file| file.text.as_str()).collect(),
            crates,
        }
    }

    /// Returns modules that a table of a library lists, and that it does not have.
    fn listed_modules(&self, files: &[RepositoryFile]) -> Vec<String> {
        let mut faults = Vec::new();
        for file in files {
            let Some(folder) = file.path.strip_suffix("/src/lib.rs") else {
                continue;
            };
            let mut in_table = false;
            for (line, text) in (1..).zip(file.text.lines()) {
                let row = text
                    .strip_prefix("//! |")
                    .and_then(|row| row.split_once('|'));
                let Some((cell, _)) = row else {
                    in_table = false;
                    continue;
                };
                in_table |= cell.trim() == "module";
                for (_, name) in code_spans(cell).into_iter().filter(|_| in_table) {
                    let is_type = name.starts_with(|c: char| c.is_ascii_uppercase());
                    let is_module = |(module, _): &(Module<'_>, &str)| **module == [folder, name];
                    if !is_type && !self.modules.iter().any(is_module) {
                        let path = &file.path;
                        faults.push(format!("{path}:{line}: \"{name}\" is no module of it"));
                    }
                }
            }
        }
        faults
    }

    /// Returns the fault of an item or module; `None` if `span` is none or exists. `row` has
    /// the files that its row of a table names.
    fn missing(&self, span: &str, row: &[&RepositoryFile]) -> Option<String> {
        let names: Vec<&str> = span
            .strip_suffix("()")
            .unwrap_or(span)
            .split("::")
            .collect();
        let is_type = |name: &str| {
            name.starts_with(|c: char| c.is_ascii_uppercase())
                && name.contains(|c: char| c.is_ascii_lowercase())
        };
        let is_name = |name: &str| {
            let mut bytes = name.bytes();
            !name.is_empty() && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        let (first, rest) = names.split_first()?;
        let last = names.last()?;
        if !rest.iter().all(|name| is_name(name)) || (rest.is_empty() && !is_name(first)) {
            return None;
        }
        if !row.is_empty() && (!rest.is_empty() || is_type(first)) {
            let found = row.iter().any(|file| has_word(&file.text, last));
            return (!found).then(|| "is in no file of its row".to_owned());
        }
        if rest.is_empty() {
            return None;
        }
        if is_type(first) {
            let is_in = |text: &str| names.iter().all(|name| has_word(text, name));
            let found = self.rust.iter().any(|text| is_in(text));
            return (!found).then(|| "is in no Rust file".to_owned());
        }
        let name = first.replace('-', "_");
        let folder = self
            .crates
            .iter()
            .find(|(folder, crate_)| *folder == first || **crate_ == name);
        let mut path = vec![folder.map_or(*first, |(folder, _)| *folder)];
        path.extend(rest);
        // A name that is neither a crate nor a module is of a crate of others.
        let is_known = folder.is_some() || self.ends_with(&path[..1]).next().is_some();
        (is_known && !self.has(&path)).then(|| "is no module or item".to_owned())
    }

    /// Returns the modules whose paths end with `path`.
    fn ends_with(&self, path: &[&str]) -> impl Iterator<Item = &Module<'t>> {
        let modules = self.modules.iter().map(|(module, _)| module);
        modules.filter(move |module| module.ends_with(path))
    }

    /// Returns true if `path` leads to a module, or to an item in one or in its
    /// descendants, which it may publish.
    fn has(&self, path: &[&str]) -> bool {
        (1..=path.len()).rev().any(|len| {
            let (module, item) = path.split_at(len);
            let is_item = match item.split_last() {
                // Only types have items of their own.
                Some((_, types)) => types
                    .iter()
                    .all(|name| name.starts_with(char::is_uppercase)),
                None => true,
            };
            let has_item = |at: &Module<'_>| {
                let inside = self
                    .modules
                    .iter()
                    .filter(|(inner, _)| inner.starts_with(at));
                let texts: Vec<&str> = inside.map(|(_, text)| *text).collect();
                item.iter()
                    .all(|name| texts.iter().any(|text| has_word(text, name)))
            };
            is_item && self.ends_with(module).any(has_item)
        })
    }
}

/// Returns true if `text` contains `word`, not as a part of a longer one.
fn has_word(text: &str, word: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word).any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + word.len()..]);
        !before.ends_with(is_word) && !after.starts_with(is_word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the faults of a repository with these files and a few others.
    fn faults(path: &str, text: &str) -> Vec<String> {
        let mut files = vec![(path, text)];
        files.extend([
            ("guide/a.md", "x"),
            ("guide/guide/c.md", "x"),
            ("one/two/Cargo.toml", "[package]\nname = \"sm-two\"\n"),
            ("one/two/src/lib.rs", "pub mod walk; pub use walk::Path;"),
            (
                "one/two/src/walk.rs",
                "pub struct Path; impl Path { fn step() {} }",
            ),
            ("one/two/src/walk/deep/mod.rs", "pub enum End { Wall }"),
        ]);
        let files: Vec<RepositoryFile> = files
            .into_iter()
            .map(|(path, text)| RepositoryFile {
                path: path.to_owned(),
                text: text.to_owned(),
            })
            .collect();
        let exists = |path: &str| {
            let path = path.trim_end_matches('/');
            let mut paths = files.iter().map(|file| file.path.as_str());
            paths.any(|known| known == path || known.starts_with(&format!("{path}/")))
        };
        unknown(&files, exists)
    }

    fn check(fine: &[&str], broken: &[(&str, &str)]) {
        for span in fine {
            assert_eq!(faults("b.md", &format!("`{span}`")), [""; 0]);
        }
        for (span, why) in broken {
            let found = faults("b.md", &format!("see\n`{span}`"));
            assert_eq!(found, [format!("b.md:2: \"{span}\" {why}")]);
        }
    }

    #[test]
    fn paths_lead_to_files_and_folders() {
        let why = "is not in the repository";
        check(
            &[
                "guide/a.md",
                "one/two/src",
                "one/two/src/walk/",
                "elsewhere/b",
                "guide/NAME",
                "guide/*.md",
                "and/or",
                "guide",
                "/usr/src/linux",
                "sm run guide/x",
            ],
            &[
                ("guide/gone.md", why),
                ("one/two/src/gone", why),
                ("one/gone/src", why),
                ("gone/src/walk", why),
                ("gone/src/walk.rs", why),
            ],
        );
        assert_eq!(faults("guide/b.md", "`guide/c.md`"), [""; 0]);
        assert_eq!(faults("one/CHANGELOG.md", "`guide/gone.md`"), [""; 0]);
    }

    #[test]
    fn rust_files_may_be_named_without_their_folders() {
        let why = "is not in the repository";
        check(
            &["walk.rs", "deep/mod.rs", "src/lib.rs"],
            &[("gone.rs", why), ("alk.rs", why), ("two/walk.rs", why)],
        );
    }

    #[test]
    fn modules_and_items_exist() {
        let (module, item) = ("is no module or item", "is in no Rust file");
        check(
            &[
                "sm_two::walk",
                "sm-two::walk::deep",
                "one/two::walk",
                "sm_two::Path",
                "sm_two::walk::Path::step",
                "sm_two::walk::deep::End::Wall",
                "walk::Path",
                "walk::deep",
                "Path::step()",
                "std::fs::read",
                "walk::{a, b}",
            ],
            &[
                ("sm_two::run", module),
                ("sm_two::deep::End", module),
                ("one/two::run", module),
                ("sm_two::walk::Pat", module),
                ("walk::Gone", module),
                ("Path::gone", item),
                ("Path::Wall", item),
            ],
        );
    }

    #[test]
    fn libraries_have_the_modules_that_they_list() {
        let library = |name: &str| {
            let table = "//! | module | x |\n//! |---|---|\n//! | [`walk`], `Path` | `deep` |";
            format!("{table}\n//! | `{name}` | x |\n//!\n//! | item | x |\n//! | `run` | x |\n")
        };
        let path = "one/two/src/lib.rs";
        assert_eq!(faults(path, &library("walk")), [""; 0]);
        assert_eq!(
            faults(path, &library("gone")),
            ["one/two/src/lib.rs:4: \"gone\" is no module of it"]
        );
    }

    #[test]
    fn items_in_a_row_are_in_the_files_of_the_row() {
        let row = |item: &str| format!("|a|b|\n|---|---|\n|`one/two/src/walk.rs`|`{item}`|");
        for item in ["Path::step", "Path", "step", "NAME"] {
            assert_eq!(faults("b.md", &row(item)), [""; 0]);
        }
        for item in ["End::Wall", "End"] {
            let expected = format!("b.md:3: \"{item}\" is in no file of its row");
            assert_eq!(faults("b.md", &row(item)), std::slice::from_ref(&expected));
            let nested = row(item).replace("\n|", "\n   |");
            assert_eq!(faults("b.md", &nested), [expected]);
        }
    }
}
