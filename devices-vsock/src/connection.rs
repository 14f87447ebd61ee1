//! One connection: its state, its credit in both directions, what is kept of
//! its bytes, and what it has to tell the guest.
//!
//! A primer. Each side grants the other a window (`buf_alloc`) and says how many
//! bytes it has passed on so far (`fwd_cnt`, modulo 2^32); every packet carries
//! both. A sender may have `buf_alloc - (sent - fwd_cnt)` more bytes on the way.
//! What the guest sends goes straight to the host's socket; what that does not
//! take is kept in `backlog`, which therefore never exceeds our window.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};
use sm_vmm_core::GuestMemory;
use sm_vmm_core::event_loop::Registration;
use sm_vmm_core::virtio::iov;
use sm_vmm_core::virtio::queue::Span;
use vm_memory::Bytes as _;

use crate::group::Member;
use crate::handle::{ConnectError, ConnectOptions, OnResult};
use crate::packet::{Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// We asked the guest and wait for its answer.
    Requested,
    /// Bytes flow.
    Established,
    /// The guest is done with it; only the backlog remains to be written.
    Draining,
}

/// What is owed to the guest, besides data.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Owed {
    pub(crate) request: bool,
    pub(crate) response: bool,
    pub(crate) reset: bool,
    pub(crate) credit: bool,
    /// SHUTDOWN flags not yet told.
    pub(crate) shutdown: u32,
}

pub(crate) struct Connection {
    pub(crate) guest_port: u32,
    pub(crate) host_port: u32,
    pub(crate) stream: OwnedFd,
    pub(crate) registration: Option<Registration>,
    pub(crate) phase: Phase,
    pub(crate) owed: Owed,
    /// Queued for the guest's attention.
    pub(crate) queued: bool,
    /// The socket may have bytes to read.
    pub(crate) readable: bool,
    /// Reading has ended, by the peer or by the guest.
    pub(crate) read_done: bool,
    /// When the guest was asked for it, if that is measured.
    pub(crate) asked: Option<Instant>,
    /// SHUTDOWN flags that the guest was told.
    told: u32,
    /// SHUTDOWN flags that the guest told us.
    pub(crate) guest_shutdown: u32,
    host_write_closed: bool,
    /// Receive buffers to be filled by the next read: more while reads fill all.
    pub(crate) run: usize,
    preamble: Vec<u8>,
    preamble_sent: usize,
    pub(crate) status_reply: bool,
    on_result: Option<OnResult>,
    pub(crate) member: Option<Member>,
    window: u32,
    backlog: VecDeque<u8>,
    /// Bytes passed on to the socket, modulo 2^32.
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    forwarded_told: u32,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    guest_window: u32,
    guest_forwarded: u32,
}

impl Connection {
    pub(crate) fn new(
        guest_port: u32,
        host_port: u32,
        stream: OwnedFd,
        phase: Phase,
        window: u32,
    ) -> Self {
        Self {
            guest_port,
            host_port,
            stream,
            registration: None,
            phase,
            owed: Owed::default(),
            queued: false,
            readable: true,
            read_done: false,
            asked: None,
            told: 0,
            guest_shutdown: 0,
            host_write_closed: false,
            run: 1,
            preamble: Vec::new(),
            preamble_sent: 0,
            status_reply: false,
            on_result: None,
            member: None,
            window,
            backlog: VecDeque::new(),
            forwarded: 0,
            forwarded_told: 0,
            sent: 0,
            guest_window: 0,
            guest_forwarded: 0,
        }
    }

    pub(crate) fn with_options(mut self, options: ConnectOptions) -> Self {
        self.preamble = options.preamble;
        self.status_reply = options.status_reply;
        self.on_result = options.on_result;
        self.member = options.member;
        self
    }

    /// Tells whoever asked for the connection how that ended; once.
    pub(crate) fn report(&mut self, result: Result<(), ConnectError>) {
        if let Some(tell) = self.on_result.take() {
            tell(result.map(|()| self.host_port));
        }
    }

    /// Takes the guest's window from a packet.
    pub(crate) fn update_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_window = buf_alloc;
        self.guest_forwarded = fwd_cnt;
    }

    /// Bytes that may be sent to the guest now. A guest that claims to have
    /// passed on more than it got has no credit.
    pub(crate) fn credit(&self) -> u32 {
        let on_the_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_window.saturating_sub(on_the_way)
    }

    /// Window and counter for the next packet to the guest.
    pub(crate) fn announce(&mut self) -> (u32, u32) {
        self.forwarded_told = self.forwarded;
        self.owed.credit = false;
        (self.window, self.forwarded)
    }

    /// The next thing other than data that the guest must be told.
    pub(crate) fn next_owed(&mut self) -> Option<(Operation, u32)> {
        let owed = &mut self.owed;
        if std::mem::take(&mut owed.reset) {
            return Some((Operation::Reset, 0));
        }
        if std::mem::take(&mut owed.request) {
            return Some((Operation::Request, 0));
        }
        if std::mem::take(&mut owed.response) {
            return Some((Operation::Response, 0));
        }
        // An end is told after the data before it.
        if self.owed.shutdown & !self.told != 0 && !self.has_data_to_send() {
            self.told |= std::mem::take(&mut self.owed.shutdown);
            return Some((Operation::Shutdown, self.told));
        }
        if std::mem::take(&mut self.owed.credit) {
            return Some((Operation::CreditUpdate, 0));
        }
        None
    }

    fn has_data_to_send(&self) -> bool {
        self.preamble_sent < self.preamble.len() || self.readable && !self.read_done
    }

    /// Whether there is anything that a receive buffer could be used for now.
    pub(crate) fn wants_buffer(&self) -> bool {
        let owed = &self.owed;
        owed.reset
            || owed.request
            || owed.response
            || owed.credit
            || owed.shutdown & !self.told != 0 && !self.has_data_to_send()
            || self.phase == Phase::Established && self.has_data_to_send() && self.credit() > 0
    }

    /// Fills `spans` with data for the guest; 0 when there is none now.
    pub(crate) fn fill(&mut self, memory: &GuestMemory, spans: &[Span]) -> u32 {
        if self.phase != Phase::Established {
            return 0;
        }
        let filled = if self.preamble_sent < self.preamble.len() {
            self.fill_from_preamble(memory, spans)
        } else if self.readable && !self.read_done {
            self.fill_from_stream(memory, spans)
        } else {
            0
        };
        self.sent = self.sent.wrapping_add(filled);
        filled
    }

    fn fill_from_preamble(&mut self, memory: &GuestMemory, spans: &[Span]) -> u32 {
        let mut filled = 0;
        for span in spans {
            let rest = &self.preamble[self.preamble_sent..];
            let len = rest.len().min(span.len as usize);
            if memory.write_slice(&rest[..len], span.address).is_err() {
                break;
            }
            self.preamble_sent += len;
            filled += u32::try_from(len).unwrap_or(0);
        }
        if self.preamble_sent >= self.preamble.len() {
            self.preamble = Vec::new();
            self.preamble_sent = 0;
        }
        filled
    }

    fn fill_from_stream(&mut self, memory: &GuestMemory, spans: &[Span]) -> u32 {
        loop {
            match iov::readv(memory, spans, self.stream.as_fd()) {
                Ok(0) => {
                    self.read_done = true;
                    self.owed.shutdown |= SHUTDOWN_SEND;
                    self.notice_hang_up();
                    return 0;
                }
                // Not more than the spans hold, which is below a u32.
                Ok(len) => return u32::try_from(len).unwrap_or(0),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return 0;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // The peer is gone for good (ECONNRESET and the like).
                    self.read_done = true;
                    self.owed.shutdown |= SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
                    return 0;
                }
            }
        }
    }

    /// After the end of what the host sends: a peer that is gone altogether, rather
    /// than done with sending, will not read either, and the guest is told both.
    /// (A TCP peer cannot be told from one that is done until it answers by RST.)
    pub(crate) fn notice_hang_up(&mut self) {
        let mut polled = [PollFd::new(&self.stream, PollFlags::empty())];
        let polling = poll(&mut polled, Some(&Timespec::default()));
        let gone = |fd: &PollFd<'_>| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR);
        if self.read_done && polling.is_ok() && polled.iter().any(gone) {
            self.owed.shutdown |= SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
        }
    }

    /// Passes data from the guest on. `false` when the guest sent more than it
    /// was granted, or the socket can take nothing any more.
    pub(crate) fn take(&mut self, memory: &GuestMemory, spans: &mut Vec<Span>) -> bool {
        if self.host_write_closed {
            return false;
        }
        while self.backlog.is_empty() && !spans.is_empty() {
            match iov::send(memory, spans, self.stream.as_fd()) {
                Ok(written) => {
                    iov::advance(spans, written);
                    self.count_forwarded(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        for span in spans.iter() {
            let start = self.backlog.len();
            let len = span.len as usize;
            if start + len > self.window as usize {
                return false;
            }
            self.backlog.resize(start + len, 0);
            let place = &mut self.backlog.make_contiguous()[start..];
            if memory.read_slice(place, span.address).is_err() {
                return false;
            }
        }
        true
    }

    /// Writes what is kept, as far as the socket takes it. `false` when it can
    /// take nothing any more.
    pub(crate) fn flush(&mut self) -> bool {
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            match rustix::io::write(&self.stream, front) {
                Ok(written) => {
                    self.backlog.drain(..written);
                    self.count_forwarded(written);
                }
                Err(rustix::io::Errno::AGAIN) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        // An idle connection keeps no buffer.
        if self.backlog.capacity() > 0 {
            self.backlog = VecDeque::new();
        }
        self.close_writing_if_due();
        true
    }

    /// The status byte was consumed here rather than by the socket.
    pub(crate) fn count_status(&mut self) {
        self.count_forwarded(1);
    }

    fn count_forwarded(&mut self, len: usize) {
        // At most what one packet or the window holds.
        let len = u32::try_from(len).unwrap_or(0);
        self.forwarded = self.forwarded.wrapping_add(len);
        let untold = self.forwarded.wrapping_sub(self.forwarded_told);
        if untold >= self.window / 4 {
            self.owed.credit = true;
        }
    }

    /// The guest will send (flag 2) or receive (flag 1) no more.
    pub(crate) fn guest_shuts_down(&mut self, flags: u32) {
        self.guest_shutdown |= flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.read_done = true;
            let _ = shutdown(&self.stream, Shutdown::Read);
        }
        self.close_writing_if_due();
    }

    /// Passes the guest's end of file on once everything before it is written.
    fn close_writing_if_due(&mut self) {
        let due = self.guest_shutdown & SHUTDOWN_SEND != 0 || self.phase == Phase::Draining;
        if due && self.backlog.is_empty() && !self.host_write_closed {
            self.host_write_closed = true;
            // Fails when the peer is gone, which is as good.
            let _ = shutdown(&self.stream, Shutdown::Write);
            if let Some(member) = &mut self.member {
                member.delivered();
            }
        }
    }

    /// Whether both sides have said that they are done and all is written.
    pub(crate) fn is_finished(&self) -> bool {
        let both = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        let guest_done = self.guest_shutdown == both
            || self.guest_shutdown & SHUTDOWN_SEND != 0 && self.told & SHUTDOWN_SEND != 0;
        self.backlog.is_empty() && (guest_done || self.phase == Phase::Draining)
    }

    /// Bytes kept.
    pub(crate) fn backlog_len(&self) -> usize {
        self.backlog.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn connection() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (
            Connection::new(1, 2, ours.into(), Phase::Established, 1000),
            theirs,
        )
    }

    #[test]
    fn credit_is_right_across_every_wrap_around() {
        let (mut connection, _peer) = connection();
        for start in [0, 1, u32::MAX - 2, u32::MAX - 1, u32::MAX, 1 << 31] {
            for window in 0..4u32 {
                for on_the_way in 0..6u32 {
                    connection.sent = start.wrapping_add(on_the_way);
                    connection.update_credit(window, start);
                    let expected = window.saturating_sub(on_the_way);
                    assert_eq!(
                        connection.credit(),
                        expected,
                        "{start} {window} {on_the_way}"
                    );
                }
            }
        }
        // More passed on than was sent: a lie.
        connection.sent = 10;
        connection.update_credit(1000, 11);
        assert_eq!(connection.credit(), 0);
    }

    #[test]
    fn a_guest_is_told_of_credit_before_a_quarter_more_is_used() {
        let (mut connection, _peer) = connection();
        connection.count_forwarded(249);
        assert!(!connection.owed.credit);
        connection.count_forwarded(1);
        assert!(connection.owed.credit);
        assert_eq!(connection.announce(), (1000, 250));
        assert!(!connection.owed.credit);
    }
}
