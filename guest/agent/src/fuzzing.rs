//! Parts of the agent that process bytes from a host, for fuzz targets. Not a stable
//! interface.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::forward::Forwards;
use crate::reactor::{Class, Event, Reactor, Token};

/// Simulates the host of one forwarded connection, which sends `pieces` and then shuts
/// down its side. Returns the agent's answer.
///
/// # Panics
/// The system refuses descriptors.
#[must_use]
#[expect(
    clippy::expect_used,
    reason = "a fuzz target stops at what it cannot do"
)]
pub fn forward(pieces: &[&[u8]]) -> Vec<u8> {
    let mut reactor = Reactor::new().expect("an epoll set");
    let mut forwards = Forwards::default();
    let (mut host, ours) = UnixStream::pair().expect("a pair");
    ours.set_nonblocking(true).expect("a socket");
    forwards.accept(&reactor, ours.into());
    for piece in pieces {
        // The write fails once the agent has closed the connection.
        let _ = host.write_all(piece);
        serve(&mut reactor, &mut forwards);
    }
    let _ = host.shutdown(Shutdown::Write);
    serve(&mut reactor, &mut forwards);
    host.set_nonblocking(true).expect("a socket");
    let mut answer = Vec::new();
    // End of file, a reset because of unread data, or no more data.
    let _ = host.read_to_end(&mut answer);
    answer
}

/// Handles events until there are none.
#[expect(
    clippy::expect_used,
    reason = "a fuzz target stops at what it cannot do"
)]
fn serve(reactor: &mut Reactor, forwards: &mut Forwards) {
    let mut scratch = vec![0; 1 << 16];
    let mut busy = true;
    while busy {
        // The deadline ensures that the wait returns.
        let _wake = reactor.deadline(Instant::now(), Token::single(Class::Power, 0));
        reactor.wait().expect("events");
        busy = false;
        while let Some(event) = reactor.take_event() {
            match event {
                Event::Io(token, ready) => {
                    busy = true;
                    forwards.ready(reactor, token, ready, &mut scratch);
                }
                Event::Timer(token) if token.class == Class::Forward => {
                    busy = true;
                    forwards.deadline(reactor, token.key);
                }
                Event::Timer(_) => {}
            }
        }
    }
}
