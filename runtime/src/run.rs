//! The start of a virtual machine from options.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sm_control::config::{SettingsSourceV1, StartSettingsV1};
use sm_control::fdpass;
use sm_control::id::VmId;
use sm_control::launch::{
    ImageSource, LaunchPurpose, LaunchRequest, RestartProgress, StartSource, VmmReport,
};
use sm_control::session::{Aside, Event, Session};
use sm_control::timed::Until;
use sm_control::timings::Phase;
use sm_control::workload::Workload;
use sm_guest_proto::frame::{self, FrameHeader, FrameType, HEADER_LEN};

use crate::error::ENTRY_ADVICE;
use crate::image::Image;
use crate::kernel::Kernel;
use crate::reaper::Process;
use crate::record::{Draft, ExitRecord, Record, Records, VMM_LOG, VmConfig};
use crate::sm::Sm;
use crate::vm::Vm;
use crate::{Error, StartError, volumes};

mod again;
mod files_machine;
mod health;
mod open_files;
mod options;
mod reporting;

pub use self::again::StartOptions;
pub use self::health::HealthOptions;
pub use self::open_files::OpenFiles;
pub(crate) use self::options::DEFAULT_STOP_TIMEOUT;
pub use self::options::{
    DEFAULT_CPUS, DEFAULT_MEMORY, MAX_ROOT_DISK, MIN_MEMORY, MIN_ROOT_DISK, RootStorage, RunOptions,
};
pub(crate) use self::reporting::ReportingVm;

impl Image {
    /// Starts a VM from this image and returns once its workload runs.
    ///
    /// # Errors
    /// See [`Error`]; nothing is left behind, except the record of a VM whose command
    /// could not be run.
    pub fn run(&self, options: RunOptions) -> Result<Vm, Error> {
        start(self.sm(), self, options)
    }

    /// Creates a VM from this image, which [`Vm::start`] starts.
    ///
    /// # Errors
    /// As for [`Self::run`], as far as they concern the options, image and kernel.
    pub fn create(&self, options: RunOptions) -> Result<Vm, Error> {
        let kernel = check(self.sm(), self, &options)?;
        let options = options.with_all_mounts(self.sm(), &self.defaults().volumes)?;
        let config = |id, name| config(self, &options, &kernel, id, name);
        create_idle(self.sm(), &options, settings_source(&options), config)
    }
}

/// Creates a VM without starting it.
pub(crate) fn create_idle(
    sm: &Sm,
    options: &RunOptions,
    source: SettingsSourceV1,
    config: impl FnOnce(VmId, String) -> Result<VmConfig, Error>,
) -> Result<Vm, Error> {
    let draft = Draft {
        idle: true,
        ..draft(options, source)
    };
    let records = Records::open(sm.home())?;
    records.sweep()?;
    let (record, _lock) = records.create(&draft, config)?;
    Ok(Vm::from_record(sm, record))
}

/// Starts a VM from an image and returns once its workload runs.
pub(crate) fn start(sm: &Sm, image: &Image, options: RunOptions) -> Result<Vm, Error> {
    let kernel = check(sm, image, &options)?;
    let options = options.with_all_mounts(sm, &image.defaults().volumes)?;
    let launched = launch(
        sm,
        &options,
        |id, name| config(image, &options, &kernel, id, name),
        StartSource::Image(ImageSource {
            root: image.segments().to_vec(),
            modules: kernel.modules.clone(),
            cold: options.cold,
        }),
    )?;
    launched.until_started(options.attach)
}

/// Checks everything that can fail before something would have to be undone; returns the
/// kernel.
fn check(sm: &Sm, image: &Image, options: &RunOptions) -> Result<Kernel, Error> {
    options.check()?;
    image.check_platform()?;
    let kernel = sm.kernels().find(options.kernel.as_deref())?;
    sm.describe_agent()?;
    Workload::merge(image.defaults(), &options.overrides, "checked")?;
    Ok(kernel)
}

/// Returns the configuration of a VM of `image`.
fn config(
    image: &Image,
    options: &RunOptions,
    kernel: &Kernel,
    id: VmId,
    name: String,
) -> Result<VmConfig, Error> {
    let workload = Workload::merge(image.defaults(), &options.overrides, id.short())?;
    let mut config = VmConfig::new(id, name);
    config.image = image.reference().to_owned();
    config.image_digest = image.digest().to_owned();
    config.workload = workload;
    config.health.clone_from(&image.defaults().health);
    config.memory_bytes = options.memory_given().unwrap_or(DEFAULT_MEMORY);
    config.cpus = options.cpus.unwrap_or(DEFAULT_CPUS);
    config.kernel.clone_from(&kernel.path);
    config.read_only = options.read_only;
    config.stop_timeout = options.stop_timeout.unwrap_or(DEFAULT_STOP_TIMEOUT);
    options.apply_to(&mut config);
    Ok(config)
}

/// A VMM process that has said hello.
pub(crate) struct Launched {
    sm: Sm,
    record: Record,
    child: Process,
    session: Session,
    phases: Vec<Phase>,
    warnings: Vec<String>,
    /// The record existed before, and stays if the start fails.
    existing: bool,
}

/// The program of the VMM process.
struct Program {
    path: PathBuf,
    /// Variables that differ from those of this process; `None` for those to remove.
    environment: Vec<(&'static str, Option<OsString>)>,
    /// Time until it must say hello.
    timeout: Duration,
}

/// Creates a record and starts a VMM for it. `config` completes the configuration with an
/// identifier and a name.
pub(crate) fn launch(
    sm: &Sm,
    options: &RunOptions,
    config: impl FnOnce(VmId, String) -> Result<VmConfig, Error>,
    source: StartSource,
) -> Result<Launched, Error> {
    let records = Records::open(sm.home())?;
    records.sweep()?;
    launch_in(sm, &records, options, config, source)
}

/// Like [`launch`], for a caller that has already swept the records.
pub(crate) fn launch_in(
    sm: &Sm,
    records: &Records,
    options: &RunOptions,
    config: impl FnOnce(VmId, String) -> Result<VmConfig, Error>,
    source: StartSource,
) -> Result<Launched, Error> {
    launch_program(sm, records, options, config, source, &program(sm)?)
}

fn launch_program(
    sm: &Sm,
    records: &Records,
    options: &RunOptions,
    config: impl FnOnce(VmId, String) -> Result<VmConfig, Error>,
    source: StartSource,
    program: &Program,
) -> Result<Launched, Error> {
    let settings = match &source {
        StartSource::Image(_) => Some(settings_source(options)),
        StartSource::Snapshot(name) => Some(SettingsSourceV1::Snapshot(name.clone())),
        StartSource::IdentityReport(_) => None,
    };
    let draft = settings.map_or_else(
        || Draft {
            name: options.name.clone(),
            ..Draft::default()
        },
        |settings| draft(options, settings),
    );
    let (record, lock) = records.create(&draft, config)?;
    let launch = || {
        let fixed = request(sm, &record, &settings_of(options, &draft), source)?;
        let mut request = LaunchRequest {
            attach: options.attach,
            columns: options.terminal_size.0,
            rows: options.terminal_size.1,
            phases: options.phases.clone(),
            ..fixed
        };
        request.phases.push(Phase::now("image resolved"));
        let (child, session) = spawn(&record, &request, &lock, program)?;
        let warnings = volumes::warnings(sm.home(), &request.mounts);
        Ok((child, session, request.phases, warnings))
    };
    match launch() {
        Ok((child, session, phases, warnings)) => Ok(Launched {
            sm: sm.clone(),
            record,
            child,
            session,
            phases,
            warnings,
            existing: false,
        }),
        Err(error) => {
            // Without a process, no one else removes the record.
            let _ = record.erase();
            let _ = sm.volumes().remove_anonymous_of(&record);
            Err(error)
        }
    }
}

/// Returns the program of the VMM process.
fn program(sm: &Sm) -> Result<Program, Error> {
    if std::env::var_os(sm_vmm::VMM_VARIABLE).is_some() {
        return Err(StartError::InsideVmm.into());
    }
    Ok(Program {
        path: sm.vmm()?,
        environment: sm.vmm_environment().into(),
        timeout: HELLO_TIMEOUT,
    })
}

/// Returns the request for a detached start of a VM.
fn request(
    sm: &Sm,
    record: &Record,
    settings: &StartSettingsV1,
    source: StartSource,
) -> Result<LaunchRequest, Error> {
    let home = sm.home();
    Ok(LaunchRequest {
        version: sm_control::VERSION.to_owned(),
        data: home.data().to_owned(),
        run: home.run().to_owned(),
        cache: home.cache().to_owned(),
        config: record.config().clone().into(),
        purpose: LaunchPurpose::Workload,
        cmdline: settings.cmdline.clone(),
        source,
        paging: settings.paging,
        root_disk: settings.root_disk,
        upper_size: settings.upper_size,
        shm_size: settings.shm_size,
        mounts: volumes::requests(&sm.volumes(), &settings.mounts)?,
        attach: false,
        columns: 80,
        rows: 24,
        start_timeout_ms: settings.start_timeout_ms,
        phases: Vec::new(),
        existing: false,
        restarts: RestartProgress::default(),
    })
}

/// Returns the settings of starts with these options, of an image.
fn settings_source(options: &RunOptions) -> SettingsSourceV1 {
    SettingsSourceV1::Image { cold: options.cold }
}

/// Returns the draft of a record with these options.
fn draft(options: &RunOptions, source: SettingsSourceV1) -> Draft {
    Draft {
        name: options.name.clone(),
        start: Some(options.settings(source)),
        idle: false,
    }
}

/// Returns the settings of a draft, or of a start that is not repeated.
fn settings_of(options: &RunOptions, draft: &Draft) -> StartSettingsV1 {
    let stored = draft.start.clone();
    stored.unwrap_or_else(|| options.settings(settings_source(options)))
}

/// Time until a program must say hello; a busy host needs a part of it.
const HELLO_TIMEOUT: Duration = Duration::from_secs(60);

fn talking(source: io::Error) -> Error {
    Error::Vmm {
        operation: "talk to the VM's process",
        source,
    }
}

pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Starts the VMM process, passes it the request and the record's lock, and waits for its
/// hello. There is no process after an error.
fn spawn(
    record: &Record,
    request: &LaunchRequest,
    lock: &File,
    program: &Program,
) -> Result<(Process, Session), Error> {
    let vmm_error = |source| Error::Vmm {
        operation: "start the VM's process",
        source,
    };
    let log_path = record.directory().join(VMM_LOG);
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(|source| Error::File {
            operation: "create",
            path: log_path,
            source,
        })?;
    let mut bytes = Vec::new();
    let encoded = serde_json::to_vec(request).map_err(|error| vmm_error(error.into()))?;
    frame::encode(FrameType::Request, &encoded, &mut bytes)
        .map_err(|error| vmm_error(io::Error::other(error)))?;
    let (mut ours, theirs) = UnixStream::pair().map_err(vmm_error)?;
    let session = ours
        .try_clone()
        .and_then(|stream| Session::new(stream, Some(Aside::workload(record.control_endpoint()))))
        .map_err(vmm_error)?;
    let mut command = Command::new(&program.path);
    for (name, value) in &program.environment {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let child = command
        .arg0("sm-vmm")
        .args([sm_vmm::SUBCOMMAND, record.config().id.short()])
        .env(sm_vmm::VMM_VARIABLE, "1")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(vmm_error)?;
    // It has a copy of the process's end, which would keep the stream open.
    drop(command);
    let mut child = Process::new(child);
    let deadline = Instant::now() + program.timeout;
    let greeted = ours
        .set_write_timeout(Some(program.timeout))
        .and_then(|()| fdpass::send(&mut ours, &bytes, lock))
        .and_then(|()| receive_hello(&ours, deadline))
        .and_then(|()| ours.set_write_timeout(None))
        .and_then(|()| ours.set_read_timeout(None));
    match greeted {
        Ok(()) => Ok((child, session)),
        // The process has exited, or closed its end.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
            ) =>
        {
            drop(ours);
            drop(session);
            Err(not_a_vmm(record, &mut child, deadline))
        }
        Err(error) => {
            child.kill();
            Err(vmm_error(match error.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                    let text = format!(
                        "{:?} does not become one within {:?}: {ENTRY_ADVICE}",
                        program.path, program.timeout
                    );
                    io::Error::new(io::ErrorKind::TimedOut, text)
                }
                _ => error,
            }))
        }
    }
}

/// Reads the VMM's first message, and no further bytes.
fn receive_hello(stream: &UnixStream, deadline: Instant) -> io::Result<()> {
    let mut until = Until {
        stream,
        deadline: Some(deadline),
    };
    let mut header = [0; HEADER_LEN];
    until.read_exact(&mut header)?;
    let header = FrameHeader::decode(header)
        .and_then(|header| header.limited(frame::payload_limit))
        .map_err(io::Error::other)?;
    let mut payload = vec![0; header.len];
    until.read_exact(&mut payload)?;
    match serde_json::from_slice(&payload)? {
        VmmReport::Hello => Ok(()),
        other => Err(io::Error::other(format!("it began with {other:?}"))),
    }
}

/// Returns the error for a process that closed the connection before its hello.
fn not_a_vmm(record: &Record, child: &mut Process, deadline: Instant) -> Error {
    let how = child.wait_until(deadline);
    let how = how.map_or_else(|| "it went on".to_owned(), |status| status.to_string());
    let log = log_tail(record);
    StartError::NotAVmm { how, log }.into()
}

/// Returns the last lines of the VMM's log, indented.
fn log_tail(record: &Record) -> String {
    // The log may contain invalid UTF-8.
    let log = std::fs::read(record.directory().join(VMM_LOG)).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().rev().take(5).collect();
    let lines = lines.into_iter().rev();
    lines.map(|line| format!("\n  {line}")).collect()
}

impl Launched {
    /// Processes events of the VMM until the workload runs.
    pub(crate) fn until_started(mut self, attach: bool) -> Result<Vm, Error> {
        if let Err(error) = self.wait_until_started() {
            self.remove_volumes();
            return Err(error);
        }
        let session = attach.then_some(self.session);
        let mut vm = Vm::started(self.sm, self.record, self.child, session, self.phases);
        vm.warnings = self.warnings;
        Ok(vm)
    }

    /// Removes the volumes that were created for a VM whose start failed, unless its record
    /// stays. No error replaces that of the start.
    fn remove_volumes(self) {
        if self.existing || !self.record.volumes().any(|(_, anonymous)| anonymous) {
            return;
        }
        drop(self.session);
        // It has ended the run, and holds the volumes until it exits.
        let mut child = self.child;
        child.wait_until(Instant::now() + HELLO_TIMEOUT);
        if !self.record.directory().exists() {
            let _ = self.sm.volumes().remove_anonymous_of(&self.record);
        }
    }

    fn wait_until_started(&mut self) -> Result<(), Error> {
        loop {
            match self.session.next_event().map_err(talking)? {
                Some(Event::Started { .. }) => return Ok(()),
                Some(Event::Phase(phase)) => self.phases.push(phase),
                Some(Event::Warning(text)) => self.warnings.push(text),
                Some(Event::Ended(exit)) => return Err(not_started(exit)),
                // Output follows the start, and the record has the exit status.
                Some(_) => {}
                None => return Err(vmm_exited(&self.record, &mut self.child, self.existing)),
            }
        }
    }
}

fn not_started(exit: ExitRecord) -> Error {
    let status = exit.status;
    let message = exit
        .message
        .unwrap_or_else(|| format!("the workload ended with status {status} before it ran"));
    // Docker's exit statuses 126 and 127 say that the command could not be run.
    match status {
        126 | 127 => StartError::Command { status, message },
        _ => StartError::Failed {
            message,
            cause: exit.cause,
        },
    }
    .into()
}

/// The VMM died without a report: returns the error with the known facts, and cleans up.
fn vmm_exited(record: &Record, child: &mut Process, existing: bool) -> Error {
    let how = match child.wait() {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    let log = log_tail(record);
    if !existing {
        // No one else has a handle of the record.
        let _ = record.remove();
    }
    StartError::Died { how, log }.into()
}

#[cfg(test)]
mod tests;
