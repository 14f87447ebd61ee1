//! Paths to files that are not in the repository.

use super::RepositoryFile;

/// Folders of development machines, outside the repository.
const OUTSIDE: [&str; 2] = [concat!("..", "/shared"), concat!("/wo", "rk/")];

/// Returns the lines that name such folders.
pub(super) fn outside(files: &[RepositoryFile]) -> Vec<String> {
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
        }
    }
    faults
}

/// Returns true if `line` contains `folder`, not as the end of a longer path.
fn names(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|character| character.is_alphanumeric() || "._-$}".contains(character))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(path: &str, text: &str) -> Vec<String> {
        let file = RepositoryFile {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        outside(&[file])
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
}
