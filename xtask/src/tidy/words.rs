//! English of comments: "One English" in CONTRIBUTING.md.
//!
//! Two counts are taken per crate: comment lines that open with a question word, which
//! usually have no subject, and words of a list of metaphors that the specifications and
//! Linux do not use. Both have budgets in `xtask/tidy`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};

use super::{RepositoryFile, lines};

/// Question words that make a poor beginning of a comment.
const OPENINGS: [&str; 7] = [
    "What", "Who", "Whoever", "Whatever", "Where", "How", "Whether",
];
/// Words and phrases that a technical term replaces, see CONTRIBUTING.md.
const DIALECT: [&str; 13] = [
    "told",
    "spoilt",
    "stillborn",
    "testimony",
    "parcel",
    "chassis",
    "patience",
    "done for",
    "for good",
    "given up",
    "put back",
    "all the same",
    "by then",
];
/// Out of this many comment lines of a crate, one may open with a question word.
const LINES_PER_OPENING: usize = 200;

/// Counts of one crate.
#[derive(Debug, Default, PartialEq, Eq)]
struct WordCounts {
    lines: usize,
    openings: usize,
    words: usize,
}

/// Compares the comments of each crate with the budgets in `openings` and `words`, whose
/// lines are the folder of a crate and a count.
pub(super) fn check(files: &[RepositoryFile], openings: &str, words: &str) -> Result<Vec<String>> {
    let counts = count(files);
    let mut faults = compare(
        "xtask/tidy/openings.txt",
        openings,
        "comment lines open with a question word",
        &counts,
        |crate_| crate_.openings,
        |crate_| crate_.lines / LINES_PER_OPENING,
    )?;
    faults.extend(compare(
        "xtask/tidy/words.txt",
        words,
        "words in comments are ones that CONTRIBUTING.md replaces",
        &counts,
        |crate_| crate_.words,
        |_| 0,
    )?);
    Ok(faults)
}

/// Compares one count of each crate with its budget: a line of `list` or, without one,
/// what `free` returns. A budget that is larger than the count is a fault as well.
fn compare(
    name: &str,
    list: &str,
    what: &str,
    counts: &BTreeMap<&str, WordCounts>,
    count: impl Fn(&WordCounts) -> usize,
    free: impl Fn(&WordCounts) -> usize,
) -> Result<Vec<String>> {
    let mut budgets = BTreeMap::new();
    for line in lines(list) {
        let (folder, budget) = line
            .split_once(' ')
            .with_context(|| format!("{name}: \"{line}\" is not a folder and a number"))?;
        let budget: usize = budget
            .parse()
            .with_context(|| format!("{name}: \"{budget}\" is not a number"))?;
        budgets.insert(folder, budget);
    }
    let mut faults: Vec<String> = budgets
        .keys()
        .filter(|folder| !counts.contains_key(**folder))
        .map(|folder| format!("{name}: there is no crate in {folder}: remove the line"))
        .collect();
    for (folder, crate_) in counts {
        let (found, free) = (count(crate_), free(crate_));
        match budgets.get(folder) {
            _ if found <= free => {
                if budgets.contains_key(folder) {
                    faults.push(format!(
                        "{name}: {folder} is no exception any more: remove the line"
                    ));
                }
            }
            Some(budget) if found < *budget => faults.push(format!(
                "{name}: {folder} has {found} instead of {budget}: lower the number"
            )),
            budget => {
                let most = budget.copied().unwrap_or(free);
                if found > most {
                    faults.push(format!("{folder}: {found} {what}, more than {most}"));
                }
            }
        }
    }
    Ok(faults)
}

/// Counts by the folders of crates.
fn count(files: &[RepositoryFile]) -> BTreeMap<&str, WordCounts> {
    let folders: Vec<&str> = files
        .iter()
        .filter_map(|file| file.path.strip_suffix("/Cargo.toml"))
        .collect();
    let mut counts = BTreeMap::<&str, WordCounts>::new();
    for file in files.iter().filter(|file| file.path.ends_with(".rs")) {
        let within = |folder: &&&str| {
            let rest = file.path.strip_prefix(**folder);
            rest.is_some_and(|rest| rest.starts_with('/'))
        };
        let folder = folders
            .iter()
            .filter(within)
            .max_by_key(|folder| folder.len());
        if let Some(folder) = folder {
            let counted = counts.entry(folder).or_default();
            let mut text = String::new();
            for line in file.text.lines() {
                match comment(line) {
                    Some(line) => {
                        counted.lines += 1;
                        counted.openings += usize::from(opens_with_question(line));
                        text.push(' ');
                        text.push_str(line);
                    }
                    // A phrase does not continue in the next comment.
                    None => text.push('\n'),
                }
            }
            counted.words += dialect(&text);
        }
    }
    counts
}

/// Returns the text of a comment line.
fn comment(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix("//")?;
    let text = text.strip_prefix(['/', '!']).unwrap_or(text);
    Some(text.trim())
}

fn opens_with_question(comment: &str) -> bool {
    let end = comment.find(|character: char| !character.is_alphanumeric());
    let word = end.map_or(comment, |end| &comment[..end]);
    OPENINGS.contains(&word)
}

/// Number of words of the list in a text, code in backticks excepted.
fn dialect(text: &str) -> usize {
    let prose: String = text.split('`').step_by(2).collect::<Vec<_>>().join("\n");
    let prose = prose.to_lowercase();
    DIALECT
        .iter()
        .map(|phrase| {
            let found = prose.match_indices(phrase);
            found
                .filter(|(at, _)| {
                    let before = prose[..*at].chars().next_back();
                    let after = prose[at + phrase.len()..].chars().next();
                    ![before, after]
                        .into_iter()
                        .flatten()
                        .any(|character| character.is_alphanumeric() || character == '_')
                })
                .count()
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(text: &str) -> Vec<RepositoryFile> {
        [
            ("a/Cargo.toml", ""),
            ("a/src/lib.rs", text),
            ("a/b/Cargo.toml", ""),
            ("a/b/src/lib.rs", "// Fine.\n"),
        ]
        .map(|(path, text)| RepositoryFile {
            path: path.to_owned(),
            text: text.to_owned(),
        })
        .into()
    }

    #[test]
    fn openings_are_counted_in_comments_only() {
        let text = "//! What.\nlet x = 1; // Who\n    /// How it is\n// However\n/// Whether\n\
                    \"Where\"\n// a\n// where\n";
        let files = files(text);
        let counts = count(&files);
        assert_eq!(counts["a"].lines, 6);
        assert_eq!(counts["a"].openings, 3);
        assert_eq!(counts["a/b"].lines, 1);
        assert_eq!(counts["a/b"].openings, 0);
    }

    #[test]
    fn words_of_the_list_are_counted_outside_of_code() {
        assert_eq!(dialect("It is told. Told, untold"), 2);
        assert_eq!(dialect("a `told` and `parcel::Parcel`"), 0);
        let files = files("// It was given\n// up.\n// given\nfn f() {}\n// up\n");
        assert_eq!(count(&files)["a"].words, 1);
    }

    #[test]
    fn budgets_only_shrink() {
        let files = files("// What\n// How\n// told\n");
        let found = |openings: &str, words: &str| check(&files, openings, words).unwrap();
        assert_eq!(found("# why\na 2\n", "a 1\n"), [""; 0]);
        assert_eq!(
            found("a 1\n", "a 2\n"),
            [
                "a: 2 comment lines open with a question word, more than 1",
                "xtask/tidy/words.txt: a has 1 instead of 2: lower the number",
            ]
        );
        assert_eq!(
            found("a 2\na/b 1\nc 1\n", "a 1\n"),
            [
                "xtask/tidy/openings.txt: there is no crate in c: remove the line",
                "xtask/tidy/openings.txt: a/b is no exception any more: remove the line",
            ]
        );
        assert!(check(&files, "a\n", "").is_err());
        assert!(check(&files, "a x\n", "").is_err());
    }

    #[test]
    fn a_crate_without_a_budget_has_half_a_percent() {
        let text = format!("// What\n{}", "// x\n".repeat(199));
        assert_eq!(check(&files(&text), "", "").unwrap(), [""; 0]);
        let text = format!("// What\n{}", "// x\n".repeat(198));
        assert_eq!(
            check(&files(&text), "", "").unwrap(),
            ["a: 1 comment lines open with a question word, more than 0"]
        );
    }
}
