//! Dependencies between the crates of the workspace.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::lines;
use crate::cmd;

/// A dependency on another member of the workspace.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Arrow {
    from: String,
    to: String,
    /// True for a dev-dependency.
    dev: bool,
}

/// Returns the metadata of the workspace.
pub(super) fn metadata() -> Result<Value> {
    let arguments = ["metadata", "--format-version=1", "--no-deps", "--locked"];
    let text = cmd::text(&mut crate::build::cargo(arguments))?;
    serde_json::from_str(&text).context("cargo's metadata is not valid")
}

/// Compares the workspace with a table, whose lines are a crate, a colon, and its
/// dependencies, all of which have lines above.
pub(super) fn check(metadata: &Value, table: &str) -> Result<Vec<String>> {
    let members = members(metadata)?;
    let arrows = arrows(metadata, &members)?;
    let mut faults = Vec::new();
    let mut above = BTreeSet::new();
    let mut allowed = BTreeSet::new();
    for line in lines(table) {
        let (name, dependencies) = line.split_once(':').unwrap_or((line, ""));
        let dependencies = dependencies.split_whitespace();
        let actual: BTreeSet<_> = arrows
            .iter()
            .filter(|arrow| arrow.from == name && !arrow.dev)
            .map(|arrow| arrow.to.as_str())
            .collect();
        for dependency in dependencies {
            if !above.contains(dependency) {
                faults.push(format!(
                    "crates.txt: {dependency} has no line above that of {name}"
                ));
            }
            if !actual.contains(dependency) {
                faults.push(format!(
                    "crates.txt: {name} does not depend on {dependency}: remove the word"
                ));
            }
            allowed.insert((name, dependency));
        }
        for arrow in arrows
            .iter()
            .filter(|arrow| arrow.from == name && arrow.dev)
        {
            if !above.contains(arrow.to.as_str()) {
                faults.push(format!(
                    "tests of {name} depend on {}, which is not below it",
                    arrow.to
                ));
            }
        }
        above.insert(name);
    }
    for arrow in arrows.iter().filter(|arrow| !arrow.dev) {
        if !allowed.contains(&(arrow.from.as_str(), arrow.to.as_str())) {
            faults.push(format!(
                "{} depends on {}, which crates.txt does not have",
                arrow.from, arrow.to
            ));
        }
    }
    for member in members {
        if !above.contains(member.as_str()) {
            faults.push(format!("crates.txt has no line for {member}"));
        }
    }
    Ok(faults)
}

fn members(metadata: &Value) -> Result<BTreeSet<String>> {
    packages(metadata)?
        .iter()
        .map(|package| name(package).map(str::to_owned))
        .collect()
}

fn arrows(metadata: &Value, members: &BTreeSet<String>) -> Result<BTreeSet<Arrow>> {
    let mut arrows = BTreeSet::new();
    for package in packages(metadata)? {
        let from = name(package)?;
        let dependencies = package["dependencies"].as_array();
        for dependency in dependencies.context("a package has no dependencies")? {
            let to = name(dependency)?;
            // A crate's tests may depend on the crate itself with other features.
            if members.contains(to) && to != from {
                arrows.insert(Arrow {
                    from: from.to_owned(),
                    to: to.to_owned(),
                    dev: dependency["kind"] == "dev",
                });
            }
        }
    }
    Ok(arrows)
}

fn packages(metadata: &Value) -> Result<&Vec<Value>> {
    let packages = metadata["packages"].as_array();
    packages.context("cargo's metadata has no packages")
}

fn name(value: &Value) -> Result<&str> {
    value["name"].as_str().context("a package has no name")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A workspace in which `b` depends on `a` and, in tests, on `c`; `c` depends on
    /// both.
    fn workspace() -> Value {
        json!({ "packages": [
            { "name": "a", "dependencies": [{ "name": "serde", "kind": null }] },
            { "name": "b", "dependencies": [
                { "name": "a", "kind": null },
                { "name": "b", "kind": "dev" },
                { "name": "c", "kind": "dev" },
            ] },
            { "name": "c", "dependencies": [
                { "name": "a", "kind": "build" },
                { "name": "b", "kind": null },
            ] },
        ] })
    }

    fn faults(table: &str) -> Vec<String> {
        check(&workspace(), table).unwrap()
    }

    #[test]
    fn arrows_point_to_lines_above() {
        let upward = "tests of b depend on c, which is not below it";
        assert_eq!(faults("a:\nb: a\nc: a b\n"), [upward]);
        assert_eq!(
            faults("b: a\na:\nc: a b\n")[..1],
            ["crates.txt: a has no line above that of b"]
        );
    }

    #[test]
    fn the_table_has_all_arrows_and_no_others() {
        let found = faults("# a comment\na:\nb:\nc: a b\n");
        assert!(
            found.contains(&"b depends on a, which crates.txt does not have".to_owned()),
            "{found:?}"
        );
        let found = faults("a:\nx:\nb: a x\nc: a b\n");
        assert!(
            found.contains(&"crates.txt: b does not depend on x: remove the word".to_owned()),
            "{found:?}"
        );
        let found = faults("a:\nb: a\n");
        assert!(
            found.contains(&"crates.txt has no line for c".to_owned()),
            "{found:?}"
        );
    }
}
