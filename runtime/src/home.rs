//! Directories of persistent data, sockets and caches on the host.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, mkdir};
use rustix::process::geteuid;
use thiserror::Error;

/// An error of using the directories.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HomeError {
    /// No environment variable determines a directory.
    #[error("cannot determine the directory for {what}: set {variable}")]
    Unknown {
        /// The data of that directory.
        what: &'static str,
        /// The missing variable.
        variable: &'static str,
    },
    /// A directory that must be private is not.
    #[error("refusing to use {path:?}: {reason}")]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// The cause.
        reason: &'static str,
    },
    /// A directory cannot be created or examined.
    #[error("cannot prepare directory {path:?}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
}

/// The three directories of a user: data that survives a reboot, sockets that do not, and
/// caches that may be deleted at any time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    data: PathBuf,
    run: PathBuf,
    cache: PathBuf,
}

impl Home {
    /// Returns the directories of the XDG variables and their defaults:
    /// `$XDG_DATA_HOME/sm`, `$XDG_RUNTIME_DIR/sm`, `$XDG_CACHE_HOME/sm`.
    ///
    /// Without `XDG_RUNTIME_DIR`, it is `/run/sm` for root and `/run/user/UID/sm` for
    /// others, if that directory exists.
    ///
    /// # Errors
    /// No variable determines one of the directories.
    pub fn from_env() -> Result<Self, HomeError> {
        let var = |name| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let below_home =
            |xdg, fallback: &str| var(xdg).or_else(|| var("HOME").map(|home| home.join(fallback)));
        let data = below_home("XDG_DATA_HOME", ".local/share").ok_or(HomeError::Unknown {
            what: "images and virtual machines",
            variable: "HOME or XDG_DATA_HOME",
        })?;
        let cache = below_home("XDG_CACHE_HOME", ".cache").ok_or(HomeError::Unknown {
            what: "caches",
            variable: "HOME or XDG_CACHE_HOME",
        })?;
        let run =
            var("XDG_RUNTIME_DIR")
                .or_else(default_runtime_dir)
                .ok_or(HomeError::Unknown {
                    what: "sockets",
                    variable: "XDG_RUNTIME_DIR to a private directory",
                })?;
        Ok(Self::new(
            &data.join("sm"),
            &run.join("sm"),
            &cache.join("sm"),
        ))
    }

    /// Sets explicit directories, for tests and for applications with their own layout.
    /// [`crate::SmBuilder::build`] completes relative paths.
    #[must_use]
    pub fn new(data: &Path, run: &Path, cache: &Path) -> Self {
        Self {
            data: data.to_owned(),
            run: run.to_owned(),
            cache: cache.to_owned(),
        }
    }

    /// Returns the same directories by absolute paths, which are valid in processes with
    /// another working directory.
    ///
    /// # Errors
    /// A path is empty, or the working directory of this process is unknown.
    pub(crate) fn absolute(&self) -> Result<Self, HomeError> {
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|source| HomeError::Io {
                path: path.to_owned(),
                source,
            })
        };
        Ok(Self {
            data: absolute(&self.data)?,
            run: absolute(&self.run)?,
            cache: absolute(&self.cache)?,
        })
    }

    /// Returns the directory of persistent data: images, kernels, records of VMs.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Returns the directory of sockets, which does not survive a reboot.
    #[must_use]
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// Returns the directory of data that can be created again.
    #[must_use]
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Returns the directory of VM records.
    #[must_use]
    pub fn vms(&self) -> PathBuf {
        self.data.join("vms")
    }

    /// Returns the directory of kernels that the user manages.
    #[must_use]
    pub fn kernels(&self) -> PathBuf {
        self.data.join("kernels")
    }

    /// Returns the directory of the image store.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// Returns the directory of the log of events.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.data.join("events")
    }

    /// Returns the directory of snapshots.
    #[must_use]
    pub fn snapshots(&self) -> PathBuf {
        self.data.join("snapshots")
    }
}

fn default_runtime_dir() -> Option<PathBuf> {
    let uid = geteuid();
    if uid.is_root() {
        return Some(PathBuf::from("/run"));
    }
    let path = PathBuf::from(format!("/run/user/{}", uid.as_raw()));
    path.is_dir().then_some(path)
}

/// Creates `path` (and its parents) as a directory that only this user can enter, or
/// checks an existing one.
pub(crate) fn ensure_private_dir(path: &Path) -> Result<(), HomeError> {
    let io_error = |source| HomeError::Io {
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(io_error)?;
    }
    match mkdir(path, Mode::RWXU) {
        Ok(()) => return Ok(()),
        Err(rustix::io::Errno::EXIST) => {}
        Err(errno) => return Err(io_error(errno.into())),
    }
    let stat = rustix::fs::lstat(path).map_err(|errno| io_error(errno.into()))?;
    let refuse = |reason| {
        Err(HomeError::NotPrivate {
            path: path.to_owned(),
            reason,
        })
    };
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Directory {
        return refuse("it is not a directory");
    }
    if stat.st_uid != geteuid().as_raw() {
        return refuse("it belongs to another user");
    }
    if stat.st_mode & 0o077 != 0 {
        return refuse("other users may enter it; remove their permissions (chmod 700)");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_private_directory_is_made_and_accepted_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        ensure_private_dir(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        ensure_private_dir(&path).unwrap();
    }

    #[test]
    fn an_open_directory_or_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(
            ensure_private_dir(&open),
            Err(HomeError::NotPrivate { .. })
        ));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/", &link).unwrap();
        assert!(matches!(
            ensure_private_dir(&link),
            Err(HomeError::NotPrivate { .. })
        ));
    }
}
