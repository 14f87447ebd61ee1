//! The machine that is started for access to the files of an idle VM.

use std::io;
use std::time::Instant;

use sm_control::config::NetworkConfigV1;
use sm_control::config::{MountSourceV1, MountV1, SettingsSourceV1, StartSettingsV1, VmConfig};
use sm_control::launch::{LaunchPurpose, LaunchRequest};
use sm_control::session::{Event, Session};
use sm_vmm::disks::DiskDirectory;

use super::again::source;
use super::options::DEFAULT_ROOT_DISK;
use super::{HELLO_TIMEOUT, log_tail, not_started, program, request, spawn, talking};
use crate::files::{FileAccess, FileScope};
use crate::reaper::Process;
use crate::record::{Record, Records};
use crate::sm::Sm;
use crate::{Error, Refusal, StartError};

/// A machine whose agent performs operations on files. It holds the lock of the VM's record
/// until it ends: when this value is dropped, or this process ends.
#[derive(Debug)]
pub(crate) struct FilesMachine {
    /// The record with the sockets of the machine.
    record: Record,
    child: Process,
    session: Option<Session>,
}

impl FilesMachine {
    /// Starts the machine of a VM that is idle; `None` if the VM has a process.
    ///
    /// # Errors
    /// The VM has no files while it is idle, or none that could be written; another access
    /// takes long; the machine cannot be started.
    pub(crate) fn start(
        sm: &Sm,
        record: &Record,
        scope: FileScope,
        access: FileAccess,
    ) -> Result<Option<Self>, Error> {
        let program = program(sm)?;
        sm.describe_agent()?;
        let records = Records::open(sm.home())?;
        let Some((record, lock)) = records.claim_files(record)? else {
            return Ok(None);
        };
        let launch = || {
            let config = record.config();
            let settings = record.start_settings();
            let settings = settings.ok_or_else(|| Refusal::NoStartSettings(config.name.clone()))?;
            let settings = settings_for_files(&record, settings, scope, access)?;
            // The image stays in the store meanwhile.
            let (source, _image) = source(sm, &record, &settings.source)?;
            let fixed = request(sm, &record, &settings, source)?;
            let request = LaunchRequest {
                config: config_for_files(config).into(),
                purpose: LaunchPurpose::Files,
                existing: true,
                ..fixed
            };
            spawn(&record, &request, &lock, &program)
        };
        let launched = launch();
        if launched.is_err() {
            // A sweep removes them otherwise.
            let _ = record.remove_sockets();
        }
        let (child, session) = launched?;
        drop(lock);
        let mut machine = Self {
            record,
            child,
            session: Some(session),
        };
        machine.wait_until_ready()?;
        Ok(Some(machine))
    }

    /// Returns the record with the sockets of the machine.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    fn wait_until_ready(&mut self) -> Result<(), Error> {
        while let Some(session) = &mut self.session {
            match session.next_event().map_err(talking)? {
                Some(Event::Started { .. }) => return Ok(()),
                Some(Event::Ended(exit)) => return Err(not_started(exit)),
                Some(_) => {}
                None => self.session = None,
            }
        }
        Err(self.died())
    }

    /// Lets the guest write its disks back and power itself off, and waits for that.
    ///
    /// # Errors
    /// The process ended in another way: what was written may be lost.
    pub(crate) fn close(mut self) -> Result<(), Error> {
        self.session = None;
        match self.child.wait() {
            Ok(status) if status.success() => Ok(()),
            _ => Err(self.died()),
        }
    }

    fn died(&mut self) -> Error {
        let how = match self.child.wait_until(Instant::now() + HELLO_TIMEOUT) {
            Some(status) => status.to_string(),
            None => "it went on".to_owned(),
        };
        let log = log_tail(&self.record);
        StartError::Died { how, log }.into()
    }
}

impl Drop for FilesMachine {
    fn drop(&mut self) {
        // The process ends when its launcher closes the connection. The next command finds
        // the disk free.
        self.session = None;
        let _ = self.child.wait();
    }
}

/// Returns the configuration of the machine: nothing outside of it notices it.
fn config_for_files(config: &VmConfig) -> VmConfig {
    let mut own = VmConfig::new(config.id.clone(), config.name.clone());
    own.image.clone_from(&config.image);
    own.image_digest.clone_from(&config.image_digest);
    own.created = config.created;
    own.workload = config.workload.clone();
    own.memory_bytes = config.memory_bytes;
    own.cpus = config.cpus;
    own.kernel.clone_from(&config.kernel);
    own.read_only = config.read_only;
    // No program of the VM runs in it.
    own.network = NetworkConfigV1::none();
    own
}

/// Returns the settings of the machine: those of a start from the VM's image.
fn settings_for_files(
    record: &Record,
    settings: &StartSettingsV1,
    scope: FileScope,
    access: FileAccess,
) -> Result<StartSettingsV1, Error> {
    let config = record.config();
    let mut own = settings.clone();
    let mut mounts = scope == FileScope::Mounts;
    if let SettingsSourceV1::Snapshot(snapshot) = &settings.source {
        // Its disk is that of its last run until the next one.
        let disk = DiskDirectory::of_root(record.directory());
        let has_disk = disk.exists().map_err(|source| Error::File {
            operation: "find the disk of the VM in",
            path: record.directory().to_owned(),
            source: io::Error::other(source),
        })?;
        if access == FileAccess::Write {
            return Err(Refusal::ContinuesSnapshot {
                vm: config.name.clone(),
                snapshot: snapshot.clone(),
            }
            .into());
        }
        own.root_disk = has_disk.then_some(DEFAULT_ROOT_DISK);
        own.source = SettingsSourceV1::Image { cold: false };
        // Its disks have other numbers than these mounts.
        mounts = false;
    }
    if own.root_disk.is_none() && !config.read_only {
        return Err(Refusal::RootInMemory(config.name.clone()).into());
    }
    let is_stored = |mount: &MountV1| !matches!(mount.source, MountSourceV1::Tmpfs { .. });
    own.mounts.retain(|mount| mounts && is_stored(mount));
    for mount in &mut own.mounts {
        mount.read_only |= access == FileAccess::Read;
    }
    Ok(own)
}
