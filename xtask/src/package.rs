//! `cargo xtask package`: whether each library could be published as it is.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::build::cargo;
use crate::{cmd, paths};

/// Members of a manifest that the pages of a registry show.
const TEXTS: [&str; 5] = [
    "description",
    "license",
    "documentation",
    "readme",
    "rust_version",
];
const LISTS: [&str; 2] = ["keywords", "categories"];
/// Files that come with every library, beside its sources and an example.
const FILES: [&str; 3] = ["README.md", "CHANGELOG.md", "LICENSE"];

/// Packages all libraries, and builds what was packaged if `build` is set: each from its
/// archive, with the others' archives as its dependencies.
pub(crate) fn run(build: bool) -> Result<()> {
    cmd::step("packaging the libraries");
    let arguments = ["metadata", "--format-version=1", "--no-deps", "--locked"];
    let metadata = cmd::text(&mut cargo(arguments))?;
    let metadata: Value =
        serde_json::from_str(&metadata).context("cargo's metadata is not valid")?;
    let packages = metadata["packages"].as_array();
    let packages = packages.context("cargo's metadata lists no packages")?;
    let (libraries, others): (Vec<_>, Vec<_>) = packages.iter().partition(is_published);
    if libraries.is_empty() {
        bail!("no crate of the workspace can be published");
    }

    let mut faults = Vec::new();
    for library in &libraries {
        let name = name(library);
        let mut list = cargo(["package", "--list", "--allow-dirty", "--locked", "-p"]);
        let files = cmd::text(list.arg(name))?;
        let files: BTreeSet<&str> = files.lines().collect();
        faults.extend(
            missing(library, &files)
                .into_iter()
                .map(|what| format!("{name}: {what}")),
        );
    }
    for fault in &faults {
        cmd::note(fault);
    }
    if !faults.is_empty() {
        bail!("{} things are missing in packages", faults.len());
    }

    let mut package = cargo([
        "package",
        "--workspace",
        "--locked",
        "--allow-dirty",
        "--quiet",
    ]);
    for other in others {
        package.args(["--exclude", name(other)]);
    }
    if !build {
        // Dependencies are in the lock file: nothing is asked of a registry.
        package.args(["--no-verify", "--offline"]);
    }
    cmd::check(&mut package)?;
    if libraries
        .iter()
        .any(|library| !has_text(library, "repository"))
    {
        cmd::note("the manifests name no repository: there is none yet");
    }
    cmd::note(format_args!(
        "{} packages are in {}",
        libraries.len(),
        package_directory().display()
    ));
    Ok(())
}

/// The directory that cargo writes archives into.
fn package_directory() -> std::path::PathBuf {
    paths::target().join("package")
}

/// Returns whether a package's manifest allows publishing it.
fn is_published(package: &&Value) -> bool {
    package["publish"].is_null()
}

fn name(package: &Value) -> &str {
    package["name"].as_str().unwrap_or_default()
}

fn has_text(package: &Value, member: &str) -> bool {
    package[member]
        .as_str()
        .is_some_and(|text| !text.is_empty())
}

/// Returns what a package with these files lacks.
fn missing(package: &Value, files: &BTreeSet<&str>) -> Vec<String> {
    let texts = TEXTS.iter().filter(|member| !has_text(package, member));
    let lists = LISTS
        .iter()
        .filter(|member| package[**member].as_array().is_none_or(Vec::is_empty));
    let members = texts
        .chain(lists)
        .map(|member| format!("its manifest has no {member}"));
    let absent = FILES.iter().filter(|file| !files.contains(**file));
    let absent = absent.map(|file| format!("the package has no {file}"));
    let mut faults: Vec<String> = members.chain(absent).collect();
    let is_example = |file: &&str| file.starts_with("examples/") && is_rust(file);
    if !files.iter().any(is_example) {
        faults.push("the package has no example".to_owned());
    }
    faults
}

fn is_rust(file: &str) -> bool {
    Path::new(file)
        .extension()
        .is_some_and(|extension| extension == "rs")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::{is_published, missing};

    fn complete() -> Value {
        json!({
            "name": "whole", "description": "Something.", "license": "Apache-2.0",
            "documentation": "https://docs.rs/whole", "readme": "README.md",
            "rust_version": "1.90", "keywords": ["a"], "categories": ["b"],
            "publish": null,
        })
    }

    const FILES: [&str; 5] = [
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "examples/use.rs",
        "src/lib.rs",
    ];

    #[test]
    fn a_complete_package_lacks_nothing() {
        assert_eq!(missing(&complete(), &BTreeSet::from(FILES)), [""; 0]);
    }

    #[test]
    fn each_absent_member_and_file_is_named() {
        for (member, empty) in [
            ("description", json!("")),
            ("rust_version", Value::Null),
            ("keywords", json!([])),
        ] {
            let mut package = complete();
            package[member] = empty;
            let faults = missing(&package, &BTreeSet::from(FILES));
            assert_eq!(faults, [format!("its manifest has no {member}")]);
        }
        for file in ["CHANGELOG.md", "LICENSE", "README.md"] {
            let files = FILES.into_iter().filter(|other| *other != file).collect();
            let faults = missing(&complete(), &files);
            assert_eq!(faults, [format!("the package has no {file}")]);
        }
        let files = FILES
            .into_iter()
            .filter(|file| !file.contains("use.rs"))
            .collect();
        assert_eq!(missing(&complete(), &files), ["the package has no example"]);
    }

    #[test]
    fn crates_of_the_repository_alone_are_left_out() {
        assert!(is_published(&&complete()));
        let mut package = complete();
        package["publish"] = json!([]);
        assert!(!is_published(&&package));
    }
}
