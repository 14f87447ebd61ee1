//! The directory of volumes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sm_control::id::{hex, is_valid_name, random};
use sm_vmm::disks::{DiskDirectory, Templates, writer};

use super::{
    DEFAULT_VOLUME_BYTES, MAX_VOLUME_BYTES, MIN_VOLUME_BYTES, Volume, VolumeError, VolumeKind,
    VolumeOptions, tree,
};
use crate::home::Home;
use crate::record::name_of;

const DESCRIPTION: &str = "volume.json";
const LOCK: &str = "lock";
const DISK: &str = "disk";
/// The directory with the files of a volume that is one.
const DATA: &str = "data";
/// Lock file that serialises creation and removal of names.
const NAMES_LOCK: &str = ".lock";
/// Prefix of directories that are created or removed; names do not begin with it. Who does so
/// holds the lock of the directory itself ([`Held`]).
const TEMPORARY: &str = ".tmp-";
/// Longest description that is read, in bytes.
const MAX_DESCRIPTION: u64 = 1 << 20;

/// The description of a volume on disk. Members may be added with defaults.
#[derive(Debug, Serialize, Deserialize)]
struct VolumeFileV1 {
    version: u32,
    /// Programs before it created disks only.
    #[serde(default)]
    kind: VolumeKind,
    /// 0 for a directory.
    size_bytes: u64,
    created_ns: u64,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    anonymous: bool,
}

const VERSION: u32 = 1;

/// A directory with a temporary name, whose lock is held.
struct Held {
    path: PathBuf,
    _lock: File,
}

/// A volume that was removed from the names. Its files take space until [`Self::remove`].
pub(super) struct RemovedVolume {
    held: Held,
    /// Nobody who opened the lock before uses the files.
    _claim: File,
}

impl RemovedVolume {
    /// Returns the path of the files of a volume that was a directory.
    pub(super) fn data(&self) -> PathBuf {
        self.held.path.join(DATA)
    }

    /// Removes the files.
    pub(super) fn remove(self) -> Result<(), VolumeError> {
        remove_tree(&self.held.path)
    }
}

fn remove_tree(path: &Path) -> Result<(), VolumeError> {
    tree::remove(path).map_err(io_error("remove", path))
}

pub(super) struct VolumeStore {
    directory: PathBuf,
    /// The directory of the records of VMs.
    vms: PathBuf,
    templates: Templates,
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::Io {
        operation,
        path,
        source,
    }
}

fn create_directory(path: &Path, recursive: bool) -> Result<(), VolumeError> {
    fs::DirBuilder::new()
        .recursive(recursive)
        .mode(0o700)
        .create(path)
        .map_err(io_error("create directory", path))
}

/// Takes a lock; `None` if another process holds it.
fn lock(path: &Path, operation: FlockOperation) -> Result<Option<File>, VolumeError> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error("open", path))?;
    locked(file, path, operation)
}

/// Takes the lock of a directory itself; `None` if another process holds it.
fn lock_directory(path: &Path, operation: FlockOperation) -> Result<Option<File>, VolumeError> {
    let directory = File::open(path).map_err(io_error("open", path))?;
    locked(directory, path, operation)
}

fn locked(file: File, path: &Path, operation: FlockOperation) -> Result<Option<File>, VolumeError> {
    match rustix::io::retry_on_intr(|| flock(&file, operation)) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(io_error("lock", path)(errno.into())),
    }
}

impl VolumeStore {
    pub(super) fn open(home: &Home) -> Result<Self, VolumeError> {
        let directory = home.data().join("volumes");
        create_directory(&directory, true)?;
        Ok(Self {
            directory,
            vms: home.vms(),
            templates: Templates::new(home.data()),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Serialises changes of names. It is held briefly: directories are complete before.
    fn names_lock(&self) -> Result<File, VolumeError> {
        let path = self.directory.join(NAMES_LOCK);
        let locked = lock(&path, FlockOperation::LockExclusive)?;
        locked.ok_or_else(|| io_error("lock", &path)(io::ErrorKind::WouldBlock.into()))
    }

    /// Holds a volume against all users.
    fn claim(&self, name: &str) -> Result<File, VolumeError> {
        let path = self.path(name).join(LOCK);
        match lock(&path, FlockOperation::NonBlockingLockExclusive) {
            Ok(Some(file)) => Ok(file),
            Ok(None) => Err(VolumeError::InUse {
                name: name.to_owned(),
                by: holder(&path, &self.vms),
            }),
            Err(VolumeError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(VolumeError::NotFound(name.to_owned()))
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn create(
        &self,
        name: Option<&str>,
        options: &VolumeOptions,
    ) -> Result<Volume, VolumeError> {
        let (name, anonymous) = match name {
            Some(name) => (name.to_owned(), options.anonymous),
            None => (hex(&random::<32>()), true),
        };
        check_name(&name)?;
        match self.get(&name) {
            Err(VolumeError::NotFound(_)) => {}
            found => return found,
        }
        let size_bytes = match options.kind {
            VolumeKind::Disk => checked_size(options.size)?,
            VolumeKind::Directory if options.size.is_some() => {
                return Err(VolumeError::SizeOfDirectory);
            }
            VolumeKind::Directory => 0,
        };
        let file = VolumeFileV1 {
            version: VERSION,
            kind: options.kind,
            size_bytes,
            created_ns: now_ns(),
            labels: options.labels.clone(),
            anonymous,
        };
        let created = match options.kind {
            VolumeKind::Disk => {
                let template = self.templates.get(size_bytes).map_err(disk_error(&name))?;
                self.publish(&name, &file, |fresh| {
                    let disk = DiskDirectory::at(fresh.join(DISK));
                    disk.create(&[template]).map_err(disk_error(&name))?;
                    Ok(())
                })
            }
            VolumeKind::Directory => self.publish(&name, &file, |fresh| {
                let path = fresh.join(DATA);
                // The mode is that of the volume's root in guests.
                fs::create_dir(&path)
                    .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
                    .map_err(io_error("create directory", &path))
            }),
        };
        match created {
            // Another process was first.
            Err(VolumeError::Exists(_)) => self.get(&name),
            Err(error) => Err(error),
            Ok(()) => self.get(&name),
        }
    }

    pub(super) fn copy(&self, source: &str, name: &str) -> Result<Volume, VolumeError> {
        check_name(name)?;
        check_name(source)?;
        if self.path(name).exists() {
            return Err(VolumeError::Exists(name.to_owned()));
        }
        let _held = self.claim(source)?;
        let file = VolumeFileV1 {
            created_ns: now_ns(),
            anonymous: false,
            ..self.read(source)?
        };
        if file.kind != VolumeKind::Disk {
            return Err(VolumeError::CloneOfDirectory(source.to_owned()));
        }
        let from = self.disk(source);
        self.publish(name, &file, |fresh| {
            let disk = DiskDirectory::at(fresh.join(DISK));
            from.clone_to(&disk).map_err(disk_error(name))
        })?;
        self.get(name)
    }

    fn disk(&self, name: &str) -> DiskDirectory {
        DiskDirectory::at(self.path(name).join(DISK))
    }

    /// Makes a directory with a temporary name, and locks it. No other process sees it
    /// without its lock.
    fn temporary(
        &self,
        make: impl FnOnce(&Path) -> Result<(), VolumeError>,
    ) -> Result<Held, VolumeError> {
        let path = self.path(&format!("{TEMPORARY}{}", hex(&random::<8>())));
        let _names = self.names_lock()?;
        make(&path)?;
        // The process that creates a volume still holds it for a moment after naming it.
        let lock = lock_directory(&path, FlockOperation::LockExclusive)?;
        let lock = lock.ok_or_else(|| io_error("lock", &path)(io::ErrorKind::WouldBlock.into()))?;
        Ok(Held { path, _lock: lock })
    }

    /// Removes what processes left that were killed while they created or removed a volume.
    pub(super) fn sweep(&self) -> Result<(), VolumeError> {
        let mut left = Vec::new();
        {
            let _names = self.names_lock()?;
            for entry in fs::read_dir(&self.directory).map_err(io_error("list", &self.directory))? {
                let entry = entry.map_err(io_error("list", &self.directory))?;
                let name = entry.file_name();
                let path = entry.path();
                if name.as_encoded_bytes().starts_with(TEMPORARY.as_bytes())
                    && let Some(lock) =
                        lock_directory(&path, FlockOperation::NonBlockingLockExclusive)?
                {
                    left.push(Held { path, _lock: lock });
                }
            }
        }
        left.iter().try_for_each(|held| remove_tree(&held.path))
    }

    /// Creates the directory of a volume, whole or not at all.
    fn publish(
        &self,
        name: &str,
        file: &VolumeFileV1,
        create: impl FnOnce(&Path) -> Result<(), VolumeError>,
    ) -> Result<(), VolumeError> {
        let fresh = self.temporary(|path| create_directory(path, false))?;
        let published = self.fill(&fresh.path, name, file, create);
        if published.is_err() {
            let _ = fs::remove_dir_all(&fresh.path);
        }
        published
    }

    fn fill(
        &self,
        fresh: &Path,
        name: &str,
        file: &VolumeFileV1,
        create: impl FnOnce(&Path) -> Result<(), VolumeError>,
    ) -> Result<(), VolumeError> {
        let path = fresh.join(DESCRIPTION);
        let json = serde_json::to_vec_pretty(file);
        json.map_err(io::Error::from)
            .and_then(|json| write_durably(&path, &json))
            .map_err(io_error("write", &path))?;
        lock(&fresh.join(LOCK), FlockOperation::NonBlockingLockShared)?;
        create(fresh)?;
        let _names = self.names_lock()?;
        let path = self.path(name);
        if path.exists() {
            return Err(VolumeError::Exists(name.to_owned()));
        }
        fs::rename(fresh, &path).map_err(io_error("create", &path))?;
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(io_error("write back", &self.directory))
    }

    fn read(&self, name: &str) -> Result<VolumeFileV1, VolumeError> {
        use io::Read as _;

        let path = self.path(name).join(DESCRIPTION);
        let mut json = Vec::new();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(VolumeError::NotFound(name.to_owned()));
            }
            Err(error) => return Err(io_error("open", &path)(error)),
        };
        file.take(MAX_DESCRIPTION)
            .read_to_end(&mut json)
            .map_err(io_error("read", &path))?;
        let damaged = |reason| VolumeError::Damaged {
            name: name.to_owned(),
            reason,
        };
        let file: VolumeFileV1 =
            serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?;
        match file.version {
            VERSION => Ok(file),
            other => Err(damaged(format!("its version is {other}, not {VERSION}"))),
        }
    }

    pub(super) fn get(&self, name: &str) -> Result<Volume, VolumeError> {
        check_name(name)?;
        let file = self.read(name)?;
        let is_disk = file.kind == VolumeKind::Disk;
        Ok(Volume {
            name: name.to_owned(),
            kind: file.kind,
            size_bytes: is_disk.then_some(file.size_bytes),
            disk_bytes: match is_disk {
                true => Some(self.own_bytes(name)?),
                false => None,
            },
            created_ns: file.created_ns,
            labels: file.labels,
            anonymous: file.anonymous,
            path: match is_disk {
                true => self.path(name),
                false => self.path(name).join(DATA),
            },
        })
    }

    /// Returns the space of a disk's layers that nothing else uses, in bytes.
    fn own_bytes(&self, name: &str) -> Result<u64, VolumeError> {
        let layers = self.disk(name).layers().map_err(disk_error(name))?;
        // Layers with other names are shared with templates, snapshots or copies.
        let own = |path: &PathBuf| {
            let metadata = fs::metadata(path).ok()?;
            (metadata.nlink() == 1).then_some(metadata.blocks() * 512)
        };
        Ok(layers.iter().filter_map(own).sum())
    }

    /// Returns the names of all volumes, in order.
    pub(super) fn names(&self) -> Result<Vec<String>, VolumeError> {
        let list = io_error("list", &self.directory);
        let entries = fs::read_dir(&self.directory)
            .and_then(Iterator::collect::<io::Result<Vec<_>>>)
            .map_err(list)?;
        let mut names: Vec<String> = entries
            .into_iter()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| is_valid_name(name))
            .collect();
        names.sort();
        Ok(names)
    }

    pub(super) fn list(&self) -> Result<(Vec<Volume>, Vec<VolumeError>), VolumeError> {
        let (mut volumes, mut errors) = (Vec::new(), Vec::new());
        for name in self.names()? {
            match self.get(&name) {
                Ok(volume) => volumes.push(volume),
                // It was removed meanwhile.
                Err(VolumeError::NotFound(_)) if !self.path(&name).exists() => {}
                Err(error) => errors.push(error),
            }
        }
        Ok((volumes, errors))
    }

    /// Removes the name of a volume, which takes the same time for every content.
    pub(super) fn remove(&self, name: &str) -> Result<RemovedVolume, VolumeError> {
        check_name(name)?;
        let path = self.path(name);
        if !path.exists() {
            return Err(VolumeError::NotFound(name.to_owned()));
        }
        let claim = self.claim(name)?;
        let rename = |grave: &Path| fs::rename(&path, grave).map_err(io_error("remove", &path));
        Ok(RemovedVolume {
            held: self.temporary(rename)?,
            _claim: claim,
        })
    }
}

/// Returns the size of a disk, in bytes.
fn checked_size(size: Option<u64>) -> Result<u64, VolumeError> {
    let bytes = size.unwrap_or(DEFAULT_VOLUME_BYTES);
    let bytes = bytes.checked_next_multiple_of(4096).unwrap_or(u64::MAX);
    match (MIN_VOLUME_BYTES..=MAX_VOLUME_BYTES).contains(&bytes) {
        true => Ok(bytes),
        false => Err(VolumeError::Size(bytes)),
    }
}

fn check_name(name: &str) -> Result<(), VolumeError> {
    match is_valid_name(name) {
        true => Ok(()),
        false => Err(VolumeError::BadName(name.to_owned())),
    }
}

fn disk_error(name: &str) -> impl FnOnce(sm_vmm::disks::DiskError) -> VolumeError {
    let name = name.to_owned();
    move |source| VolumeError::Disk { name, source }
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use io::Write as _;

    let mut file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Returns the present name of the VM that holds a lock exclusively, which it has noted there.
fn holder(path: &Path, vms: &Path) -> Option<String> {
    let (name, id) = writer(path)?;
    let now = id.and_then(|id| name_of(vms, &id));
    Some(now.unwrap_or(name))
}
