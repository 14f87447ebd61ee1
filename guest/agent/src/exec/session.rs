//! The agent's side of a command: frames on one side, descriptors on the other.
//!
//! A session is a small state machine driven by readiness. It never blocks and buffers at
//! most one frame of output (if the client is slow) and a bounded amount of input
//! ([`super::input`], if the command is slow); beyond that it stops reading the faster
//! side.
//!
//! Order of events at the end: the reaper reports the exit; the output that the command
//! had written until then is forwarded (remaining children may hold the pipes open, so
//! end of file is not awaited); EXIT is the last frame.

#[cfg(test)]
mod tests;

mod answer;

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::Pid;
use sm_event_loop::Key;
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::exec::{ExecControl, ExecReply, ExecRequest, Role};
use sm_guest_proto::files::FileRequest;
use sm_guest_proto::frame::{BULK_PAYLOAD, ExitStatus, FrameType, HEADER_LEN, parse_resize};

use super::frame_limit;
use super::input::Input;
use super::status::{Report, Status};
use super::stdio::{self, AgentEnds};
use crate::reactor::{Class, Deadline, Interest, Reactor, Readiness, Token, Watched};
use crate::sys;
use crate::wire::{Filled, Framed, may_read};

/// Parts of an exec session's tokens.
pub(crate) mod part {
    pub(crate) const CLIENT: u8 = 0;
    pub(crate) const STATUS: u8 = 1;
    pub(crate) const STDIN: u8 = 2;
    pub(crate) const STDOUT: u8 = 3;
    pub(crate) const STDERR: u8 = 4;
    pub(crate) const TIMEOUT: u8 = 5;
    pub(crate) const HANGUP: u8 = 6;
}

/// Maximum number of bytes forwarded from a terminal after its command exited. The
/// kernel's buffers hold less, so that only another writer can reach the limit.
const TERMINAL_TAIL: u64 = 256 * 1024;

/// Time between SIGHUP and SIGKILL when the client has disconnected.
const HANGUP_GRACE: Duration = Duration::from_secs(2);

/// Exit status of a command killed by its timeout.
const TIMED_OUT: u32 = 124;

/// Action that a session requests of the agent.
#[derive(Debug)]
pub(crate) enum SessionAction {
    /// No action.
    Nothing,
    /// Start this command.
    Launch(Box<ExecRequest>),
    /// Perform this operation on files.
    Files(Box<FileRequest>),
    /// Connect this client to the main command of a container.
    AttachMain(ContainerId),
    /// Signal the command of a container with this process identifier.
    Signal {
        container: ContainerId,
        pid: u32,
        signal: u8,
    },
    /// List the processes of a container.
    ListProcesses(ContainerId),
    /// The session is complete and can be removed.
    Finished,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SessionPhase {
    /// Waiting for CONTROL HELLO.
    Hello,
    /// Waiting for REQUEST.
    Request,
    /// Forked; the result of the exec is not known yet.
    Starting,
    /// The program runs, or has exited and the exit has not been reported yet.
    Running,
    /// The last frame is queued.
    Closing,
}

#[derive(Debug)]
struct Output {
    fd: Watched,
    /// Number of bytes still to forward, once the command has exited.
    remaining: Option<u64>,
}

/// A command and, usually, its client.
#[derive(Debug)]
pub(crate) struct Session {
    client: Option<Framed>,
    phase: SessionPhase,
    container: ContainerId,
    role: Role,
    /// The command continues without a client.
    detached: bool,
    tty: bool,
    pid: Option<Pid>,
    status: Option<Status>,
    shown_pid: u32,
    stdin: Input,
    outputs: [Option<Output>; 2],
    exit: Option<ExitStatus>,
    timed_out: bool,
    /// The end of the command's time limit.
    timeout: Option<Deadline>,
    /// The end of the time between SIGHUP and SIGKILL.
    hangup: Option<Deadline>,
    /// Frames that a disconnected client did not receive, for the next client.
    unsent: Vec<u8>,
}

impl Session {
    /// Creates a session for a new connection.
    pub(crate) fn new(client: OwnedFd) -> Self {
        Self {
            client: Some(Framed::new(client, frame_limit)),
            phase: SessionPhase::Hello,
            container: ContainerId::default(),
            role: Role::Exec,
            detached: false,
            tty: false,
            pid: None,
            status: None,
            shown_pid: 0,
            stdin: Input::default(),
            outputs: [None, None],
            exit: None,
            timed_out: false,
            timeout: None,
            hangup: None,
            unsent: Vec::new(),
        }
    }

    /// Returns the command's process until it has been reaped.
    pub(crate) fn live_pid(&self) -> Option<Pid> {
        self.pid.filter(|_| self.exit.is_none())
    }

    /// Returns true if this session may still send frames to its client.
    pub(crate) fn has_pending_frames(&self) -> bool {
        self.client.is_some()
            && self.phase != SessionPhase::Hello
            && self.phase != SessionPhase::Request
    }

    // ---- starting ----

    /// Records that the command has been forked.
    pub(crate) fn started(
        &mut self,
        request: &ExecRequest,
        pid: Pid,
        ends: AgentEnds,
        status: OwnedFd,
    ) {
        self.phase = SessionPhase::Starting;
        self.container.clone_from(&request.container);
        self.role = request.role;
        self.detached = request.detached;
        self.tty = request.tty;
        self.pid = Some(pid);
        self.status = Some(Status::new(status));
        self.stdin = Input::new(ends.stdin);
        let output = |fd| Output {
            fd: Watched::new(fd),
            remaining: None,
        };
        self.outputs = [Some(output(ends.stdout)), ends.stderr.map(output)];
    }

    fn send_exit(&mut self, exit: ExitStatus) {
        if let Some(client) = &mut self.client {
            client.send(FrameType::Exit, &exit.to_payload());
        }
        self.phase = SessionPhase::Closing;
    }

    fn send_reply(&mut self, reply: &ExecReply) {
        if let (Some(client), Ok(json)) = (&mut self.client, serde_json::to_vec(reply)) {
            client.send(FrameType::Control, &json);
        }
    }

    // ---- the client ----

    /// Removes the connection from this session, for use by another one.
    pub(crate) fn take_client(&mut self) -> Option<OwnedFd> {
        self.client.take().map(|client| client.socket.release())
    }

    /// Gives this session (the workload's) a new client.
    pub(crate) fn attach(&mut self, client: OwnedFd) {
        self.detach();
        let mut client = Framed::new(client, frame_limit);
        let unsent = std::mem::take(&mut self.unsent);
        if self.phase == SessionPhase::Running {
            let started = ExecReply::Started {
                container: self.container.clone(),
                pid: self.shown_pid,
            };
            if let Ok(json) = serde_json::to_vec(&started) {
                client.send(FrameType::Control, &json);
            }
        }
        client.resend(&unsent);
        self.client = Some(client);
    }

    fn detach(&mut self) {
        if let Some(client) = self.client.take() {
            if self.phase == SessionPhase::Running {
                self.unsent = client.unsent();
            } else if let (SessionPhase::Closing, Role::Main, Some(exit), false) =
                (self.phase, self.role, self.exit, client.is_flushed())
            {
                // Keep the workload's last output without EXIT, which is created again.
                self.unsent = client.unsent();
                let exit_len = HEADER_LEN + exit.to_payload().len();
                let keep = self.unsent.len().saturating_sub(exit_len);
                self.unsent.truncate(keep);
                self.phase = SessionPhase::Running;
            }
        }
    }

    fn drop_client(&mut self, reactor: &Reactor, key: Key) {
        self.detach();
        let continues = self.role == Role::Main || self.detached;
        if continues && self.phase != SessionPhase::Closing {
            return;
        }
        if let Some(pid) = self.live_pid() {
            let _ = sys::kill_group(pid, 1);
            let at = Instant::now() + HANGUP_GRACE;
            let token = Token::new(Class::Exec, part::HANGUP, key);
            self.hangup
                .get_or_insert_with(|| reactor.deadline(at, token));
        }
        // The output has no reader, so closing the pipes lets the command notice.
        self.close_streams();
    }

    fn close_streams(&mut self) {
        self.stdin.close();
        self.outputs = [None, None];
    }

    fn read_client(&mut self, reactor: &Reactor, key: Key, scratch: &mut [u8]) -> SessionAction {
        let Some(client) = &mut self.client else {
            return SessionAction::Nothing;
        };
        match client.fill(scratch) {
            Filled::Nothing => return SessionAction::Nothing,
            Filled::Some => {}
            Filled::Closed => {
                self.drop_client(reactor, key);
                return SessionAction::Nothing;
            }
        }
        self.take_frames()
    }

    /// Processes frames that have been received.
    pub(crate) fn take_frames(&mut self) -> SessionAction {
        // The decoder is moved out, so that its frames can be borrowed while the rest of
        // the session is changed.
        let Some(client) = &mut self.client else {
            return SessionAction::Nothing;
        };
        let mut decoder = std::mem::take(&mut client.decoder);
        let action = loop {
            if self.phase == SessionPhase::Closing {
                break SessionAction::Nothing;
            }
            match decoder.next_frame() {
                Ok(None) => break SessionAction::Nothing,
                Err(error) => {
                    self.protocol_error(&error.to_string());
                    break SessionAction::Nothing;
                }
                Ok(Some(frame)) => match self.take_frame(frame.kind, frame.payload) {
                    SessionAction::Nothing => {}
                    action => break action,
                },
            }
        };
        if let Some(client) = &mut self.client {
            client.decoder = decoder;
        }
        action
    }

    fn protocol_error(&mut self, message: &str) {
        match self.phase {
            SessionPhase::Hello | SessionPhase::Request => self.refuse(125, message),
            // The stream cannot be resynchronised, so the client is lost: `settle` treats
            // it as disconnected.
            _ => {
                if let Some(client) = &mut self.client {
                    client.invalidate();
                }
            }
        }
    }

    fn take_frame(&mut self, kind: FrameType, payload: &[u8]) -> SessionAction {
        match (self.phase, kind) {
            (SessionPhase::Hello, FrameType::Control) => self.take_hello(payload),
            (SessionPhase::Hello, _) => {
                self.refuse(125, "exec: the first frame must be CONTROL hello")
            }
            (SessionPhase::Request, FrameType::Request) => match serde_json::from_slice(payload) {
                Ok(request) => return SessionAction::Launch(Box::new(request)),
                Err(error) => self.refuse(125, &format!("exec: malformed request: {error}")),
            },
            (SessionPhase::Request, FrameType::Control) => match serde_json::from_slice(payload) {
                Ok(ExecControl::Processes { container }) => {
                    return SessionAction::ListProcesses(container);
                }
                Ok(ExecControl::Files(request)) => return SessionAction::Files(Box::new(request)),
                Ok(ExecControl::AttachMain { container }) => {
                    return SessionAction::AttachMain(container);
                }
                Ok(ExecControl::Signal {
                    container,
                    pid,
                    signal,
                }) => {
                    return SessionAction::Signal {
                        container,
                        pid,
                        signal,
                    };
                }
                _ => self.refuse(125, "exec: unknown control message"),
            },
            (SessionPhase::Request, _) => self.refuse(125, "exec: expected a request"),
            (_, FrameType::Stdin) if payload.is_empty() => self.stdin.end(self.tty),
            (_, FrameType::Stdin) => self.stdin.push(payload),
            (_, FrameType::Resize) => {
                if let (true, Ok((cols, rows)), Some(Some(output))) =
                    (self.tty, parse_resize(payload), self.outputs.first())
                {
                    let _ = stdio::resize(&output.fd, cols, rows);
                }
            }
            (_, FrameType::Signal) => {
                if let [number] = payload {
                    self.signal(*number);
                }
            }
            // Frames of later versions are ignored.
            _ => {}
        }
        SessionAction::Nothing
    }

    /// Signals the command, unless it has exited.
    fn signal(&self, number: u8) {
        if let (1..=64, Some(pid)) = (number, self.live_pid()) {
            let _ = sys::kill(pid, number);
        }
    }

    /// Signals the command if `pid` is its process identifier in the workload's view.
    /// Returns true if it is.
    pub(crate) fn signal_if(&self, pid: u32, number: u8) -> bool {
        let is_meant = self.phase == SessionPhase::Running && self.shown_pid == pid;
        let is_meant = is_meant && self.live_pid().is_some();
        if is_meant {
            self.signal(number);
        }
        is_meant
    }

    // ---- output ----

    /// Forwards one chunk. Returns true if another attempt may succeed immediately.
    fn forward(&mut self, index: usize, scratch: &mut [u8]) -> bool {
        let (Some(client), Some(Some(output))) = (&mut self.client, self.outputs.get_mut(index))
        else {
            return false;
        };
        if !client.is_flushed() || client.is_broken() {
            return false;
        }
        let mut room = BULK_PAYLOAD;
        if let Some(remaining) = output.remaining {
            room = usize::try_from(remaining).map_or(room, |remaining| remaining.min(room));
        }
        let end = scratch.len().min(HEADER_LEN + room);
        let target = scratch.get_mut(HEADER_LEN..end).unwrap_or_default();
        match rustix::io::read(&output.fd, target) {
            Ok(count) if count > 0 => {
                if let Some(remaining) = &mut output.remaining {
                    *remaining = remaining.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX));
                }
                let kind = [FrameType::Stdout, FrameType::Stderr][index & 1];
                client.send_bulk(kind, scratch, count);
                return true;
            }
            Err(Errno::INTR) => return true,
            Err(Errno::AGAIN) if output.remaining.is_none() => return false,
            // End of file, a hung-up terminal (EIO), or no more output after the exit.
            Ok(_) | Err(_) => {}
        }
        self.outputs[index] = None;
        true
    }

    // ---- the process ----

    fn read_status(&mut self) {
        if let Some(report) = self.status.as_mut().and_then(Status::read) {
            self.take_report(&report);
        }
    }

    fn take_report(&mut self, report: &Report) {
        self.status = None;
        self.shown_pid = report.pid;
        if let Some((status, message)) = &report.failure {
            self.close_streams();
            self.refuse(*status, message);
        } else {
            self.phase = SessionPhase::Running;
            self.send_reply(&ExecReply::Started {
                container: self.container.clone(),
                pid: self.shown_pid,
            });
        }
    }

    /// Records that the command has exited and was reaped.
    pub(crate) fn exited(&mut self, status: u32, peak_rss_kib: u64) {
        if let Some(status) = self.status.take() {
            self.take_report(&status.finish());
        }
        self.exit = Some(ExitStatus {
            status: if self.timed_out { TIMED_OUT } else { status },
            peak_rss_kib: Some(peak_rss_kib),
        });
        let tty = self.tty;
        for output in self.outputs.iter_mut().flatten() {
            // A pipe contains everything that the command wrote. Bytes of a terminal may
            // not have arrived at the read side yet, so it is read until it is empty.
            let queued = rustix::io::ioctl_fionread(&output.fd).unwrap_or(0);
            output.remaining = Some(if tty { TERMINAL_TAIL } else { queued });
        }
        self.stdin.close();
        self.timeout = None;
        self.hangup = None;
    }

    /// Sets the deadline after which the command is killed.
    pub(crate) fn set_timeout(&mut self, reactor: &Reactor, key: Key, timeout_ms: u64) {
        if timeout_ms > 0 {
            // The limit of one day prevents an overflow when the duration is added.
            let timeout = Duration::from_millis(timeout_ms.min(86_400_000));
            let token = Token::new(Class::Exec, part::TIMEOUT, key);
            self.timeout = Some(reactor.deadline(Instant::now() + timeout, token));
        }
    }

    // ---- events ----

    /// Handles an expired deadline.
    pub(crate) fn deadline(&mut self, which: u8) {
        if let Some(pid) = self.live_pid() {
            self.timed_out |= which == part::TIMEOUT;
            let _ = sys::kill_group(pid, 9);
            // There is no group yet before setsid in the child.
            let _ = sys::kill(pid, 9);
        }
    }

    /// Handles readiness of a descriptor.
    pub(crate) fn ready(
        &mut self,
        reactor: &Reactor,
        key: Key,
        which: u8,
        ready: Readiness,
        scratch: &mut [u8],
    ) -> SessionAction {
        match which {
            part::CLIENT => {
                if ready.writable
                    && let Some(client) = &mut self.client
                {
                    client.flush();
                }
                if may_read(ready) {
                    return self.read_client(reactor, key, scratch);
                }
            }
            part::STATUS => self.read_status(),
            part::STDIN => self.stdin.flush(),
            part::STDOUT => drop(self.forward(0, scratch)),
            part::STDERR => drop(self.forward(1, scratch)),
            _ => {}
        }
        SessionAction::Nothing
    }

    /// Advances everything that needs no new events, and updates the watched events.
    pub(crate) fn settle(
        &mut self,
        reactor: &Reactor,
        key: Key,
        scratch: &mut [u8],
    ) -> SessionAction {
        if self.client.as_ref().is_some_and(Framed::is_broken) {
            self.drop_client(reactor, key);
        }
        if let Some(exit) = self.exit
            && self.phase == SessionPhase::Running
        {
            while self.forward(0, scratch) || self.forward(1, scratch) {}
            if self.client.is_some() && self.outputs.iter().all(Option::is_none) {
                self.send_exit(exit);
            }
        }
        if self.is_finished() {
            return SessionAction::Finished;
        }
        if self.watch(reactor, key).is_err() {
            // Out of memory or epoll watches: this command cannot be served, and without
            // a process nothing settles its session again.
            self.drop_client(reactor, key);
            if self.is_finished() {
                return SessionAction::Finished;
            }
        }
        SessionAction::Nothing
    }

    fn is_finished(&self) -> bool {
        let reaped = self.pid.is_none() || self.exit.is_some();
        match &self.client {
            Some(client) => self.phase == SessionPhase::Closing && client.is_flushed() && reaped,
            // The exit of the workload is kept for a later client.
            None => reaped && (self.role != Role::Main || self.phase == SessionPhase::Closing),
        }
    }

    fn watch(&mut self, reactor: &Reactor, key: Key) -> io::Result<()> {
        let token = |part| Token::new(Class::Exec, part, key);
        let when = |condition, interest| match condition {
            true => interest,
            false => Interest::NONE,
        };
        let mut flushed = false;
        if let Some(client) = &mut self.client {
            flushed = client.is_flushed();
            let reading = self.phase != SessionPhase::Closing && !self.stdin.is_full();
            let want = when(reading, Interest::READ).and(when(!flushed, Interest::WRITE));
            let hangup = when(self.phase != SessionPhase::Closing, Interest::HANGUP);
            client
                .socket
                .set(reactor, token(part::CLIENT), want.and(hangup))?;
        }
        if let Some(status) = &mut self.status {
            status.watch(reactor, token(part::STATUS))?;
        }
        self.stdin.watch(reactor, token(part::STDIN))?;
        let forwarding = self.phase == SessionPhase::Running && flushed;
        for (output, part) in self.outputs.iter_mut().zip([part::STDOUT, part::STDERR]) {
            if let Some(output) = output {
                output
                    .fd
                    .set(reactor, token(part), when(forwarding, Interest::READ))?;
            }
        }
        Ok(())
    }
}
