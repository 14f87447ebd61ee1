//! The end of a machine whose VM has ended: its last bytes are delivered, the guest powers
//! itself off or is stopped, and its resources are released.

use std::time::Duration;

use sm_control::launch::{LaunchRequest, MountRequest, MountSource};
use sm_guest_proto::control::ControlRequest;

use super::stage::{Ending, MachineEnd, SupervisorStage};
use super::{Supervisor, SupervisorTimer};
use crate::agent::Purpose;
use crate::guest::GuestMachine;

/// Time limit for a machine to stop before the process exits.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for the guest to power itself off.
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(2);
/// The same for a guest that first writes back a disk which is used again.
const WRITE_BACK_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit for delivering the bytes that an exited workload had sent to published
/// ports, and for those that clients of commands have not read when the guest is off.
pub(super) const DELIVERY_TIMEOUT: Duration = Duration::from_secs(2);

/// Returns the time limit for the guest of a VM to power itself off.
pub(super) fn power_off_timeout(request: &LaunchRequest) -> Duration {
    let keeps_root = request.root_disk.is_some() && !request.config.auto_remove;
    let is_written = |mount: &MountRequest| {
        let keeps = match &mount.source {
            MountSource::Volume { directory, .. } => {
                directory.is_some() || !request.config.auto_remove
            }
            // The server on the host has all that the guest's kernel has sent.
            MountSource::Host { .. } => true,
            MountSource::Tmpfs { .. } => false,
        };
        keeps && !mount.read_only
    };
    match keeps_root || request.mounts.iter().any(is_written) {
        true => WRITE_BACK_TIMEOUT,
        false => POWER_OFF_TIMEOUT,
    }
}

impl<G: GuestMachine> Supervisor<G> {
    /// Handles the end of the machine itself, unless its last bytes are still on their way.
    pub(super) fn machine_has_ended(&mut self) {
        // The agent has sent the last bytes of its commands and their statuses before it
        // powered the guest off; slow clients have not read them.
        if self.stage.machine_end() == Some(MachineEnd::PoweringOff) && self.delivers_commands() {
            self.machine_ends(MachineEnd::Draining);
            self.set_timer(SupervisorTimer::Delivery, DELIVERY_TIMEOUT);
            return;
        }
        self.machine_is_drained();
    }

    fn delivers_commands(&mut self) -> bool {
        let guest = self.guest.as_mut();
        guest.is_some_and(GuestMachine::is_delivering_commands)
    }

    fn machine_is_drained(&mut self) {
        self.clear_timer(SupervisorTimer::Delivery);
        self.machine_ends(MachineEnd::Ended);
        self.release_when_published();
    }

    /// Releases the machine after its end, unless a snapshot of it is being published:
    /// the client is notified of the result first.
    pub(super) fn release_when_published(&mut self) {
        match &self.stage {
            SupervisorStage::Ending(Ending {
                machine: MachineEnd::Ended,
                publishing: None,
                ..
            }) => self.release(),
            SupervisorStage::Starting(_)
            | SupervisorStage::Running(_)
            | SupervisorStage::Resetting(_)
            | SupervisorStage::Ending(_) => {}
        }
    }

    /// Handles the event that all bytes to published ports or to clients of commands were
    /// delivered.
    pub(super) fn delivered(&mut self) {
        // A late event of published ports says nothing about commands.
        let is_draining = self.stage.machine_end() == Some(MachineEnd::Draining);
        if !(is_draining && self.delivers_commands()) {
            self.delivery_is_over();
        }
    }

    /// Continues after the delivery of last bytes, or when its time is over.
    pub(super) fn delivery_is_over(&mut self) {
        match self.stage.machine_end() {
            Some(MachineEnd::Delivering) => {
                self.clear_timer(SupervisorTimer::Delivery);
                self.power_off();
            }
            Some(MachineEnd::Draining) => self.machine_is_drained(),
            // The event is late.
            Some(MachineEnd::PoweringOff | MachineEnd::Stopping | MachineEnd::Ended) | None => {}
        }
    }

    /// Powers the guest off if its workload exited; [`Self::guest_ended`] follows.
    pub(super) fn power_off(&mut self) {
        let by_itself = self.ended_by_itself();
        match &mut self.agent {
            // Commands beside the workload are killed by the power-off; their clients
            // still get the last output and the status.
            Some(agent) if by_itself => {
                let request = ControlRequest::PowerOff { grace_ms: 0 };
                agent.send_request(Purpose::PowerOff, &request);
                self.machine_ends(MachineEnd::PoweringOff);
                self.set_timer(SupervisorTimer::PowerOff, self.power_off_timeout);
            }
            _ => self.stop_machine(),
        }
    }

    /// Stops the machine, without the guest's cooperation.
    pub(super) fn stop_machine(&mut self) {
        self.agent = None;
        if self.stage.machine_end() == Some(MachineEnd::Draining) {
            return self.machine_is_drained();
        }
        self.clear_timer(SupervisorTimer::Delivery);
        self.clear_timer(SupervisorTimer::PowerOff);
        self.machine_ends(MachineEnd::Stopping);
        if let Some(guest) = &mut self.guest {
            guest.stop();
            self.set_timer(SupervisorTimer::End, END_TIMEOUT);
        }
    }

    /// Notes the progress of the end of the machine. It ends once.
    fn machine_ends(&mut self, how: MachineEnd) {
        if let SupervisorStage::Ending(ending) = &mut self.stage
            && ending.machine != MachineEnd::Ended
        {
            ending.machine = how;
        }
    }

    /// Releases all resources of the machine and, once the exit record is written, the
    /// record's lock. Clients may still read queued bytes.
    fn release(&mut self) {
        self.guest = None;
        self.clear_guest_timers();
        if !self.stage.is_unwritten() {
            self.clean_up();
        }
    }

    pub(super) fn clean_up(&mut self) {
        if let Some(Err(error)) = self.log.take().map(|mut log| log.note_dropped()) {
            tracing::error!(%error, "output is missing from the log");
        }
        if self.stage.is_restarting() {
            // The next run takes over the sockets and the lock.
            return;
        }
        let cleaned = if self.request.config.auto_remove {
            self.record.erase()
        } else {
            self.record.remove_sockets()
        };
        if let Err(error) = cleaned {
            tracing::warn!(%error, "left something behind");
        }
        self.lock = None;
    }
}
