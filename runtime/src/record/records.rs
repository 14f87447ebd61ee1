//! All records of one user: naming, finding, and cleaning up after the dead.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::files::{dir_names, read_json, remove_tree, write_json};
use super::{CONFIG, CONSOLE, ExitRecord, LOCK, Record, RecordError, VmConfig, io_error};
use crate::home::{Home, ensure_private_dir};
use crate::id::{VmId, generate_name, is_valid_name};

/// Records being made and records being removed, which have no lock to test.
const NEW_PREFIX: &str = ".new-";
pub(super) const REMOVED_PREFIX: &str = ".removed-";
/// Serialises naming and sweeping.
const REGISTRY_LOCK: &str = ".lock";

/// All records of one user.
#[derive(Clone, Debug)]
pub struct Records {
    pub(super) directory: PathBuf,
    pub(super) sockets: PathBuf,
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
        let _registry = registry_lock(&self.directory)?;
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
        let _registry = registry_lock(&self.directory)?;
        for name in dir_names(&self.directory)? {
            // Both kinds are made and renamed under the registry's lock, but for
            // the removals of VMMs, which get their name by a rename and may be
            // going on: removing twice is fine.
            if name.starts_with(NEW_PREFIX) || name.starts_with(REMOVED_PREFIX) {
                remove_tree(&self.directory.join(name))?;
            }
        }
        let records = self.list_with(true)?;
        for record in &records {
            let dead = record.try_lock(FlockOperation::NonBlockingLockShared);
            let Ok(Some(_dead)) = dead else {
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

/// Takes the lock under which records are named and cleaned up after.
pub(super) fn registry_lock(directory: &Path) -> Result<File, RecordError> {
    let path = directory.join(REGISTRY_LOCK);
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
