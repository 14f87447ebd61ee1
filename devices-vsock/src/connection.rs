//! One connection: its state, and the packets that it owes the guest.
//!
//! # Primer (virtio 1.3 section 5.10.6)
//!
//! Every packet is a header of 44 bytes, in RW packets followed by data. A connection is
//! identified by the guest's port and the host's port. This side is a proxy: its peer is a
//! guest's socket, and behind it is a host socket whose other end belongs to an application.
//!
//! **Handshake** (section 5.10.6.5). The side that connects sends REQUEST. The other side
//! answers RESPONSE if a socket listens on the port, otherwise RST. Host code connects with
//! [`MuxerHandle::connect`]; requests of the guest go to the acceptor of the host port. With
//! `status_reply`, the first byte of the guest is a status that the device consumes, and only
//! status 0 completes the attempt. A request without an answer or a status in time is reset.
//!
//! **Shutdown**. Each direction ends independently, and a SHUTDOWN flag is permanent:
//!
//! | event | effect |
//! |---|---|
//! | the host's end of file | SHUTDOWN (send), after all data before it |
//! | the host accepts no more (EPIPE) | SHUTDOWN (receive); data of the guest are dropped |
//! | the host has closed, or reading fails | both flags, after all data before |
//! | the guest's SHUTDOWN (send) | `shutdown(SHUT_WR)` on the host socket, after the backlog |
//! | the guest's SHUTDOWN (receive) | `shutdown(SHUT_RD)`; unread data of the host are dropped |
//!
//! A clean end is a SHUTDOWN of both flags that the peer confirms by RST, so that neither side
//! uses the two ports again while the other still handles packets of the old connection. The
//! device sends the RST once the guest has sent a SHUTDOWN, both directions have ended (by flags
//! of either side) and the backlog is written. If only the device has sent both flags, the guest
//! confirms; without its RST within `answer_timeout`, the device sends one.
//!
//! **Credit** (section 5.10.6.3). Each side announces in every packet the size of its receive
//! buffer (`buf_alloc`) and the number of bytes that it has forwarded to its application
//! (`fwd_cnt`). A sender has at most `buf_alloc` bytes in flight. The device counts a byte as
//! forwarded once the host socket has accepted it (or it was dropped), so the guest's credit
//! follows the speed of the host application. A guest that exceeds its credit is reset.
//! `credit.rs` has the arithmetic, `allowance.rs` the sizes of windows.
//!
//! **Buffering**. Data of the host need no buffer: `transfer.rs` reads from the host socket
//! directly into the guest's receive buffers, as many bytes as the guest's credit permits; all
//! others stay in the socket. (One message of a seqpacket socket is read at once, and its rest is
//! stored until the guest offers more buffers or credit.) Data of the guest are written
//! directly from its transmit buffers. If the host socket is full, the device cannot leave them
//! there: all connections share the transmit queue, which is processed in order, so one slow
//! reader would block every other connection. The rest is copied to the `backlog` of the
//! connection, which its window bounds, and written when the event loop reports the socket
//! writable. The guest may even close the connection meanwhile: the backlog is still written.
//!
//! # States
//!
//! ```text
//!  MuxerHandle::connect                       REQUEST of the guest, accepted
//!          |                                               |
//!          v                                               v  (RESPONSE pending)
//!    +-----------+     RESPONSE of the guest        +-------------+
//!    | Requested |--------------------------------->| Established |
//!    +-----------+                                  +-------------+
//!          |                                          |         |
//!          | RST of the guest (refused);              |         | RST of the guest, or reset of
//!          | timeout; host socket closed;             |         | the device, with a backlog
//!          | seqpacket unsupported; cut;              |         v
//!          | protocol violation; reset                |   +----------+
//!          |                                          |   | Draining |  (the ports are free)
//!          |   both directions ended, no backlog;     |   +----------+
//!          |   RST or reset without a backlog;        |         |
//!          |   protocol violation; timeout; cut       |         |
//!          v                                          v         | backlog written, host socket
//!    +----------------------------------------------------+     | closed, linger timeout, cut
//!    |                      removed                       |<----+
//!    +----------------------------------------------------+
//! ```
//!
//! `Muxer::abort` removes a connection and sends RST if the guest knows it: in `Established`,
//! and in `Requested` after REQUEST was sent.
//!
//! [`MuxerHandle::connect`]: crate::MuxerHandle::connect

mod transfer;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::net::Shutdown;
use sm_event_loop::{Registered, Timer};

pub(crate) use transfer::{Filled, MAX_MESSAGE};

use crate::backlog::{Backlog, ChunkPool};
use crate::credit::{Incoming, Outgoing};
use crate::group::Member;
use crate::handle::{ConnectError, ConnectRequest, Report, SocketKind};
use crate::host::HostSocket;
use crate::packet::{Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_SEQPACKET, TYPE_STREAM};

/// Guest port and host port.
pub(crate) type Key = (u32, u32);

const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The host's request is to be sent, or was sent and is not answered yet.
    Requested,
    /// Both sides have accepted; data flow.
    Established,
    /// The guest has closed the connection, or the device was reset; only the backlog is
    /// still written.
    Draining,
}

/// Event that a connection awaits, with a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaiting {
    /// The guest's answer to a request.
    Answer,
    /// The status that follows the answer.
    Status,
    /// The guest's confirmation of the end.
    End,
    /// A host socket that accepts the last bytes of the guest.
    Tail,
    /// No event: the connection may last.
    Nothing,
}

/// Packets without data that the guest has not received yet.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PendingPackets {
    pub(crate) request: bool,
    pub(crate) response: bool,
    pub(crate) credit: bool,
    /// SHUTDOWN flags.
    ends: u32,
}

/// Complete messages of the guest, and a partial one.
#[derive(Debug, Default)]
struct Messages {
    lens: VecDeque<u32>,
    partial: u32,
}

pub(crate) struct Connection {
    pub(crate) key: Key,
    pub(crate) socket: Registered<HostSocket>,
    /// True if the event loop reports when the socket is writable.
    pub(crate) watches_writing: bool,
    pub(crate) phase: Phase,
    pub(crate) pending: PendingPackets,
    /// The socket may have bytes to read.
    pub(crate) readable: bool,
    /// The host's end has hung up; its last bytes may be unread.
    pub(crate) hung_up: bool,
    /// Reading has ended, by the peer or by the guest.
    read_done: bool,
    /// The host accepts no more bytes.
    refuses: bool,
    /// The host's socket was shut down for writing.
    write_closed: bool,
    /// SHUTDOWN flags that were sent to the guest, and those that it sent.
    sent_flags: u32,
    guest_ends: u32,
    /// Number of receive buffers for the next read.
    pub(crate) run: usize,
    pub(crate) outgoing: Outgoing<u32>,
    pub(crate) incoming: Incoming<u32>,
    /// Bytes for the guest that precede those of the socket: the preamble, or the rest of a
    /// message.
    prefix: Vec<u8>,
    prefix_sent: usize,
    backlog: Backlog,
    messages: Messages,
    /// The system lacked memory: the transfer must be repeated.
    pub(crate) short_of_memory: bool,
    /// Timer of that repetition.
    pub(crate) retry: Option<Timer>,
    /// Bytes of the backlog were written since the deadline was set.
    pub(crate) progressed: bool,
    /// The guest's next byte is a status.
    pub(crate) status_reply: bool,
    /// Additional time for the status.
    pub(crate) status_wait: Duration,
    report: Report,
    pub(crate) member: Option<Member>,
    /// Time of the request, if it is measured.
    pub(crate) requested_at: Option<Instant>,
    /// Time of the notification whose data are in the backlog, if it is measured.
    pub(crate) stored_since: Option<Instant>,
    pub(crate) awaiting: Awaiting,
    /// Deadline of `awaiting`.
    pub(crate) deadline: Option<Timer>,
}

impl Connection {
    pub(crate) fn new(key: Key, socket: Registered<HostSocket>, phase: Phase, window: u32) -> Self {
        Self {
            key,
            socket,
            watches_writing: false,
            phase,
            pending: PendingPackets::default(),
            readable: true,
            hung_up: false,
            read_done: false,
            refuses: false,
            write_closed: false,
            sent_flags: 0,
            guest_ends: 0,
            run: 1,
            outgoing: Outgoing::default(),
            incoming: Incoming::new(window),
            prefix: Vec::new(),
            prefix_sent: 0,
            backlog: Backlog::default(),
            messages: Messages::default(),
            short_of_memory: false,
            retry: None,
            progressed: false,
            status_reply: false,
            status_wait: Duration::ZERO,
            report: Report::none(),
            member: None,
            requested_at: None,
            stored_since: None,
            awaiting: Awaiting::Nothing,
            deadline: None,
        }
    }

    /// Adds the host's request.
    pub(crate) fn with_request(mut self, request: ConnectRequest) -> Self {
        self.pending.request = true;
        self.prefix = request.preamble;
        self.status_reply = request.status_reply;
        self.status_wait = request.wait;
        self.report = request.report;
        self.member = request.member;
        self.requested_at = request.requested_at;
        self
    }

    pub(crate) fn is_seqpacket(&self) -> bool {
        self.socket.kind == SocketKind::SeqPacket
    }

    /// Returns the socket type in packets of the connection.
    pub(crate) fn socket_type(&self) -> u16 {
        match self.socket.kind {
            SocketKind::Stream => TYPE_STREAM,
            SocketKind::SeqPacket => TYPE_SEQPACKET,
        }
    }

    /// Reports the result of the connection attempt to its requester; once.
    pub(crate) fn report(&mut self, result: Result<(), ConnectError>) {
        self.report.send(result.map(|()| self.key.1));
    }

    /// Returns window and counter for the next packet to the guest.
    pub(crate) fn announce(&mut self) -> (u32, u32) {
        self.pending.credit = false;
        self.incoming.announce()
    }

    /// Returns the next pending packet without data.
    pub(crate) fn next_pending(&mut self) -> Option<(Operation, u32)> {
        if self.phase == Phase::Draining {
            return None;
        }
        if std::mem::take(&mut self.pending.request) {
            return Some((Operation::Request, 0));
        }
        if self.phase == Phase::Requested {
            return None;
        }
        if std::mem::take(&mut self.pending.response) {
            return Some((Operation::Response, 0));
        }
        let due = self.due_shutdown();
        if due != 0 {
            self.sent_flags |= due;
            self.pending.ends &= !due;
            return Some((Operation::Shutdown, self.sent_flags));
        }
        std::mem::take(&mut self.pending.credit).then_some((Operation::CreditUpdate, 0))
    }

    /// Returns the SHUTDOWN flags that can be sent. The host's end of sending follows its
    /// data.
    fn due_shutdown(&self) -> u32 {
        let due = self.pending.ends & !self.sent_flags;
        if self.has_data_to_send() {
            due & SHUTDOWN_RECEIVE
        } else {
            due
        }
    }

    fn has_data_to_send(&self) -> bool {
        self.prefix_sent < self.prefix.len() || self.readable && !self.read_done
    }

    /// Returns true if the connection can use a receive buffer now.
    pub(crate) fn wants_buffer(&self) -> bool {
        match self.phase {
            Phase::Requested => self.pending.request,
            Phase::Established => {
                self.pending.response
                    || self.pending.credit
                    || self.due_shutdown() != 0
                    || self.has_data_to_send() && self.outgoing.available() > 0
            }
            Phase::Draining => false,
        }
    }

    /// Handles a hang-up after the end of the host's data: a peer that is gone, instead of
    /// one that only stopped sending, does not read either, and the guest gets both flags.
    pub(crate) fn handle_hang_up(&mut self) {
        if self.read_done && !self.refuses && self.socket.is_gone() {
            self.pending.ends |= BOTH;
        }
    }

    /// Returns true if the host's end was closed before there was a connection, and without
    /// data to send.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.phase == Phase::Requested && self.socket.is_gone() && !self.socket.has_bytes()
    }

    /// Handles the guest's SHUTDOWN: it will send (flag 2) or receive (flag 1) no more.
    pub(crate) fn guest_shuts_down(&mut self, flags: u32) {
        self.guest_ends |= flags & BOTH;
        if self.guest_ends & SHUTDOWN_RECEIVE != 0 {
            self.stop_reading();
            self.socket.shut_down(Shutdown::Read);
        }
        self.close_writing_if_due();
    }

    /// Handles the guest's end of the connection; its earlier data are still written.
    pub(crate) fn guest_closed(&mut self) {
        self.phase = Phase::Draining;
        self.pending = PendingPackets::default();
        self.stop_reading();
        self.close_writing_if_due();
    }

    fn stop_reading(&mut self) {
        self.read_done = true;
        self.prefix = Vec::new();
        self.prefix_sent = 0;
    }

    /// Shuts the host's socket down for writing once the guest has ended and all its data
    /// are written.
    fn close_writing_if_due(&mut self) {
        let due = self.guest_ends & SHUTDOWN_SEND != 0 || self.phase == Phase::Draining;
        if due && !self.has_backlog() && !self.write_closed {
            self.write_closed = true;
            self.socket.shut_down(Shutdown::Write);
            self.delivered();
        }
    }

    /// Records that no more data of the guest will reach the host.
    fn delivered(&mut self) {
        if let Some(member) = &mut self.member {
            member.delivered();
        }
    }

    /// Returns true if both directions have ended and all data are written.
    pub(crate) fn is_finished(&self) -> bool {
        let to_host =
            self.guest_ends & SHUTDOWN_SEND != 0 || self.sent_flags & SHUTDOWN_RECEIVE != 0;
        let to_guest =
            self.guest_ends & SHUTDOWN_RECEIVE != 0 || self.sent_flags & SHUTDOWN_SEND != 0;
        // The guest must confirm the host's end.
        let by_guest = self.guest_ends != 0 && to_host && to_guest;
        !self.has_backlog() && (by_guest || self.phase == Phase::Draining)
    }

    /// Returns the event that the connection awaits now.
    pub(crate) fn awaits(&self) -> Awaiting {
        match self.phase {
            Phase::Requested => Awaiting::Answer,
            Phase::Draining => Awaiting::Tail,
            Phase::Established if self.status_reply => Awaiting::Status,
            Phase::Established if self.guest_ends == BOTH => Awaiting::Tail,
            Phase::Established if self.sent_flags == BOTH => Awaiting::End,
            Phase::Established => Awaiting::Nothing,
        }
    }

    /// Returns true if data of the guest wait for the socket.
    pub(crate) fn has_backlog(&self) -> bool {
        if self.is_seqpacket() {
            // An incomplete message does not count.
            !self.messages.lens.is_empty()
        } else {
            !self.backlog.is_empty()
        }
    }

    /// Returns its chunks to the pool.
    pub(crate) fn release(&mut self, pool: &mut ChunkPool) {
        self.backlog.clear(pool);
    }
}
