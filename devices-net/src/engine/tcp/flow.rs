//! One TCP flow.

use std::io::IoSlice;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::Shutdown;
use sm_event_loop::{Registered, Registry, Timer};

use super::super::flow::{FlowKey, TokenKind, token};
use super::super::journal::Tally;
use super::super::link::GuestFrame;
use super::super::rate::Rates;
use super::super::socket;
use super::super::store::{ByteQueue, ChunkStore, Cursor};
use super::super::table::Keyed;
use super::control::Control;

/// Time until segments are sent again at first, and at most.
const RETRY: Duration = Duration::from_millis(200);
const MAX_RETRY: Duration = Duration::from_secs(3);
/// Time between probes of a guest that has ended its side: it may have forgotten the
/// connection, which Linux does after a minute, while the peer never ends its own.
const WATCH: Duration = Duration::from_secs(75);
/// Smallest window of a flow without a backlog.
const MIN_ROOM: u32 = 16 << 10;
/// Parts of the backlog that one call sends.
const SLICES: usize = 16;

/// State of a flow's host socket.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Host {
    pub(super) connected: bool,
    /// It may have bytes.
    pub(super) readable: bool,
    /// The peer has sent all, and some of it may be unread.
    pub(super) hangup: bool,
    /// The peer has sent urgent data, at which a read may end early.
    pub(super) urgent: bool,
    /// All bytes of the peer have been read.
    pub(super) ended: bool,
    /// The end of the guest's bytes has been passed on.
    pub(super) shut: bool,
    /// It cannot send any more.
    pub(super) failed: bool,
    /// It is one end of a pair, whose other end the engine's name server has.
    pub(super) internal: bool,
    /// A client of the host has begun the flow.
    pub(super) from_host: bool,
    /// No byte of the guest is sent before the flow has proven its name.
    pub(super) held: bool,
    /// The policy does not allow the flow any more.
    pub(super) prohibited: bool,
    /// It probes its peer.
    pub(super) keepalive: bool,
}

/// One TCP flow.
pub(super) struct TcpFlow {
    pub(super) key: FlowKey,
    pub(super) tally: Tally,
    pub(super) socket: Registered<OwnedFd>,
    pub(super) control: Control,
    pub(super) host: Host,
    /// Bytes of the peer that the guest has not acknowledged.
    pub(super) to_guest: ByteQueue,
    /// Position of the next of these to send.
    pub(super) sent: Cursor,
    /// Bytes of the guest that the host socket has not accepted.
    pub(super) to_host: ByteQueue,
    /// The guest has acknowledged the end of the peer's bytes.
    pub(super) end_acknowledged: bool,
    /// Number of acknowledgments that the guest gets.
    pub(super) acknowledgments: u8,
    /// The guest is asked whether it knows the connection.
    pub(super) ask: bool,
    /// Number of times that the first unacknowledged segment was sent again.
    pub(super) tries: u8,
    /// Time at which it is sent again.
    pub(super) deadline: Option<Instant>,
    /// A timer that is due at the deadline, or before it.
    pub(super) timer: Option<Timer>,
}

impl Keyed for TcpFlow {
    fn key(&self) -> &FlowKey {
        &self.key
    }
}

impl TcpFlow {
    pub(super) fn new(
        key: FlowKey,
        socket: Registered<OwnedFd>,
        control: Control,
        to_guest: ByteQueue,
        tally: Tally,
    ) -> Self {
        Self {
            key,
            tally,
            socket,
            control,
            host: Host::default(),
            sent: to_guest.start(),
            to_guest,
            to_host: ByteQueue::default(),
            end_acknowledged: false,
            acknowledgments: 0,
            ask: false,
            tries: 0,
            deadline: None,
            timer: None,
        }
    }

    /// Returns true if a FIN follows the stored bytes.
    pub(super) fn ends(&self) -> bool {
        self.host.ended && !self.end_acknowledged
    }

    /// Returns true if both sides have ended, and nothing is left to send.
    pub(super) fn is_over(&self) -> bool {
        self.host.shut && self.end_acknowledged && self.acknowledgments == 0
    }

    /// Returns true if only the peer can end the flow.
    pub(super) fn is_half_closed(&self) -> bool {
        self.host.shut && !self.host.ended && self.to_guest.is_empty()
    }

    /// Sets the time for sending again, unless it is set to an earlier one.
    pub(super) fn arm(&mut self, slot: u32, now: Instant, registry: &mut dyn Registry) {
        let wait = RETRY.saturating_mul(1 << self.tries.min(4)).min(MAX_RETRY);
        self.arm_at(slot, now + wait, registry);
    }

    /// Sets the time for a probe of a guest that has ended its side.
    pub(super) fn watch(&mut self, slot: u32, now: Instant, registry: &mut dyn Registry) {
        self.deadline = None;
        self.arm_at(slot, now + WATCH, registry);
    }

    /// Sets the deadline, unless it is earlier, and a timer that is due at or before it.
    pub(super) fn arm_at(&mut self, slot: u32, at: Instant, registry: &mut dyn Registry) {
        let at = self.deadline.map_or(at, |earlier| earlier.min(at));
        self.deadline = Some(at);
        // An earlier timer sets the next one when it is due: one for many segments.
        if let Some(timer) = self.timer {
            if timer.at() <= at {
                return;
            }
            registry.cancel_timer(timer);
        }
        self.timer = Some(registry.set_timer(at, token(TokenKind::TcpTimer, slot)));
    }

    /// Room for bytes of the guest. A host socket that has accepted all is expected to accept
    /// some more: it has a window also if the store is full.
    pub(super) fn room(&self, store: &ChunkStore, most: u32) -> u32 {
        let least = if self.to_host.is_empty() { MIN_ROOM } else { 0 };
        store.share(&self.to_host, most).max(least.min(most))
    }

    /// Sends `len` bytes of a frame to the host socket, and stores what it does not accept;
    /// returns the number of bytes that were sent or stored.
    pub(super) fn send_host(
        &mut self,
        store: &mut ChunkStore,
        (rates, now): (&mut Rates, Instant),
        frame: &dyn GuestFrame,
        (offset, len): (usize, u32),
    ) -> u32 {
        // Bytes for a socket that cannot send are of no use, and the guest gets a reset.
        if self.host.failed {
            return len;
        }
        let mut done = 0;
        while self.to_host.is_empty() && done < len && !self.host.held && rates.may_send(now) {
            let (at, rest) = (offset + done as usize, (len - done) as usize);
            match frame.send(at, rest, self.socket.as_fd()) {
                // A socket that takes nothing is one that is full: this must end.
                Ok(0) => break,
                // At most `rest`.
                Ok(sent) => {
                    rates.sent(sent as u64, now);
                    done += u32::try_from(sent).unwrap_or(0);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.host.failed = true;
                    return len;
                }
            }
        }
        done + (self.to_host).push(store, frame, offset + done as usize, len - done)
    }

    /// Sends the backlog as far as the host socket accepts it; returns true if it is empty.
    ///
    /// # Errors
    /// The socket cannot send any more.
    pub(super) fn flush_host(
        &mut self,
        store: &mut ChunkStore,
        (rates, now): (&mut Rates, Instant),
    ) -> Result<bool, Errno> {
        while !self.to_host.is_empty() && !self.host.held {
            if !rates.may_send(now) {
                return Ok(false);
            }
            let mut slices = [IoSlice::new(&[]); SLICES];
            let start = self.to_host.start();
            let (_, count, _) = self.to_host.slices(store, start, u32::MAX, &mut slices);
            match socket::send(self.socket.as_fd(), &slices[..count]) {
                Ok(sent) => {
                    rates.sent(sent as u64, now);
                    let sent = u32::try_from(sent).unwrap_or(u32::MAX);
                    self.to_host.consume(store, sent);
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Passes on the end of the guest's bytes, if it has come and they are sent.
    ///
    /// # Errors
    /// The connection of the host socket does not exist any more.
    pub(super) fn finish_host(&mut self) -> Result<(), Errno> {
        if self.control.guest_ended && self.to_host.is_empty() && !self.host.shut {
            rustix::net::shutdown(&*self.socket, Shutdown::Write)?;
            self.host.shut = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The aim is 384 bytes for an idle flow. This leaves 120 for its entries in the order of
    /// service, the index and the event loop.
    #[test]
    fn an_idle_flow_is_small() {
        let size = size_of::<Option<TcpFlow>>();
        assert!(size <= 264, "{size} bytes");
    }
}
