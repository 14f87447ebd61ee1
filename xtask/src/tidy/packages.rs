//! Dependencies of crates that are meant to be used alone.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};

use super::lines;
use crate::build::cargo;
use crate::cmd;

/// Compares the output of cargo with a list, whose lines are a crate and its maximum
/// number of packages, including itself. `tree` returns the packages of a crate, one per
/// line, by the given kinds of edges.
pub(super) fn check(
    list: &str,
    tree: impl Fn(&str, &str) -> Result<String>,
) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for line in lines(list) {
        let (name, most) = line
            .split_once(' ')
            .with_context(|| format!("packages.txt: \"{line}\" is not a crate and a number"))?;
        let most: usize = most
            .parse()
            .with_context(|| format!("packages.txt: \"{most}\" is not a number"))?;
        let text = tree(name, "normal")?;
        let count = packages(&text).len();
        if count > most {
            faults.push(format!(
                "{name} comes to {count} packages, more than {most}"
            ));
        }
        let built = tree(name, "normal,build")?;
        if packages(&built).iter().any(|line| line.starts_with("cc ")) {
            faults.push(format!("{name} needs a C compiler"));
        }
    }
    Ok(faults)
}

/// The packages of a crate for this host.
pub(super) fn tree(name: &str, edges: &str) -> Result<String> {
    let arguments = [
        "tree",
        "--locked",
        "--prefix=none",
        "--edges",
        edges,
        "-p",
        name,
    ];
    cmd::text(&mut cargo(arguments))
}

/// Returns each package and version once.
fn packages(tree: &str) -> BTreeSet<&str> {
    tree.lines()
        .map(|line| line.trim_end_matches(" (*)"))
        .filter(|line| !line.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NORMAL: &str = "a v1.0.0 (/a)\nb v1.0.0\nb v2.0.0\nc v1.0.0 (proc-macro)\nb v1.0.0 (*)\n";

    #[test]
    fn packages_are_counted_once_by_version() {
        let tree = |_: &str, _: &str| Ok(NORMAL.to_owned());
        assert_eq!(check("a 4\n", tree).unwrap(), [""; 0]);
        let found = check("a 3\n", tree).unwrap();
        assert_eq!(found, ["a comes to 4 packages, more than 3"]);
    }

    #[test]
    fn compilers_are_found_among_what_builds() {
        let tree = |_: &str, edges: &str| {
            Ok(match edges {
                "normal" => NORMAL.to_owned(),
                _ => format!("{NORMAL}cc v1.2.0\n"),
            })
        };
        let found = check("a 4\n", tree).unwrap();
        assert_eq!(found, ["a needs a C compiler"]);
    }
}
