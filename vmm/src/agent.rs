//! The control connection to the agent: replies arrive in the order of requests.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;

use sm_guest_proto::PROTOCOL_VERSION;
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::{ControlReply, ControlRequest};
use sm_guest_proto::exec::Hello;
use sm_guest_proto::frame::FrameType;

use super::clock_error::ClockError;
use super::conn::Conn;

/// The purpose of an outstanding request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Agree on a protocol version.
    Hello,
    /// Give the guest a new identity.
    Refresh,
    /// Correct the guest's clock, which was set late.
    AdjustClock {
        /// Time of the request, in nanoseconds since the Unix epoch.
        sent_ns: u64,
        /// Bounds of the clock's error when the request is carried out.
        error: ClockError,
    },
    /// Create the container of the workload: mount its root file system.
    AttachRoot,
    /// Mount volumes and tmpfs.
    Mount,
    /// Notify programs of changes by the host.
    NoteHostChanges,
    /// Collect the guest's identity report.
    IdentityReport {
        /// Time of the request, in nanoseconds since the Unix epoch.
        requested_ns: u64,
    },
    /// Freeze the workload, which has not started yet, for an image snapshot.
    FreezeRoot,
    /// Freeze the workload, for a snapshot.
    Freeze {
        /// Number of the snapshot job.
        job: u64,
    },
    /// Write back data that need not be in a snapshot.
    Prepare {
        /// Number of the snapshot job.
        job: u64,
    },
    /// Thaw the workload.
    Thaw,
    /// Ask for the number of OOM kills.
    OomCheck,
    /// Power the guest off.
    PowerOff,
    /// Send a signal to the workload. (On the workload's own stream, a signal would wait
    /// behind unread input.)
    Signal {
        /// Number of a signal whose client waits for the answer.
        number: Option<u64>,
    },
    /// Collect resource usage for a client.
    Stats {
        /// The client.
        client: u64,
    },
}

/// Limit of requests without a reply. A paused guest answers none.
const MAX_PENDING: usize = 256;

/// The agent's control connection.
#[derive(Debug)]
pub(crate) struct AgentLink {
    pub(crate) conn: Conn,
    /// The container of the VM's workload. Requests that concern one container name it.
    container: ContainerId,
    pending: VecDeque<Purpose>,
}

impl AgentLink {
    /// Takes over a stream and sends the hello. `container` is that of the VM's workload.
    pub(crate) fn new(stream: UnixStream, container: ContainerId) -> io::Result<Self> {
        let mut link = Self {
            conn: Conn::new(stream)?,
            container,
            pending: VecDeque::new(),
        };
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
        };
        link.send_request(Purpose::Hello, &ControlRequest::Hello(hello));
        Ok(link)
    }

    /// Returns true if too many requests are unanswered to send more.
    pub(crate) fn is_behind(&self) -> bool {
        self.pending.len() >= MAX_PENDING
    }

    /// Queues a request.
    pub(crate) fn send_request(&mut self, purpose: Purpose, request: &ControlRequest) {
        self.pending.push_back(purpose);
        self.conn.queue_json(FrameType::Control, request);
    }

    /// Queues a signal for the workload's main process; `stop` marks the stop signal, and
    /// `number` a signal whose client waits for the answer.
    pub(crate) fn signal_main(&mut self, signal: u8, stop: bool, number: Option<u64>) {
        let request = ControlRequest::SignalMain {
            container: self.container.clone(),
            signal,
            stop,
        };
        self.send_request(Purpose::Signal { number }, &request);
    }

    /// Queues a request for the usage figures of guest and workload.
    pub(crate) fn request_stats(&mut self, purpose: Purpose) {
        let container = self.container.clone();
        self.send_request(purpose, &ControlRequest::Stats { container });
    }

    /// Queues a request for the identity that the workload's processes see.
    pub(crate) fn request_identity_report(&mut self, purpose: Purpose) {
        let container = self.container.clone();
        self.send_request(purpose, &ControlRequest::IdentityReport { container });
    }

    /// Returns the next reply that has arrived, if it answers a signal, and the number of
    /// that signal.
    pub(crate) fn next_signal_reply(&mut self) -> Option<(Option<u64>, ControlReply)> {
        let Some(&Purpose::Signal { number }) = self.pending.front() else {
            return None;
        };
        let (_, reply) = self.next_reply().ok()??;
        Some((number, reply))
    }

    /// Returns the next reply, with the purpose of its request.
    ///
    /// # Errors
    /// The agent violated the protocol; a clause.
    pub(crate) fn next_reply(&mut self) -> Result<Option<(Purpose, ControlReply)>, String> {
        let frame = match self.conn.decoder.next_frame() {
            Ok(Some(frame)) => frame,
            Ok(None) => return Ok(None),
            Err(error) => return Err(format!("a reply that is no frame ({error})")),
        };
        let reply = match frame.kind {
            FrameType::Control => serde_json::from_slice(frame.payload)
                .map_err(|error| format!("a reply that does not parse ({error})"))?,
            FrameType::Error => ControlReply::Error {
                message: String::from_utf8_lossy(frame.payload).into_owned(),
            },
            other => return Err(format!("an unexpected {other:?} frame")),
        };
        match self.pending.pop_front() {
            Some(purpose) => Ok(Some((purpose, reply))),
            None => Err("a reply that answers nothing".to_owned()),
        }
    }
}
