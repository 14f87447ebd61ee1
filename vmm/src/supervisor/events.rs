//! Events in the life of the VM, for its record's log.

use sm_control::config::VmConfig;
use sm_control::event::{EventAction, EventRecord, EventSubject};
use sm_control::exit::ExitRecord;

use super::Supervisor;
use super::restarting::EndRequest;
use crate::guest::GuestMachine;

impl<G: GuestMachine> Supervisor<G> {
    /// Logs an event; `details` completes it.
    pub(super) fn note(
        &self,
        action: EventAction,
        details: impl FnOnce(EventRecord) -> EventRecord,
    ) {
        // Callers may have changed name and labels.
        let config = self.record.current_config().ok().flatten();
        let config = config.unwrap_or_else(|| VmConfig::from(self.request.config.clone()));
        let event = EventRecord::of_vm(action, &config);
        self.record.note_event(&details(event));
    }

    /// Logs the events of the VM's end.
    pub(super) fn note_end(&self, exit: &ExitRecord) {
        if exit.oom_killed {
            self.note(EventAction::Oom, |event| event);
        }
        self.note(EventAction::Die, |event| {
            event.with("exit_code", exit.status)
        });
        if self.end_request == EndRequest::Client {
            self.note(EventAction::Stop, |event| event);
        }
    }

    /// Logs a signal for the workload.
    pub(super) fn note_signal(&self, signal: u8) {
        self.note(EventAction::Kill, |event| event.with("signal", signal));
    }

    /// Logs a new snapshot.
    pub(super) fn note_snapshot(&self, name: &str) {
        let event = EventRecord::now(EventSubject::Snapshot, EventAction::Create, name, name);
        let config = &self.request.config;
        let event = event.with("vm", config.id.as_str());
        self.record.note_event(&event.with("image", &config.image));
    }
}
