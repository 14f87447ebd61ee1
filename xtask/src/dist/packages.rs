//! The packages that a release contains: their licences, and a bill of materials.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::component;
use crate::build::cargo;
use crate::cmd;

/// The crates whose programs are in a release.
const ROOTS: [&str; 2] = ["sm-cli", "sm-guest-agent"];

/// A package from a registry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Package {
    name: String,
    version: String,
    licence: String,
    directory: PathBuf,
}

/// Returns the packages of other projects that are linked into the programs for `target`,
/// by name.
pub(super) fn of_program(target: &str) -> Result<BTreeSet<Package>> {
    let mut metadata = cargo(["metadata", "--format-version", "1", "--locked"]);
    let text = cmd::text(metadata.args(["--filter-platform", target]))?;
    let metadata: Value = serde_json::from_str(&text).context("cannot parse cargo's metadata")?;
    linked(&metadata).context("cargo's metadata lacks a member")
}

fn linked(metadata: &Value) -> Option<BTreeSet<Package>> {
    let packages: BTreeMap<&str, &Value> = metadata["packages"]
        .as_array()?
        .iter()
        .filter_map(|package| Some((package["id"].as_str()?, package)))
        .collect();
    let nodes: BTreeMap<&str, &Value> = metadata["resolve"]["nodes"]
        .as_array()?
        .iter()
        .filter_map(|node| Some((node["id"].as_str()?, node)))
        .collect();
    let is_root = |package: &Value| ROOTS.iter().any(|root| package["name"] == *root);
    let mut pending: Vec<&str> = packages
        .iter()
        .filter(|(_, package)| is_root(package))
        .map(|(id, _)| *id)
        .collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = pending.pop() {
        if !seen.insert(id) {
            continue;
        }
        for dependency in nodes.get(id)?["deps"].as_array()? {
            // Neither of development nor of build scripts, whose code is not in the
            // program.
            let mut kinds = dependency["dep_kinds"].as_array()?.iter();
            if kinds.any(|kind| kind["kind"].is_null()) {
                pending.push(dependency["pkg"].as_str()?);
            }
        }
    }
    let of_others = seen.into_iter().filter_map(|id| packages.get(id));
    of_others
        .filter(|package| !package["source"].is_null())
        .map(|package| {
            let text = |key: &str| package[key].as_str().map(str::to_owned);
            let manifest = PathBuf::from(package["manifest_path"].as_str()?);
            Some(Package {
                name: text("name")?,
                version: text("version")?,
                licence: text("license").unwrap_or_else(|| "NOASSERTION".to_owned()),
                directory: manifest.parent()?.to_owned(),
            })
        })
        .collect()
}

/// Returns the texts of all licences, each text once with the packages that it is of.
pub(super) fn licences(packages: &BTreeSet<Package>) -> Result<String> {
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut report = String::from("sm contains the following packages.\n\n");
    for package in packages {
        let Package {
            name,
            version,
            licence,
            directory,
        } = package;
        report.push_str(&format!("{name} {version}: {licence}\n"));
        for file in licence_files(directory)? {
            let bytes =
                fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            texts
                .entry(text)
                .or_default()
                .push(format!("{name} {version}"));
        }
    }
    for (text, of) in texts {
        let line = "-".repeat(78);
        report.push_str(&format!("\n{line}\n{}\n\n{text}\n", of.join(", ")));
    }
    Ok(report)
}

fn licence_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let name = name.to_ascii_uppercase();
            let starts = [
                "LICENSE",
                "LICENCE",
                "COPYING",
                "COPYRIGHT",
                "NOTICE",
                "UNLICENSE",
            ];
            path.is_file() && starts.iter().any(|start| name.starts_with(start))
        })
        .collect();
    found.sort();
    Ok(found)
}

/// Returns a bill of materials in CycloneDX 1.5 (ECMA-424), without a serial number and a
/// time, which would differ between equal releases.
pub(super) fn sbom(packages: &BTreeSet<Package>, version: &str, kernel: &Value) -> Value {
    let mut components = vec![component(
        "operating-system",
        "linux",
        kernel["version"].as_str().unwrap_or("unknown"),
        "GPL-2.0-only WITH Linux-syscall-note",
    )];
    for package in packages {
        let mut entry = component("library", &package.name, &package.version, &package.licence);
        let purl = format!("pkg:cargo/{}@{}", package.name, package.version);
        entry["purl"] = purl.into();
        components.push(entry);
    }
    json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": component("application", "sm", version, "Apache-2.0") },
        "components": components,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, source: Option<&str>) -> Value {
        json!({
            "id": name, "name": name, "version": "1.0.0", "license": "MIT",
            "source": source, "manifest_path": format!("/registry/{name}/Cargo.toml"),
        })
    }

    fn node(id: &str, deps: &[(&str, Option<&str>)]) -> Value {
        let deps: Vec<_> = deps
            .iter()
            .map(|(pkg, kind)| json!({ "pkg": pkg, "dep_kinds": [{ "kind": kind }] }))
            .collect();
        json!({ "id": id, "deps": deps })
    }

    #[test]
    fn only_what_is_linked_is_listed() {
        let registry = Some("registry");
        let metadata = json!({
            "packages": [
                package("sm-cli", None), package("sm-runtime", None), package("xtask", None),
                package("used", registry), package("below", registry),
                package("builds", registry), package("tests", registry),
                package("elsewhere", registry),
            ],
            "resolve": { "nodes": [
                node("sm-cli", &[("sm-runtime", None), ("tests", Some("dev"))]),
                node("sm-runtime", &[("used", None), ("builds", Some("build"))]),
                node("used", &[("below", None)]),
                node("below", &[]), node("builds", &[]), node("tests", &[]),
                node("xtask", &[("elsewhere", None)]), node("elsewhere", &[]),
            ] },
        });
        let found = linked(&metadata).unwrap();
        let names: Vec<_> = found.iter().map(|package| package.name.as_str()).collect();
        assert_eq!(names, ["below", "used"]);

        let sbom = sbom(&found, "0.1.0", &json!({ "version": "6.12" }));
        assert_eq!(sbom["components"][0]["version"], "6.12");
        assert_eq!(sbom["components"][2]["purl"], "pkg:cargo/used@1.0.0");
    }

    #[test]
    fn each_text_is_there_once_with_all_that_it_is_of() {
        let dir = tempfile::tempdir().unwrap();
        let packages: BTreeSet<Package> = ["a", "b"]
            .map(|name| {
                let directory = dir.path().join(name);
                fs::create_dir(&directory).unwrap();
                fs::write(directory.join("LICENSE-MIT"), "the text\n").unwrap();
                fs::write(directory.join("README.md"), "no licence").unwrap();
                Package {
                    name: name.to_owned(),
                    version: "1.0.0".to_owned(),
                    licence: "MIT".to_owned(),
                    directory,
                }
            })
            .into();
        let text = licences(&packages).unwrap();
        assert_eq!(text.matches("the text").count(), 1);
        assert!(text.contains("a 1.0.0, b 1.0.0"));
        assert!(!text.contains("no licence"));
    }
}
