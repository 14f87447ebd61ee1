//! Control connections: one request at a time, answered in order.
//!
//! A request that takes time (attaching, freezing, powering off, waiting for a VM
//! generation ID) makes its connection *busy*: no further requests are read from it until
//! the answer is queued. Nor is one read while the host has not accepted the last answer
//! completely, so that at most one is in memory. Other connections are served meanwhile.

use std::io;
use std::os::fd::OwnedFd;

use sm_event_loop::Key;
use sm_guest_proto::PROTOCOL_VERSION;
use sm_guest_proto::control::{ControlReply, ControlRequest};
use sm_guest_proto::frame::FrameType;

use crate::reactor::{Class, Interest, Reactor, Readiness, Token};
use crate::wire::{Filled, Framed, may_read};

/// Parts of control tokens.
pub(crate) mod part {
    pub(crate) const SOCKET: u8 = 0;
    /// Deadline of a refresh that waits for the VM generation ID.
    pub(crate) const VMGENID: u8 = 1;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ControlPhase {
    /// The agent is connecting to the host.
    Connecting,
    /// Waiting for HELLO.
    Hello,
    /// Waiting for a request.
    Idle,
    /// A request is in progress.
    Busy,
    /// No further input is read; the connection is closed once its output is flushed.
    Closing,
}

/// Returns the maximum frame payload. The largest request is an ATTACH ROOT with its
/// hosts.
fn limit(kind: FrameType) -> usize {
    match kind {
        FrameType::Control => 1 << 20,
        // Other frames are always refused.
        _ => 4096,
    }
}

/// A control connection.
#[derive(Debug)]
pub(crate) struct Control {
    framed: Framed,
    phase: ControlPhase,
}

impl Control {
    /// Creates the state of a connection accepted from the host.
    pub(crate) fn accepted(socket: OwnedFd) -> Self {
        Self {
            framed: Framed::new(socket, limit),
            phase: ControlPhase::Hello,
        }
    }

    /// Creates the state of a connection that the agent is making.
    pub(crate) fn dialled(socket: OwnedFd) -> Self {
        Self {
            framed: Framed::new(socket, limit),
            phase: ControlPhase::Connecting,
        }
    }

    /// Handles readiness. Returns false if the connection is closed.
    pub(crate) fn ready(&mut self, ready: Readiness, scratch: &mut [u8]) -> bool {
        if self.phase == ControlPhase::Connecting {
            if !matches!(
                rustix::net::sockopt::socket_error(&self.framed.socket),
                Ok(Ok(()))
            ) {
                return false;
            }
            self.phase = ControlPhase::Hello;
        }
        if ready.writable {
            self.framed.flush();
        }
        if may_read(ready) {
            return self.framed.fill(scratch) != Filled::Closed;
        }
        true
    }

    /// Takes the next request, unless one is in progress or the last answer is not sent
    /// yet. Protocol errors are answered here.
    pub(crate) fn next_request(&mut self) -> Option<ControlRequest> {
        if !matches!(self.phase, ControlPhase::Hello | ControlPhase::Idle)
            || !self.framed.is_flushed()
        {
            return None;
        }
        let parsed = match self.framed.decoder.next_frame() {
            Ok(None) => return None,
            Err(error) => Err(error.to_string()),
            Ok(Some(frame)) if frame.kind != FrameType::Control => {
                Err("control: expected a CONTROL frame".to_owned())
            }
            Ok(Some(frame)) => serde_json::from_slice(frame.payload)
                .map_err(|error| format!("control: request not understood: {error}")),
        };
        let refusal = match (parsed, self.phase) {
            (Ok(ControlRequest::Hello(hello)), _) if hello.protocol != PROTOCOL_VERSION => format!(
                "this guest agent speaks control protocol {PROTOCOL_VERSION}, the host {}; \
                 make a new base snapshot with the host's own agent",
                hello.protocol
            ),
            (Ok(request), ControlPhase::Hello) if !matches!(request, ControlRequest::Hello(_)) => {
                "control: the first request must be hello".to_owned()
            }
            (Ok(request), _) => {
                self.phase = ControlPhase::Busy;
                return Some(request);
            }
            (Err(message), _) => message,
        };
        self.reply(&ControlReply::Error { message: refusal });
        self.phase = ControlPhase::Closing;
        None
    }

    /// Queues the answer to the last request.
    pub(crate) fn reply(&mut self, reply: &ControlReply) {
        if let Ok(json) = serde_json::to_vec(reply) {
            self.framed.send(FrameType::Control, &json);
        }
        self.phase = ControlPhase::Idle;
    }

    /// Updates the watched events. Returns false if the connection is to be closed.
    pub(crate) fn settle(&mut self, reactor: &Reactor, key: Key) -> bool {
        let flushed = self.framed.is_flushed();
        if self.framed.is_broken() || (self.phase == ControlPhase::Closing && flushed) {
            return false;
        }
        let mut want = match self.phase {
            ControlPhase::Connecting => Interest::WRITE,
            ControlPhase::Hello | ControlPhase::Idle if flushed => Interest::READ,
            ControlPhase::Hello | ControlPhase::Idle | ControlPhase::Busy => Interest::HANGUP,
            ControlPhase::Closing => Interest::NONE,
        };
        if !flushed {
            want = want.and(Interest::WRITE);
        }
        let token = Token::new(Class::Control, part::SOCKET, key);
        self.framed.socket.set(reactor, token, want).is_ok()
    }
}

/// Starts connecting to the host's control port, which signals that the guest is ready.
pub(crate) fn dial() -> io::Result<OwnedFd> {
    let socket = crate::sys::vsock_socket()?;
    crate::sys::vsock_connect(
        std::os::fd::AsFd::as_fd(&socket),
        sm_guest_proto::port::HOST_CID,
        sm_guest_proto::port::CONTROL,
    )?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use sm_guest_proto::exec::Hello;
    use sm_guest_proto::frame::{FrameDecoder, encode};

    use crate::reactor::Event;

    /// Answers requests until there is none to be taken.
    fn serve(control: &mut Control, reply: &ControlReply) -> usize {
        let requests = std::iter::from_fn(|| {
            control.next_request()?;
            control.reply(reply);
            Some(())
        });
        requests.count()
    }

    #[test]
    fn a_host_that_does_not_read_is_not_answered_any_more() {
        const REQUESTS: usize = 50;
        let mut reactor = Reactor::new().unwrap();
        let key = Key::new(0, 0);
        let mut scratch = vec![0; 1 << 16];
        let (mut host, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut control = Control::accepted(ours.into());
        let hello = ControlRequest::Hello(Hello {
            protocol: PROTOCOL_VERSION,
        });
        let json = serde_json::to_vec(&hello).unwrap();
        let mut bytes = Vec::new();
        for _ in 0..REQUESTS {
            encode(FrameType::Control, &json, &mut bytes).unwrap();
        }
        host.write_all(&bytes).unwrap();
        // Several of these fill the socket's buffer.
        let reply = ControlReply::Error {
            message: "x".repeat(50_000),
        };
        assert!(control.settle(&reactor, key));
        assert!(matches!(reactor.events()[..], [Event::Io(_, ready)]
            if control.ready(ready, &mut scratch)));
        let mut answered = serve(&mut control, &reply);
        assert!(answered < REQUESTS, "all answers are in memory");
        // More requests do not wake the agent either.
        host.write_all(&bytes).unwrap();
        assert!(control.settle(&reactor, key));
        let _wake = reactor.deadline(Instant::now(), Token::single(Class::Power, 0));
        assert!(matches!(reactor.events()[..], [Event::Timer(_)]));

        let reader = std::thread::spawn(move || {
            let mut decoder = FrameDecoder::new();
            let mut chunk = vec![0; 1 << 16];
            let mut seen = 0;
            while seen < 2 * REQUESTS {
                let count = host.read(&mut chunk).unwrap();
                assert!(count > 0, "the connection ended");
                decoder.push(&chunk[..count]);
                while decoder.next_frame().unwrap().is_some() {
                    seen += 1;
                }
            }
            host
        });
        while answered < 2 * REQUESTS || !control.framed.is_flushed() {
            for event in reactor.events() {
                if let Event::Io(_, ready) = event {
                    assert!(control.ready(ready, &mut scratch));
                }
                answered += serve(&mut control, &reply);
                assert!(control.settle(&reactor, key));
            }
        }
        // The connection still notices its end.
        drop(reader.join().unwrap());
        let events = reactor.events();
        assert!(matches!(events[..], [Event::Io(_, ready)]
            if !control.ready(ready, &mut scratch)));
    }
}
