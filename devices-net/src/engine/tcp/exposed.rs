//! Connections of clients of the host to the guest.

use std::os::fd::OwnedFd;

use super::super::egress::FlowProtocol;
use super::super::flow::{FlowKey, TokenKind, token};
use super::super::output::largest_segment;
use super::super::turn::Turn;
use super::control::Control;
use super::flow::TcpFlow;
use super::{INTEREST, TcpFlows};

impl TcpFlows {
    /// Returns true if there is a flow with this key.
    pub(crate) fn has(&self, key: &FlowKey) -> bool {
        self.table.find(key).is_some()
    }

    /// Begins the flow of a client that the host has accepted; its key is none of another flow. At
    /// a limit the client is disconnected.
    pub(crate) fn accept_host(&mut self, turn: &mut Turn<'_>, key: FlowKey, socket: OwnedFd) {
        if self.table.len() >= self.limits.tcp_flows {
            return turn.limited("TCP connections", &key);
        }
        let token = token(TokenKind::Tcp, self.table.next_slot());
        let Ok(socket) = turn.registry.add(socket, token, INTEREST) else {
            return turn.limited("descriptors for connections", &key);
        };
        let Some(to_guest) = self.store.reserve() else {
            drop(turn.registry.remove(socket));
            return turn.limited("bytes of connections", &key);
        };
        let largest = largest_segment(turn.config.mtu, key.is_v6());
        let initial = self.initial_number(&key, turn.now);
        let control = Control::opening(initial, largest);
        let tally = turn.journal.begin(turn.now);
        let mut flow = TcpFlow::new(key, socket, control, to_guest, tally);
        flow.host.connected = true;
        flow.host.from_host = true;
        let slot = self.table.insert(flow);
        turn.stats.tcp_connected += 1;
        turn.journal.opened_by_host(FlowProtocol::Tcp, key);
        self.ready.push_back(slot);
    }
}
