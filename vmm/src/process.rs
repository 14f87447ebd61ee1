//! Runs the VMM process from the launch request to the supervised machine.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::Mode;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use sm_control::exit::{ExitReason, ExitRecord};
use sm_control::fdpass;
use sm_control::launch::{LaunchRequest, VmmReport};
use sm_control::timings::{Phase, unix_nanos};
use sm_control::with_causes;
use sm_guest_proto::frame::{self, ExitStatus, FrameDecoder, FrameType};
use sm_hypervisor::{Hypervisor as _, Native};

use super::environment::{VmRecord, VmmEnvironment};
use super::failure::StartFailure;
use super::guest::event_channel;
use super::supervisor::{Supervisor, SupervisorParts};
use super::{descriptors, log};

/// Runs a VM from its launch request to its end.
pub(super) fn main(environment: &dyn VmmEnvironment) -> io::Result<()> {
    let launcher = take_launch_stream()?;
    log::to_stderr();
    greet(&launcher);
    // Detach from the launcher's terminal and directory; files created below are private.
    let _ = rustix::process::setsid();
    let _ = rustix::process::chdir("/");
    rustix::process::umask(Mode::from_raw_mode(0o077));
    descriptors::raise();
    let terminate = terminate_stream()?;
    let started = Phase::now("process started");
    // Every request needs a VM, so it is created while the request is received.
    let host = Native::open().inspect(Native::prepare_vm);
    let opened = Phase::now("hypervisor opened");

    let Received {
        request,
        lock,
        listener,
    } = receive_request(&launcher)?;
    let (existing, restarts) = (request.existing, request.restarts.count);
    let record = environment.open_record(&request)?;
    let mut phases = request.phases.clone();
    phases.extend([started, opened]);
    let request = LaunchRequest { phases, ..request };

    let supervisor = host.map_err(|error| StartFailure::from(with_causes(&error)));
    let supervisor = supervisor.and_then(|host| {
        let record = Arc::clone(&record);
        assemble(
            &host,
            environment,
            request,
            record,
            (lock, listener),
            &launcher,
            terminate,
        )
    });
    match supervisor {
        Ok(supervisor) => {
            // The supervisor has the last copy: the stream ends when that is closed.
            drop(launcher);
            match supervisor.run()? {
                Some(next) => Err(next.exec()),
                None => Ok(()),
            }
        }
        Err(failure) => {
            tracing::error!(message = failure.message, "the VM cannot be started");
            let exit = not_started(failure, restarts);
            refuse(launcher, exit.clone());
            match existing {
                true => record
                    .take_over()
                    .and_then(|()| record.write_exit(&exit))
                    .and_then(|()| record.remove_sockets()),
                // The launcher has the cause; an empty record is of no use.
                false => record.erase(),
            }
        }
    }
}

/// Takes the launch stream from standard input, which is replaced by /dev/null: a
/// descriptor that stayed there would keep the stream open as long as the VM lives.
fn take_launch_stream() -> io::Result<UnixStream> {
    let launcher = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let null = File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(launcher)
}

/// Sends the launcher the hello of a VMM.
fn greet(mut launcher: &UnixStream) {
    let mut bytes = Vec::new();
    let greeted = serde_json::to_vec(&VmmReport::Hello)
        .map_err(io::Error::from)
        .and_then(|hello| {
            frame::encode(FrameType::Control, &hello, &mut bytes).map_err(io::Error::other)
        })
        .and_then(|()| launcher.write_all(&bytes));
    if let Err(error) = greeted {
        tracing::warn!(%error, "cannot send the hello to the launcher");
    }
}

/// Returns a stream that becomes readable when this process receives SIGTERM or SIGINT.
fn terminate_stream() -> io::Result<UnixStream> {
    let (reader, writer) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(SIGTERM, writer.try_clone()?)?;
    signal_hook::low_level::pipe::register(SIGINT, writer)?;
    // SIGHUP is ignored: the VM survives the launcher's terminal.
    signal_hook::flag::register(SIGHUP, Arc::new(AtomicBool::new(false)))?;
    Ok(reader)
}

/// The launcher's message.
#[derive(Debug)]
struct Received {
    request: LaunchRequest,
    /// The record's lock.
    lock: File,
    /// The control socket of the run before, if this process has replaced that of the run.
    listener: Option<UnixListener>,
}

fn receive_request(launcher: &UnixStream) -> io::Result<Received> {
    let bad = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut decoder = FrameDecoder::new();
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = fdpass::receive(launcher, &mut buffer, &mut fds)?;
        if count == 0 {
            return Err(bad("the launcher disconnected"));
        }
        decoder.push(buffer.get(..count).unwrap_or_default());
        let frame = decoder.next_frame().map_err(io::Error::other)?;
        let Some(frame) = frame else { continue };
        if frame.kind != FrameType::Request {
            return Err(bad("the launcher did not send a request"));
        }
        let request = LaunchRequest::from_json(frame.payload).map_err(io::Error::other)?;
        let mut fds = fds.into_iter();
        return match fds.next() {
            Some(lock) => Ok(Received {
                request,
                lock: File::from(lock),
                listener: fds.next().map(UnixListener::from),
            }),
            None => Err(bad("the launcher did not send the record's lock")),
        };
    }
}

/// Starts the machine and creates its supervisor.
///
/// # Errors
/// A sentence with its causes, for the person who started the VM.
fn assemble(
    host: &Native,
    environment: &dyn VmmEnvironment,
    request: LaunchRequest,
    record: Arc<dyn VmRecord>,
    (lock, listener): (File, Option<UnixListener>),
    launcher: &UnixStream,
    terminate: UnixStream,
) -> Result<Supervisor<super::machine::RunningMachine>, StartFailure> {
    let io_error = |what: &'static str| move |error: io::Error| format!("cannot {what}: {error}");
    let console = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(record.console())
        .map_err(io_error("create the console log"))?;
    // It has the console of one run.
    console
        .set_len(0)
        .map_err(io_error("empty the console log"))?;
    record
        .take_over()
        .map_err(io_error("begin a run of the VM"))?;
    let log = record
        .output_log()
        .map_err(io_error("create the output log"))?;
    let listener = match listener {
        Some(listener) => listener,
        // The directory is private, so no other user can bind or connect.
        None => UnixListener::bind(record.control_socket())
            .map_err(io_error("create the control socket"))?,
    };
    let (sender, events) = event_channel().map_err(io_error("create an event descriptor"))?;
    let started = super::machine::start(host, environment, &request, &*record, &console, &sender)?;
    let mut request = request;
    request.phases.extend(started.phases);
    // A run that its own process starts has no launcher.
    let launcher = match request.restarts.count {
        0 => Some(launcher.try_clone()),
        _ => None,
    };
    let launcher = launcher
        .transpose()
        .map_err(io_error("keep the launch stream"))?;
    Supervisor::new(SupervisorParts {
        guest: started.machine,
        warnings: started.warnings,
        events,
        request,
        record,
        lock,
        launcher,
        listener,
        terminate,
        log,
    })
    .map_err(|error| io_error("supervise the VM")(error).into())
}

/// Returns the exit record of a start that failed before there was a machine.
fn not_started(failure: StartFailure, restarts: u32) -> ExitRecord {
    ExitRecord {
        status: 125,
        reason: ExitReason::StartFailed,
        message: Some(failure.message),
        cause: failure.cause,
        finished_ns: unix_nanos(),
        restarts,
        ..ExitRecord::lost()
    }
}

/// Sends the launcher the cause of a failed start.
fn refuse(mut launcher: UnixStream, exit: ExitRecord) {
    let payload = ExitStatus {
        status: exit.status,
        peak_rss_kib: None,
    }
    .to_payload();
    let mut bytes = Vec::new();
    let encoded = frame::encode(FrameType::Exit, &payload, &mut bytes)
        .map_err(io::Error::other)
        .and_then(|()| Ok(serde_json::to_vec(&VmmReport::Ended(exit))?))
        .and_then(|report| {
            frame::encode(FrameType::Control, &report, &mut bytes).map_err(io::Error::other)
        });
    let sent = encoded.and_then(|()| launcher.write_all(&bytes));
    if let Err(error) = sent {
        tracing::warn!(%error, "cannot send the failure to the launcher");
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// Variable that marks the process with a launch stream as standard input.
    const LAUNCHED: &str = "SM_TEST_LAUNCHED";

    /// Returns the descriptors of this process that refer to `launcher`.
    fn copies(launcher: &str) -> Vec<String> {
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let same = descriptors.filter(|entry| {
            std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == launcher)
        });
        same.map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    }

    /// Its other members are unknown.
    #[test]
    fn a_request_of_another_version_is_refused_by_its_version() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let request = br#"{"version": "9.8.7", "members": "unknown"}"#;
        let mut bytes = Vec::new();
        frame::encode(FrameType::Request, request, &mut bytes).unwrap();
        let lock = tempfile::tempfile().unwrap();
        fdpass::send(&mut ours, &bytes, &lock).unwrap();
        let error = receive_request(&theirs).unwrap_err().to_string();
        assert!(error.contains("version 9.8.7"), "{error}");
        assert!(error.contains(sm_control::VERSION), "{error}");
    }

    /// Variable with the directory of a VM whose process replaces itself.
    const REPLACED: &str = "SM_TEST_REPLACED";

    /// Returns the request for the next run of VM `abab…`.
    fn next_request() -> LaunchRequest {
        let id = sm_control::id::VmId::parse(&"ab".repeat(32)).unwrap();
        let request = serde_json::json!({
            "version": sm_control::VERSION, "data": "/", "run": "/", "cache": "/",
            "config": sm_control::config::LaunchConfig::from(
                sm_control::config::VmConfig::new(id, "web")
            ),
            "purpose": "workload", "cmdline": "", "source": {"snapshot": "s"}, "paging": "map", "upper_size": null,
            "shm_size": null, "attach": false,
            "columns": 80, "rows": 24, "start_timeout_ms": 1, "phases": [], "existing": true,
            "restarts": {"count": 3, "delay_ms": 100},
        });
        serde_json::from_value(request).unwrap()
    }

    fn is_locked(path: &std::path::Path) -> bool {
        let file = File::open(path).unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared).is_err()
    }

    /// The process replaces itself by this test program, whose arguments, `__vmm` and the
    /// short identifier of the VM, choose the test after this one.
    #[test]
    fn a_process_replaces_itself() {
        let Some(directory) = std::env::var_os(REPLACED) else {
            let directory = tempfile::tempdir().unwrap();
            let name = "process::tests::a_process_replaces_itself";
            let test = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name])
                .env(REPLACED, directory.path())
                .stdin(Stdio::null())
                .output()
                .unwrap();
            assert!(test.status.success(), "{test:?}");
            let text = String::from_utf8_lossy(&test.stdout);
            // The first process never says that its test has passed.
            assert!(text.contains("abababababab_is_the_next_run"), "{text}");
            assert!(text.contains("1 passed"), "{text}");
            assert!(directory.path().join("replaced").exists());
            return;
        };
        let directory = std::path::PathBuf::from(directory);
        let lock = File::create(directory.join("lock")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let listener = UnixListener::bind(directory.join("control.sock")).unwrap();
        std::fs::write(directory.join("pid"), std::process::id().to_string()).unwrap();
        let next = crate::restart::NextRun {
            request: next_request(),
            lock,
            listener,
        };
        panic!("{}", next.exec());
    }

    /// The second part of the test before.
    #[test]
    fn abababababab_is_the_next_run() {
        let Some(directory) = std::env::var_os(REPLACED) else {
            return;
        };
        let directory = std::path::PathBuf::from(directory);
        let pid = std::fs::read_to_string(directory.join("pid")).unwrap();
        assert_eq!(
            pid,
            std::process::id().to_string(),
            "it is the same process"
        );
        // A client that connects before the request was read is served as well.
        let _client = UnixStream::connect(directory.join("control.sock")).unwrap();
        assert!(is_locked(&directory.join("lock")));
        let launcher = take_launch_stream().unwrap();
        greet(&launcher);
        let received = receive_request(&launcher).unwrap();
        assert_eq!(received.request.restarts.count, 3);
        assert!(is_locked(&directory.join("lock")));
        received.listener.unwrap().accept().unwrap();
        drop(received.lock);
        assert!(!is_locked(&directory.join("lock")), "nothing else holds it");
        std::fs::write(directory.join("replaced"), b"").unwrap();
    }

    /// A copy at descriptor 0 would keep the stream open for the VM's life.
    #[test]
    fn the_launch_stream_is_moved_away_from_standard_input() {
        if std::env::var_os(LAUNCHED).is_none() {
            let (_ours, theirs) = UnixStream::pair().unwrap();
            let name = "process::tests::the_launch_stream_is_moved_away_from_standard_input";
            let test = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", name])
                .env(LAUNCHED, "1")
                .stdin(Stdio::from(OwnedFd::from(theirs)))
                .output()
                .unwrap();
            assert!(test.status.success(), "{test:?}");
            assert!(String::from_utf8_lossy(&test.stdout).contains("1 passed"));
            return;
        }
        let stream = std::fs::read_link("/proc/self/fd/0").unwrap();
        let stream = stream.to_str().unwrap();
        assert!(stream.starts_with("socket:"), "{stream}");
        assert_eq!(copies(stream), ["0"]);
        let launcher = take_launch_stream().unwrap();
        let null = std::fs::read_link("/proc/self/fd/0").unwrap();
        assert_eq!(null.to_str(), Some("/dev/null"));
        assert_eq!(copies(stream).len(), 1);
        drop(launcher);
        assert_eq!(copies(stream), [""; 0]);
    }
}
