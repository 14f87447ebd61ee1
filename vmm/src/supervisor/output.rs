//! Output of the workload: to the log, and to attached clients.

use sm_control::launch::{ControlAnswer, VmmReport};
use sm_guest_proto::frame::FrameType;

use super::Supervisor;
use super::clients::ClientRole;
use crate::guest::GuestMachine;

impl<G: GuestMachine> Supervisor<G> {
    /// Returns true if output can be forwarded: every attached client has space, or is
    /// not waited for.
    pub(super) fn has_room_for_output(&self) -> bool {
        self.skips_slow_clients
            || self
                .clients
                .values()
                .all(|client| !client.is_attached() || !client.conn.is_full())
    }

    /// Stops waiting for clients that do not read: the workload is about to exit, and its
    /// exit report may be behind their output. The log has the output that they miss.
    pub(super) fn skip_slow_clients(&mut self) {
        self.skips_slow_clients = true;
    }

    pub(super) fn pass_on_output(&mut self, kind: FrameType, payload: &[u8]) {
        self.log_output(kind, payload);
        self.notify_followers();
        for client in self.clients.values_mut().filter(|c| c.is_attached()) {
            if !client.conn.is_full() {
                client.conn.queue(kind, payload);
            } else if !std::mem::replace(&mut client.missed_output, true) {
                let text = "output is missing here, because it was not read in time: see the log";
                let report = VmmReport::Warning(text.to_owned());
                client.conn.queue_json(FrameType::Control, &report);
            }
        }
    }

    /// Sends a frame of the workload to all attached clients, full or not.
    pub(super) fn broadcast(&mut self, kind: FrameType, payload: &[u8]) {
        for client in self.clients.values_mut().filter(|c| c.is_attached()) {
            client.conn.queue(kind, payload);
        }
    }

    /// Notifies followers of new log output. One that has not read the last notification
    /// needs no other, as it reads the log afterwards; so a slow reader blocks nobody.
    fn notify_followers(&mut self) {
        for client in self.clients.values_mut() {
            if client.role == ClientRole::Following && client.conn.unsent() == 0 {
                let kind = FrameType::Control;
                client.conn.queue_json(kind, &ControlAnswer::Done);
            }
        }
    }

    fn log_output(&mut self, kind: FrameType, payload: &[u8]) {
        let Some(log) = &mut self.log else {
            return;
        };
        // The workload continues, and its clients still receive everything. The log gets
        // a count of the missing bytes as soon as it can be written.
        match log.append(kind, payload) {
            Ok(()) if std::mem::take(&mut self.log_fails) => {
                tracing::info!("output is logged again");
            }
            Ok(()) => {}
            Err(error) if !std::mem::replace(&mut self.log_fails, true) => {
                tracing::error!(%error, "output cannot be logged");
            }
            Err(_) => {}
        }
    }
}
