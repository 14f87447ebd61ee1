//! Commands that run beside a VM's workload.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use sm_control::Control;
use sm_control::launch::{ControlAnswer, ControlCall, Stage};
use sm_control::session::{Aside, Event, Output, Session, SessionWriter};
use sm_control::timed::{connect_until, timed_out};
use sm_control::workload::merge_env;
use sm_guest_proto::PROTOCOL_VERSION;
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::exec::{ExecControl, ExecRequest, GuestProcess, Hello, Role, StageFile};
use sm_guest_proto::frame::FrameType;
use sm_guest_proto::privileges::Privileges;

use crate::events::EventAction;
use crate::record::Record;
use crate::{Error, Refusal};

/// Time limit until a VMM accepts another exec connection.
const EXEC_TIMEOUT: Duration = Duration::from_secs(10);

/// Builder of a command. It runs with the workload's environment, directory and user
/// unless they are set.
#[derive(Clone, Debug)]
pub struct ExecBuilder {
    record: Record,
    request: ExecRequest,
    env: Vec<String>,
    /// Time limit for sending the request, while the guest accepts no bytes.
    pub(crate) send_timeout: Duration,
}

impl ExecBuilder {
    pub(crate) fn new(record: Record, command: Vec<String>) -> Self {
        let workload = &record.config().workload;
        let request = ExecRequest {
            argv: command,
            cwd: workload.cwd.clone(),
            user: workload.user.clone(),
            groups: workload.groups.clone(),
            role: Role::Exec,
            ..ExecRequest::default()
        };
        Self {
            record,
            request,
            env: Vec::new(),
            send_timeout: EXEC_TIMEOUT,
        }
    }

    /// Adds `NAME=value` entries.
    #[must_use]
    pub fn env<I, S>(mut self, entries: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.env.extend(entries.into_iter().map(Into::into));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn cwd(mut self, cwd: impl Into<String>) -> Self {
        self.request.cwd = cwd.into();
        self
    }

    /// Sets `user[:group]`.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.request.user = user.into();
        // The supplementary groups are those of the workload's user.
        self.request.groups.clear();
        self
    }

    /// Runs it on a terminal of this size.
    #[must_use]
    pub fn tty(mut self, columns: u16, rows: u16) -> Self {
        self.request.tty = true;
        self.request.cols = columns;
        self.request.rows = rows;
        self
    }

    /// Keeps its standard input open, for [`crate::session::SessionWriter`].
    #[must_use]
    pub fn stdin(mut self, open: bool) -> Self {
        self.request.stdin = open;
        self
    }

    /// Writes a file in the guest before the command starts.
    #[must_use]
    pub fn stage_file(mut self, path: impl Into<String>, mode: u32, data: Vec<u8>) -> Self {
        self.request.stage_files.push(StageFile {
            path: path.into(),
            mode,
            data,
        });
        self
    }

    /// Kills the command after this time, with status 124.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.request.timeout_ms = u64::try_from(timeout.as_millis())
            .unwrap_or(u64::MAX)
            .max(1);
        self
    }

    /// Lets it continue when the session is dropped. Its standard streams are `/dev/null`.
    #[must_use]
    pub fn detached(mut self, yes: bool) -> Self {
        self.request.detached = yes;
        self
    }

    /// Gives it all capabilities of the guest's kernel, even if the workload does not have
    /// them.
    #[must_use]
    pub fn privileged(mut self, yes: bool) -> Self {
        self.request.privileges = yes.then(Privileges::default);
        self
    }

    /// Sends the command to the guest. Events of the session report whether it started.
    ///
    /// # Errors
    /// The VM is not running, is paused or still starting, or an environment entry is
    /// malformed.
    pub fn start(self) -> Result<Session, Error> {
        let mut request = self.request;
        let command = request.argv.join(" ");
        let mut base = self.record.config().workload.env.clone();
        if request.tty {
            base.push("TERM=xterm".to_owned());
        }
        request.env = merge_env(&[&base, &self.env])?;
        refuse_unless_running(&self.record)?;
        let execution = uuid::Uuid::new_v4().simple().to_string();
        let note = |action| {
            self.record.note(action, |event| {
                event.with("exec_id", &execution).with("command", &command)
            });
        };
        note(EventAction::ExecCreate);
        let aside = Aside::exec(self.record.exec_endpoint(), request.container.clone());
        let session = open_session(
            &self.record,
            Some(aside),
            self.send_timeout,
            "send the command to the VM",
            |writer| writer.send_json(FrameType::Request, &request),
        )?;
        note(EventAction::ExecStart);
        let record = self.record.clone();
        Ok(session.when_exited(move |status| {
            record.note(EventAction::ExecDie, |event| {
                let event = event.with("exec_id", &execution).with("command", &command);
                event.with("exit_code", status)
            });
        }))
    }

    /// Runs the command to its end and returns its output.
    ///
    /// # Errors
    /// The VM is not running, is paused or still starting, or exits before the command; or
    /// an environment entry is malformed.
    pub fn output(self) -> Result<Output, Error> {
        self.start()?.output().map_err(|source| Error::Vmm {
            operation: "run the command in the VM",
            source,
        })
    }
}

/// Opens a session without a command; `send` sends the request.
pub(crate) fn start_session(
    record: &Record,
    operation: &'static str,
    send: impl FnOnce(&SessionWriter) -> io::Result<()>,
) -> Result<Session, Error> {
    refuse_unless_running(record)?;
    open_session(record, None, EXEC_TIMEOUT, operation, send)
}

fn open_session(
    record: &Record,
    aside: Option<Aside>,
    timeout: Duration,
    operation: &'static str,
    send: impl FnOnce(&SessionWriter) -> io::Result<()>,
) -> Result<Session, Error> {
    let stream = connect_exec(record)?;
    let open = || {
        // A guest that hangs accepts only as many bytes as the buffers on the path hold.
        let socket = stream.try_clone()?;
        socket.set_write_timeout(Some(timeout))?;
        let session = Session::new(stream, aside)?;
        let writer = session.writer();
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
        };
        writer.send_json(FrameType::Control, &ExecControl::Hello(hello))?;
        send(&writer)?;
        socket.set_write_timeout(None)?;
        Ok(session)
    };
    open()
        .map_err(timed_out)
        .map_err(|source| Error::Vmm { operation, source })
}

/// Most bytes of a list of processes that are read from a guest.
const MAX_LIST: usize = 8 << 20;

/// Asks the agent for the processes in the guest.
pub(crate) fn processes(record: &Record) -> Result<Vec<GuestProcess>, Error> {
    refuse_unless_running(record)?;
    let stream = connect_exec(record)?;
    let failed = |source| Error::Vmm {
        operation: "list the processes in the VM",
        source,
    };
    let ask = || {
        stream.set_read_timeout(Some(EXEC_TIMEOUT))?;
        stream.set_write_timeout(Some(EXEC_TIMEOUT))?;
        let mut session = Session::new(stream, None)?;
        let writer = session.writer();
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
        };
        writer.send_json(FrameType::Control, &ExecControl::Hello(hello))?;
        let container = ContainerId::default();
        writer.send_json(FrameType::Control, &ExecControl::Processes { container })?;
        let mut list = Vec::new();
        let mut refusal = None;
        while let Some(event) = session.next_event()? {
            match event {
                Event::Stdout(bytes) if list.len() < MAX_LIST => list.extend_from_slice(bytes),
                Event::Stdout(_) => return Err(io::Error::other("the list is too long")),
                Event::Error(text) => refusal = Some(text),
                Event::Exit(0) => return Ok(Ok(serde_json::from_slice(&list)?)),
                Event::Exit(status) => {
                    let status = || format!("the guest agent answered with status {status}");
                    return Ok(Err(refusal.unwrap_or_else(status)));
                }
                _ => {}
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    };
    match ask().map_err(timed_out).map_err(failed)? {
        Ok(processes) => Ok(processes),
        Err(text) => Err(Refusal::Vm(text).into()),
    }
}

/// Refuses a command that would hang in a paused VM, or find another root directory than
/// the workload in a VM that is still starting.
fn refuse_unless_running(record: &Record) -> Result<(), Error> {
    let name = &record.config().name;
    match Control::connect(&record.control_endpoint())?.call(&ControlCall::Status)? {
        ControlAnswer::Status(status) if status.paused => Err(Refusal::Paused(name.clone()).into()),
        ControlAnswer::Status(status) if status.stage == Stage::Starting => {
            Err(Refusal::Starting(name.clone()).into())
        }
        _ => Ok(()),
    }
}

/// Connects to the exec socket of a VM.
fn connect_exec(record: &Record) -> Result<UnixStream, Error> {
    match connect_until(&record.exec_socket(), Instant::now() + EXEC_TIMEOUT) {
        Ok(stream) => Ok(stream),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Err(Error::not_running(record))
        }
        Err(source) => Err(Error::Vmm {
            operation: "connect to the VM's exec socket",
            source,
        }),
    }
}
