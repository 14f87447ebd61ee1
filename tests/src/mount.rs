//! Mounts for tests in the lab.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A mount that is unmounted when dropped.
#[derive(Debug)]
pub struct Mount(PathBuf);

impl Mount {
    /// Runs `mount ARGUMENTS AT` after creating the directory.
    ///
    /// # Panics
    /// The mount fails.
    #[must_use]
    pub fn new(arguments: &[&str], at: &Path) -> Self {
        std::fs::create_dir_all(at).expect("a directory to mount on");
        let mut mount = Command::new("mount");
        mount.args(arguments).arg(at);
        assert!(mount.status().expect("mount runs").success());
        Self(at.to_owned())
    }

    /// Creates an ext4 file system of `gib` GiB in a sparse file beside `at`, with a
    /// journal, delayed allocation and a page cache, like those of disks.
    ///
    /// # Panics
    /// The file system cannot be created or mounted.
    #[must_use]
    pub fn ext4(gib: u64, at: &Path) -> Self {
        let disk = at.with_extension("ext4");
        let file = std::fs::File::create(&disk).expect("a file for the file system");
        file.set_len(gib << 30).expect("a sparse file");
        let mut format = Command::new("mkfs.ext4");
        format.args(["-q", "-F"]).arg(&disk);
        assert!(format.status().expect("mkfs.ext4 runs").success());
        Self::new(&["-o", "loop", disk.to_str().expect("UTF-8")], at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // An error means that it was unmounted with another mount.
        let mut umount = Command::new("umount");
        let _ = umount.arg("-l").arg(&self.0).stderr(Stdio::null()).status();
    }
}
