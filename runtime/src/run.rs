//! Starting a virtual machine: options in, a running VM out.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sm_control::fdpass;
use sm_control::id::VmId;
use sm_control::launch::{DiskSegment, LaunchRequest, Origin, Paging, Report};
use sm_control::publish::{DEFAULT_WAIT_MS, Publication};
use sm_control::session::{Aside, Event, Session};
use sm_control::timed::Until;
use sm_control::timings::{Phase, unix_nanos};
use sm_control::workload::{Overrides, Workload};
use sm_guest_proto::forward::MAX_WAIT_MS;
use sm_guest_proto::frame::{self, FrameHeader, FrameType, HEADER_LEN};

use crate::home::Home;
use crate::image::Image;
use crate::reaper::Process;
use crate::record::{ExitRecord, Record, Records, VMM_LOG, VmConfig};
use crate::vm::Vm;
use crate::{Error, kernel, vmm};

mod witness;

pub(crate) use self::witness::Witness;

/// Least guest memory in bytes.
pub const MIN_MEMORY: u64 = 64 << 20;
/// Guest memory when nothing else is asked for, in bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// Number of vCPUs when nothing else is asked for.
pub const DEFAULT_CPUS: u32 = 1;
/// Time between stop signal and SIGKILL when nothing else is asked for.
pub(crate) const DEFAULT_STOP_TIMEOUT: Duration = Duration::from_secs(10);
const MEBIBYTE: u64 = 1 << 20;

/// How a VM is started.
#[derive(Clone, Debug)]
pub struct RunOptions {
    pub(crate) overrides: Overrides,
    pub(crate) name: Option<String>,
    pub(crate) memory: Option<u64>,
    pub(crate) cpus: Option<u32>,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) auto_remove: bool,
    pub(crate) read_only: bool,
    pub(crate) attach: bool,
    terminal_size: (u16, u16),
    pub(crate) upper_size: Option<u64>,
    pub(crate) shm_size: Option<u64>,
    pub(crate) extra_hosts: Vec<(String, String)>,
    pub(crate) nameservers: Vec<String>,
    pub(crate) stop_timeout: Option<Duration>,
    start_timeout: Duration,
    pub(crate) cmdline: String,
    pub(crate) cold: bool,
    paging: Paging,
    phases: Vec<Phase>,
    pub(crate) publish: Vec<Publication>,
    publish_wait: Duration,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            overrides: Overrides::default(),
            name: None,
            memory: None,
            cpus: None,
            kernel: None,
            auto_remove: false,
            read_only: false,
            attach: false,
            terminal_size: (80, 24),
            upper_size: None,
            shm_size: None,
            extra_hosts: Vec::new(),
            nameservers: Vec::new(),
            stop_timeout: None,
            start_timeout: Duration::from_secs(120),
            cmdline: String::new(),
            cold: false,
            paging: Paging::Map,
            phases: Vec::new(),
            publish: Vec::new(),
            publish_wait: Duration::from_millis(u64::from(DEFAULT_WAIT_MS)),
        }
    }
}

impl RunOptions {
    /// The image's own choices, 512 MiB and one vCPU.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What to change of the image's configuration.
    #[must_use]
    pub fn overrides(mut self, overrides: Overrides) -> Self {
        self.overrides = overrides;
        self
    }

    /// Arguments in place of the image's `Cmd`.
    #[must_use]
    pub fn command<I, S>(mut self, command: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.overrides.command = command.into_iter().map(Into::into).collect();
        self
    }

    /// Adds a `NAME=value` entry to the environment.
    #[must_use]
    pub fn env(mut self, entry: impl Into<String>) -> Self {
        self.overrides.env.push(entry.into());
        self
    }

    /// Names the VM; a name is generated otherwise.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Guest memory in bytes, at least [`MIN_MEMORY`]; rounded up to a MiB.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = Some(bytes);
        self
    }

    /// Number of vCPUs, at least 1.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = Some(cpus);
        self
    }

    /// The kernel to boot; see [`kernel::find`] for what is used otherwise.
    #[must_use]
    pub fn kernel(mut self, path: impl Into<PathBuf>) -> Self {
        self.kernel = Some(path.into());
        self
    }

    /// Words added to the guest kernel's command line.
    #[must_use]
    pub fn cmdline(mut self, words: impl Into<String>) -> Self {
        self.cmdline = words.into();
        self
    }

    /// Boots a kernel even where a snapshot could be restored, and leaves none
    /// behind.
    #[must_use]
    pub fn cold(mut self, cold: bool) -> Self {
        self.cold = cold;
        self
    }

    /// Removes the VM's record and logs when it ends.
    #[must_use]
    pub fn auto_remove(mut self, yes: bool) -> Self {
        self.auto_remove = yes;
        self
    }

    /// No writable layer over the image.
    #[must_use]
    pub fn read_only(mut self, yes: bool) -> Self {
        self.read_only = yes;
        self
    }

    /// Stays attached: [`Vm::take_session`] then has the workload's session,
    /// from its first byte on.
    #[must_use]
    pub fn attach(mut self, yes: bool) -> Self {
        self.attach = yes;
        self
    }

    /// Columns and rows, for a workload on a terminal.
    #[must_use]
    pub fn terminal_size(mut self, columns: u16, rows: u16) -> Self {
        self.terminal_size = (columns, rows);
        self
    }

    /// Size limit of the writable layer in bytes; half of guest memory when 0.
    #[must_use]
    pub fn upper_size(mut self, bytes: u64) -> Self {
        self.upper_size = Some(bytes);
        self
    }

    /// Size of `/dev/shm` in bytes; 64 MiB when 0.
    #[must_use]
    pub fn shm_size(mut self, bytes: u64) -> Self {
        self.shm_size = Some(bytes);
        self
    }

    /// Adds a line to `/etc/hosts`.
    #[must_use]
    pub fn host(mut self, name: impl Into<String>, address: impl Into<String>) -> Self {
        self.extra_hosts.push((address.into(), name.into()));
        self
    }

    /// Adds a name server.
    #[must_use]
    pub fn nameserver(mut self, address: impl Into<String>) -> Self {
        self.nameservers.push(address.into());
        self
    }

    /// Time between stop signal and SIGKILL.
    #[must_use]
    pub fn stop_timeout(mut self, timeout: Duration) -> Self {
        self.stop_timeout = Some(timeout);
        self
    }

    /// How long guest and agent may take until the workload runs.
    #[must_use]
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// Phases that were complete before, for one list of all.
    #[must_use]
    pub fn phases(mut self, phases: Vec<Phase>) -> Self {
        self.phases = phases;
        self
    }

    /// How memory is restored, where the VM is started from a snapshot.
    #[must_use]
    pub fn paging(mut self, paging: Paging) -> Self {
        self.paging = paging;
        self
    }

    /// Publishes a port of the guest on the host.
    #[must_use]
    pub fn publish(mut self, publication: Publication) -> Self {
        self.publish.push(publication);
        self
    }

    /// How long a connection to a published port waits for somebody in the guest to
    /// listen, 10 minutes at most: 1 s unless this is called. Longer lets clients
    /// come before a server that takes its time to start; with none at all a client
    /// learns at once that nobody listens.
    #[must_use]
    pub fn publish_wait(mut self, wait: Duration) -> Self {
        self.publish_wait = wait;
        self
    }

    pub(crate) fn publish_wait_ms(&self) -> u32 {
        let wait = u32::try_from(self.publish_wait.as_millis());
        wait.unwrap_or(MAX_WAIT_MS).min(MAX_WAIT_MS)
    }

    /// Guest memory in bytes, in whole MiB; `None` when it is not asked for.
    pub(crate) fn memory_given(&self) -> Option<u64> {
        let mebibytes = self.memory.map(|bytes| bytes.div_ceil(MEBIBYTE));
        mebibytes.map(|count| count.saturating_mul(MEBIBYTE))
    }

    fn check(&self) -> Result<(), Error> {
        if let Some(memory) = self.memory.filter(|memory| *memory < MIN_MEMORY) {
            return Err(Error::Option(format!(
                "{} of memory is too little for a guest: give it at least {} MiB",
                mebibytes(memory),
                MIN_MEMORY / MEBIBYTE
            )));
        }
        if self.cpus == Some(0) {
            return Err(Error::Option(
                "0 CPUs are too few for a guest: give it at least 1".to_owned(),
            ));
        }
        Ok(())
    }
}

fn mebibytes(bytes: u64) -> String {
    if bytes.is_multiple_of(MEBIBYTE) {
        format!("{} MiB", bytes / MEBIBYTE)
    } else {
        format!("{bytes} bytes")
    }
}

impl Image {
    /// Starts a VM from this image and returns once its workload runs.
    ///
    /// # Errors
    /// See [`Error`]; nothing is left behind, except the record of a VM
    /// whose command could not be run.
    pub fn run(&self, options: RunOptions) -> Result<Vm, Error> {
        start(self.home(), self, options)
    }
}

/// Starts a VM from an image and returns once its workload runs.
pub(crate) fn start(home: &Home, image: &Image, options: RunOptions) -> Result<Vm, Error> {
    options.check()?;
    let memory = options.memory_given().unwrap_or(DEFAULT_MEMORY);
    // Look at everything that can be wrong before there is anything to undo.
    image.check_platform()?;
    let kernel = kernel::find(home, options.kernel.as_deref())?;
    crate::guest_agent::describe()?;
    Workload::merge(image.defaults(), &options.overrides, "checked")?;

    let launched = launch(
        home,
        &options,
        |id, name| {
            let workload = Workload::merge(image.defaults(), &options.overrides, id.short())?;
            Ok(VmConfig {
                id,
                name,
                image: image.reference().to_owned(),
                image_digest: image.digest().to_owned(),
                created_ns: unix_nanos(),
                workload,
                memory,
                cpus: options.cpus.unwrap_or(DEFAULT_CPUS),
                kernel: kernel.path.clone(),
                auto_remove: options.auto_remove,
                read_only: options.read_only,
                stop_timeout_ms: millis(options.stop_timeout.unwrap_or(DEFAULT_STOP_TIMEOUT)),
                publish: options.publish.clone(),
                publish_wait_ms: options.publish_wait_ms(),
            })
        },
        Source {
            origin: if options.cold {
                Origin::Cold
            } else {
                Origin::Image
            },
            root: image.segments().to_vec(),
            modules: kernel.modules.clone(),
        },
    )?;
    launched.until_started(options.attach)
}

/// What a machine is made from.
pub(crate) struct Source {
    pub(crate) origin: Origin,
    pub(crate) root: Vec<DiskSegment>,
    pub(crate) modules: Option<PathBuf>,
}

/// A VMM that was started and has not said much yet.
pub(crate) struct Launched {
    record: Record,
    child: Process,
    session: Session,
    phases: Vec<Phase>,
    warnings: Vec<String>,
}

/// The program that becomes a VMM.
struct Program {
    path: PathBuf,
    /// How long it may take to say that it is one.
    timeout: Duration,
}

/// Makes a record and starts a VMM for it. `config` completes what the options
/// leave open, given an identifier and a name.
pub(crate) fn launch(
    home: &Home,
    options: &RunOptions,
    config: impl FnOnce(VmId, String) -> Result<VmConfig, Error>,
    source: Source,
) -> Result<Launched, Error> {
    let records = Records::open(home)?;
    records.sweep()?;
    launch_in(home, &records, options, config, source)
}

/// Does the same for one of many VMs, whose caller has swept the records.
pub(crate) fn launch_in(
    home: &Home,
    records: &Records,
    options: &RunOptions,
    config: impl FnOnce(VmId, String) -> Result<VmConfig, Error>,
    source: Source,
) -> Result<Launched, Error> {
    let program = Program {
        path: executable(),
        timeout: HELLO_TIMEOUT,
    };
    launch_program(home, records, options, config, source, &program)
}

fn launch_program(
    home: &Home,
    records: &Records,
    options: &RunOptions,
    config: impl FnOnce(VmId, String) -> Result<VmConfig, Error>,
    source: Source,
    program: &Program,
) -> Result<Launched, Error> {
    if std::env::var_os(vmm::VMM_VARIABLE).is_some() {
        return Err(Error::Refused(format!(
            "this process was started to be the process of a VM, and starts a VM instead: \
             {FORGOTTEN}"
        )));
    }
    let (record, lock) = records.create(options.name.as_deref(), config)?;
    let mut phases = options.phases.clone();
    phases.push(Phase::now("image resolved"));
    let request = LaunchRequest {
        version: sm_control::VERSION.to_owned(),
        data: home.data().to_owned(),
        run: home.run().to_owned(),
        cache: home.cache().to_owned(),
        config: record.config().clone(),
        modules: source.modules,
        cmdline: options.cmdline.clone(),
        origin: source.origin,
        paging: options.paging,
        root: source.root,
        upper_size: options.upper_size.unwrap_or(0),
        shm_size: options.shm_size.unwrap_or(0),
        extra_hosts: options.extra_hosts.clone(),
        nameservers: options.nameservers.clone(),
        attach: options.attach,
        columns: options.terminal_size.0,
        rows: options.terminal_size.1,
        start_timeout_ms: millis(options.start_timeout),
        phases,
    };
    match spawn(&record, &request, lock, program) {
        Ok((child, session)) => Ok(Launched {
            record,
            child,
            session,
            phases: request.phases,
            warnings: Vec::new(),
        }),
        Err(error) => {
            // There is no process, or none any more, so nothing else cleans up.
            let _ = record.erase();
            Err(error)
        }
    }
}

/// How long a program may take to say that it is a VMM. A busy host needs some of it.
const HELLO_TIMEOUT: Duration = Duration::from_secs(60);

/// What a program has to do.
const FORGOTTEN: &str =
    "its program has to call sm_runtime::run_vmm_if_asked() first thing in main";

fn talking(source: io::Error) -> Error {
    Error::Vmm {
        operation: "talk to the VM's process",
        source,
    }
}

pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Starts the VMM process, hands it the request and the record's lock, and waits
/// until it says that it is a VMM. There is no process after an error.
fn spawn(
    record: &Record,
    request: &LaunchRequest,
    lock: File,
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
    let child = Command::new(&program.path)
        .arg0("sm-vmm")
        .args([vmm::SUBCOMMAND, record.config().id.short()])
        .env(vmm::VMM_VARIABLE, "1")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .map_err(vmm_error)?;
    let mut child = Process::new(child);
    let deadline = Instant::now() + program.timeout;
    let greeted = ours
        .set_write_timeout(Some(program.timeout))
        .and_then(|()| fdpass::send(&mut ours, &bytes, &lock))
        .and_then(|()| receive_hello(&ours, deadline))
        .and_then(|()| ours.set_write_timeout(None))
        .and_then(|()| ours.set_read_timeout(None));
    match greeted {
        Ok(()) => Ok((child, session)),
        // It has ended, or closed its end.
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
                        "{:?} does not become one within {:?}: {FORGOTTEN}",
                        program.path, program.timeout
                    );
                    io::Error::new(io::ErrorKind::TimedOut, text)
                }
                _ => error,
            }))
        }
    }
}

/// Reads the VMM's first message, and no byte more.
fn receive_hello(stream: &UnixStream, deadline: Instant) -> io::Result<()> {
    let mut until = Until {
        stream,
        deadline: Some(deadline),
    };
    let mut header = [0; HEADER_LEN];
    until.read_exact(&mut header)?;
    let header = FrameHeader::decode(header).map_err(io::Error::other)?;
    let mut payload = vec![0; header.len];
    until.read_exact(&mut payload)?;
    match serde_json::from_slice(&payload)? {
        Report::Hello => Ok(()),
        other => Err(io::Error::other(format!("it began with {other:?}"))),
    }
}

/// A program that has hung up before it said that it is a VMM.
fn not_a_vmm(record: &Record, child: &mut Process, deadline: Instant) -> Error {
    let how = child.wait_until(deadline);
    let how = how.map_or_else(|| "it went on".to_owned(), |status| status.to_string());
    Error::Start {
        message: format!(
            "the VM's process ended before it was one ({how}): {FORGOTTEN}{}",
            log_tail(record)
        ),
        status: 125,
    }
}

/// The last lines of the VMM's log, indented.
fn log_tail(record: &Record) -> String {
    // Any bytes may be in it.
    let log = std::fs::read(record.directory().join(VMM_LOG)).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().rev().take(5).collect();
    let lines = lines.into_iter().rev();
    lines.map(|line| format!("\n  {line}")).collect()
}

/// The program to run as the VMM: `$SM_VMM`, else this one, which must call
/// [`crate::run_vmm_if_asked`] first thing.
fn executable() -> PathBuf {
    std::env::var_os("SM_VMM")
        .filter(|value| !value.is_empty())
        .map_or_else(|| Path::new("/proc/self/exe").to_owned(), PathBuf::from)
}

impl Launched {
    /// Follows the VMM's reports until the workload runs.
    pub(crate) fn until_started(mut self, attach: bool) -> Result<Vm, Error> {
        loop {
            match self.session.next_event().map_err(talking)? {
                Some(Event::Started { .. }) => break,
                Some(Event::Phase(phase)) => self.phases.push(phase),
                Some(Event::Warning(text)) => self.warnings.push(text),
                Some(Event::Ended(exit)) => return Err(not_started(exit)),
                // Output comes after the start, and the record tells of the end.
                Some(
                    Event::Stdout(_)
                    | Event::Stderr(_)
                    | Event::Error(_)
                    | Event::Evidence(_)
                    | Event::Exit(_),
                ) => {}
                None => return Err(vmm_died(&self.record, &mut self.child)),
            }
        }
        let session = attach.then_some(self.session);
        let mut vm = Vm::started(self.record, self.child, session, self.phases);
        vm.warnings = self.warnings;
        Ok(vm)
    }
}

fn not_started(exit: ExitRecord) -> Error {
    Error::Start {
        // Whether the command was at fault is what Docker's statuses tell.
        status: match exit.status {
            status @ (126 | 127) => status,
            _ => 125,
        },
        message: exit.message.unwrap_or_else(|| {
            format!(
                "the workload ended with status {} before it ran",
                exit.status
            )
        }),
    }
}

/// The VMM is gone without a word: say what can be known, and clean up.
fn vmm_died(record: &Record, child: &mut Process) -> Error {
    let how = match child.wait() {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    let mut message = format!("the VM's process ended unexpectedly ({how})");
    let tail = log_tail(record);
    if !tail.is_empty() {
        message.push(':');
        message.push_str(&tail);
    }
    // Nobody else knows of it.
    let _ = record.remove();
    Error::Start {
        message,
        status: 125,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Starts a "VMM" that is another program; returns the error, and whether
    /// anything is left of it.
    fn started_as(program: &str, timeout: Duration) -> (String, bool) {
        let dir = tempfile::tempdir().unwrap();
        let at = |name| dir.path().join(name);
        let home = Home::new(&at("data"), &at("run"), &at("cache"));
        let records = Records::open(&home).unwrap();
        let config = |id, name| {
            Ok(VmConfig {
                id,
                name,
                image: String::new(),
                image_digest: String::new(),
                created_ns: 0,
                workload: Workload::default(),
                memory: MIN_MEMORY,
                cpus: 1,
                kernel: PathBuf::new(),
                auto_remove: false,
                read_only: false,
                stop_timeout_ms: 0,
                publish: Vec::new(),
                publish_wait_ms: 0,
            })
        };
        let source = Source {
            origin: Origin::Cold,
            root: Vec::new(),
            modules: None,
        };
        let program = Program {
            path: program.into(),
            timeout,
        };
        let launched = launch_program(
            &home,
            &records,
            &RunOptions::new(),
            config,
            source,
            &program,
        );
        let Err(error) = launched else {
            panic!("{:?} is a VMM", program.path);
        };
        let left = !records.list().unwrap().is_empty() || has_child(&program.path);
        (sm_control::with_causes(&error), left)
    }

    /// Whether this process has a child that runs `program`, or did (a zombie).
    fn has_child(program: &Path) -> bool {
        let name = program.file_name().unwrap().to_str().unwrap();
        let wanted = (format!("({name})"), std::process::id().to_string());
        let processes = std::fs::read_dir("/proc").unwrap();
        processes.flatten().any(|entry| {
            let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let mut words = stat.split(' ').skip(1);
            let (comm, parent) = (words.next(), words.nth(1));
            comm == Some(wanted.0.as_str()) && parent == Some(wanted.1.as_str())
        })
    }

    #[test]
    fn a_program_that_is_no_vmm_is_told_from_one() {
        // It ends at once, reading nothing.
        let (error, left) = started_as("/usr/bin/false", Duration::from_secs(60));
        assert!(error.contains("run_vmm_if_asked"), "{error}");
        assert!(!left, "{error}");
        // It goes on, reading nothing.
        let (error, left) = started_as("/usr/bin/yes", Duration::from_millis(200));
        assert!(error.contains("run_vmm_if_asked"), "{error}");
        assert!(!left, "{error}");
    }

    #[test]
    fn memory_and_cpus_have_a_minimum() {
        let error = RunOptions::new().memory(1 << 20).check().unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("1 MiB of memory") && text.contains("64 MiB"),
            "{text}"
        );
        assert!(RunOptions::new().cpus(0).check().is_err());
        assert!(RunOptions::new().memory(MIN_MEMORY).check().is_ok());
    }
}
