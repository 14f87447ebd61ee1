//! Pointers to files that a reader of the repository does not have.

use super::Text;

/// Folders of the machines on which this is developed, outside the repository.
const OUTSIDE: [&str; 2] = [concat!("..", "/shared"), concat!("/wo", "rk/")];

/// Names of such folders, and links in Markdown files to nothing in the repository.
pub(super) fn outside(files: &[Text], exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut faults = Vec::new();
    for file in files {
        for (number, line) in (1..).zip(file.text.lines()) {
            for folder in OUTSIDE {
                if names(line, folder) {
                    faults.push(format!(
                        "{}:{number}: {folder} is not part of the repository",
                        file.path
                    ));
                }
            }
            if !file.path.ends_with(".md") {
                continue;
            }
            for target in links(line) {
                let found = resolve(&file.path, target).is_some_and(|path| exists(&path));
                if !found {
                    faults.push(format!(
                        "{}:{number}: \"{target}\" is not in the repository",
                        file.path
                    ));
                }
            }
        }
    }
    faults
}

/// Returns true if `line` has `folder`, not as the end of a longer path.
fn names(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|character| character.is_alphanumeric() || "._-$}".contains(character))
    })
}

/// Targets of a line's links that are paths.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| {
        let (target, _) = rest.split_once(')')?;
        let (path, _) = target.split_once('#').unwrap_or((target, ""));
        (!path.is_empty() && !path.contains(':')).then_some(path)
    })
}

/// A link's target relative to the root; `None` if it is outside.
fn resolve(file: &str, target: &str) -> Option<String> {
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

    fn faults(path: &str, text: &str) -> Vec<String> {
        let file = Text {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        outside(&[file], |path| path == "docs/a.md" || path == "LICENSE")
    }

    #[test]
    fn folders_of_development_machines_are_found_in_any_file() {
        for folder in OUTSIDE {
            let text = format!("one\n# see {folder}/DESIGN.md\n");
            let expected = format!("Cargo.toml:2: {folder} is not part of the repository");
            assert_eq!(faults("Cargo.toml", &text), [expected]);
        }
        assert_eq!(
            faults("a.rs", concat!("let path = \"/tmp/wo", "rk/x\";")),
            [""; 0]
        );
    }

    #[test]
    fn links_lead_to_files_of_the_repository() {
        let fine = "[a](a.md) [b](../LICENSE#x) [c](https://example.org/x) [d](#here)";
        assert_eq!(faults("docs/b.md", fine), [""; 0]);
        for target in ["b.md", "../../LICENSE", "../../other/README.md"] {
            let found = faults("docs/b.md", &format!("see [it]({target})."));
            let expected = format!("docs/b.md:1: \"{target}\" is not in the repository");
            assert_eq!(found, [expected]);
        }
    }
}
