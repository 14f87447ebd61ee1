//! A caller's connection to a command in a guest: the workload, or an exec.

#[cfg(test)]
mod tests;

use std::io::{self, BufReader, Read as _, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use sm_guest_proto::PROTOCOL_VERSION;
use sm_guest_proto::exec::{ExecControl, ExecReply, Hello};
use sm_guest_proto::frame::{self, BULK_PAYLOAD, FrameHeader, FrameType, HEADER_LEN};

use crate::control::Control;
use crate::endpoint::Endpoint;
use crate::error::ControlError;
use crate::exit::ExitRecord;
use crate::launch::{ControlCall, Report, Testimony};
use crate::timed::{Until, connect_until};
use crate::timings::Phase;

/// How long a signal to a command may take on its way.
const SIGNAL_TIMEOUT: Duration = Duration::from_secs(5);

/// What arrives from a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Bytes of its standard output, or its terminal.
    Stdout(&'a [u8]),
    /// Bytes of its standard error.
    Stderr(&'a [u8]),
    /// A sentence about why it cannot be started; [`Event::Exit`] follows.
    Error(String),
    /// It runs.
    Started {
        /// Its process identifier in the guest.
        pid: u32,
    },
    /// A phase of the VM's start is complete.
    Phase(Phase),
    /// Something that did not go as it should, and stopped nothing; a sentence.
    Warning(String),
    /// What makes the machine distinct, from one that was started to tell it.
    Evidence(Testimony),
    /// It ended, with this status; 128+n when signal n ended it.
    Exit(u32),
    /// The VM has ended. The last event of a workload's session.
    Ended(ExitRecord),
}

/// A stream of frames to and from a command.
#[derive(Debug)]
pub struct Session {
    reader: BufReader<UnixStream>,
    payload: Vec<u8>,
    writer: SessionWriter,
}

impl Session {
    /// A session on `stream`; signals to its command go by `aside`, else by the stream.
    ///
    /// # Errors
    /// The stream's descriptor cannot be duplicated.
    pub fn new(stream: UnixStream, aside: Option<Aside>) -> io::Result<Self> {
        let writer = SessionWriter {
            stream: Arc::new(Mutex::new(stream.try_clone()?)),
            hang_up: Arc::new(stream.try_clone()?),
            aside: aside.map(Arc::new),
        };
        Ok(Self {
            reader: BufReader::with_capacity(BULK_PAYLOAD, stream),
            payload: Vec::new(),
            writer,
        })
    }

    /// A session with the workload of the VM at `endpoint`, over a connection to it;
    /// with `stdin`, frames of input are sent, too.
    ///
    /// # Errors
    /// The VM refuses, or its process cannot be talked to.
    pub fn attach(endpoint: Endpoint, control: Control, stdin: bool) -> Result<Self, ControlError> {
        let stream = control.attach(stdin)?;
        Self::new(stream, Some(Aside::workload(endpoint))).map_err(|source| ControlError::Io {
            operation: "talk to the VM's process",
            source,
        })
    }

    /// The other direction, usable from other threads.
    #[must_use]
    pub fn writer(&self) -> SessionWriter {
        self.writer.clone()
    }

    /// Waits for the next event; `None` when the stream has ended.
    ///
    /// # Errors
    /// The connection failed, or does not carry frames.
    pub fn next_event(&mut self) -> io::Result<Option<Event<'_>>> {
        let bad = |error: frame::FrameError| io::Error::new(io::ErrorKind::InvalidData, error);
        loop {
            let mut header = [0; HEADER_LEN];
            if !read_exact_or_end(&mut self.reader, &mut header)? {
                return Ok(None);
            }
            let header = FrameHeader::decode(header).map_err(bad)?;
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
                // Only sent towards a command.
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

/// What a CONTROL frame means to a caller, if anything: a report of a VMM, or a
/// reply of the agent.
fn control_event(payload: &[u8]) -> Option<Event<'static>> {
    if let Ok(report) = serde_json::from_slice(payload) {
        return Some(match report {
            Report::Hello => return None,
            Report::Phase(phase) => Event::Phase(phase),
            Report::Warning(text) => Event::Warning(text),
            Report::Started { pid } => Event::Started { pid },
            Report::Evidence(evidence) => Event::Evidence(evidence),
            Report::Ended(exit) => Event::Ended(exit),
        });
    }
    match serde_json::from_slice(payload) {
        Ok(ExecReply::Started { pid }) => Some(Event::Started { pid }),
        Ok(ExecReply::Hello(_)) => None,
        // A message of another version is skipped.
        Err(_) => None,
    }
}

/// `Ok(false)` when the stream ends before the first byte.
fn read_exact_or_end(reader: &mut impl io::Read, buffer: &mut [u8]) -> io::Result<bool> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A peer that closes with input of ours unread resets the stream,
            // after everything it had to say.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset && filled == 0 => {
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// The way to a command besides its session, where nothing waits behind input that
/// the command does not read.
#[derive(Debug)]
pub struct Aside {
    endpoint: Endpoint,
    command: Command,
}

#[derive(Debug)]
enum Command {
    /// The workload, reached by the control socket.
    Workload,
    /// A command beside it: its process identifier, 0 until it runs.
    Exec(AtomicU32),
}

impl Aside {
    /// The way to the workload of a VM: its control socket.
    pub fn workload(control: Endpoint) -> Self {
        Self {
            endpoint: control,
            command: Command::Workload,
        }
    }

    /// The way to a command beside it: the VM's exec socket.
    pub fn exec(exec: Endpoint) -> Self {
        Self {
            endpoint: exec,
            command: Command::Exec(AtomicU32::new(0)),
        }
    }

    /// Sends a signal. `Ok(false)` when there is no such way to the command: it
    /// does not run yet, or the guest's agent is from before there was one.
    fn signal(&self, signal: u8) -> io::Result<bool> {
        let pid = match &self.command {
            Command::Workload => {
                return Control::connect(&self.endpoint)
                    .and_then(|mut control| control.call(&ControlCall::Signal { signal }))
                    .map(|_| true)
                    .map_err(io::Error::other);
            }
            Command::Exec(pid) => pid.load(Ordering::Relaxed),
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
        for message in [hello, ExecControl::Signal { pid, signal }] {
            let json = serde_json::to_vec(&message)?;
            frame::encode(FrameType::Control, &json, &mut bytes).map_err(io::Error::other)?;
        }
        until.write_all(&bytes)?;
        loop {
            let mut header = [0; HEADER_LEN];
            until.read_exact(&mut header)?;
            let header = FrameHeader::decode(header).map_err(io::Error::other)?;
            if header.len > BULK_PAYLOAD {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut payload = vec![0; header.len];
            until.read_exact(&mut payload)?;
            if header.kind == FrameType::Exit {
                let exit = frame::ExitStatus::parse(&payload).map_err(io::Error::other)?;
                // 1: it has ended. 125: a request that the agent does not know.
                return Ok(exit.status <= 1);
            }
        }
    }
}

/// The direction towards a command. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SessionWriter {
    stream: Arc<Mutex<UnixStream>>,
    /// The same stream, not behind the lock that a blocked writer holds.
    hang_up: Arc<UnixStream>,
    aside: Option<Arc<Aside>>,
}

impl SessionWriter {
    /// Notes the process identifier of the command, which runs now.
    fn started(&self, pid: u32) {
        if let Some(Command::Exec(known)) = self.aside.as_deref().map(|aside| &aside.command) {
            known.store(pid, Ordering::Relaxed);
        }
    }

    /// Sends a frame. Blocks while the other side does not read.
    ///
    /// # Errors
    /// The payload is too long for a frame, or the command or the VM is gone.
    pub fn send(&self, kind: FrameType, payload: &[u8]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
        frame::encode(kind, payload, &mut bytes)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        // A frame is written whole or the stream is broken anyway.
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(&bytes)
    }

    /// Sends `message` as the payload of a frame.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_json(&self, kind: FrameType, message: &impl Serialize) -> io::Result<()> {
        self.send(kind, &serde_json::to_vec(message)?)
    }

    /// Sends bytes to the command's standard input. Blocks while it does not read.
    ///
    /// # Errors
    /// The command or the VM is gone.
    pub fn write_stdin(&self, bytes: &[u8]) -> io::Result<()> {
        // An empty frame would mean the end.
        bytes
            .chunks(BULK_PAYLOAD)
            .try_for_each(|chunk| self.send(FrameType::Stdin, chunk))
    }

    /// Ends the command's standard input.
    ///
    /// # Errors
    /// The command or the VM is gone.
    pub fn close_stdin(&self) -> io::Result<()> {
        self.send(FrameType::Stdin, &[])
    }

    /// Tells the command's terminal its new size.
    ///
    /// # Errors
    /// The command or the VM is gone.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        self.send(FrameType::Resize, &frame::resize_payload(columns, rows))
    }

    /// Signals the command, by a connection of its own, so that the signal does not
    /// wait behind input that the command does not read. Before the command runs
    /// there is only the session, where the signal waits its turn.
    ///
    /// # Errors
    /// The command or the VM is gone, or does not answer.
    pub fn signal(&self, signal: u8) -> io::Result<()> {
        match &self.aside {
            Some(aside) if aside.signal(signal)? => Ok(()),
            _ => self.send(FrameType::Signal, &[signal]),
        }
    }

    /// Closes the connection in both directions; a waiting [`Session::next_event`]
    /// and a writer that is blocked return.
    pub fn hang_up(&self) {
        // A peer that is gone already is as good.
        let _ = self.hang_up.shutdown(Shutdown::Both);
    }
}

/// [`SessionWriter`]'s standard input as a writer; ends the input when dropped.
#[derive(Debug)]
pub struct Stdin {
    writer: SessionWriter,
}

impl Stdin {
    /// Takes responsibility for the command's standard input.
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
        // A command that is gone needs no end of input.
        let _ = self.writer.close_stdin();
    }
}

/// Everything a command wrote, and how it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Exit status; 128+n when signal n ended it.
    pub status: u32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Session {
    /// Collects output until the command ends.
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
                | Event::Evidence(_) => {}
            }
        }
        Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the VM ended before the command did",
        ))
    }
}
