//! Control connections: dispatch of requests and answers.

use sm_event_loop::Key;
use sm_guest_proto::control::{ControlReply, ControlRequest};

use super::Agent;
use crate::control::Control;
use crate::facts::uptime_us;
use crate::log;
use crate::reactor::Readiness;

impl Agent {
    /// Logs a trace line if `sm.debug` is on the kernel's command line.
    pub(crate) fn trace(&self, text: impl FnOnce() -> String) {
        if self.facts.debug {
            log::line(6, &format!("{} us: {}", uptime_us(), text()));
        }
    }

    pub(super) fn control_ready(&mut self, key: Key, ready: Readiness) {
        let alive = match self.controls.get_mut(key) {
            Some(control) => control.ready(ready, &mut self.scratch),
            None => return,
        };
        if alive {
            self.serve_control(key);
        } else {
            self.drop_control(key);
        }
    }

    pub(super) fn serve_control(&mut self, key: Key) {
        while let Some(request) = self.controls.get_mut(key).and_then(Control::next_request) {
            self.trace(|| format!("asked {}", request_name(&request)));
            if let Some(reply) = self.perform(key, request) {
                self.answer_now(key, &reply);
            }
        }
        self.settle_control(key);
    }

    pub(super) fn answer_now(&mut self, key: Key, reply: &ControlReply) {
        self.trace(|| format!("answered {reply:?}"));
        if let Some(control) = self.controls.get_mut(key) {
            control.reply(reply);
        }
    }

    /// Answers a request whose answer was deferred, and continues with the next one.
    pub(crate) fn answer(&mut self, key: Option<Key>, reply: &ControlReply) {
        if let Some(key) = key {
            self.answer_now(key, reply);
            self.serve_control(key);
        }
    }

    pub(super) fn settle_control(&mut self, key: Key) {
        let alive = match self.controls.get_mut(key) {
            Some(control) => control.settle(&self.reactor, key),
            None => return,
        };
        if !alive {
            self.drop_control(key);
        }
    }

    pub(super) fn drop_control(&mut self, key: Key) {
        if self.controls.remove(key).is_some() {
            self.resume_accepting();
            if self.power.is_some() {
                self.check_power();
            }
        }
    }
}

/// Returns the name of a request without its contents, which may be secret (entropy).
fn request_name(request: &ControlRequest) -> &'static str {
    match request {
        ControlRequest::Hello(_) => "hello",
        ControlRequest::Refresh(_) => "refresh",
        ControlRequest::AdjustClock { .. } => "adjust clock",
        ControlRequest::AttachRoot(_) => "attach root",
        ControlRequest::Mount { .. } => "mount",
        ControlRequest::Freeze => "freeze",
        ControlRequest::Thaw => "thaw",
        ControlRequest::PrepareSnapshot => "prepare snapshot",
        ControlRequest::SignalMain { .. } => "signal main",
        ControlRequest::PowerOff { .. } => "power off",
        ControlRequest::Stats { .. } => "stats",
        ControlRequest::IdentityReport { .. } => "identity report",
        ControlRequest::NoteHostChanges { .. } => "note host changes",
    }
}
