//! Calls on a VM's control socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use sm_guest_proto::frame::{self, FrameHeader, FrameType, HEADER_LEN};

use crate::launch::{ControlAnswer, ControlCall};
use crate::record::Record;
use crate::session::Session;
use crate::{Error, record::RecordError};

/// How long a VMM may take to answer an ordinary call.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to a VMM.
#[derive(Debug)]
pub(crate) struct Control {
    stream: UnixStream,
}

fn vmm(operation: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Vmm { operation, source }
}

impl Control {
    /// Connects to the VMM of `record`.
    pub(crate) fn connect(record: &Record) -> Result<Self, Error> {
        match UnixStream::connect(record.control_socket()) {
            Ok(stream) => Ok(Self { stream }),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Err(Error::NotRunning(record.config().name.clone()))
            }
            Err(error) => Err(vmm("connect to the VM's process")(error)),
        }
    }

    /// Makes a call that is answered at once.
    pub(crate) fn call(&mut self, call: &ControlCall) -> Result<ControlAnswer, Error> {
        self.stream
            .set_read_timeout(Some(ANSWER_TIMEOUT))
            .map_err(vmm("talk to the VM's process"))?;
        self.ask(call)
    }

    /// Makes a call that is answered when it pleases.
    pub(crate) fn call_and_wait(&mut self, call: &ControlCall) -> Result<ControlAnswer, Error> {
        self.stream
            .set_read_timeout(None)
            .map_err(vmm("talk to the VM's process"))?;
        self.ask(call)
    }

    fn ask(&mut self, call: &ControlCall) -> Result<ControlAnswer, Error> {
        let exchange = || -> io::Result<ControlAnswer> {
            let mut bytes = Vec::new();
            frame::encode(FrameType::Request, &serde_json::to_vec(call)?, &mut bytes)
                .map_err(io::Error::other)?;
            io::Write::write_all(&mut &self.stream, &bytes)?;
            // Unbuffered: what follows an answer may belong to a session.
            let mut header = [0; HEADER_LEN];
            io::Read::read_exact(&mut &self.stream, &mut header)?;
            let header = FrameHeader::decode(header).map_err(io::Error::other)?;
            let mut payload = vec![0; header.len];
            io::Read::read_exact(&mut &self.stream, &mut payload)?;
            Ok(serde_json::from_slice(&payload)?)
        };
        match exchange().map_err(vmm("talk to the VM's process"))? {
            ControlAnswer::Error(text) => Err(Error::Refused(text)),
            answer => Ok(answer),
        }
    }

    /// Makes the connection a client of the workload.
    pub(crate) fn attach(mut self, stdin: bool) -> Result<Session, Error> {
        self.call(&ControlCall::Attach { stdin })?;
        self.stream
            .set_read_timeout(None)
            .and_then(|()| Session::new(self.stream))
            .map_err(vmm("talk to the VM's process"))
    }

    /// Process identifier of the VMM, as the kernel knows it.
    pub(crate) fn peer_pid(&self) -> io::Result<rustix::process::Pid> {
        Ok(rustix::net::sockopt::socket_peercred(&self.stream)?.pid)
    }
}

/// The error for a VM that is not there to be asked.
pub(crate) fn not_running(record: &Record) -> Error {
    match record.state() {
        Err(RecordError::NotFound(name)) => RecordError::NotFound(name).into(),
        _ => Error::NotRunning(record.config().name.clone()),
    }
}
