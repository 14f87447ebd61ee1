//! Forwarding of bytes between host connections and TCP ports of the guest.
//!
//! All connections share the agent's event loop. Each uses two sockets and, only while
//! one side is slow, at most one chunk of buffer per direction.

mod connection;
mod listening;

use std::os::fd::OwnedFd;

use sm_event_loop::{Key, Slab};

use crate::reactor::{Reactor, Readiness, Token};
use connection::Connection;

/// All forwarded connections.
#[derive(Debug, Default)]
pub(crate) struct Forwards {
    connections: Slab<Connection>,
}

impl Forwards {
    /// Adds a new connection of the host.
    pub(crate) fn accept(&mut self, reactor: &Reactor, host: OwnedFd) {
        let key = self.connections.insert(Connection::new(host));
        self.settle(reactor, key);
    }

    /// Handles readiness of a socket. Returns true if its connection has ended.
    pub(crate) fn ready(
        &mut self,
        reactor: &Reactor,
        token: Token,
        ready: Readiness,
        scratch: &mut [u8],
    ) -> bool {
        if let Some(connection) = self.connections.get_mut(token.key) {
            connection.ready(reactor, token.key, token.part, ready, scratch);
        }
        self.settle(reactor, token.key)
    }

    /// Starts another attempt to connect. Returns true if the connection has ended.
    pub(crate) fn deadline(&mut self, reactor: &Reactor, key: Key) -> bool {
        if let Some(connection) = self.connections.get_mut(key) {
            connection.retry(reactor, key);
        }
        self.settle(reactor, key)
    }

    fn settle(&mut self, reactor: &Reactor, key: Key) -> bool {
        if let Some(connection) = self.connections.get_mut(key)
            && !connection.settle(reactor, key)
            && let Some(connection) = self.connections.remove(key)
        {
            connection.close();
            return true;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, TcpListener};
    use std::os::unix::net::UnixStream;

    use sm_guest_proto::forward::{ForwardHeader, ForwardStatus};

    use super::*;
    use crate::reactor::{Class, Event, refusal};
    use crate::sending::shortage;

    /// Handles events until the connection is over.
    fn serve(reactor: &mut Reactor, forwards: &mut Forwards, mut each: impl FnMut()) {
        let mut scratch = vec![0; 1 << 16];
        loop {
            each();
            for event in reactor.events() {
                let closed = match event {
                    Event::Io(token, ready) => forwards.ready(reactor, token, ready, &mut scratch),
                    Event::Timer(token) if token.class == Class::Forward => {
                        forwards.deadline(reactor, token.key)
                    }
                    Event::Timer(_) => panic!("nobody asked for this"),
                };
                if closed {
                    return;
                }
            }
        }
    }

    #[test]
    fn a_shortage_of_memory_loses_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mut host, agents) = UnixStream::pair().unwrap();
        let header = ForwardHeader { port, wait_ms: 0 }.encode();
        host.write_all(&header).unwrap();

        // Data is sent in both directions.
        let sent: Vec<u8> = (0..500_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        let outcome = std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let (mut tcp, _) = listener.accept().unwrap();
                let mut got = Vec::new();
                tcp.read_to_end(&mut got).unwrap();
                tcp.write_all(&got).unwrap();
                got
            });
            let client = scope.spawn(|| {
                host.write_all(&sent).unwrap();
                host.shutdown(Shutdown::Write).unwrap();
                let mut got = Vec::new();
                host.read_to_end(&mut got).unwrap();
                got
            });
            let mut reactor = Reactor::new().unwrap();
            let mut forwards = Forwards::default();
            forwards.accept(&reactor, agents.into());
            // Every send of the loop's first turns fails, large or small.
            let mut turns = 0;
            serve(&mut reactor, &mut forwards, || {
                turns += 1;
                if turns % 2 == 0 && turns < 20 {
                    shortage::begin(5);
                }
            });
            (server.join().unwrap(), client.join().unwrap())
        });
        assert!(outcome.0 == sent);
        assert_eq!(outcome.1.first(), Some(&(ForwardStatus::Connected as u8)));
        assert!(outcome.1[1..] == sent);
    }

    #[test]
    fn a_connection_that_cannot_be_watched_is_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mut host, agents) = UnixStream::pair().unwrap();
        let header = ForwardHeader { port, wait_ms: 0 }.encode();
        host.write_all(&header).unwrap();
        let mut reactor = Reactor::new().unwrap();
        let mut forwards = Forwards::default();
        forwards.accept(&reactor, agents.into());
        // Refused once the connection to the server exists.
        serve(&mut reactor, &mut forwards, || refusal::begin(2));
        refusal::begin(0);
        let (mut tcp, _) = listener.accept().unwrap();
        // An end of file would look as if the host had sent everything.
        let error = tcp.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn a_shortage_of_memory_loses_no_status() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let listening = listener.local_addr().unwrap().port();
        let unused = TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = unused.local_addr().unwrap().port();
        drop(unused);
        for (port, expected) in [
            (listening, ForwardStatus::Connected),
            (silent, ForwardStatus::NoListener),
        ] {
            let (mut host, agents) = UnixStream::pair().unwrap();
            let header = ForwardHeader { port, wait_ms: 0 }.encode();
            host.write_all(&header).unwrap();
            host.shutdown(Shutdown::Write).unwrap();
            let client = std::thread::spawn(move || {
                let mut got = Vec::new();
                host.read_to_end(&mut got).unwrap();
                got
            });
            let server = (port == listening).then(|| listener.try_clone().unwrap());
            let server = server.map(|listener| {
                // Its end ends the connection.
                std::thread::spawn(move || drop(listener.accept().unwrap()))
            });
            let mut reactor = Reactor::new().unwrap();
            let mut forwards = Forwards::default();
            forwards.accept(&reactor, agents.into());
            let mut turns = 0;
            serve(&mut reactor, &mut forwards, || {
                turns += 1;
                if turns < 5 {
                    shortage::begin(1);
                }
            });
            shortage::begin(0);
            assert_eq!(client.join().unwrap(), [expected as u8]);
            if let Some(server) = server {
                server.join().unwrap();
            }
        }
    }
}
