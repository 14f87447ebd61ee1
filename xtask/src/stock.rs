//! The distribution's cloud kernel and its modules, unpacked into the cache without being
//! installed.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::apt::Apt;
use crate::deb::Deb;
use crate::{cmd, modules, paths};

/// Modules that `sm` may add to the initramfs (with their dependencies by `modules.dep`),
/// so that the cache does not contain every driver.
const GUEST_MODULES: [&str; 16] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "virtio_console",
    "vmw_vsock_virtio_transport",
    "erofs",
    "overlay",
    "ext4",
    "vmgenid",
    "loop",
    "fuse",
    "virtiofs",
    "crc32c_generic",
    "crc32c_intel",
];

pub(crate) const PACKAGES: [&str; 3] = ["kmod", "xz-utils", "zstd"];

/// Returns the distribution's cloud kernel: `vmlinuz` with `modules/` (a module tree with
/// its `modules.dep`) beside it.
pub(crate) fn kernel(apt: &Apt) -> Result<PathBuf> {
    let package = apt.depends_on("linux-image-cloud-amd64", "linux-image-")?;
    let version = apt
        .candidate(&package)?
        .with_context(|| format!("apt does not know {package}"))?;
    let kernels = paths::cache("kernels")?;
    let done = kernels.join(format!("stock-{}", version.replace(['/', ':'], "_")));
    let image = done.join("vmlinuz");
    let Some(_lock) = paths::lock_unless(&image, &kernels)? else {
        return Ok(image);
    };
    apt.ensure(&PACKAGES)?;
    let deb = Deb::fetch(&format!("{package}={version}"))?;
    let work = tempfile::tempdir_in(paths::cache("tmp")?)?;
    cmd::step(format_args!("unpacking {package}"));
    deb.unpack(work.path())?;
    let release = modules::release(work.path())?;
    modules::index(work.path(), &release)?;

    let fresh = work.path().join("stock");
    let tree = work.path().join("lib/modules").join(&release);
    let dep = fs::read_to_string(tree.join("modules.dep"))?;
    let mut list = String::new();
    for file in modules::load_order(&dep, &GUEST_MODULES) {
        let target = fresh.join("modules").join(&file);
        fs::create_dir_all(target.parent().context("a module has no directory")?)?;
        fs::copy(tree.join(&file), &target)?;
        let line = dep
            .lines()
            .find(|line| line.split_once(':').is_some_and(|(name, _)| name == file));
        list.extend(line.into_iter().chain(["\n"]));
    }
    fs::write(fresh.join("modules/modules.dep"), list)?;
    let from = work.path().join(format!("boot/vmlinuz-{release}"));
    // A rename, unlike a copy, preserves the old time stamp, so that it never counts as
    // newer than the tuned kernel.
    fs::rename(from, fresh.join("vmlinuz"))?;
    fs::rename(&fresh, &done).with_context(|| format!("cannot publish {:?}", done.display()))?;
    Ok(image)
}
