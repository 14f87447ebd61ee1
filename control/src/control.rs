//! Calls on a VM's control socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use sm_guest_proto::frame::{self, FrameHeader, FrameType, HEADER_LEN};

use crate::endpoint::Endpoint;
use crate::error::ControlError;
use crate::launch::{ControlAnswer, ControlCall};
use crate::timed::{Until, connect_until};

/// Timeout for connecting to a VMM, and for sending a call and receiving its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum length of an answer of a VMM in bytes. A status lists all published ports.
pub const MAX_ANSWER: usize = 1 << 20;

/// A connection to the control socket of a VMM.
#[derive(Debug)]
pub struct Control {
    stream: UnixStream,
}

fn vmm(operation: &'static str) -> impl FnOnce(io::Error) -> ControlError {
    move |source| ControlError::Io { operation, source }
}

impl Control {
    /// Connects to the VMM that listens on `endpoint`, waiting at most 10 s for room in
    /// its backlog.
    ///
    /// # Errors
    /// The VM is not running, or the connection to its process failed.
    pub fn connect(endpoint: &Endpoint) -> Result<Self, ControlError> {
        Self::connect_until(endpoint, Instant::now() + ANSWER_TIMEOUT)
    }

    fn connect_until(endpoint: &Endpoint, deadline: Instant) -> Result<Self, ControlError> {
        match connect_until(&endpoint.socket, deadline) {
            Ok(stream) => Ok(Self { stream }),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Err(ControlError::NotRunning(endpoint.name.clone()))
            }
            Err(error) => Err(vmm("connect to the VM's process")(error)),
        }
    }

    /// Makes a call whose answer is due within 10 s.
    ///
    /// # Errors
    /// The VM refuses the call, or the connection to its process failed.
    pub fn call(&mut self, call: &ControlCall) -> Result<ControlAnswer, ControlError> {
        self.send(call)
            .and_then(|()| self.receive(Some(Instant::now() + ANSWER_TIMEOUT)))
            .map_err(vmm("talk to the VM's process"))
            .and_then(checked)
    }

    /// Makes a call whose answer has no deadline.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn call_and_wait(&mut self, call: &ControlCall) -> Result<ControlAnswer, ControlError> {
        self.send(call)
            .and_then(|()| self.receive(None))
            .map_err(vmm("talk to the VM's process"))
            .and_then(checked)
    }

    /// Waits until the VM has exited, or its process has closed the connection.
    ///
    /// # Errors
    /// The deadline has passed (`TimedOut`), or the connection failed.
    pub fn wait_until(mut self, deadline: Instant) -> Result<(), ControlError> {
        let operation = vmm("wait for the VM's process");
        match self
            .send(&ControlCall::Wait)
            .and_then(|()| self.receive(Some(deadline)))
        {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof
                        | io::ErrorKind::BrokenPipe
                        | io::ErrorKind::ConnectionReset
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(operation(error)),
            Ok(answer) => checked(answer).map(drop),
        }
    }

    fn send(&mut self, call: &ControlCall) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame::encode(FrameType::Request, &serde_json::to_vec(call)?, &mut bytes)
            .map_err(io::Error::other)?;
        let mut until = Until {
            stream: &self.stream,
            deadline: Some(Instant::now() + ANSWER_TIMEOUT),
        };
        io::Write::write_all(&mut until, &bytes)
    }

    fn receive(&self, deadline: Option<Instant>) -> io::Result<ControlAnswer> {
        let mut until = Until {
            stream: &self.stream,
            deadline,
        };
        // Unbuffered: bytes after an answer may belong to a session.
        let mut header = [0; HEADER_LEN];
        io::Read::read_exact(&mut until, &mut header)?;
        let header = FrameHeader::decode(header)
            .and_then(|header| header.limited(|_| MAX_ANSWER))
            .map_err(io::Error::other)?;
        let mut payload = vec![0; header.len];
        io::Read::read_exact(&mut until, &mut payload)?;
        Ok(serde_json::from_slice(&payload)?)
    }

    /// Turns the connection into a session with the workload and returns its stream. With
    /// `stdin`, the caller may send input frames on it.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn attach(mut self, stdin: bool) -> Result<UnixStream, ControlError> {
        self.call(&ControlCall::Attach { stdin })?;
        self.stream
            .set_read_timeout(None)
            .and_then(|()| self.stream.set_write_timeout(None))
            .map_err(vmm("talk to the VM's process"))?;
        Ok(self.stream)
    }

    /// Subscribes the connection to output notifications and returns its stream. Arriving
    /// bytes mean that more output may be in the log; end of file means that the VM has
    /// exited or is about to.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn follow(mut self) -> Result<UnixStream, ControlError> {
        self.call(&ControlCall::Follow)?;
        self.stream
            .set_read_timeout(None)
            .map_err(vmm("talk to the VM's process"))?;
        Ok(self.stream)
    }

    /// Process identifier of the VMM, from `SO_PEERCRED`.
    ///
    /// # Errors
    /// The socket option cannot be read.
    pub fn peer_pid(&self) -> io::Result<rustix::process::Pid> {
        Ok(rustix::net::sockopt::socket_peercred(&self.stream)?.pid)
    }
}

fn checked(answer: ControlAnswer) -> Result<ControlAnswer, ControlError> {
    match answer {
        ControlAnswer::Error(text) => Err(ControlError::Refused(text)),
        answer => Ok(answer),
    }
}
