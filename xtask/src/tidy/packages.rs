//! Dependencies of crates that are meant to be used alone.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail};

use super::lines;
use crate::build::cargo;
use crate::cmd;

/// A line of the list: a crate, its maximum number of packages, including itself, and
/// options.
struct Line<'a> {
    name: &'a str,
    most: usize,
    default_features: bool,
    c_compiler: bool,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Result<Self> {
        let mut words = line.split(' ');
        let (Some(name), Some(most)) = (words.next(), words.next()) else {
            bail!("packages.txt: \"{line}\" is not a crate and a number");
        };
        let mut parsed = Self {
            name,
            most: most
                .parse()
                .with_context(|| format!("packages.txt: \"{most}\" is not a number"))?,
            default_features: true,
            c_compiler: false,
        };
        for option in words {
            match option {
                "no-default-features" => parsed.default_features = false,
                "c-compiler" => parsed.c_compiler = true,
                other => bail!("packages.txt: \"{other}\" is not an option"),
            }
        }
        Ok(parsed)
    }
}

/// Compares the output of cargo with a list. `tree` returns the packages of a crate, one
/// per line, by the given kinds of edges, with or without its default features.
pub(super) fn check(
    list: &str,
    tree: impl Fn(&str, &str, bool) -> Result<String>,
) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for line in lines(list) {
        let Line {
            name,
            most,
            default_features,
            c_compiler,
        } = Line::parse(line)?;
        let text = tree(name, "normal", default_features)?;
        let count = packages(&text).len();
        if count > most {
            faults.push(format!(
                "{name} comes to {count} packages, more than {most}"
            ));
        }
        if c_compiler {
            continue;
        }
        let built = tree(name, "normal,build", default_features)?;
        if packages(&built).iter().any(|line| line.starts_with("cc ")) {
            faults.push(format!("{name} needs a C compiler"));
        }
    }
    Ok(faults)
}

/// The packages of a crate for this host.
pub(super) fn tree(name: &str, edges: &str, default_features: bool) -> Result<String> {
    let arguments = [
        "tree",
        "--locked",
        "--prefix=none",
        "--edges",
        edges,
        "-p",
        name,
    ];
    let mut tree = cargo(arguments);
    if !default_features {
        tree.arg("--no-default-features");
    }
    cmd::text(&mut tree)
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
        let tree = |_: &str, _: &str, _| Ok(NORMAL.to_owned());
        assert_eq!(check("a 4\n", tree).unwrap(), [""; 0]);
        let found = check("a 3\n", tree).unwrap();
        assert_eq!(found, ["a comes to 4 packages, more than 3"]);
    }

    #[test]
    fn compilers_are_found_among_what_builds() {
        let tree = |_: &str, edges: &str, _| {
            Ok(match edges {
                "normal" => NORMAL.to_owned(),
                _ => format!("{NORMAL}cc v1.2.0\n"),
            })
        };
        let found = check("a 4\n", tree).unwrap();
        assert_eq!(found, ["a needs a C compiler"]);
        assert_eq!(check("a 4 c-compiler\n", tree).unwrap(), [""; 0]);
    }

    #[test]
    fn options_are_known() {
        let tree = |_: &str, _: &str, default_features| {
            Ok(match default_features {
                true => NORMAL.to_owned(),
                false => "a v1.0.0 (/a)\n".to_owned(),
            })
        };
        assert_eq!(check("a 1 no-default-features\n", tree).unwrap(), [""; 0]);
        for bad in ["a", "a x", "a 1 other"] {
            assert!(check(&format!("{bad}\n"), tree).is_err(), "{bad}");
        }
    }
}
