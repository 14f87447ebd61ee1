//! Distribution kernels: unpacked into the cache, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::process::{output, run, step};
use crate::{apt, paths};

/// An unpacked kernel package.
pub struct Stock {
    /// `vmlinuz-VERSION`.
    pub image: PathBuf,
    /// `lib/modules/VERSION`, with `modules.dep`.
    pub modules: PathBuf,
}

/// The distribution's small kernel for clouds, for use as a guest kernel.
pub fn guest_kernel() -> Result<PathBuf> {
    Ok(unpack("linux-image-cloud-amd64")?.image)
}

/// The distribution's generic kernel, for the lab.
pub fn generic() -> Result<Stock> {
    unpack("linux-image-amd64")
}

fn unpack(meta: &str) -> Result<Stock> {
    let cache = paths::cache("stock")?;
    let target = cache.join(meta);
    if !target.is_dir() {
        apt::ensure(&["kmod"])?;
        apt::refresh()?;
        let package = dependency(meta)?;
        step(&format!("Unpacking {package}"));
        let draft = paths::draft(&cache)?;
        run(Command::new("apt-get")
            .args(["-qq", "download", &package])
            .current_dir(draft.path())
            .stderr(std::process::Stdio::null()))?;
        let archive = find(draft.path(), ".deb")?;
        run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(draft.path()))?;
        fs::remove_file(archive)?;
        let version = only_entry(&draft.path().join("lib/modules"))?;
        run(Command::new("/sbin/depmod").arg("-b").arg(draft.path()).arg(version))?;
        paths::publish(draft, &target)?;
    }
    let version = only_entry(&target.join("lib/modules"))?;
    Ok(Stock {
        image: target.join("boot").join(format!("vmlinuz-{version}")),
        modules: target.join("lib/modules").join(version),
    })
}

/// The package that a meta package stands for now.
fn dependency(meta: &str) -> Result<String> {
    let text = output(Command::new("apt-cache").args(["depends", meta]))?;
    text.lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
        .with_context(|| format!("apt does not know the package {meta}"))
}

fn find(directory: &Path, suffix: &str) -> Result<PathBuf> {
    fs::read_dir(directory)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().ends_with(suffix))
        .with_context(|| format!("nothing ending in {suffix} in {}", directory.display()))
}

fn only_entry(directory: &Path) -> Result<String> {
    let entry = fs::read_dir(directory)
        .with_context(|| format!("cannot list {}", directory.display()))?
        .next()
        .with_context(|| format!("{} is empty", directory.display()))??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}
