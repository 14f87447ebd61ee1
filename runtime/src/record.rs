//! Records of virtual machines on disk, and the proof that one is alive.
//!
//! `<data>/vms/<id>/` holds `config.json`, `lock`, `console.log`, `vmm.log`,
//! the output log and, once it has ended, `exit.json`. `<run>/vms/<short id>/`
//! holds its sockets and nothing else.
//!
//! Invariant: a VM's process is alive exactly while its `lock` is flocked. The
//! lock is taken before the record gets its name, is handed to the VMM as an
//! open file description, and is released by the kernel whatever way the VMM
//! ends. Whoever takes the lock of a record that has a name knows that its VMM
//! is dead, and may clean up after it.
//!
//! A VM has *ended* once `exit.json` exists; its VMM may still be releasing
//! resources for some milliseconds, which only removal has to wait for.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::home::{Home, HomeError, ensure_private_dir};
use crate::id::{VmId, generate_name, is_valid_name};
use crate::publish::Publication;
use crate::timings::Phase;
use crate::workload::Workload;

const CONFIG: &str = "config.json";
const LOCK: &str = "lock";
const EXIT: &str = "exit.json";
/// The guest's serial console.
pub(crate) const CONSOLE: &str = "console.log";
/// What the VMM process itself has to say.
pub(crate) const VMM_LOG: &str = "vmm.log";

/// Why a record cannot be used.
#[derive(Debug, Error)]
pub enum RecordError {
    /// The directories cannot be used.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// No record matches.
    #[error("no such VM: \"{0}\"")]
    NotFound(String),
    /// Several records match a prefix.
    #[error("\"{0}\" matches several VMs: give more characters of the ID")]
    Ambiguous(String),
    /// Another record has the name.
    #[error(
        "the name \"{name}\" is already taken by VM {id}: remove that VM (sm rm {name}) or choose another name"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it, in short form.
        id: String,
    },
    /// A name outside the permitted characters.
    #[error(
        "\"{0}\" is not a valid name: start with a letter or digit, then letters, digits, '_', '.' or '-', 64 at most"
    )]
    BadName(String),
    /// It is alive and must not be for this operation.
    #[error("VM \"{0}\" is running: stop it first, or use --force")]
    Running(String),
    /// A file of a record cannot be read, written or understood.
    #[error("cannot {operation} {path:?}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Io {
        operation,
        path,
        source,
    }
}

/// What a VM was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Identifier.
    pub id: VmId,
    /// Name, unique among this user's VMs.
    pub name: String,
    /// The image as the caller named it.
    pub image: String,
    /// Digest of the image's manifest.
    pub image_digest: String,
    /// Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// What runs.
    pub workload: Workload,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// The kernel booted.
    pub kernel: PathBuf,
    /// Remove the record when the VM ends.
    pub auto_remove: bool,
    /// Root file system without an upper layer.
    pub read_only: bool,
    /// Milliseconds between the stop signal and SIGKILL.
    pub stop_timeout_ms: u64,
    /// Ports of the guest that are published on the host, as asked for.
    #[serde(default)]
    pub publish: Vec<Publication>,
}

/// How a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The workload ended by itself or by a signal.
    Workload,
    /// The VM never came to run its workload.
    StartFailed,
    /// The guest ended under the workload: panic, triple fault, reset.
    GuestFailed,
    /// The VM was ended from outside without waiting for the workload.
    Destroyed,
    /// The VMM ended without leaving word (killed, or the host went down).
    Lost,
}

/// What is left when a VM has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Docker's exit status: the workload's own, or 125 when it is not its doing.
    pub status: u32,
    /// How it came to that.
    pub reason: ExitReason,
    /// A sentence, unless the workload ended by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The guest's kernel killed processes for lack of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// When, in nanoseconds since the Unix epoch.
    pub finished_ns: u64,
    /// When the workload was started, likewise; 0 if never.
    #[serde(default)]
    pub started_ns: u64,
    /// Peak resident set size of the workload's main process in KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_rss_kib: Option<u64>,
    /// When each phase was reached.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<Phase>,
}

impl ExitRecord {
    fn lost() -> Self {
        Self {
            status: 137,
            reason: ExitReason::Lost,
            message: Some("the VMM process ended without leaving an exit status".into()),
            oom_killed: false,
            finished_ns: 0,
            started_ns: 0,
            peak_rss_kib: None,
            phases: Vec::new(),
        }
    }
}

/// Whether a VM is alive, and how it ended if not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmState {
    /// A process holds its lock.
    Running,
    /// It has ended.
    Exited(ExitRecord),
}

/// One VM's record.
#[derive(Clone, Debug)]
pub struct Record {
    config: VmConfig,
    directory: PathBuf,
    sockets: PathBuf,
}

impl Record {
    /// What it was started with.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Its directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory of its sockets.
    #[must_use]
    pub fn sockets(&self) -> &Path {
        &self.sockets
    }

    pub(crate) fn control_socket(&self) -> PathBuf {
        self.sockets.join("control.sock")
    }

    pub(crate) fn exec_socket(&self) -> PathBuf {
        self.sockets.join("exec.sock")
    }

    /// Whether it runs, and how it ended if not.
    ///
    /// # Errors
    /// Its files cannot be read.
    pub fn state(&self) -> Result<VmState, RecordError> {
        if let Some(exit) = self.exit()? {
            return Ok(VmState::Exited(exit));
        }
        if self
            .try_lock(FlockOperation::NonBlockingLockShared)?
            .is_none()
        {
            return Ok(VmState::Running);
        }
        Ok(VmState::Exited(
            self.exit()?.unwrap_or_else(ExitRecord::lost),
        ))
    }

    /// How it ended, if it left word.
    pub(crate) fn exit(&self) -> Result<Option<ExitRecord>, RecordError> {
        read_json(&self.directory.join(EXIT))
    }

    /// Blocks until no process holds its lock.
    pub(crate) fn wait_until_dead(&self) -> Result<(), RecordError> {
        match self.try_lock(FlockOperation::LockShared) {
            Ok(_) | Err(RecordError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether it has ended and is about to be removed by its VMM.
    fn is_vanishing(&self) -> bool {
        self.config.auto_remove && self.directory.join(EXIT).exists()
    }

    /// Durably leaves word of how it ended. Called by the VMM.
    pub(crate) fn write_exit(&self, exit: &ExitRecord) -> Result<(), RecordError> {
        write_json(&self.directory, EXIT, exit)
    }

    /// Takes the lock, `None` if it is held elsewhere (or the record is gone).
    fn try_lock(&self, operation: FlockOperation) -> Result<Option<File>, RecordError> {
        let path = self.directory.join(LOCK);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RecordError::NotFound(self.config.name.clone()));
            }
            Err(error) => return Err(io_error("open", &path)(error)),
        };
        match rustix::io::retry_on_intr(|| flock(&file, operation)) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(io_error("lock", &path)(errno.into())),
        }
    }

    /// Removes a record that is not alive.
    ///
    /// # Errors
    /// It is alive, or its files cannot be removed.
    pub fn remove(&self) -> Result<(), RecordError> {
        // A VM that has ended is about to give up its lock.
        let operation = match self.exit()? {
            Some(_) => FlockOperation::LockExclusive,
            None => FlockOperation::NonBlockingLockExclusive,
        };
        let Some(lock) = self.try_lock(operation)? else {
            return Err(RecordError::Running(self.config.name.clone()));
        };
        self.erase()?;
        drop(lock);
        Ok(())
    }

    /// Removes the record. The caller holds its lock.
    pub(crate) fn erase(&self) -> Result<(), RecordError> {
        self.remove_sockets()?;
        // Rename first: a listing never sees half a record.
        let parent = self.directory.parent().unwrap_or(Path::new("/"));
        let grave = parent.join(format!("{REMOVED_PREFIX}{}", self.config.id));
        match std::fs::rename(&self.directory, &grave) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(io_error("remove", &self.directory)(error)),
        }
        remove_tree(&grave)
    }

    pub(crate) fn remove_sockets(&self) -> Result<(), RecordError> {
        remove_tree(&self.sockets)
    }
}

fn remove_tree(path: &Path) -> Result<(), RecordError> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error("remove", path)(error)),
    }
}

/// Records being made and records being removed, which have no lock to test.
const NEW_PREFIX: &str = ".new-";
const REMOVED_PREFIX: &str = ".removed-";
/// Serialises naming and sweeping.
const REGISTRY_LOCK: &str = ".lock";

/// All records of one user.
#[derive(Clone, Debug)]
pub struct Records {
    directory: PathBuf,
    sockets: PathBuf,
}

impl Records {
    /// Opens the records below `home`, creating the directories.
    ///
    /// # Errors
    /// A directory cannot be made, or is open to others.
    pub fn open(home: &Home) -> Result<Self, RecordError> {
        let sockets = home.run().join("vms");
        let directory = home.vms();
        ensure_private_dir(home.run())?;
        ensure_private_dir(&sockets)?;
        ensure_private_dir(&directory)?;
        Ok(Self { directory, sockets })
    }

    fn registry_lock(&self) -> Result<File, RecordError> {
        let path = self.directory.join(REGISTRY_LOCK);
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(io_error("open", &path))?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
            .map_err(|errno| io_error("lock", &path)(errno.into()))?;
        Ok(file)
    }

    /// Makes a record under a free name (`name`, or a generated one) and gives
    /// out its lock, held. `config` gets the identifier and the name.
    pub(crate) fn create(
        &self,
        name: Option<&str>,
        config: impl FnOnce(VmId, String) -> Result<VmConfig, crate::Error>,
    ) -> Result<(Record, File), crate::Error> {
        if let Some(name) = name.filter(|name| !is_valid_name(name)) {
            return Err(RecordError::BadName(name.to_owned()).into());
        }
        let _registry = self.registry_lock()?;
        let taken = self.list()?;
        let id = self.free_id()?;
        let name = match name {
            Some(name) => {
                if let Some(other) = taken.iter().find(|record| record.config.name == name) {
                    return Err(RecordError::NameTaken {
                        name: name.to_owned(),
                        id: other.config.id.short().to_owned(),
                    }
                    .into());
                }
                name.to_owned()
            }
            None => (0..)
                .map(generate_name)
                .find(|name| !taken.iter().any(|record| record.config.name == *name))
                .unwrap_or_else(|| id.short().to_owned()),
        };
        let config = config(id.clone(), name)?;

        let fresh = self.directory.join(format!("{NEW_PREFIX}{id}"));
        DirBuilder::new()
            .mode(0o700)
            .create(&fresh)
            .map_err(io_error("create", &fresh))?;
        let result = self.furnish(&fresh, config);
        if result.is_err() {
            // The first error is the one to report.
            let _ = remove_tree(&fresh);
        }
        Ok(result?)
    }

    fn furnish(&self, fresh: &Path, config: VmConfig) -> Result<(Record, File), RecordError> {
        let lock_path = fresh.join(LOCK);
        let lock = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(io_error("create", &lock_path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| io_error("lock", &lock_path)(errno.into()))?;
        write_json(fresh, CONFIG, &config)?;
        let record = self.record(config);
        DirBuilder::new()
            .mode(0o700)
            .create(&record.sockets)
            .map_err(io_error("create", &record.sockets))?;
        std::fs::rename(fresh, &record.directory).map_err(io_error("create", &record.directory))?;
        Ok((record, lock))
    }

    /// An identifier whose short form is free, because it names the directory
    /// of sockets (whose paths must stay under 108 bytes).
    fn free_id(&self) -> Result<VmId, RecordError> {
        loop {
            let id = VmId::generate();
            let path = self.sockets.join(id.short());
            match path.try_exists() {
                Ok(false) => return Ok(id),
                Ok(true) => {}
                Err(error) => return Err(io_error("examine", &path)(error)),
            }
        }
    }

    pub(crate) fn record(&self, config: VmConfig) -> Record {
        Record {
            directory: self.directory.join(config.id.as_str()),
            sockets: self.sockets.join(config.id.short()),
            config,
        }
    }

    /// All records, newest first.
    ///
    /// # Errors
    /// The directory cannot be read. A record that disappears meanwhile is left
    /// out, one that cannot be understood is logged and left out.
    pub fn list(&self) -> Result<Vec<Record>, RecordError> {
        self.list_with(false)
    }

    fn list_with(&self, vanishing: bool) -> Result<Vec<Record>, RecordError> {
        let mut records = Vec::new();
        for name in dir_names(&self.directory)? {
            let Some(id) = VmId::parse(&name) else {
                continue;
            };
            let path = self.directory.join(id.as_str()).join(CONFIG);
            match read_json::<VmConfig>(&path) {
                Ok(Some(config)) if config.id == id => {
                    let record = self.record(config);
                    if vanishing || !record.is_vanishing() {
                        records.push(record);
                    }
                }
                Ok(Some(_)) => tracing::warn!(?path, "the record names another VM"),
                Ok(None) => {}
                Err(error) => tracing::warn!(?path, %error, "skipping a damaged record"),
            }
        }
        records.sort_by_key(|record| std::cmp::Reverse(record.config.created_ns));
        Ok(records)
    }

    /// The record with this name, identifier, or unambiguous prefix of one.
    ///
    /// # Errors
    /// None, or several.
    pub fn find(&self, query: &str) -> Result<Record, RecordError> {
        let mut records = self.list()?;
        if let Some(exact) = records
            .iter()
            .position(|r| r.config.name == query || r.config.id.as_str() == query)
        {
            return Ok(records.swap_remove(exact));
        }
        if !query.is_empty() {
            records.retain(|r| r.config.id.as_str().starts_with(query));
            match records.len() {
                1 => return Ok(records.swap_remove(0)),
                0 => {}
                _ => return Err(RecordError::Ambiguous(query.to_owned())),
            }
        }
        Err(RecordError::NotFound(query.to_owned()))
    }

    /// Cleans up after VMs that died without doing so: sockets of dead VMs,
    /// records that were to be removed at their end, interrupted creations and
    /// removals.
    ///
    /// # Errors
    /// The directories cannot be read or written.
    pub fn sweep(&self) -> Result<(), RecordError> {
        let _registry = self.registry_lock()?;
        for name in dir_names(&self.directory)? {
            // Both kinds are made and renamed under the registry lock (a
            // removal only continues after its rename; removing twice is fine).
            if name.starts_with(NEW_PREFIX) || name.starts_with(REMOVED_PREFIX) {
                remove_tree(&self.directory.join(name))?;
            }
        }
        let records = self.list_with(true)?;
        for record in &records {
            let Ok(Some(_lock)) = record.try_lock(FlockOperation::NonBlockingLockExclusive) else {
                continue;
            };
            // One that has no console never came to be a machine.
            let stillborn = !record.directory.join(CONSOLE).exists();
            if record.config.auto_remove || stillborn {
                record.erase()?;
                continue;
            }
            record.remove_sockets()?;
            if record.exit()?.is_none() {
                let mut exit = ExitRecord::lost();
                exit.finished_ns = crate::output_log::unix_nanos();
                record.write_exit(&exit)?;
            }
        }
        for name in dir_names(&self.sockets)? {
            if !records.iter().any(|r| r.config.id.short() == name) {
                remove_tree(&self.sockets.join(name))?;
            }
        }
        Ok(())
    }
}

fn dir_names(directory: &Path) -> Result<Vec<String>, RecordError> {
    let entries = std::fs::read_dir(directory).map_err(io_error("list", directory))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io_error("list", directory))?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, RecordError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error("read", path)(error)),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| io_error("understand", path)(error.into()))
}

/// Writes `directory/name` so that it appears complete or not at all, and
/// survives a crash of the host once this returns.
fn write_json(directory: &Path, name: &str, value: &impl Serialize) -> Result<(), RecordError> {
    let path = directory.join(name);
    let bytes =
        serde_json::to_vec_pretty(value).map_err(|error| io_error("write", &path)(error.into()))?;
    let fresh = directory.join(format!(".{name}.new"));
    let write = || {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(&fresh, &path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(io_error("write", &path))
}

#[cfg(test)]
mod tests;
