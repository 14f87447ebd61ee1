//! Images by many tools, each with a listing of the result of `umoci unpack`, with which
//! tests compare the guest's view.
//!
//! Every image contains `sm-tree`, which lists all files.

mod odd;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use crate::apt::{self, Apt};
use crate::build::{self, cargo};
use crate::{cmd, fixtures, paths};

pub(crate) const PACKAGES: [&str; 6] = [
    "attr",
    "buildah",
    "busybox-static",
    "libcap2-bin",
    "skopeo",
    "umoci",
];
/// Part of the cache's name; it must be raised when the images change.
const RECIPE: &str = "2";
const TOOL: &str = "sm-tree";

/// Returns the directory of the images, with a file `list`: a name and a reference
/// relative to the directory per line. `NAME.tree` lists the result of `umoci unpack`.
/// `None` without root, which is needed to create devices and other special files.
pub(crate) fn create(apt: &Apt) -> Result<Option<PathBuf>> {
    let cache = paths::cache("fidelity")?;
    let tool = build::tree(apt)?;
    let tool_bytes = fs::read(&tool)?;
    let key = paths::fingerprint(&[RECIPE.as_bytes(), tool_bytes.as_slice()]);
    let done = cache.join(key);
    if !apt::is_root() && !done.exists() {
        cmd::note("not root: images of odd files are not compared (sudo -E cargo xtask fixtures)");
        return Ok(None);
    }
    let Some(_lock) = paths::lock_unless(&done, &cache)? else {
        return Ok(Some(done));
    };
    apt.ensure(&PACKAGES)?;
    let base = fixtures::create(apt)?;
    // Images of earlier recipes are not used any more.
    for old in fs::read_dir(&cache)?
        .flatten()
        .filter(|old| old.path().is_dir())
    {
        paths::remove(&old.path())?;
    }
    let builder = FidelityBuilder::new(tool)?;
    builder.all(&base)?;
    fs::write(builder.images.join("list"), builder.list.borrow().join(""))?;
    fs::rename(&builder.images, &done)
        .with_context(|| format!("cannot publish {:?}", done.display()))?;
    Ok(Some(done))
}

struct FidelityBuilder {
    directory: TempDir,
    images: PathBuf,
    tool: PathBuf,
    list: std::cell::RefCell<Vec<String>>,
}

impl FidelityBuilder {
    fn new(tool: PathBuf) -> Result<Self> {
        let directory = tempfile::tempdir_in(paths::cache("tmp")?)?;
        let images = directory.path().join("images");
        fs::create_dir(&images)?;
        Ok(Self {
            directory,
            images,
            tool,
            list: std::cell::RefCell::default(),
        })
    }

    fn all(&self, base: &Path) -> Result<()> {
        for name in ["debian", "python", "nginx"] {
            cmd::step(format_args!(
                "making the image {name} with {TOOL} in it (umoci)"
            ));
            self.copied(base, name)?;
        }
        cmd::step("making images from these with other tools");
        self.buildah()?;
        self.single_layer()?;
        self.distroless()?;
        self.own_writer()?;
        self.skopeo()?;
        cmd::step("making images of odd and of many files");
        self.many_layers()?;
        self.small_files()?;
        self.large_file()?;
        self.odd_files()
    }

    /// Records an image and the listing of umoci. `layout` is that of the same image.
    fn note(&self, name: &str, reference: &str, layout: &str) -> Result<()> {
        let bundle = self.directory.path().join("bundle");
        paths::remove(&bundle)?;
        let image = format!("{layout}:latest");
        self.umoci(&["unpack", "--image", &image], &[&bundle])?;
        let tree = fs::File::create(self.images.join(format!("{name}.tree")))?;
        let mut list = Command::new(&self.tool);
        cmd::check(list.arg(bundle.join("rootfs")).stdout(tree))?;
        self.list.borrow_mut().push(format!("{name} {reference}\n"));
        paths::remove(&bundle)
    }

    /// Copies an image of the other tests, with the tool in a layer of its own.
    fn copied(&self, base: &Path, name: &str) -> Result<()> {
        self.run("cp", &["-a"], &[&base.join(name), &self.images])?;
        self.finish(name)
    }

    /// Adds the tool to the image of a layout.
    fn finish(&self, name: &str) -> Result<()> {
        let image = format!("{name}:latest");
        self.umoci(
            &["insert", "--image", &image],
            &[&self.tool, Path::new("/sm-tree")],
        )?;
        self.umoci(&["gc", "--layout", name], &[])?;
        self.note(name, &format!("oci:{name}:latest"), name)
    }

    /// Creates a layout with an image without layers.
    fn empty(&self, name: &str) -> Result<()> {
        self.umoci(&["init", "--layout", name], &[])?;
        self.umoci(&["new", "--image", &format!("{name}:latest")], &[])
    }

    fn add_layer(&self, name: &str, tar: &Path) -> Result<()> {
        let image = format!("{name}:latest");
        self.umoci(&["raw", "add-layer", "--image", &image], &[tar])
    }

    /// Adds a directory as a layer, with GNU tar.
    fn add_directory(&self, name: &str, root: &Path) -> Result<()> {
        let tar = self.directory.path().join("layer.tar");
        let mut command = cmd::command("tar", ["--format=pax", "--sort=name"]);
        command
            .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-C"])
            .arg(root)
            .arg("-cf")
            .arg(&tar)
            .arg(".");
        cmd::check(&mut command)?;
        self.add_layer(name, &tar)?;
        fs::remove_file(&tar).context("cannot remove a tar file")
    }

    /// Creates two layers with buildah: files added, changed and removed.
    fn buildah(&self) -> Result<()> {
        let storage = self.directory.path().join("containers");
        let (root, run) = (storage.join("root"), storage.join("run"));
        let layout = self.images.join("buildah");
        let buildah = |arguments: &[&str]| -> Result<String> {
            let mut command = cmd::command("buildah", ["--storage-driver", "vfs"]);
            command.arg("--root").arg(&root).arg("--runroot").arg(&run);
            cmd::text(command.args(arguments).stderr(Stdio::null()))
        };
        let first = buildah(&["from", "scratch"])?;
        let first = first.trim();
        let mounted = PathBuf::from(buildah(&["mount", first])?.trim());
        fixtures::busybox_tree(&mounted)?;
        fs::create_dir_all(mounted.join("srv/old"))?;
        fs::write(mounted.join("srv/old/gone"), "gone")?;
        fs::write(mounted.join("srv/changed"), "1")?;
        buildah(&["umount", first])?;
        buildah(&["commit", "--quiet", first, "first"])?;
        let second = buildah(&["from", "--pull-never", "localhost/first"])?;
        let second = second.trim();
        let mounted = PathBuf::from(buildah(&["mount", second])?.trim());
        fs::remove_dir_all(mounted.join("srv/old"))?;
        fs::write(mounted.join("srv/changed"), "2")?;
        fs::write(mounted.join("srv/new"), "new")?;
        buildah(&["umount", second])?;
        let target = format!("oci:{}:latest", layout.display());
        buildah(&["commit", "--quiet", second, &target])?;
        self.finish("buildah")
    }

    /// Creates an image of Debian in one layer, as kaniko with `--single-snapshot` does.
    fn single_layer(&self) -> Result<()> {
        let bundle = self.directory.path().join("whole");
        self.umoci(&["unpack", "--image", "debian:latest"], &[&bundle])?;
        self.empty("single")?;
        self.add_directory("single", &bundle.join("rootfs"))?;
        paths::remove(&bundle)?;
        self.finish("single")
    }

    /// Creates an image without shell and package manager: only the needs of a static program.
    fn distroless(&self) -> Result<()> {
        let root = self.directory.path().join("distroless");
        for name in [
            "etc/ssl/certs",
            "home/nonroot",
            "tmp",
            "usr/bin",
            "usr/lib",
            "var/lib",
        ] {
            fs::create_dir_all(root.join(name))?;
        }
        for name in ["bin", "lib"] {
            std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name))?;
        }
        fs::write(
            root.join("etc/passwd"),
            "nonroot:x:65532:65532::/home/nonroot:\n",
        )?;
        fs::write(root.join("etc/group"), "nonroot:x:65532:\n")?;
        fs::write(root.join("etc/os-release"), "ID=distroless-like\n")?;
        self.run(
            "chown",
            &["-R", "65532:65532"],
            &[&root.join("home/nonroot")],
        )?;
        self.run("chmod", &["1777"], &[&root.join("tmp")])?;
        self.empty("distroless")?;
        self.add_directory("distroless", &root)?;
        self.finish("distroless")
    }

    /// Creates an image with the writer of `sm-image`.
    fn own_writer(&self) -> Result<()> {
        let root = self.directory.path().join("own");
        fixtures::busybox_tree(&root)?;
        let mut command = cargo(["run", "--quiet", "--locked", "-p", "sm-image", "--example"]);
        command
            .args(["mkimage", "--"])
            .arg(self.images.join("own"))
            .arg("latest")
            .arg(&root)
            .stdout(Stdio::null());
        cmd::check(&mut command)?;
        self.finish("own")
    }

    /// Copies the images with skopeo into other formats: Docker's archive, an archive of
    /// a layout, and layers compressed by Zstandard.
    fn skopeo(&self) -> Result<()> {
        let copy = |arguments: &[&str]| {
            self.run("skopeo", &[&["copy", "--quiet"], arguments].concat(), &[])
        };
        copy(&[
            "oci:debian:latest",
            "docker-archive:debian.tar:team/debian:v1",
        ])?;
        self.note("docker-archive", "docker-archive:debian.tar", "debian")?;
        copy(&["oci:nginx:latest", "oci-archive:nginx.oci.tar:latest"])?;
        self.note("oci-archive", "oci-archive:nginx.oci.tar:latest", "nginx")?;
        copy(&[
            "--dest-compress",
            "--dest-compress-format",
            "zstd",
            "oci:python:latest",
            "oci:zstd:latest",
        ])?;
        self.note("zstd", "oci:zstd:latest", "python")
    }

    fn umoci(&self, arguments: &[&str], paths: &[&Path]) -> Result<()> {
        self.run("umoci", arguments, paths)
    }

    fn run(&self, program: &str, arguments: &[&str], paths: &[&Path]) -> Result<()> {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .args(paths)
            .current_dir(&self.images)
            .stdout(Stdio::null());
        cmd::check(&mut command)
    }
}
