//! All records of a user: names, look-up, and clean-up after dead VMs.

use std::collections::{HashMap, HashSet};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};
use sm_control::config::{RecordConfigV1, StartSettingsV1};
use sm_control::id::{VmId, generate_name, is_valid_name};
use sm_control::with_causes;

use super::files::{dir_names, read_config, read_name, remove_tree};
use super::{
    CONFIG, CONSOLE, CREATED, EXIT, ExitRecord, LOCK, Record, RecordError, SOCKETS, VmConfig, bury,
    io_error, is_vanishing, try_lock,
};
use crate::events::{EventAction, EventLog};
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
    /// Names of records that were read.
    known_names: Arc<Mutex<HashMap<VmId, KnownName>>>,
    events: EventLog,
}

/// The name in a configuration file.
#[derive(Clone, Debug)]
struct KnownName {
    name: String,
    /// The VM is removed at its exit.
    auto_remove: bool,
    /// Identifies the file, which is replaced when the VM gets another name.
    file: FileIdentity,
}

/// Inode and time of the last write (seconds and nanoseconds) of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileIdentity(u64, i64, i64);

impl FileIdentity {
    /// Returns that of the file at `path`; `None` if there is none.
    fn of(path: &Path) -> Result<Option<Self>, RecordError> {
        match std::fs::metadata(path) {
            Ok(file) => Ok(Some(Self(file.ino(), file.mtime(), file.mtime_nsec()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("examine", path)(error)),
        }
    }
}

/// The parts of a new record besides its configuration.
#[derive(Clone, Debug, Default)]
pub(crate) struct Draft {
    /// The name; `None` for a generated one.
    pub(crate) name: Option<String>,
    /// Settings of the VM's starts.
    pub(crate) start: Option<StartSettingsV1>,
    /// The VM is not started by the caller.
    pub(crate) idle: bool,
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
            events: EventLog::of(home),
        })
    }

    /// Takes the lock of all records, under which they are created and removed.
    pub(crate) fn lock(&self) -> Result<File, RecordError> {
        registry_lock(&self.directory)
    }

    /// Creates a record under a free name and returns its lock, which is held. `config`
    /// receives the identifier and the name.
    pub(crate) fn create(
        &self,
        draft: &Draft,
        config: impl FnOnce(VmId, String) -> Result<VmConfig, crate::Error>,
    ) -> Result<(Record, File), crate::Error> {
        let name = draft.name.as_deref();
        let _registry = registry_lock(&self.directory)?;
        let used = self.names()?;
        let id = self.free_id(&used)?;
        let name = match name {
            Some(name) => {
                check_name(name, &id, &used)?;
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
        let result = self.create_files(&fresh, config, draft);
        if result.is_err() {
            // A failure of the clean-up must not replace the first error.
            let _ = remove_tree(&fresh);
        }
        let (record, lock) = result?;
        record.note(EventAction::Create, |event| event);
        Ok((record, lock))
    }

    fn create_files(
        &self,
        fresh: &Path,
        config: VmConfig,
        draft: &Draft,
    ) -> Result<(Record, File), RecordError> {
        let new_file = |name: &str| {
            let path = fresh.join(name);
            let file = OpenOptions::new()
                .create_new(true)
                .write(true)
                .mode(0o600)
                .open(&path);
            file.map_err(io_error("create", &path))
        };
        let lock = new_file(LOCK)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| io_error("lock", &fresh.join(LOCK))(errno.into()))?;
        if draft.idle {
            new_file(CREATED)?;
        }
        let record = Record {
            start: draft.start.clone(),
            ..self.record(config)
        };
        record.write_config(fresh)?;
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

    /// Changes the configuration of a VM, running or not, durably. `change` returns the
    /// error for a change that is refused. The VM's process reads the new configuration
    /// when it needs it.
    ///
    /// # Errors
    /// The record was removed, the change was refused, the new name is taken, or the file
    /// cannot be written.
    pub(crate) fn change(
        &self,
        record: &Record,
        change: impl FnOnce(&mut VmConfig) -> Result<(), crate::Error>,
    ) -> Result<Record, crate::Error> {
        let _registry = registry_lock(&self.directory)?;
        let mut record = self.reread(record)?;
        let before = record.config.clone();
        change(&mut record.config)?;
        if record.config == before {
            return Ok(record);
        }
        if record.config.name != before.name {
            check_name(&record.config.name, &before.id, &self.names()?)?;
        }
        record.write_config(&record.directory)?;
        if record.config.name != before.name {
            record.note(EventAction::Rename, |event| {
                event.with("old_name", &before.name)
            });
        }
        let mut renamed = before;
        renamed.name.clone_from(&record.config.name);
        if record.config != renamed {
            record.note(EventAction::Update, |event| event);
        }
        Ok(record)
    }

    /// Reads a record again. The caller holds the registry's lock.
    pub(super) fn reread(&self, record: &Record) -> Result<Record, RecordError> {
        match read_config(&record.directory.join(CONFIG))? {
            Some(read) if !record.is_vanishing() => Ok(self.stored(read)),
            _ => Err(RecordError::NotFound(record.config.name.clone())),
        }
    }

    /// Returns an identifier whose short form is free, because that names the directory
    /// of the sockets (whose paths must stay under 108 bytes).
    fn free_id(&self, used: &[(VmId, String)]) -> Result<VmId, RecordError> {
        loop {
            let id = VmId::generate();
            if used.iter().any(|(other, _)| other.short() == id.short()) {
                continue;
            }
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
            start: None,
            names: SOCKETS,
            events: self.events.clone(),
        }
    }

    /// Returns the record with the contents of its `config.json`.
    fn stored(&self, read: RecordConfigV1) -> Record {
        Record {
            start: read.start,
            ..self.record(read.config.into())
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
                Ok(Some(read)) if read.config.id == id => {
                    let record = self.stored(read);
                    if vanishing || !record.is_vanishing() {
                        records.push(record);
                    }
                    continue;
                }
                // The record has disappeared in the meantime.
                Ok(None) => continue,
                Ok(Some(read)) => (format!("{path:?} is of VM {}", read.config.id), false),
                Err(error) => (with_causes(&error), error.is_of_later_version()),
            };
            damaged.push(Damaged { id, reason, later });
        }
        records.sort_by_key(|record| std::cmp::Reverse(record.config.created));
        Ok((records, damaged))
    }

    /// Returns the names in use. Each record is read once and after changes only, so that
    /// starting many VMs through one value does not read all records each time.
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
            let Some(file) = FileIdentity::of(&directory.join(CONFIG))? else {
                continue;
            };
            if known_names.get(&id).is_none_or(|known| known.file != file) {
                let (name, auto_remove) = match read_config(&directory.join(CONFIG)) {
                    Ok(Some(read)) => (read.config.name, read.config.auto_remove),
                    Err(error) if error.is_of_later_version() => {
                        match read_name(&directory.join(CONFIG)) {
                            Some(named) => named,
                            None => continue,
                        }
                    }
                    // A record that has disappeared, or whose name is lost, has none.
                    Ok(None) | Err(RecordError::Form { .. }) => continue,
                    Err(error) => return Err(error),
                };
                let known = KnownName {
                    name,
                    auto_remove,
                    file,
                };
                known_names.insert(id.clone(), known);
            }
            let Some(known) = known_names.get(&id) else {
                continue;
            };
            if !is_vanishing(&directory, known.auto_remove) {
                names.push((id, known.name.clone()));
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
        let ids: Vec<VmId> = names.iter().filter_map(|name| VmId::parse(name)).collect();
        let sockets: HashSet<String> = dir_names(&self.sockets)?.into_iter().collect();
        for id in &ids {
            let directory = self.directory.join(id.as_str());
            if !sockets.contains(id.short()) && is_settled(&directory) {
                continue;
            }
            if let Ok(Some(read)) = read_config(&directory.join(CONFIG))
                && read.config.id == *id
            {
                clean_up_if_dead(&self.stored(read));
            }
        }
        // Sockets of a VM with a damaged record stay.
        let known: HashSet<&str> = ids.iter().map(VmId::short).collect();
        for name in sockets {
            if !known.contains(name.as_str()) {
                note(remove_tree(&self.sockets.join(name)));
            }
        }
        Ok(())
    }

    /// Cleans up like [`Self::sweep`], and returns the records that are left, newest first,
    /// and the damaged ones.
    ///
    /// # Errors
    /// The directories cannot be read.
    pub(crate) fn swept(&self) -> Result<(Vec<Record>, Vec<Damaged>), RecordError> {
        if let Err(error) = self.sweep() {
            tracing::warn!(%error, "cannot clean up after VMs");
        }
        let (records, damaged) = self.read_all(true)?;
        // Among those that a sweep passes over are records that were to be removed.
        let (gone, left): (Vec<_>, Vec<_>) = records.into_iter().partition(Record::is_vanishing);
        if !gone.is_empty() {
            let _registry = registry_lock(&self.directory)?;
            gone.iter().for_each(clean_up_if_dead);
        }
        Ok((left, damaged))
    }
}

/// Returns true if a record shows that its VM is idle, so that there is nothing to clean up
/// unless it has sockets, or was to be removed. Only this much is read of most records.
fn is_settled(directory: &Path) -> bool {
    [EXIT, CREATED]
        .iter()
        .any(|name| directory.join(name).exists())
}

/// Cleans up after a VM if no process has its lock. The caller holds the registry's lock.
fn clean_up_if_dead(record: &Record) {
    let lock = record.try_lock(FlockOperation::NonBlockingLockShared);
    if let Ok(Some(_lock)) = lock {
        note(clean_up(record));
    }
}

/// Checks that VM `id` can have `name`, which none of the `used` may be.
fn check_name(name: &str, id: &VmId, used: &[(VmId, String)]) -> Result<(), RecordError> {
    if !is_valid_name(name) {
        return Err(RecordError::BadName(name.to_owned()));
    }
    let taken = used
        .iter()
        .find(|(other, used)| used == name && other != id);
    match taken {
        Some((other, _)) => Err(RecordError::NameTaken {
            name: name.to_owned(),
            id: other.short().to_owned(),
        }),
        None => Ok(()),
    }
}

/// Cleans up after a VM that is dead, or was never started.
pub(super) fn clean_up(record: &Record) -> Result<(), RecordError> {
    // The start was interrupted before the VM's process took over.
    record.return_to_idle()?;
    if record.is_created()? {
        return record.remove_sockets();
    }
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
    if !record.directory.join(EXIT).exists() {
        let mut exit = ExitRecord::lost();
        exit.finished_ns = sm_control::timings::unix_nanos();
        record.write_exit(&exit)?;
        record.note(EventAction::Die, |event| {
            event.with("exit_code", exit.status).with("reason", "lost")
        });
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
