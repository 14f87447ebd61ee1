//! Shares of temporary directories.
#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use sm_fs_server::dev_fuse::DevFuse;
use sm_fs_server::testing::FuseDriver;
use sm_fs_server::{FsConfig, Server, Share, ShareOptions};
use tempfile::TempDir;

pub(crate) fn directory(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

/// A server with `path` as its share "s".
pub(crate) fn server(path: &Path, options: ShareOptions) -> Server {
    let share = Share::new("s", directory(path), options).unwrap();
    Server::new(FsConfig::default().share(share)).unwrap()
}

/// A driver of such a server, and the number of the share's root.
pub(crate) fn driver(path: &Path, options: ShareOptions) -> (FuseDriver, u64) {
    let mut driver = FuseDriver::started(server(path, options));
    let share = driver.walk("s").unwrap().node;
    (driver, share)
}

/// Number of open descriptors of this process.
pub(crate) fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// A server on `/dev/fuse` with its share as a directory of the host.
pub(crate) struct Mounted {
    pub(crate) fuse: Option<DevFuse>,
    /// Directory of the host that is shared.
    pub(crate) host: PathBuf,
    /// The same directory through the server.
    pub(crate) guest: PathBuf,
    target: TempDir,
}

impl Mounted {
    /// Mounts `host`; none without root, after a line about that.
    pub(crate) fn new(host: &Path, options: ShareOptions) -> Option<Self> {
        if !sm_test_needs::root() {
            return None;
        }
        let target = tempfile::tempdir().unwrap();
        let fuse = DevFuse::mount(server(host, options), target.path()).unwrap();
        Some(Self {
            fuse: Some(fuse),
            host: host.to_owned(),
            guest: target.path().join("s"),
            target,
        })
    }

    /// Unmounts, and returns the server.
    pub(crate) fn unmount(mut self) -> Server {
        let fuse = self.fuse.take().unwrap();
        let server = fuse.unmount().unwrap();
        assert!(self.target.path().read_dir().unwrap().next().is_none());
        server
    }
}
