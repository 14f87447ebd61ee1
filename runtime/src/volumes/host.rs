//! Paths of the host that are mounted in guests.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use sm_control::config::HostOptionsV1;
use sm_control::launch::{MountRequest, MountSource};

use crate::home::Home;
use crate::{Error, OptionError};

/// A directory of this program's own, by its path without links. It may not exist yet.
struct OwnDirectory(PathBuf);

/// Inode number and device of a file.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

/// Returns true if `path` is `directory` or below it: by its name, or because a directory
/// above it is the same one, which is mounted at another path as well.
fn is_in(path: &Path, directory: &Path) -> bool {
    let own = identity(directory);
    path.starts_with(directory)
        || own.is_some() && path.ancestors().any(|above| identity(above) == own)
}

impl OwnDirectory {
    /// Returns the directories that contain the memory, disks and sockets of VMs.
    fn all(home: &Home) -> [Self; 3] {
        [home.data(), home.run(), home.cache()].map(|path| {
            let mut above = path.ancestors();
            let found = above.find_map(|above| Some((above.canonicalize().ok()?, above)));
            Self(match found {
                Some((real, above)) => match path.strip_prefix(above) {
                    Ok(rest) if rest.as_os_str().is_empty() => real,
                    Ok(rest) => real.join(rest),
                    Err(_) => path.to_owned(),
                },
                None => path.to_owned(),
            })
        })
    }
}

/// Returns the directory of this program that is in `path`.
fn contained(home: &Home, path: &Path) -> Option<PathBuf> {
    let own = OwnDirectory::all(home).into_iter().map(|own| own.0);
    own.into_iter().find(|own| is_in(own, path))
}

/// Resolves a path of the host that is to be mounted.
///
/// A guest that can write to the store runs code in other guests, whose memory and disks are
/// there: it is not mounted, and directories above it read-only.
///
/// # Errors
/// The path does not exist or cannot be mounted.
pub(super) fn resolved(
    home: &Home,
    path: &Path,
    options: HostOptionsV1,
    read_only: bool,
) -> Result<MountSource, Error> {
    let failed = |source| Error::File {
        operation: "mount",
        path: path.to_owned(),
        source,
    };
    let refused = |reason: String| {
        Error::from(OptionError::HostPath {
            path: path.to_owned(),
            reason,
        })
    };
    let real = path.canonicalize().map_err(failed)?;
    if real.to_str().is_none() {
        return Err(refused("its name is not valid UTF-8".to_owned()));
    }
    let own = OwnDirectory::all(home);
    if own.iter().any(|own| is_in(&real, &own.0)) {
        return Err(refused("VMs and images are stored there".to_owned()));
    }
    if !read_only && let Some(own) = contained(home, &real) {
        let own = own.display();
        return Err(refused(format!(
            "it contains \"{own}\", which a guest could then change: mount it read-only, or \
             mount directories in it"
        )));
    }
    let kind = real.metadata().map_err(failed)?.file_type();
    if kind.is_dir() {
        return Ok(MountSource::Host {
            directory: real,
            file: None,
            options,
            volume: None,
        });
    }
    match (real.parent(), real.file_name()) {
        (Some(parent), Some(name)) if kind.is_file() => Ok(MountSource::Host {
            directory: parent.to_owned(),
            file: Some(name.to_string_lossy().into_owned()),
            options,
            volume: None,
        }),
        _ if kind.is_socket() => Err(refused(
            "it is a socket, to which programs in a guest cannot connect".to_owned(),
        )),
        _ => Err(refused(
            "it is neither a directory nor a regular file".to_owned(),
        )),
    }
}

/// Returns a sentence for each mount that gives a guest more of the host than most users
/// want.
pub(crate) fn warnings(home: &Home, mounts: &[MountRequest]) -> Vec<String> {
    let person = std::env::var_os("HOME").map(PathBuf::from);
    let person = person.and_then(|path| path.canonicalize().ok());
    let warning = |mount: &MountRequest| {
        let MountSource::Host {
            directory,
            file: None,
            ..
        } = &mount.source
        else {
            return None;
        };
        let (may, at) = match mount.read_only {
            true => ("read", &mount.target),
            false => ("change", &mount.target),
        };
        if directory.parent().is_none() {
            return Some(format!(
                "the guest can {may} all files of this host, at \"{at}\""
            ));
        }
        if person.as_deref() == Some(directory) {
            return Some(format!(
                "the guest can {may} all files of your home directory, keys and passwords \
                 among them, at \"{at}\""
            ));
        }
        let own = contained(home, directory)?;
        Some(format!(
            "the guest can {may} memory and disks of other VMs: \"{}\" is below \"{at}\"",
            own.display()
        ))
    };
    mounts.iter().filter_map(warning).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Mount, requests};
    use super::*;
    use crate::Sm;

    fn found(sm: &Sm, mount: &Mount) -> Result<Vec<MountRequest>, String> {
        let found = requests(&sm.volumes(), &[mount.stored()]);
        found.map_err(|error| sm_control::with_causes(&error))
    }

    #[test]
    fn paths_of_the_host_are_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let sm = Sm::builder().below(dir.path().join("sm")).build().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir_all(outside.join("d")).unwrap();
        fs::write(outside.join("f"), "").unwrap();
        std::os::unix::fs::symlink("d", outside.join("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(outside.join("socket")).unwrap();
        let real = outside.canonicalize().unwrap();
        let host = |directory: PathBuf, file: Option<&str>| MountSource::Host {
            directory,
            file: file.map(str::to_owned),
            options: HostOptionsV1::default(),
            volume: None,
        };
        for (name, source) in [
            ("d", host(real.join("d"), None)),
            ("link", host(real.join("d"), None)),
            ("f", host(real.clone(), Some("f"))),
        ] {
            let mount = Mount::host(outside.join(name), "/x");
            let found = found(&sm, &mount).unwrap();
            assert_eq!(found[0].source, source, "{name}");
            assert_eq!(warnings(sm.home(), &found), [""; 0], "{name}");
        }
        for (path, why) in [
            (outside.join("missing"), "No such file"),
            (outside.join("socket"), "cannot connect"),
            ("/dev/null".into(), "neither a directory"),
        ] {
            let error = found(&sm, &Mount::host(&path, "/x")).unwrap_err();
            assert!(error.contains(why), "{}: {error}", path.display());
        }
    }

    #[test]
    fn the_store_is_never_writable() {
        let dir = tempfile::tempdir().unwrap();
        let above = dir.path().join("above");
        let sm = Sm::builder().below(above.join("sm")).build().unwrap();
        let data = sm.home().data().to_owned();
        fs::create_dir_all(&above).unwrap();
        // Before it exists, after, and by a link.
        for round in 0..2 {
            for path in [above.clone(), dir.path().to_owned(), "/".into()] {
                let error = found(&sm, &Mount::host(&path, "/x")).unwrap_err();
                let why = "mount it read-only";
                assert!(error.contains(why), "{round} {}: {error}", path.display());
                let mount = Mount::host(&path, "/x").read_only(true);
                let found = found(&sm, &mount).unwrap();
                let warned = warnings(sm.home(), &found);
                let what = if path == Path::new("/") {
                    "can read all files of this host, at \"/x\""
                } else {
                    "can read memory and disks of other VMs"
                };
                assert!(warned.len() == 1 && warned[0].contains(what), "{warned:?}");
            }
            fs::create_dir_all(data.join("d")).unwrap();
            fs::write(data.join("d/f"), "").unwrap();
        }
        std::os::unix::fs::symlink(&data, dir.path().join("link")).unwrap();
        for path in [data.clone(), data.join("d/f"), dir.path().join("link/d")] {
            for read_only in [false, true] {
                let mount = Mount::host(&path, "/x").read_only(read_only);
                let error = found(&sm, &mount).unwrap_err();
                let why = "are stored there";
                assert!(error.contains(why), "{}: {error}", path.display());
            }
        }
        let beside = above.join("beside");
        fs::create_dir(&beside).unwrap();
        assert!(found(&sm, &Mount::host(&beside, "/x")).is_ok());
    }

    #[test]
    fn a_directory_is_recognised_at_another_path() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        fs::create_dir_all(data.join("d")).unwrap();
        // A path that leads to the directory by other names, as a bind mount would.
        let other = dir.path().join("x/../data/d");
        fs::create_dir(dir.path().join("x")).unwrap();
        assert!(is_in(&other, &data));
        assert!(!is_in(&data, &other));
        assert!(!is_in(&dir.path().join("x"), &data));
    }
}
