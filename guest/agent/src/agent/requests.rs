//! Control requests and their handlers.

use std::time::Duration;

use sm_event_loop::Key;
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::{AttachRoot, ControlReply, ControlRequest, Refresh, Refreshed};

use super::Agent;
use super::poweroff::stop_signal;
use crate::identity;
use crate::sys;

/// Answer to what a power-off excludes.
pub(super) const POWERING_OFF: &str = "the guest is powering off";

pub(super) fn failed(message: impl std::fmt::Display) -> ControlReply {
    ControlReply::Error {
        message: message.to_string(),
    }
}

fn done_or(operation: &str, result: std::io::Result<()>) -> ControlReply {
    match result {
        Ok(()) => ControlReply::Done,
        Err(error) => failed(format_args!("{operation}: {error}")),
    }
}

impl Agent {
    /// Performs a request of connection `key`. Returns `None` if the answer is sent
    /// later.
    pub(crate) fn perform(&mut self, key: Key, request: ControlRequest) -> Option<ControlReply> {
        Some(match request {
            ControlRequest::Hello(_) => ControlReply::Hello(self.facts.hello()),
            ControlRequest::Refresh(refresh) => return self.refresh(key, &refresh),
            ControlRequest::AdjustClock { offset_ns } => match identity::adjust_clock(offset_ns) {
                Ok(()) => ControlReply::ClockAdjusted {
                    realtime_ns: identity::realtime_ns(),
                },
                Err(error) => failed(format_args!("set the clock: {error}")),
            },
            ControlRequest::AttachRoot(plan) => return self.attach_root(key, &plan),
            ControlRequest::Mount { container, mounts } => {
                return self.mount(key, &container, &mounts);
            }
            ControlRequest::NoteHostChanges { container, changes } => {
                self.note_host_changes(&container, &changes)
            }
            ControlRequest::Freeze => return self.freeze(key),
            ControlRequest::Thaw => {
                done_or("thaw the containers", self.containers.group.freeze(false))
            }
            ControlRequest::PrepareSnapshot => return self.prepare(key),
            ControlRequest::SignalMain {
                container,
                signal,
                stop,
            } => self.signal_main(&container, signal, stop),
            ControlRequest::PowerOff { .. } if self.power.is_some() => failed(POWERING_OFF),
            ControlRequest::PowerOff { grace_ms } => {
                self.start_power_off(key, Duration::from_millis(grace_ms));
                return None;
            }
            ControlRequest::Stats { container } => ControlReply::Stats(self.stats(&container)),
            ControlRequest::IdentityReport { container } => {
                return self.identity_report(key, &container);
            }
        })
    }

    fn refresh(&mut self, key: Key, refresh: &Refresh) -> Option<ControlReply> {
        if let Err(error) = self.identity.refresh(refresh) {
            return Some(failed(error));
        }
        // If this guest is a clone, earlier counts belong to another VM.
        for container in self.containers.iter_mut() {
            container.reset_counts();
        }
        self.check_vmgenid();
        let waits = refresh.vmgenid_wait_ms > 0 && self.kernel_log.is_some();
        if !self.vmgenid_seen && waits && self.refreshing.is_none() {
            let wait = Duration::from_millis(u64::from(refresh.vmgenid_wait_ms.min(60_000)));
            self.wait_for_vmgenid(key, wait);
            return None;
        }
        Some(self.refreshed())
    }

    /// Returns the answer to a refresh, and resets the flag for the generation ID.
    pub(crate) fn refreshed(&mut self) -> ControlReply {
        ControlReply::Refreshed(Refreshed {
            realtime_ns: identity::realtime_ns(),
            vmgenid_seen: std::mem::take(&mut self.vmgenid_seen),
        })
    }

    fn attach_root(&mut self, key: Key, plan: &AttachRoot) -> Option<ControlReply> {
        let id = &plan.container;
        if self.containers.find(id).is_some() {
            let text = format_args!("container {id} has a root file system already");
            return Some(failed(text));
        }
        if let Err(error) = self.identity.prepare(plan) {
            return Some(failed(error));
        }
        let created = match self.containers.create(id) {
            Ok(created) => created,
            Err(error) => return Some(failed(error)),
        };
        let files = self.identity.directory();
        let container = self.containers.get_mut(created)?;
        if let Err(error) = container.start_attach(created, plan, files, &self.reactor) {
            self.containers.remove(created);
            return Some(failed(format_args!("start the container's init: {error}")));
        }
        self.await_root(created, key);
        None
    }

    fn freeze(&mut self, key: Key) -> Option<ControlReply> {
        if self.power.is_some() {
            // Frozen processes would not end before the grace period does.
            return Some(failed(POWERING_OFF));
        }
        if self.freezing.is_some() {
            return Some(failed("the containers are already being frozen"));
        }
        if let Err(error) = self.start_freeze(key) {
            return Some(failed(format_args!("freeze the containers: {error}")));
        }
        match self.containers.group.events(&self.reactor) {
            Ok(events) if !events.frozen => None,
            result => {
                self.containers.group.stop_watching();
                self.freezing = None;
                Some(self.frozen(result))
            }
        }
    }

    fn prepare(&mut self, key: Key) -> Option<ControlReply> {
        if self.preparing.is_some() {
            return Some(failed("data is already being written back"));
        }
        let started = self.start_prepare(key);
        started
            .err()
            .map(|error| failed(format_args!("write data back: {error}")))
    }

    fn identity_report(&mut self, key: Key, container: &ContainerId) -> Option<ControlReply> {
        if self.reporting.is_some() {
            return Some(failed("the workload's files are already being read"));
        }
        let started = self.start_report(key, container);
        started
            .err()
            .map(|error| failed(format_args!("read the workload's files: {error}")))
    }

    fn signal_main(&mut self, id: &ContainerId, signal: u8, stop: bool) -> ControlReply {
        let container = self.containers.named(id).ok();
        let main = container.and_then(|(_, container)| container.workload.main());
        let pid = main
            .and_then(|key| self.sessions.get_mut(key))
            .and_then(|session| session.live_pid());
        match pid {
            Some(pid) if (1..=64).contains(&signal) => {
                let signal = if stop {
                    stop_signal(pid, signal)
                } else {
                    signal
                };
                done_or("signal the main command", sys::kill(pid, signal))
            }
            Some(_) => failed(format_args!("{signal} is not a signal number")),
            None => failed(format_args!("no main command runs in container {id}")),
        }
    }
}
