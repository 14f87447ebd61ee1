//! The workload's output: to the log, and to the clients that are attached.

use sm_control::launch::{ControlAnswer, Report};
use sm_guest_proto::frame::FrameType;

use super::Supervisor;
use super::clients::Role;
use crate::guest::Guest;

impl<G: Guest> Supervisor<G> {
    /// Whether the workload's output can be passed on. Every attached client takes more,
    /// or is not waited for any more.
    pub(super) fn has_room_for_output(&self) -> bool {
        self.leaves_behind
            || self
                .clients
                .values()
                .all(|client| !client.is_attached() || !client.conn.is_full())
    }

    /// Waits no longer for clients that take no output: the workload's end is near, and
    /// word of it may be behind that. What they miss is in the log.
    pub(super) fn leave_slow_clients_behind(&mut self) {
        self.leaves_behind = true;
    }

    pub(super) fn pass_on_output(&mut self, kind: FrameType, payload: &[u8]) {
        self.log_output(kind, payload);
        self.tell_followers();
        for client in self.clients.values_mut().filter(|c| c.is_attached()) {
            if !client.conn.is_full() {
                client.conn.queue(kind, payload);
            } else if !std::mem::replace(&mut client.left_behind, true) {
                let text = "output is missing here, as it was not taken in time: see the log";
                let report = Report::Warning(text.to_owned());
                client.conn.queue_json(FrameType::Control, &report);
            }
        }
    }

    /// Sends one of the workload's frames to all attached clients, full or not.
    pub(super) fn broadcast(&mut self, kind: FrameType, payload: &[u8]) {
        for client in self.clients.values_mut().filter(|c| c.is_attached()) {
            client.conn.queue(kind, payload);
        }
    }

    /// Something was logged. Whoever has not taken the last word of that needs no
    /// other: it looks at the log when it has, so a slow reader holds up nobody.
    fn tell_followers(&mut self) {
        for client in self.clients.values_mut() {
            if client.role == Role::Following && client.conn.unsent() == 0 {
                let kind = FrameType::Control;
                client.conn.queue_json(kind, &ControlAnswer::Done);
            }
        }
    }

    fn log_output(&mut self, kind: FrameType, payload: &[u8]) {
        let Some(log) = &mut self.log else {
            return;
        };
        // The workload goes on, and its clients still see everything. What is missing
        // is noted in the log as soon as something can be written again.
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
