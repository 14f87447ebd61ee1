//! A client's connection to a command in a guest: the workload, or an exec.

mod exited;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io::{self, BufReader, Read as _, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use serde::Serialize;
use sm_guest_proto::PROTOCOL_VERSION;
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::exec::{ExecControl, ExecReply, Hello};
use sm_guest_proto::frame::{self, BULK_PAYLOAD, FrameHeader, FrameType, HEADER_LEN};

use self::exited::ExitCallback;
use crate::control::Control;
use crate::endpoint::Endpoint;
use crate::error::ControlError;
use crate::exit::ExitRecord;
use crate::launch::{ControlCall, VmIdentityReport, VmmReport};
use crate::timed::{Until, connect_until};
use crate::timings::Phase;

/// Maximum number of signals that wait behind data on a session.
const MAX_QUEUED_SIGNALS: usize = 64;

/// Timeout for the delivery of a signal to a command.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(5);

/// An event of a command's session.
#[derive(Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Bytes that the command wrote to its standard output or its terminal.
    Stdout(&'a [u8]),
    /// Bytes that the command wrote to its standard error.
    Stderr(&'a [u8]),
    /// The reason why the command cannot be started; [`Event::Exit`] follows.
    Error(String),
    /// The command runs.
    Started {
        /// Its process identifier in the guest.
        pid: u32,
    },
    /// A phase of the VM's start is complete.
    Phase(Phase),
    /// A failure that the start survived, in a sentence.
    Warning(String),
    /// The identity report of a VM that was started to produce one.
    IdentityReport(VmIdentityReport),
    /// The command exited with this status; 128+n when signal n terminated it.
    Exit(u32),
    /// The VM has exited. The last event of a workload's session.
    Ended(ExitRecord),
}

/// A session with a command: its output and state arrive as [`Event`]s.
#[derive(Debug)]
pub struct Session {
    reader: BufReader<UnixStream>,
    payload: Vec<u8>,
    writer: SessionWriter,
    exited: ExitCallback,
}

impl Session {
    /// Creates a session on `stream`. Signals to its command are sent through `aside` if
    /// there is one, else on the stream.
    ///
    /// # Errors
    /// The stream's descriptor cannot be duplicated.
    pub fn new(stream: UnixStream, aside: Option<Aside>) -> io::Result<Self> {
        let writer = SessionWriter {
            stream: Arc::new(Mutex::new(stream.try_clone()?)),
            hang_up: Arc::new(stream.try_clone()?),
            signals: Arc::default(),
            aside: aside.map(Arc::new),
        };
        Ok(Self {
            reader: BufReader::with_capacity(BULK_PAYLOAD, stream),
            payload: Vec::new(),
            writer,
            exited: ExitCallback::default(),
        })
    }

    /// Sets a function that is called with the command's status when [`Self::next_event`]
    /// returns it.
    #[must_use]
    pub fn when_exited(mut self, call: impl FnOnce(u32) + Send + Sync + 'static) -> Self {
        self.exited = ExitCallback::new(call);
        self
    }

    /// Opens a session with the workload of the VM at `endpoint`, over a connection to
    /// it. With `stdin`, the caller may send input.
    ///
    /// # Errors
    /// The VM refuses, or the connection to its process failed.
    pub fn attach(endpoint: Endpoint, control: Control, stdin: bool) -> Result<Self, ControlError> {
        let stream = control.attach(stdin)?;
        Self::new(stream, Some(Aside::workload(endpoint))).map_err(|source| ControlError::Io {
            operation: "talk to the VM's process",
            source,
        })
    }

    /// Returns the writer of this session, which other threads can use.
    #[must_use]
    pub fn writer(&self) -> SessionWriter {
        self.writer.clone()
    }

    /// Waits for the next event; `None` at the end of the stream.
    ///
    /// # Errors
    /// The connection failed, or the bytes on it are not frames, or a frame is longer than
    /// [`frame::payload_limit`] allows.
    pub fn next_event(&mut self) -> io::Result<Option<Event<'_>>> {
        let bad = |error: frame::FrameError| io::Error::new(io::ErrorKind::InvalidData, error);
        loop {
            let mut header = [0; HEADER_LEN];
            if !read_exact_or_end(&mut self.reader, &mut header)? {
                return Ok(None);
            }
            // The stream of an exec comes from the guest unfiltered.
            let header = FrameHeader::decode(header)
                .and_then(|header| header.limited(frame::payload_limit))
                .map_err(bad)?;
            self.payload.resize(header.len, 0);
            self.reader.read_exact(&mut self.payload)?;
            match header.kind {
                FrameType::Stdout => return Ok(Some(Event::Stdout(&self.payload))),
                FrameType::Stderr => return Ok(Some(Event::Stderr(&self.payload))),
                FrameType::Error => {
                    let text = String::from_utf8_lossy(&self.payload).into_owned();
                    return Ok(Some(Event::Error(text)));
                }
                FrameType::Exit => {
                    let exit = frame::ExitStatus::parse(&self.payload).map_err(bad)?;
                    self.exited.call(exit.status);
                    return Ok(Some(Event::Exit(exit.status)));
                }
                FrameType::Control => {
                    if let Some(event) = control_event(&self.payload) {
                        if let Event::Started { pid } = event {
                            self.writer.started(pid);
                        }
                        return Ok(Some(event));
                    }
                }
                // These types are only sent towards a command.
                FrameType::Stdin | FrameType::Resize | FrameType::Signal | FrameType::Request => {}
            }
        }
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.get_ref().as_fd()
    }
}

/// Decodes a CONTROL frame, which is a report of a VMM or a reply of the agent. Returns
/// `None` for messages without an event.
fn control_event(payload: &[u8]) -> Option<Event<'static>> {
    if let Ok(report) = serde_json::from_slice(payload) {
        return Some(match report {
            VmmReport::Hello => return None,
            VmmReport::Phase(phase) => Event::Phase(phase),
            VmmReport::Warning(text) => Event::Warning(text),
            VmmReport::Started { pid } => Event::Started { pid },
            VmmReport::IdentityReport(identity_report) => Event::IdentityReport(identity_report),
            VmmReport::Ended(exit) => Event::Ended(exit),
        });
    }
    match serde_json::from_slice(payload) {
        Ok(ExecReply::Started { pid, .. }) => Some(Event::Started { pid }),
        Ok(ExecReply::Hello(_)) => None,
        // A message of another version is skipped.
        Err(_) => None,
    }
}

/// Fills `buffer`; `Ok(false)` when the stream ends before the first byte.
fn read_exact_or_end(reader: &mut impl io::Read, buffer: &mut [u8]) -> io::Result<bool> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Closing a unix socket with unread input resets the stream, after the peer's
            // own data was delivered.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset && filled == 0 => {
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// An additional path to a command besides its session, so that signals do not wait
/// behind input that the command does not read.
#[derive(Debug)]
pub struct Aside {
    endpoint: Endpoint,
    command: Command,
}

#[derive(Debug)]
enum Command {
    /// The workload, through the control socket.
    Workload,
    /// An exec, by its container and its process identifier, which is 0 until it runs.
    Exec(ContainerId, AtomicU32),
}

impl Aside {
    /// Creates the path to the workload of a VM, through its control socket.
    pub fn workload(control: Endpoint) -> Self {
        Self {
            endpoint: control,
            command: Command::Workload,
        }
    }

    /// Creates the path to an exec in a container, through the VM's exec socket.
    pub fn exec(exec: Endpoint, container: ContainerId) -> Self {
        Self {
            endpoint: exec,
            command: Command::Exec(container, AtomicU32::new(0)),
        }
    }

    /// Sends a signal. `Ok(false)` when the path is not available: the command does not
    /// run yet, or the guest's agent predates the request.
    fn signal(&self, signal: u8) -> io::Result<bool> {
        let (container, pid) = match &self.command {
            Command::Workload => {
                return Control::connect(&self.endpoint)
                    .and_then(|mut control| control.call(&ControlCall::Signal { signal }))
                    .map(|_| true)
                    .map_err(io::Error::other);
            }
            Command::Exec(container, pid) => (container.clone(), pid.load(Ordering::Relaxed)),
        };
        if pid == 0 {
            return Ok(false);
        }
        let deadline = Instant::now() + SIGNAL_TIMEOUT;
        let stream = connect_until(&self.endpoint.socket, deadline)?;
        let mut until = Until {
            stream: &stream,
            deadline: Some(deadline),
        };
        let hello = ExecControl::Hello(Hello {
            protocol: PROTOCOL_VERSION,
        });
        let mut bytes = Vec::new();
        let signal = ExecControl::Signal {
            container,
            pid,
            signal,
        };
        for message in [hello, signal] {
            let json = serde_json::to_vec(&message)?;
            frame::encode(FrameType::Control, &json, &mut bytes).map_err(io::Error::other)?;
        }
        until.write_all(&bytes)?;
        loop {
            let mut header = [0; HEADER_LEN];
            until.read_exact(&mut header)?;
            let header = FrameHeader::decode(header)
                .and_then(|header| header.limited(frame::payload_limit))
                .map_err(io::Error::other)?;
            let mut payload = vec![0; header.len];
            until.read_exact(&mut payload)?;
            if header.kind == FrameType::Exit {
                let exit = frame::ExitStatus::parse(&payload).map_err(io::Error::other)?;
                // Status 1: the command has exited. Status 125: the agent does not know
                // the request.
                return Ok(exit.status <= 1);
            }
        }
    }
}

/// The sending side of a session. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SessionWriter {
    stream: Arc<Mutex<UnixStream>>,
    /// The same stream outside the lock, which a blocked writer holds.
    hang_up: Arc<UnixStream>,
    /// Signals that are sent on the stream, by the next one that holds the lock.
    signals: Arc<Mutex<VecDeque<u8>>>,
    aside: Option<Arc<Aside>>,
}

impl SessionWriter {
    /// Records the process identifier of the command when it starts.
    fn started(&self, pid: u32) {
        if let Some(Command::Exec(_, known)) = self.aside.as_deref().map(|aside| &aside.command) {
            known.store(pid, Ordering::Relaxed);
        }
    }

    /// Sends a frame. Blocks while the receiver does not read.
    ///
    /// # Errors
    /// The payload is too long for a frame, or the connection failed.
    pub fn send(&self, kind: FrameType, payload: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
        frame::encode(kind, payload, &mut bytes)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        // Continuing after another writer's panic is safe: a partly written frame means
        // that the stream is broken, and this write fails too.
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(&bytes)?;
        drop(stream);
        self.send_signals(SendFlags::NOSIGNAL)
    }

    /// Sends the queued signals, unless another writer holds the lock: it does so when its
    /// data has been taken. With `DONTWAIT`, signals for which the stream has no room stay
    /// queued.
    fn send_signals(&self, flags: SendFlags) -> io::Result<()> {
        let lock = || self.signals.lock().unwrap_or_else(PoisonError::into_inner);
        // The queue is looked at again after each release of the stream: whoever queued a
        // signal before that found the stream locked.
        while !lock().is_empty() {
            let mut stream = match self.stream.try_lock() {
                Ok(stream) => stream,
                Err(TryLockError::Poisoned(error)) => error.into_inner(),
                Err(TryLockError::WouldBlock) => return Ok(()),
            };
            while let Some(signal) = { lock().front().copied() } {
                let mut bytes = Vec::new();
                frame::encode(FrameType::Signal, &[signal], &mut bytes)
                    .map_err(io::Error::other)?;
                match rustix::io::retry_on_intr(|| send(&*stream, &bytes, flags)) {
                    // A frame that has been begun must be completed.
                    Ok(count) => stream.write_all(bytes.get(count..).unwrap_or_default())?,
                    Err(Errno::AGAIN) => return Ok(()),
                    Err(error) => return Err(error.into()),
                }
                lock().pop_front();
            }
        }
        Ok(())
    }

    /// Sends `message` as the JSON payload of a frame.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_json(&self, kind: FrameType, message: &impl Serialize) -> io::Result<()> {
        self.send(kind, &serde_json::to_vec(message)?)
    }

    /// Sends bytes to the command's standard input. Blocks while the command does not
    /// read.
    ///
    /// # Errors
    /// The connection to the command or the VM failed.
    pub fn write_stdin(&self, bytes: &[u8]) -> io::Result<()> {
        // An empty frame would mean end of file.
        bytes
            .chunks(BULK_PAYLOAD)
            .try_for_each(|chunk| self.send(FrameType::Stdin, chunk))
    }

    /// Closes the command's standard input.
    ///
    /// # Errors
    /// The connection to the command or the VM failed.
    pub fn close_stdin(&self) -> io::Result<()> {
        self.send(FrameType::Stdin, &[])
    }

    /// Sets the size of the command's terminal.
    ///
    /// # Errors
    /// The connection to the command or the VM failed.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        self.send(FrameType::Resize, &frame::resize_payload(columns, rows))
    }

    /// Sends the command a signal over a separate connection, so that the signal does not
    /// wait behind input that the command does not read. Before the command runs, and if
    /// the guest's agent does not have this request, the signal is queued on the session
    /// and is delivered in order. This method does not wait for input to be read.
    ///
    /// # Errors
    /// The connection to the command or the VM failed, or no answer arrived, or too many
    /// signals are queued (`WouldBlock`).
    pub fn signal(&self, signal: u8) -> io::Result<()> {
        if let Some(aside) = &self.aside
            && aside.signal(signal)?
        {
            return Ok(());
        }
        let mut signals = self.signals.lock().unwrap_or_else(PoisonError::into_inner);
        if signals.len() >= MAX_QUEUED_SIGNALS {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        signals.push_back(signal);
        drop(signals);
        self.send_signals(SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    /// Shuts the connection down in both directions, which wakes a waiting
    /// [`Session::next_event`] and blocked writers.
    pub fn hang_up(&self) {
        // The peer may already have closed the connection.
        let _ = self.hang_up.shutdown(Shutdown::Both);
    }
}

/// An [`io::Write`] for a command's standard input, which is closed on drop.
#[derive(Debug)]
pub struct Stdin {
    writer: SessionWriter,
}

impl Stdin {
    /// Takes over the command's standard input.
    #[must_use]
    pub fn new(writer: SessionWriter) -> Self {
        Self { writer }
    }
}

impl Write for Stdin {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = bytes.get(..BULK_PAYLOAD).unwrap_or(bytes);
        self.writer.write_stdin(chunk)?;
        Ok(chunk.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Stdin {
    fn drop(&mut self) {
        // A command that has exited needs no end of file.
        let _ = self.writer.close_stdin();
    }
}

/// The complete output of a command, and its exit status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Output {
    /// Exit status; 128+n when signal n terminated the command.
    pub status: u32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Session {
    /// Collects output until the command exits.
    ///
    /// # Errors
    /// The connection failed, or ended before the command did.
    pub fn output(mut self) -> io::Result<Output> {
        let mut output = Output::default();
        while let Some(event) = self.next_event()? {
            match event {
                Event::Stdout(bytes) => output.stdout.extend_from_slice(bytes),
                Event::Stderr(bytes) => output.stderr.extend_from_slice(bytes),
                Event::Error(text) => output.stderr.extend_from_slice(text.as_bytes()),
                Event::Exit(status) => {
                    output.status = status;
                    return Ok(output);
                }
                Event::Ended(exit) => {
                    output.status = exit.status;
                    return Ok(output);
                }
                Event::Started { .. }
                | Event::Phase(_)
                | Event::Warning(_)
                | Event::IdentityReport(_) => {}
            }
        }
        Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the VM ended before the command did",
        ))
    }
}
