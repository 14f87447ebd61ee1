//! Links of Markdown files: each leads to a file of the repository and, if it has an
//! anchor, to a heading in it.
//!
//! Pages below `docs/src` are a site: they link only to each other, all are in its table
//! of contents, and files that they include have no links to others.

use std::collections::BTreeSet;

use sm_markdown::{anchors, includes, links};

use super::RepositoryFile;

/// The pages of the site.
const SITE: &str = "docs/src/";
const CONTENTS: &str = "docs/src/SUMMARY.md";
/// The first page that a reader sees, and its maximum number of lines.
const FIRST_PAGE: (&str, usize) = ("README.md", 150);

/// Returns broken links, and pages that are not in the table of contents.
pub(super) fn broken(files: &[RepositoryFile], exists: impl Fn(&str) -> bool) -> Vec<String> {
    let find = |path: &str| files.iter().find(|file| file.path == path);
    let mut faults = Vec::new();
    let mut listed = BTreeSet::new();
    for file in files.iter().filter(|file| is_markdown(&file.path)) {
        let mut fault = |line: usize, text: String| {
            faults.push(format!("{}:{line}: {text}", file.path));
        };
        for link in links(&file.text) {
            let (path, anchor) = match link.target.split_once('#') {
                Some((path, anchor)) => (path, Some(anchor)),
                None => (link.target, None),
            };
            if path.contains(':') {
                continue;
            }
            let target = match path {
                "" => Some(file.path.clone()),
                path => resolve(&file.path, path),
            };
            let Some(target) = target.filter(|target| exists(target)) else {
                fault(link.line, format!("\"{path}\" is not in the repository"));
                continue;
            };
            if file.path.starts_with(SITE) && !target.starts_with(SITE) {
                fault(link.line, format!("\"{path}\" is not a part of the site"));
            }
            if file.path == CONTENTS {
                listed.insert(target.clone());
            }
            let (Some(anchor), Some(document)) = (anchor, find(&target)) else {
                continue;
            };
            if is_markdown(&target) && !all_anchors(document, find).contains(anchor) {
                fault(
                    link.line,
                    format!("\"{target}\" has no heading \"{anchor}\""),
                );
            }
        }
        let (lines, most) = (file.text.lines().count(), FIRST_PAGE.1);
        if file.path == FIRST_PAGE.0 && lines > most {
            fault(lines, format!("the file has more than {most} lines"));
        }
        for include in includes(&file.text) {
            let target = resolve(&file.path, include.target);
            let Some(document) = target.as_deref().and_then(find) else {
                let target = include.target;
                fault(
                    include.line,
                    format!("\"{target}\" is not in the repository"),
                );
                continue;
            };
            let mut inside = links(&document.text).into_iter();
            if let Some(link) = inside.find(|link| !link.target.contains(':')) {
                let (name, target) = (&document.path, link.target);
                fault(
                    include.line,
                    format!("\"{name}\" links to \"{target}\", which is another place on the site"),
                );
            }
        }
    }
    faults.extend(
        files
            .iter()
            .map(|file| &file.path)
            .filter(|path| path.starts_with(SITE) && is_markdown(path))
            .filter(|path| *path != CONTENTS && !listed.contains(*path))
            .map(|path| format!("{path}: it is not in {CONTENTS}")),
    );
    faults
}

pub(super) fn is_markdown(path: &str) -> bool {
    path.ends_with(".md")
}

/// Returns the anchors of a document and of those that it includes.
fn all_anchors<'a>(
    document: &'a RepositoryFile,
    find: impl Fn(&str) -> Option<&'a RepositoryFile>,
) -> BTreeSet<String> {
    let mut all = anchors(&document.text);
    for include in includes(&document.text) {
        let target = resolve(&document.path, include.target);
        if let Some(included) = target.as_deref().and_then(&find) {
            all.extend(anchors(&included.text));
        }
    }
    all
}

/// Returns a link's target relative to the root; `None` if it is outside.
pub(super) fn resolve(file: &str, target: &str) -> Option<String> {
    let mut parts: Vec<&str> = match target.starts_with('/') {
        true => Vec::new(),
        false => file.split('/').rev().skip(1).collect(),
    };
    if !target.starts_with('/') {
        parts.reverse();
    }
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(path: &str, text: &str) -> RepositoryFile {
        RepositoryFile {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }

    /// Returns the faults of a repository with these files and a few others.
    fn faults(files: &[(&str, &str)]) -> Vec<String> {
        let mut all: Vec<RepositoryFile> =
            files.iter().map(|(path, body)| text(path, body)).collect();
        all.push(text("guide/a.md", "# One\n## Two words\n"));
        all.push(text("LICENSE", "#x"));
        let paths: Vec<String> = all.iter().map(|file| file.path.clone()).collect();
        broken(&all, |path| paths.iter().any(|known| known == path))
    }

    #[test]
    fn links_lead_to_files_of_the_repository() {
        let fine = "[a](a.md) [b](../LICENSE) [c](https://example.org/x)\n# Here\n[d](#here)";
        assert_eq!(faults(&[("guide/b.md", fine)]), [""; 0]);
        for target in ["c.md", "../../LICENSE", "../../other/README.md"] {
            let found = faults(&[("guide/b.md", &format!("see [it]({target})."))]);
            let expected = format!("guide/b.md:1: \"{target}\" is not in the repository");
            assert_eq!(found, [expected]);
        }
    }

    #[test]
    fn anchors_are_headings() {
        assert_eq!(faults(&[("b.md", "[x](guide/a.md#two-words)")]), [""; 0]);
        assert_eq!(
            faults(&[("b.md", "[x](guide/a.md#three)")]),
            ["b.md:1: \"guide/a.md\" has no heading \"three\""]
        );
        assert_eq!(
            faults(&[("b.md", "\n[x](#one)")]),
            ["b.md:2: \"b.md\" has no heading \"one\""]
        );
    }

    #[test]
    fn the_first_page_is_short() {
        assert_eq!(faults(&[("README.md", &"x\n".repeat(150))]), [""; 0]);
        let found = faults(&[("README.md", &"x\n".repeat(151))]);
        assert_eq!(found, ["README.md:151: the file has more than 150 lines"]);
        assert_eq!(faults(&[("guide/README.md", &"x\n".repeat(151))]), [""; 0]);
    }

    #[test]
    fn pages_of_the_site_are_listed_and_stay_on_it() {
        let contents = ("docs/src/SUMMARY.md", "- [A](a.md)");
        assert_eq!(faults(&[contents, ("docs/src/a.md", "x")]), [""; 0]);
        assert_eq!(
            faults(&[contents, ("docs/src/a.md", "x"), ("docs/src/b.md", "x")]),
            ["docs/src/b.md: it is not in docs/src/SUMMARY.md"]
        );
        assert_eq!(
            faults(&[contents, ("docs/src/a.md", "[x](../../guide/a.md)")]),
            ["docs/src/a.md:1: \"../../guide/a.md\" is not a part of the site"]
        );
    }

    #[test]
    fn included_files_are_part_of_their_page() {
        let contents = ("docs/src/SUMMARY.md", "- [A](a.md) [B](a.md#two-words)");
        let page = ("docs/src/a.md", "{{#include ../../guide/a.md}}");
        assert_eq!(faults(&[contents, page]), [""; 0]);
        let page = (
            "docs/src/a.md",
            "# Two words\n{{#include ../../guide/none.md}}",
        );
        assert_eq!(
            faults(&[contents, page]),
            ["docs/src/a.md:2: \"../../guide/none.md\" is not in the repository"]
        );
        let page = (
            "docs/src/a.md",
            "# Two words\n{{#include ../../guide/b.md}}",
        );
        assert_eq!(
            faults(&[contents, page, ("guide/b.md", "[a](a.md)")]),
            [
                "docs/src/a.md:2: \"guide/b.md\" links to \"a.md\", which is another place on the site"
            ]
        );
    }
}
