//! Images from packages of the distribution. The demo's is created by our own writer;
//! those of the end-to-end tests by other tools, so that they verify ours.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;

use crate::apt::{self, Apt};
use crate::build::cargo;
use crate::{cmd, paths};

/// Tools that create the images.
pub(crate) const PACKAGES: [&str; 6] = [
    "busybox-static",
    "erofs-utils",
    "mmdebstrap",
    "rsync",
    "skopeo",
    "umoci",
];

/// Clients with which the tests access servers.
pub(crate) const CLIENTS: [&str; 3] = ["curl", "netcat-openbsd", "wrk"];

/// Tools for becoming root of a user namespace.
pub(crate) const ROOTLESS_PACKAGES: [&str; 2] = ["uidmap", "util-linux"];

/// Part of the cache's name; it must be raised when the images change.
const RECIPE: &str = "2";
const DEMO_RECIPE: &str = "2";
const DOCKER_RECIPE: &str = "1";
/// An engine that runs in a guest, and tools for the kernel features that it needs.
const DOCKER: &str = "docker.io,iptables,nftables,ipvsadm,wireguard-tools,iproute2,procps";
const SYSTEMD_RECIPE: &str = "1";
/// An init system that is controlled over D-Bus, as on Debian.
const SYSTEMD: &str = "systemd-sysv,dbus,procps";
const WORK_RECIPE: &str = "1";
/// Databases and build tools, for tests of real work on disks and directories.
const WORK: &str = "postgresql,postgresql-contrib,mariadb-server,redis-server,git,gcc,libc6-dev,make,sqlite3,procps";
/// Large files that no test uses.
const UNUSED: [&str; 3] = ["usr/bin/ctr", "usr/share/doc", "var/lib/apt/lists"];
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Configuration of the image `nginx`, as in Docker's official image.
const NGINX: [&str; 10] = [
    "--config.cmd",
    "nginx",
    "--config.cmd",
    "-g",
    "--config.cmd",
    "daemon off;",
    "--config.exposedports",
    "80/tcp",
    "--config.stopsignal",
    "SIGQUIT",
];

/// Returns the directory of the OCI layouts `busybox`, `debian`, `python` and `nginx`,
/// and of the archives `busybox.oci.tar` and `busybox.docker.tar`.
pub(crate) fn create(apt: &Apt) -> Result<PathBuf> {
    let fixtures = paths::cache("fixtures")?;
    let done = fixtures.join(format!("v{RECIPE}"));
    let Some(lock) = paths::lock_unless(&done, &fixtures)? else {
        return Ok(done);
    };
    apt.ensure(&PACKAGES)?;
    if !apt::is_root() {
        apt.ensure(&ROOTLESS_PACKAGES)?;
        drop(lock);
        return as_root_of_a_namespace(done);
    }
    let builder = FixtureBuilder::new()?;
    cmd::step("making the test image busybox");
    builder.busybox()?;
    builder.archives()?;
    cmd::step("making the test image debian (mmdebstrap)");
    builder.debian()?;
    cmd::step("making the test image python (mmdebstrap)");
    let python = ["--config.cmd", "python3"];
    builder.derived("python", "procps,python3-minimal", &python)?;
    cmd::step("making the test image nginx (mmdebstrap)");
    builder.derived("nginx", "procps,nginx-light", &NGINX)?;
    builder.publish(&done)?;
    Ok(done)
}

/// Returns the directory of the OCI layout `docker`, for tests that are too slow for CI.
pub(crate) fn docker(apt: &Apt) -> Result<PathBuf> {
    of_packages(apt, "docker", DOCKER_RECIPE, DOCKER)
}

/// Returns the directory of the OCI layout `systemd`, for tests that are too slow for CI.
pub(crate) fn systemd(apt: &Apt) -> Result<PathBuf> {
    of_packages(apt, "systemd", SYSTEMD_RECIPE, SYSTEMD)
}

/// Returns the directory of the OCI layout `work`, for tests that are too slow for CI.
pub(crate) fn work(apt: &Apt) -> Result<PathBuf> {
    of_packages(apt, "work", WORK_RECIPE, WORK)
}

/// Returns the directory of the OCI layout `name`: Debian with `packages`, in one layer.
fn of_packages(apt: &Apt, name: &str, recipe: &str, packages: &str) -> Result<PathBuf> {
    let fixtures = paths::cache("fixtures")?;
    let done = fixtures.join(format!("{name}-v{recipe}"));
    let Some(lock) = paths::lock_unless(&done, &fixtures)? else {
        return Ok(done);
    };
    apt.ensure(&PACKAGES)?;
    if !apt::is_root() {
        apt.ensure(&ROOTLESS_PACKAGES)?;
        drop(lock);
        return as_root_of_a_namespace(done);
    }
    let builder = FixtureBuilder::new()?;
    cmd::step(format_args!("making the test image {name} (mmdebstrap)"));
    builder.of_packages(name, packages)?;
    builder.publish(&done)?;
    Ok(done)
}

/// Creates the images as root of a user namespace, because they contain files of many
/// owners.
fn as_root_of_a_namespace(done: PathBuf) -> Result<PathBuf> {
    cmd::note("not root: making the images in a user namespace");
    let own = std::env::current_exe().context("cannot tell which program this is")?;
    let mut command = cmd::command("unshare", ["--user", "--map-root-user", "--map-auto"]);
    command.args(["--mount", "--pid", "--fork", "--"]);
    cmd::check(command.arg(own).arg("fixtures")).context(
        "the images for the end-to-end tests cannot be made without root; make them by \
         \"sudo -E cargo xtask fixtures\", once",
    )?;
    Ok(done)
}

/// Creates an OCI layout with busybox only, with our own `sm-image`.
pub(crate) fn demo_image(apt: &Apt) -> Result<PathBuf> {
    let demo = paths::cache("demo")?;
    let done = demo.join(format!("v{DEMO_RECIPE}"));
    let image = done.join("busybox");
    let Some(_lock) = paths::lock_unless(&image, &demo)? else {
        return Ok(image);
    };
    apt.ensure(&["busybox-static"])?;
    cmd::step("making the demo image");
    let builder = FixtureBuilder::new()?;
    let tree = builder.directory.path().join("tree");
    busybox_tree(&tree)?;
    let mut command = cargo(["run", "--quiet", "--locked", "-p", "sm-image", "--example"]);
    command
        .args(["mkimage", "--", "--cmd", "sh", "--env", PATH])
        .arg(builder.images.join("busybox"))
        .arg("latest")
        .arg(&tree)
        .stdout(Stdio::null());
    cmd::check(&mut command)?;
    builder.publish(&done)?;
    Ok(image)
}

/// Creates a root file system of one static binary and its links.
pub(crate) fn busybox_tree(root: &Path) -> Result<()> {
    for name in ["bin", "etc", "root", "tmp"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).context("cannot copy /bin/busybox")?;
    for applet in cmd::text(&mut cmd::command("/bin/busybox", ["--list"]))?.lines() {
        if applet != "busybox" {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))?;
        }
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\n")?;
    Ok(())
}

/// A temporary directory in which images are created before they are published.
struct FixtureBuilder {
    directory: TempDir,
    images: PathBuf,
}

impl FixtureBuilder {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir_in(paths::cache("tmp")?)
            .context("cannot make a temporary directory")?;
        let images = directory.path().join("images");
        fs::create_dir(&images)?;
        Ok(Self { directory, images })
    }

    fn publish(self, done: &Path) -> Result<()> {
        fs::rename(&self.images, done)
            .with_context(|| format!("cannot publish {:?}", done.display()))
    }

    /// Creates an image with one layer, of one static binary and its links.
    fn busybox(&self) -> Result<()> {
        let bundle = self.new_image("busybox")?;
        busybox_tree(&bundle.join("rootfs"))?;
        self.repack("busybox", &bundle)?;
        self.configure("busybox", &["--config.cmd", "sh"])
    }

    /// Writes the busybox image in the two archive formats.
    fn archives(&self) -> Result<()> {
        for (transport, tag) in [("oci", ""), ("docker", ":busybox:latest")] {
            self.quiet(
                cmd::command("skopeo", ["copy", "--quiet", "oci:busybox:latest"])
                    .arg(format!("{transport}-archive:busybox.{transport}.tar{tag}")),
            )?;
        }
        Ok(())
    }

    /// Creates Debian in layers: the system; changes and whiteouts of a directory, a file
    /// and a link; new files in place of whiteouts; an opaque directory.
    fn debian(&self) -> Result<()> {
        let bundle = self.new_image("debian")?;
        let root = bundle.join("rootfs");
        self.bootstrap(&bundle, "procps")?;
        self.repack("debian", &bundle)?;
        // Other images start from the same first layer.
        for other in ["python", "nginx"] {
            cmd::check(
                Command::new("cp")
                    .args(["-a", "debian", other])
                    .current_dir(&self.images),
            )?;
        }

        fs::remove_dir_all(root.join("usr/share/doc"))?;
        fs::remove_file(root.join("etc/os-release"))?;
        fs::write(root.join("etc/os-release"), "ID=fixture\n")?;
        fs::write(root.join("second-layer"), "2\n")?;
        fs::create_dir_all(root.join("opaque/old"))?;
        fs::write(root.join("opaque/old/hidden"), "hidden by layer 4\n")?;
        self.repack("debian", &bundle)?;

        fs::remove_file(root.join("second-layer"))?;
        fs::create_dir_all(root.join("usr/share/doc/again"))?;
        fs::write(root.join("usr/share/doc/again/README"), "back\n")?;
        self.repack("debian", &bundle)?;

        let opaque = self.directory.path().join("layer");
        fs::create_dir_all(opaque.join("opaque"))?;
        fs::write(opaque.join("opaque/.wh..wh..opq"), "")?;
        fs::write(opaque.join("opaque/new"), "visible\n")?;
        let layer = self.directory.path().join("layer.tar");
        cmd::check(
            cmd::command("tar", ["--numeric-owner", "--owner=0", "--group=0", "-C"])
                .arg(&opaque)
                .arg("-cf")
                .arg(&layer)
                .arg("opaque"),
        )?;
        self.umoci(&["raw", "add-layer", "--image", "debian:latest"], &[&layer])?;
        self.configure("debian", &["--config.cmd", "bash"])
    }

    /// Creates an image from the first layer of the Debian image, a copy of which exists,
    /// and packages as a second layer.
    fn derived(&self, name: &str, packages: &str, settings: &[&str]) -> Result<()> {
        let bundle = self.directory.path().join(format!("bundle-{name}"));
        let image = format!("{name}:latest");
        self.umoci(&["unpack", "--image", &image], &[&bundle])?;
        let other = self.directory.path().join(format!("{name}-tree"));
        fs::create_dir(&other)?;
        self.bootstrap(&other, packages)?;
        cmd::check(
            cmd::command("rsync", ["-aHAX", "--numeric-ids", "--delete"])
                .arg(other.join("rootfs/"))
                .arg(bundle.join("rootfs/")),
        )?;
        self.repack(name, &bundle)?;
        self.configure(name, settings)
    }

    /// Creates an image of Debian with packages, in one layer.
    fn of_packages(&self, name: &str, packages: &str) -> Result<()> {
        let bundle = self.new_image(name)?;
        self.bootstrap(&bundle, packages)?;
        let root = bundle.join("rootfs");
        for unused in UNUSED {
            let path = root.join(unused);
            if path.is_dir() {
                paths::remove(&path)?;
            } else if path.exists() {
                fs::remove_file(path)?;
            }
        }
        self.repack(name, &bundle)?;
        self.configure(name, &["--config.cmd", "bash"])
    }

    /// Installs a Debian system of this host's release in `directory/rootfs`.
    fn bootstrap(&self, directory: &Path, packages: &str) -> Result<()> {
        let (codename, source) = apt::release_source()?;
        let root = directory.join("rootfs");
        paths::remove(&root)?;
        let log = self.directory.path().join("mmdebstrap.log");
        let status = cmd::command("mmdebstrap", ["--mode=root", "--variant=minbase"])
            .args(["--format=directory", "--aptopt=Acquire::Languages \"none\""])
            // Large files that no test uses, and that are slow to process under
            // emulation.
            .args(["--dpkgopt=path-exclude=/usr/share/man/*"])
            .args(["--dpkgopt=path-exclude=/usr/share/locale/*"])
            .arg(format!("--include={packages}"))
            .arg(codename)
            .arg(&root)
            .arg(source)
            .stderr(fs::File::create(&log)?)
            .status()
            .context("cannot run mmdebstrap")?;
        if !status.success() {
            eprintln!("{}", fs::read_to_string(&log).unwrap_or_default());
            bail!("mmdebstrap failed: {status}");
        }
        Ok(())
    }

    /// Creates a layout with one empty image, and unpacks it to the returned directory.
    fn new_image(&self, name: &str) -> Result<PathBuf> {
        let image = format!("{name}:latest");
        let bundle = self.directory.path().join(format!("bundle-{name}"));
        self.umoci(&["init", "--layout", name], &[])?;
        self.umoci(&["new", "--image", &image], &[])?;
        self.umoci(&["unpack", "--image", &image], &[&bundle])?;
        Ok(bundle)
    }

    /// Adds the changes in the bundle as a layer.
    fn repack(&self, name: &str, bundle: &Path) -> Result<()> {
        let image = format!("{name}:latest");
        self.umoci(
            &["repack", "--refresh-bundle", "--image", &image],
            &[bundle],
        )
    }

    fn configure(&self, name: &str, settings: &[&str]) -> Result<()> {
        let image = format!("{name}:latest");
        let mut arguments = vec!["config", "--image", &image, "--config.env", PATH];
        arguments.extend(settings);
        self.umoci(&arguments, &[])?;
        self.umoci(&["gc", "--layout", name], &[])
    }

    fn umoci(&self, arguments: &[&str], paths: &[&Path]) -> Result<()> {
        self.quiet(cmd::command("umoci", arguments).args(paths))
    }

    fn quiet(&self, command: &mut Command) -> Result<()> {
        cmd::check(command.current_dir(&self.images).stdout(Stdio::null()))
    }
}
