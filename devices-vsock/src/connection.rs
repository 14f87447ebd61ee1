//! One connection: how far it is, and what it has to tell the guest.
//!
//! What the guest sends goes straight to the host's socket; what that does not
//! take is kept in `backlog`, within the window that the guest was granted
//! (`credit.rs`). What the host sends is read straight into the guest's buffers.
//! `transfer.rs` moves the bytes.
//!
//! Each direction ends by itself. The host's end of file is told to the guest as
//! SHUTDOWN (no more is sent) after the data before it. A host that takes no more
//! is told as SHUTDOWN (no more is received), and what the guest still sends is
//! dropped, while what the host had sent still arrives. The guest's SHUTDOWN is
//! passed on after the data before it. When both directions are over, a reset
//! ends the connection.

mod transfer;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::net::Shutdown;
use sm_event_loop::{Registered, Timer};

pub(crate) use transfer::{Filled, MAX_MESSAGE};

use crate::backlog::{Backlog, Pool};
use crate::credit::{Incoming, Outgoing};
use crate::group::Member;
use crate::handle::{ConnectError, ConnectRequest, Report, SocketKind};
use crate::host::HostSocket;
use crate::packet::{Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_SEQPACKET, TYPE_STREAM};

/// Guest port and host port.
pub(crate) type Key = (u32, u32);

const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// We asked the guest, or are about to, and wait for its answer.
    Requested,
    /// Bytes flow.
    Established,
    /// The guest has forgotten it; only the backlog remains to be written.
    Draining,
}

/// What a connection cannot wait for without end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaiting {
    /// The guest's answer to a request.
    Answer,
    /// The status that follows the answer.
    Status,
    /// The guest's confirmation of the end.
    End,
    /// A host socket that takes the tail of what the guest sent.
    Tail,
    /// Nothing: it may last.
    Nothing,
}

/// What is owed to the guest, besides data.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Owed {
    pub(crate) request: bool,
    pub(crate) response: bool,
    pub(crate) credit: bool,
    /// SHUTDOWN flags.
    ends: u32,
}

/// Messages of the guest that are complete, and one that is not.
#[derive(Debug, Default)]
struct Messages {
    lens: VecDeque<u32>,
    partial: u32,
}

pub(crate) struct Connection {
    pub(crate) key: Key,
    pub(crate) socket: Registered<HostSocket>,
    /// The event loop tells when the socket takes bytes again.
    pub(crate) watches_writing: bool,
    pub(crate) phase: Phase,
    pub(crate) owed: Owed,
    /// The socket may have bytes to read.
    pub(crate) readable: bool,
    /// The host has said that it sends no more; its last bytes may be unread.
    pub(crate) hung_up: bool,
    /// Reading has ended, by the peer or by the guest.
    read_done: bool,
    /// The host takes no more.
    refuses: bool,
    /// The host was told that the guest sends no more.
    write_closed: bool,
    /// SHUTDOWN flags that the guest was told, and that it told us.
    told: u32,
    guest_ends: u32,
    /// Receive buffers that the next read is given.
    pub(crate) run: usize,
    pub(crate) outgoing: Outgoing<u32>,
    pub(crate) incoming: Incoming<u32>,
    /// Bytes for the guest that come before those of the socket: the preamble, or
    /// the rest of a message.
    before: Vec<u8>,
    before_sent: usize,
    backlog: Backlog,
    messages: Messages,
    /// The system lacked memory: what was not moved has to be tried again.
    pub(crate) short_of_memory: bool,
    /// When that will be.
    pub(crate) retry: Option<Timer>,
    /// Bytes of the backlog were taken since this was looked at last.
    pub(crate) progressed: bool,
    /// The guest's next byte is a status.
    pub(crate) status_reply: bool,
    /// The time beyond the usual that the guest may take for it.
    pub(crate) status_wait: Duration,
    report: Report,
    pub(crate) member: Option<Member>,
    /// When it was asked for, if that is measured.
    pub(crate) asked: Option<Instant>,
    /// When the guest gave what is in the backlog, if that is measured.
    pub(crate) kept_since: Option<Instant>,
    pub(crate) awaiting: Awaiting,
    /// The end of that.
    pub(crate) deadline: Option<Timer>,
}

impl Connection {
    pub(crate) fn new(key: Key, socket: Registered<HostSocket>, phase: Phase, window: u32) -> Self {
        Self {
            key,
            socket,
            watches_writing: false,
            phase,
            owed: Owed::default(),
            readable: true,
            hung_up: false,
            read_done: false,
            refuses: false,
            write_closed: false,
            told: 0,
            guest_ends: 0,
            run: 1,
            outgoing: Outgoing::default(),
            incoming: Incoming::new(window),
            before: Vec::new(),
            before_sent: 0,
            backlog: Backlog::default(),
            messages: Messages::default(),
            short_of_memory: false,
            retry: None,
            progressed: false,
            status_reply: false,
            status_wait: Duration::ZERO,
            report: Report::nobody(),
            member: None,
            asked: None,
            kept_since: None,
            awaiting: Awaiting::Nothing,
            deadline: None,
        }
    }

    /// What the host asked for with the connection.
    pub(crate) fn with_request(mut self, request: ConnectRequest) -> Self {
        self.owed.request = true;
        self.before = request.preamble;
        self.status_reply = request.status_reply;
        self.status_wait = request.wait;
        self.report = request.report;
        self.member = request.member;
        self.asked = request.asked;
        self
    }

    pub(crate) fn keeps_messages_apart(&self) -> bool {
        self.socket.kind == SocketKind::SeqPacket
    }

    /// The socket type in its packets.
    pub(crate) fn socket_type(&self) -> u16 {
        match self.socket.kind {
            SocketKind::Stream => TYPE_STREAM,
            SocketKind::SeqPacket => TYPE_SEQPACKET,
        }
    }

    /// Tells whoever asked for the connection how that ended; once.
    pub(crate) fn report(&mut self, result: Result<(), ConnectError>) {
        self.report.tell(result.map(|()| self.key.1));
    }

    /// Window and counter for the next packet to the guest.
    pub(crate) fn announce(&mut self) -> (u32, u32) {
        self.owed.credit = false;
        self.incoming.announce()
    }

    /// The next thing other than data that the guest must be told.
    pub(crate) fn next_owed(&mut self) -> Option<(Operation, u32)> {
        if self.phase == Phase::Draining {
            return None;
        }
        if std::mem::take(&mut self.owed.request) {
            return Some((Operation::Request, 0));
        }
        if self.phase == Phase::Requested {
            return None;
        }
        if std::mem::take(&mut self.owed.response) {
            return Some((Operation::Response, 0));
        }
        let due = self.due_ends();
        if due != 0 {
            self.told |= due;
            self.owed.ends &= !due;
            return Some((Operation::Shutdown, self.told));
        }
        std::mem::take(&mut self.owed.credit).then_some((Operation::CreditUpdate, 0))
    }

    /// The ends that can be told. That of what the host sends comes after what it
    /// has sent.
    fn due_ends(&self) -> u32 {
        let due = self.owed.ends & !self.told;
        if self.has_data_to_send() {
            due & SHUTDOWN_RECEIVE
        } else {
            due
        }
    }

    fn has_data_to_send(&self) -> bool {
        self.before_sent < self.before.len() || self.readable && !self.read_done
    }

    /// Whether there is anything that a receive buffer could be used for now.
    pub(crate) fn wants_buffer(&self) -> bool {
        match self.phase {
            Phase::Requested => self.owed.request,
            Phase::Established => {
                self.owed.response
                    || self.owed.credit
                    || self.due_ends() != 0
                    || self.has_data_to_send() && self.outgoing.available() > 0
            }
            Phase::Draining => false,
        }
    }

    /// After the end of what the host sends: a peer that is gone altogether, rather
    /// than done with sending, will not read either, and the guest is told both.
    pub(crate) fn notice_hang_up(&mut self) {
        if self.read_done && !self.refuses && self.socket.is_gone() {
            self.owed.ends |= BOTH;
        }
    }

    /// The host's end was closed before there was a connection, and there is
    /// nothing that it would have sent.
    pub(crate) fn is_given_up(&self) -> bool {
        self.phase == Phase::Requested && self.socket.is_gone() && !self.socket.has_bytes()
    }

    /// The guest will send (flag 2) or receive (flag 1) no more.
    pub(crate) fn guest_shuts_down(&mut self, flags: u32) {
        self.guest_ends |= flags & BOTH;
        if self.guest_ends & SHUTDOWN_RECEIVE != 0 {
            self.stop_reading();
            self.socket.shut_down(Shutdown::Read);
        }
        self.close_writing_if_due();
    }

    /// The guest has forgotten the connection; what it had sent is still written.
    pub(crate) fn guest_forgets(&mut self) {
        self.phase = Phase::Draining;
        self.owed = Owed::default();
        self.stop_reading();
        self.close_writing_if_due();
    }

    fn stop_reading(&mut self) {
        self.read_done = true;
        self.before = Vec::new();
        self.before_sent = 0;
    }

    /// Passes the guest's end of file on once everything before it is written.
    fn close_writing_if_due(&mut self) {
        let due = self.guest_ends & SHUTDOWN_SEND != 0 || self.phase == Phase::Draining;
        if due && !self.has_backlog() && !self.write_closed {
            self.write_closed = true;
            self.socket.shut_down(Shutdown::Write);
            self.delivered();
        }
    }

    /// Nothing of what the guest says will reach the host any more.
    fn delivered(&mut self) {
        if let Some(member) = &mut self.member {
            member.delivered();
        }
    }

    /// Whether both directions are over and all is written.
    pub(crate) fn is_finished(&self) -> bool {
        let to_host = self.guest_ends & SHUTDOWN_SEND != 0 || self.told & SHUTDOWN_RECEIVE != 0;
        let to_guest = self.guest_ends & SHUTDOWN_RECEIVE != 0 || self.told & SHUTDOWN_SEND != 0;
        // That the host is gone is for the guest to confirm.
        let by_guest = self.guest_ends != 0 && to_host && to_guest;
        !self.has_backlog() && (by_guest || self.phase == Phase::Draining)
    }

    /// What it waits for now.
    pub(crate) fn awaits(&self) -> Awaiting {
        match self.phase {
            Phase::Requested => Awaiting::Answer,
            Phase::Draining => Awaiting::Tail,
            Phase::Established if self.status_reply => Awaiting::Status,
            Phase::Established if self.guest_ends == BOTH => Awaiting::Tail,
            Phase::Established if self.told == BOTH => Awaiting::End,
            Phase::Established => Awaiting::Nothing,
        }
    }

    /// Bytes of the guest wait for the socket.
    pub(crate) fn has_backlog(&self) -> bool {
        if self.keeps_messages_apart() {
            // What is left of a message that never ended is nothing.
            !self.messages.lens.is_empty()
        } else {
            !self.backlog.is_empty()
        }
    }

    /// Gives back what it holds of the pool.
    pub(crate) fn release(&mut self, pool: &mut Pool) {
        self.backlog.clear(pool);
    }
}
