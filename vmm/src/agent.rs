//! The control connection to the agent: requests in order, replies in order.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;

use sm_guest_proto::PROTOCOL_VERSION;
use sm_guest_proto::control::{ControlReply, ControlRequest};
use sm_guest_proto::exec::Hello;
use sm_guest_proto::frame::FrameType;

use super::conn::Conn;

/// What an outstanding request was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Agree on a version.
    Hello,
    /// Give the guest an identity.
    Refresh,
    /// Mount the root.
    AttachRoot,
    /// Tell what makes the guest distinct.
    Evidence {
        /// When it was asked, in nanoseconds since the Unix epoch.
        asked_ns: u64,
    },
    /// Stop what there is of a workload for an image snapshot.
    FreezeRoot,
    /// Stop the workload for a snapshot.
    Freeze {
        /// Which one.
        job: u64,
    },
    /// Write back what need not be in a snapshot.
    Prepare {
        /// Which one.
        job: u64,
    },
    /// Let the workload go on.
    Thaw,
    /// Find out whether memory ran out.
    OomCheck,
    /// Switch the guest off.
    PowerOff,
    /// Signal the workload. (Not on the workload's own stream, where a signal
    /// would wait behind input that the workload does not read.)
    Signal,
    /// Answer a client's request for figures.
    Stats {
        /// The client.
        client: u64,
    },
}

/// Requests that may wait for a reply. A guest that is held answers none.
const MAX_PENDING: usize = 256;

/// The agent's control connection.
#[derive(Debug)]
pub(crate) struct AgentLink {
    pub(crate) conn: Conn,
    pending: VecDeque<Purpose>,
}

impl AgentLink {
    /// Takes over a stream and says hello.
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        let mut link = Self {
            conn: Conn::new(stream)?,
            pending: VecDeque::new(),
        };
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
        };
        link.ask(Purpose::Hello, &ControlRequest::Hello(hello));
        Ok(link)
    }

    /// Whether the guest has so much to answer that it should not be asked more.
    pub(crate) fn is_behind(&self) -> bool {
        self.pending.len() >= MAX_PENDING
    }

    /// Queues a request.
    pub(crate) fn ask(&mut self, purpose: Purpose, request: &ControlRequest) {
        self.pending.push_back(purpose);
        self.conn.queue_json(FrameType::Control, request);
    }

    /// Queues a signal for the workload's main process; with `stop`, the signal is the
    /// one that ends it.
    pub(crate) fn signal_main(&mut self, signal: u8, stop: bool) {
        let request = ControlRequest::SignalMain { signal, stop };
        self.ask(Purpose::Signal, &request);
    }

    /// The next reply that has arrived, with what it answers.
    ///
    /// # Errors
    /// The agent does not keep to the protocol; a clause.
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
