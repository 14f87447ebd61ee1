//! `cargo xtask tidy`: rules of this repository that no compiler checks.
//!
//! | rule | exceptions |
//! |---|---|
//! | dependencies between crates are those in `xtask/tidy/crates.txt` | none |
//! | crates that are used alone have few dependencies, and need no C compiler | `xtask/tidy/packages.txt` has the numbers |
//! | modules with one parent do not use each other in a circle | `xtask/tidy/circles.txt` |
//! | modules that will become crates use nothing outside of themselves | `xtask/tidy/sealed.txt` has them |
//! | code for specific operating systems is in folders named `sys` | `xtask/tidy/target-os.txt` |
//! | product code names KVM in the backend and the choice of the backend only | none |
//! | a Rust file has at most 600 lines | `xtask/tidy/long-files.txt` |
//! | no path leads to a file outside the repository | none |
//! | links in documents lead to existing files and headings | none |
//! | paths, modules and items that documents mention in code exist | none |
//! | `README.md` has at most 150 lines | none |
//! | commands of cargo in documents exist | blocks marked `unchecked: REASON` |
//! | at most 0.5 % of a crate's comment lines open with a question word | `xtask/tidy/openings.txt` has counts |
//! | comments are without the words that CONTRIBUTING.md replaces | `xtask/tidy/words.txt` has counts |
//! | one word names one public type of the libraries | `xtask/tidy/type-names.txt` |
//! | libraries warn of public items without documentation | none |
//! | titles of commits are `component: ...`, at most 72 characters | none |
//!
//! Lists of exceptions only shrink: an unneeded entry is an error, too.

mod commands;
mod commits;
mod crates;
mod links;
mod mentions;
mod modules;
mod packages;
mod pointers;
mod sources;
mod types;
mod words;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{cmd, paths};

/// Test data with arbitrary contents.
const DATA: [&str; 2] = ["fuzz/corpus/", "fuzz/seeds/"];

/// A file of the repository.
struct RepositoryFile {
    /// Relative to the root of the repository.
    path: String,
    text: String,
}

pub(crate) fn run() -> Result<()> {
    cmd::step("checking the repository's own rules");
    let root = paths::root();
    let files = texts(&root)?;
    let list = |name: &str| -> Result<String> {
        let path = root.join("xtask/tidy").join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {:?}", path.display()))
    };
    let metadata = crates::metadata()?;
    let mut faults = crates::check(&metadata, &list("crates.txt")?)?;
    faults.extend(packages::check(&list("packages.txt")?, packages::tree)?);
    faults.extend(modules::check(&files, &list("circles.txt")?));
    faults.extend(modules::check_sealed(&files, &list("sealed.txt")?));
    faults.extend(except(
        sources::depends_on_system(&files),
        "xtask/tidy/target-os.txt",
        &list("target-os.txt")?,
    ));
    faults.extend(except(sources::knows_kvm(&files), "none", ""));
    faults.extend(except(
        sources::long(&files),
        "xtask/tidy/long-files.txt",
        &list("long-files.txt")?,
    ));
    faults.extend(except(
        types::with_several_meanings(&files),
        "xtask/tidy/type-names.txt",
        &list("type-names.txt")?,
    ));
    faults.extend(except(types::undocumented(&files), "none", ""));
    faults.extend(pointers::outside(&files));
    faults.extend(words::check(
        &files,
        &list("openings.txt")?,
        &list("words.txt")?,
    )?);
    faults.extend(commits::check(&root));
    faults.extend(in_documents(&files, &metadata)?);
    report(&faults)
}

/// Checks the links, names and commands of documents only.
pub(crate) fn documents() -> Result<()> {
    cmd::step("checking links, names and commands of the documents");
    report(&in_documents(
        &texts(&paths::root())?,
        &crates::metadata()?,
    )?)
}

fn in_documents(files: &[RepositoryFile], metadata: &Value) -> Result<Vec<String>> {
    let root = paths::root();
    let exists = |path: &str| root.join(path).exists();
    let mut faults = links::broken(files, exists);
    faults.extend(mentions::unknown(files, exists));
    faults.extend(commands::unknown(files, &commands::Names::new(metadata)?));
    Ok(faults)
}

fn report(faults: &[String]) -> Result<()> {
    for fault in faults {
        cmd::note(fault);
    }
    if !faults.is_empty() {
        bail!("{} of the repository's rules are broken", faults.len());
    }
    Ok(())
}

/// Returns the paths of all files of the repository, relative to its root: those under
/// version control or, in a copy without it, all except build output and hidden
/// directories.
fn names(root: &Path) -> Result<Vec<String>> {
    let mut git = cmd::command("git", ["ls-files", "-z", "--cached"]);
    let listed = git.current_dir(root).stderr(Stdio::null()).output();
    if let Ok(listed) = listed
        && listed.status.success()
    {
        let names = String::from_utf8_lossy(&listed.stdout);
        let names = names.split('\0').filter(|path| !path.is_empty());
        return Ok(names.map(str::to_owned).collect());
    }
    let mut names = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let (path, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if kind.is_dir() {
                if name != "target" && !name.starts_with('.') {
                    directories.push(path);
                }
            } else if let Some(path) = path.strip_prefix(root).ok().and_then(Path::to_str) {
                names.push(path.to_owned());
            }
        }
    }
    Ok(names)
}

/// Returns all text files of the repository.
fn texts(root: &Path) -> Result<Vec<RepositoryFile>> {
    let mut texts = Vec::new();
    for path in &names(root)? {
        if DATA.iter().any(|data| path.starts_with(data)) {
            continue;
        }
        let absolute = root.join(path);
        // The file was removed without a commit, or is a link.
        if !absolute.is_file() {
            continue;
        }
        let bytes =
            fs::read(&absolute).with_context(|| format!("cannot read {:?}", absolute.display()))?;
        if let Ok(text) = String::from_utf8(bytes) {
            texts.push(RepositoryFile {
                path: path.to_owned(),
                text,
            });
        }
    }
    Ok(texts)
}

/// A file that violates a rule, with the violation.
struct Violation {
    path: String,
    message: String,
}

/// The lines of a list that are not comments.
fn lines(list: &str) -> impl Iterator<Item = &str> {
    list.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Returns the violations that are not in `list`, and the unneeded entries of `list`.
fn except(broken: Vec<Violation>, name: &str, list: &str) -> Vec<String> {
    let exceptions: Vec<&str> = lines(list).collect();
    let mut faults: Vec<String> = exceptions
        .iter()
        .filter(|exception| !broken.iter().any(|file| file.path == **exception))
        .map(|exception| format!("{name}: {exception} is no exception any more: remove the line"))
        .collect();
    faults.extend(
        broken
            .into_iter()
            .filter(|file| !exceptions.contains(&file.path.as_str()))
            .map(|file| format!("{}: {}", file.path, file.message)),
    );
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(path: &str) -> Violation {
        Violation {
            path: path.to_owned(),
            message: "is wrong".to_owned(),
        }
    }

    #[test]
    fn a_copy_without_version_control_has_the_same_files() {
        let copy = tempfile::tempdir().unwrap();
        for path in ["a.rs", "sub/b.rs", "target/c.rs", ".hidden/d.rs"] {
            let path = copy.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "text").unwrap();
        }
        let mut found = names(copy.path()).unwrap();
        found.sort();
        assert_eq!(found, ["a.rs", "sub/b.rs"]);
    }

    #[test]
    fn exceptions_are_left_out_and_must_be_needed() {
        let list = "# why\na.rs\n\nb.rs\n";
        let faults = except(vec![broken("a.rs"), broken("c.rs")], "list", list);
        assert_eq!(
            faults,
            [
                "list: b.rs is no exception any more: remove the line",
                "c.rs: is wrong"
            ]
        );
    }
}
