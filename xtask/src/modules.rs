//! Kernel modules: the files of a set of modules, in load order.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cmd;

/// Creates `modules.dep` for the modules of `version` below `root`, if the package lacks
/// it.
pub(crate) fn index(root: &Path, version: &str) -> Result<()> {
    if root
        .join("lib/modules")
        .join(version)
        .join("modules.dep")
        .exists()
    {
        return Ok(());
    }
    cmd::check(
        Command::new("/sbin/depmod")
            .arg("-b")
            .arg(root)
            .arg(version),
    )
}

/// Returns the kernel's release: the only entry of `root/lib/modules`.
pub(crate) fn release(root: &Path) -> Result<String> {
    let directory = root.join("lib/modules");
    fs::read_dir(&directory)
        .with_context(|| format!("cannot list {:?}", directory.display()))?
        .flatten()
        .find_map(|entry| entry.file_name().into_string().ok())
        .with_context(|| format!("no modules in {:?}", directory.display()))
}

/// Returns the files of the wanted modules and their dependencies, dependencies first. A
/// name without a file is built in or does not exist, and is skipped.
pub(crate) fn load_order(modules_dep: &str, wanted: &[&str]) -> Vec<String> {
    let mut files = HashMap::new();
    for line in modules_dep.lines() {
        if let Some((file, needs)) = line.split_once(':') {
            files.insert(name(file), (file, needs));
        }
    }
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    for wanted in wanted {
        let Some((file, needs)) = files.get(&name(wanted)) else {
            continue;
        };
        // Entries of modules.dep list the transitive closure, the deepest dependency
        // last.
        for file in needs.split_whitespace().rev().chain([*file]) {
            if seen.insert(file) {
                order.push(file.to_owned());
            }
        }
    }
    order
}

/// Reads a module, decompressed.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|name| name.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => {
            return fs::read(path).with_context(|| format!("cannot read {:?}", path.display()));
        }
    };
    let output = Command::new(tool).arg("-dc").arg(path).output()?;
    if !output.status.success() {
        bail!("{tool} cannot unpack {:?}", path.display());
    }
    Ok(output.stdout)
}

/// Returns the file name for the decompressed module.
pub(crate) fn plain_name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    let stem = base.split(".ko").next().unwrap_or(base);
    format!("{stem}.ko")
}

/// Returns a module's name: its file name without extensions, with `_` for `-`.
fn name(file: &str) -> String {
    plain_name(file).trim_end_matches(".ko").replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::{load_order, plain_name};

    const DEP: &str = "kernel/a-b.ko.xz: kernel/c.ko kernel/d.ko\nkernel/c.ko: kernel/d.ko\n\
                       kernel/d.ko:\nkernel/e.ko: kernel/c.ko kernel/d.ko\n";

    #[test]
    fn dependencies_come_first_and_once() {
        assert_eq!(
            load_order(DEP, &["a_b", "built_in", "e"]),
            [
                "kernel/d.ko",
                "kernel/c.ko",
                "kernel/a-b.ko.xz",
                "kernel/e.ko"
            ]
        );
    }

    #[test]
    fn compression_is_not_part_of_the_plain_name() {
        assert_eq!(plain_name("kernel/a-b.ko.xz"), "a-b.ko");
        assert_eq!(plain_name("c.ko"), "c.ko");
    }
}
