//! All records of a user: names, look-up, and clean-up after dead VMs.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};
use sm_control::config::RecordConfigV1;
use sm_control::id::{VmId, generate_name, is_valid_name};
use sm_control::with_causes;

use super::files::{dir_names, read_config, read_name, remove_tree, write_json};
use super::{
    CONFIG, CONSOLE, ExitRecord, LOCK, Record, RecordError, VmConfig, bury, io_error, is_vanishing,
    try_lock,
};
use crate::home::{Home, ensure_private_dir};

/// Prefix of records under creation. Like removed records, they have no lock to test.
const NEW_PREFIX: &str = ".new-";
pub(super) const REMOVED_PREFIX: &str = ".removed-";
/// Lock file that serialises naming and sweeping.
const REGISTRY_LOCK: &str = ".lock";

/// All records of one user.
#[derive(Clone, Debug)]
pub(crate) struct Records {
    pub(super) directory: PathBuf,
    pub(super) sockets: PathBuf,
    /// Names of records that were read, and whether they are removed at the exit.
    known_names: Arc<Mutex<HashMap<VmId, (String, bool)>>>,
}

/// A record that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Damaged {
    /// Identifier of its VM.
    pub id: VmId,
    /// The cause.
    pub reason: String,
    /// It is not damaged: a later version of this program can read it.
    pub later: bool,
}

impl From<Damaged> for RecordError {
    fn from(damaged: Damaged) -> Self {
        let Damaged { id, reason, later } = damaged;
        match later {
            true => Self::Later { id, reason },
            false => Self::Damaged { id, reason },
        }
    }
}

impl Records {
    /// Opens the records below `home`, creating the directories.
    ///
    /// # Errors
    /// A directory cannot be created, or other users have access to it.
    pub(crate) fn open(home: &Home) -> Result<Self, RecordError> {
        let sockets = home.run().join("vms");
        let directory = home.vms();
        ensure_private_dir(home.run())?;
        ensure_private_dir(&sockets)?;
        ensure_private_dir(&directory)?;
        Ok(Self {
            directory,
            sockets,
            known_names: Arc::default(),
        })
    }

    /// Creates a record under a free name (`name`, or a generated one) and returns its
    /// lock, which is held. `config` receives the identifier and the name.
    pub(crate) fn create(
        &self,
        name: Option<&str>,
        config: impl FnOnce(VmId, String) -> Result<VmConfig, crate::Error>,
    ) -> Result<(Record, File), crate::Error> {
        if let Some(name) = name.filter(|name| !is_valid_name(name)) {
            return Err(RecordError::BadName(name.to_owned()).into());
        }
        let _registry = registry_lock(&self.directory)?;
        let used = self.names()?;
        let id = self.free_id()?;
        let name = match name {
            Some(name) => {
                if let Some((other, _)) = used.iter().find(|(_, used)| used == name) {
                    return Err(RecordError::NameTaken {
                        name: name.to_owned(),
                        id: other.short().to_owned(),
                    }
                    .into());
                }
                name.to_owned()
            }
            None => (0..)
                .map(generate_name)
                .find(|name| !used.iter().any(|(_, used)| used == name))
                .unwrap_or_else(|| id.short().to_owned()),
        };
        let config = config(id.clone(), name)?;

        let fresh = self.directory.join(format!("{NEW_PREFIX}{id}"));
        DirBuilder::new()
            .mode(0o700)
            .create(&fresh)
            .map_err(io_error("create", &fresh))?;
        let result = self.create_files(&fresh, config);
        if result.is_err() {
            // A failure of the clean-up must not replace the first error.
            let _ = remove_tree(&fresh);
        }
        Ok(result?)
    }

    fn create_files(&self, fresh: &Path, config: VmConfig) -> Result<(Record, File), RecordError> {
        let lock_path = fresh.join(LOCK);
        let lock = OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(io_error("create", &lock_path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| io_error("lock", &lock_path)(errno.into()))?;
        write_json(fresh, CONFIG, &RecordConfigV1::from(config.clone()))?;
        let record = self.record(config);
        DirBuilder::new()
            .mode(0o700)
            .create(&record.sockets)
            .map_err(io_error("create", &record.sockets))?;
        std::fs::rename(fresh, &record.directory)
            .map_err(io_error("create", &record.directory))
            .inspect_err(|_| {
                // The caller removes the rest.
                let _ = std::fs::remove_dir(&record.sockets);
            })?;
        Ok((record, lock))
    }

    /// Returns an identifier whose short form is free, because that names the directory
    /// of the sockets (whose paths must stay under 108 bytes).
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

    /// Returns all records, newest first.
    ///
    /// # Errors
    /// The directory cannot be read. Records that disappear in the meantime are skipped,
    /// as are damaged ones; see [`Self::damaged`].
    pub(crate) fn list(&self) -> Result<Vec<Record>, RecordError> {
        Ok(self.read_all(false)?.0)
    }

    /// Returns the records that cannot be parsed.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(crate) fn damaged(&self) -> Result<Vec<Damaged>, RecordError> {
        Ok(self.read_all(false)?.1)
    }

    pub(crate) fn read_all(
        &self,
        vanishing: bool,
    ) -> Result<(Vec<Record>, Vec<Damaged>), RecordError> {
        let (mut records, mut damaged) = (Vec::new(), Vec::new());
        for name in dir_names(&self.directory)? {
            let Some(id) = VmId::parse(&name) else {
                continue;
            };
            let path = self.directory.join(id.as_str()).join(CONFIG);
            let (reason, later) = match read_config(&path) {
                Ok(Some(config)) if config.id == id => {
                    let record = self.record(config);
                    if vanishing || !record.is_vanishing() {
                        records.push(record);
                    }
                    continue;
                }
                // The record has disappeared in the meantime.
                Ok(None) => continue,
                Ok(Some(config)) => (format!("{path:?} is of VM {}", config.id), false),
                Err(error) => (with_causes(&error), error.is_of_later_version()),
            };
            damaged.push(Damaged { id, reason, later });
        }
        records.sort_by_key(|record| std::cmp::Reverse(record.config.created));
        Ok((records, damaged))
    }

    /// Returns the names in use. Each record is read only once, as its name never
    /// changes; starting many VMs through one value does not read all records each time.
    ///
    /// # Errors
    /// The directory, or a record, cannot be read, so that a name in use may be unknown.
    fn names(&self) -> Result<Vec<(VmId, String)>, RecordError> {
        // No code panics while it holds this lock.
        let mut known_names = self
            .known_names
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut names = Vec::new();
        for name in dir_names(&self.directory)? {
            let Some(id) = VmId::parse(&name) else {
                continue;
            };
            let directory = self.directory.join(id.as_str());
            if !known_names.contains_key(&id) {
                match read_config(&directory.join(CONFIG)) {
                    Ok(Some(config)) => {
                        known_names.insert(id.clone(), (config.name, config.auto_remove));
                    }
                    Err(error) if error.is_of_later_version() => {
                        if let Some((name, auto_remove)) = read_name(&directory.join(CONFIG)) {
                            known_names.insert(id.clone(), (name, auto_remove));
                        }
                    }
                    // A record that has disappeared, or whose name is lost, has none.
                    Ok(None) | Err(RecordError::Form { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            let Some((name, auto_remove)) = known_names.get(&id) else {
                continue;
            };
            if !is_vanishing(&directory, *auto_remove) {
                names.push((id, name.clone()));
            }
        }
        Ok(names)
    }

    /// Removes the damaged record whose identifier begins with `query`.
    ///
    /// # Errors
    /// No record matches, or several do; its VM is alive; a later version of this program
    /// can read it; its files cannot be removed.
    pub(crate) fn remove_damaged(&self, query: &str) -> Result<(), RecordError> {
        let _registry = registry_lock(&self.directory)?;
        let id = match self.find_damaged(query)? {
            Some(later) if later.later => return Err(later.into()),
            Some(damaged) => damaged.id,
            None => return Err(RecordError::NotFound(query.to_owned())),
        };
        let directory = self.directory.join(id.as_str());
        match try_lock(&directory, query, FlockOperation::NonBlockingLockShared) {
            Ok(None) => return Err(RecordError::Running(id.short().to_owned())),
            // A record without a lock file never had a process.
            Ok(Some(_)) | Err(RecordError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        remove_tree(&self.sockets.join(id.short()))?;
        bury(&directory, &id)
    }

    fn find_damaged(&self, query: &str) -> Result<Option<Damaged>, RecordError> {
        let mut damaged = self.damaged()?;
        damaged.retain(|damaged| !query.is_empty() && damaged.id.as_str().starts_with(query));
        if damaged.len() > 1 {
            return Err(RecordError::Ambiguous(query.to_owned()));
        }
        Ok(damaged.pop())
    }

    /// Finds the record with this name, identifier, or unambiguous prefix of an
    /// identifier.
    ///
    /// # Errors
    /// No record matches, or several do.
    pub(crate) fn find(&self, query: &str) -> Result<Record, RecordError> {
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
        match self.find_damaged(query)? {
            Some(damaged) => Err(damaged.into()),
            None => Err(RecordError::NotFound(query.to_owned())),
        }
    }

    /// Cleans up after VMs that died: sockets of dead VMs, records that were to be
    /// removed at the exit, interrupted creations and removals.
    ///
    /// Failures are logged, and the clean-up is repeated by the next sweep: one VM does
    /// not affect others.
    ///
    /// # Errors
    /// The directories cannot be read.
    pub(crate) fn sweep(&self) -> Result<(), RecordError> {
        let _registry = registry_lock(&self.directory)?;
        let names = dir_names(&self.directory)?;
        for name in &names {
            // Both kinds are created and renamed under the registry's lock, except for
            // removals by VMMs, which rename first and may still be in progress:
            // concurrent removal is harmless.
            if name.starts_with(NEW_PREFIX) || name.starts_with(REMOVED_PREFIX) {
                note(remove_tree(&self.directory.join(name)));
            }
        }
        for record in &self.read_all(true)?.0 {
            let lock = record.try_lock(FlockOperation::NonBlockingLockShared);
            if let Ok(Some(_lock)) = lock {
                note(clean_up(record));
            }
        }
        // Sockets of a VM with a damaged record stay.
        let ids: Vec<VmId> = names.iter().filter_map(|name| VmId::parse(name)).collect();
        for name in dir_names(&self.sockets)? {
            if !ids.iter().any(|id| id.short() == name) {
                note(remove_tree(&self.sockets.join(name)));
            }
        }
        Ok(())
    }
}

/// Cleans up after a VM that is dead.
fn clean_up(record: &Record) -> Result<(), RecordError> {
    // A record without a console log belongs to a VM whose start was aborted. An error
    // does not prove that there is none.
    let console = record.directory.join(CONSOLE);
    let exists = console
        .try_exists()
        .map_err(io_error("look at", &console))?;
    let aborted = !exists;
    if record.config.auto_remove || aborted {
        return record.erase();
    }
    record.remove_sockets()?;
    if !record.has_ended() {
        let mut exit = ExitRecord::lost();
        exit.finished_ns = sm_control::timings::unix_nanos();
        record.write_exit(&exit)?;
    }
    Ok(())
}

fn note(cleaned: Result<(), RecordError>) {
    if let Err(error) = cleaned {
        tracing::warn!(error = with_causes(&error), "cannot clean up after a VM");
    }
}

/// Takes the lock under which records are named and swept.
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
