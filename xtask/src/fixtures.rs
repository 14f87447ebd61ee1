//! The images that the end-to-end tests run, made from distribution packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::process::{exists, run, run_logged, step};
use crate::{apt, paths};

/// Packages that make and check images.
pub const TOOLS: [&str; 5] = ["busybox-static", "erofs-utils", "mmdebstrap", "skopeo", "umoci"];

/// Directory of OCI layouts `busybox`, `debian`, `python`.
pub fn all() -> Result<PathBuf> {
    apt::ensure(&TOOLS)?;
    let cache = paths::cache("fixtures")?;
    let target = cache.join("v1");
    if target.is_dir() {
        return Ok(target);
    }
    let draft = paths::draft(&cache)?;
    busybox(draft.path())?;
    debian(draft.path(), &cache)?;
    paths::publish(draft, &target)?;
    Ok(target)
}

fn umoci(directory: &Path, arguments: &[&str]) -> Result<()> {
    run(Command::new("umoci").args(arguments).current_dir(directory))
}

/// A new layout with one image of no layers, tagged `latest`.
fn layout(directory: &Path, name: &str) -> Result<()> {
    umoci(directory, &["init", "--layout", name])?;
    umoci(directory, &["new", "--image", &format!("{name}:latest")])
}

/// Only busybox and what it is called by.
pub fn busybox(directory: &Path) -> Result<()> {
    step("Making the busybox image");
    layout(directory, "busybox")?;
    umoci(directory, &["unpack", "--image", "busybox:latest", "bundle"])?;
    let root = directory.join("bundle/rootfs");
    for name in ["bin", "etc", "tmp", "root"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    run(Command::new("chroot")
        .arg(&root)
        .args(["/bin/busybox", "--install", "-s", "/bin"]))?;
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;
    umoci(directory, &["repack", "--image", "busybox:latest", "bundle"])?;
    let config = ["config", "--image", "busybox:latest"];
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let settings = ["--config.cmd", "sh", "--config.env", path];
    umoci(directory, &[config.as_slice(), &settings].concat())?;
    fs::remove_dir_all(directory.join("bundle"))?;
    Ok(())
}

/// A Debian root in three layers, the second and third with whiteouts, and the
/// same with Python.
fn debian(directory: &Path, cache: &Path) -> Result<()> {
    if !exists("mmdebstrap") {
        bail!("mmdebstrap is not installed");
    }
    for (name, packages) in [("debian", "procps"), ("python", "python3-minimal")] {
        step(&format!("Making the {name} image"));
        let tree = directory.join("tree");
        run_logged(
            Command::new("mmdebstrap")
                .args(["--variant=minbase", "--mode=root", "--format=directory"])
                .args(["--aptopt=Acquire::Languages \"none\""])
                .arg(format!("--include={packages}"))
                .arg(codename()?)
                .arg(&tree),
            &cache.join("mmdebstrap.log"),
        )?;
        layout(directory, name)?;
        let image = format!("{name}:latest");
        umoci(directory, &["unpack", "--image", &image, "bundle"])?;
        let root = directory.join("bundle/rootfs");
        fs::remove_dir(&root)?;
        fs::rename(&tree, &root)?;
        umoci(directory, &["repack", "--refresh-bundle", "--image", &image, "bundle"])?;
        // Whiteouts: of a directory with contents, and of a file.
        fs::remove_dir_all(root.join("usr/share/doc"))?;
        fs::write(root.join("second-layer"), "2\n")?;
        umoci(directory, &["repack", "--refresh-bundle", "--image", &image, "bundle"])?;
        fs::remove_file(root.join("second-layer"))?;
        fs::create_dir_all(root.join("usr/share/doc/again"))?;
        umoci(directory, &["repack", "--refresh-bundle", "--image", &image, "bundle"])?;
        umoci(directory, &["config", "--image", &image, "--config.cmd", "bash"])?;
        fs::remove_dir_all(directory.join("bundle"))?;
    }
    Ok(())
}

fn codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release")?;
    let line = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    match line {
        Some(name) => Ok(name.trim_matches('"').to_owned()),
        None => bail!("this is not a Debian release with a code name"),
    }
}
