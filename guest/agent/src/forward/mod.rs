//! Port forward: bytes between host connections and TCP ports of the guest.
//!
//! All connections share the agent's loop; each costs two sockets and, only
//! while one side is slow, at most one chunk of buffer per direction.

mod connection;
mod listening;

use std::os::fd::OwnedFd;

use crate::reactor::{Reactor, Ready, Token};
use crate::slab::{Key, Slab};
use connection::Connection;

/// Every forwarded connection.
#[derive(Debug, Default)]
pub(crate) struct Forwards {
    connections: Slab<Connection>,
}

impl Forwards {
    /// Takes a new connection of the host.
    pub(crate) fn accept(&mut self, reactor: &mut Reactor, host: OwnedFd) {
        let key = self.connections.insert(Connection::new(host));
        self.settle(reactor, key);
    }

    /// A socket is ready. Returns whether its connection is over.
    pub(crate) fn ready(
        &mut self,
        reactor: &mut Reactor,
        token: Token,
        ready: Ready,
        scratch: &mut [u8],
    ) -> bool {
        if let Some(connection) = self.connections.get_mut(token.key) {
            connection.ready(reactor, token.key, token.part, ready, scratch);
        }
        self.settle(reactor, token.key)
    }

    /// Time for another attempt to connect. Returns whether the connection is over.
    pub(crate) fn deadline(&mut self, reactor: &mut Reactor, key: Key) -> bool {
        if let Some(connection) = self.connections.get_mut(key) {
            connection.retry(reactor, key);
        }
        self.settle(reactor, key)
    }

    fn settle(&mut self, reactor: &mut Reactor, key: Key) -> bool {
        if let Some(connection) = self.connections.get_mut(key)
            && !connection.settle(reactor, key)
            && let Some(connection) = self.connections.remove(key)
        {
            connection.close(reactor);
            return true;
        }
        false
    }
}
