//! A host without disk space for what the guest writes.
//!
//! An error would turn the guest's file system read-only until it is mounted again, so the
//! request waits, and the VM with it. No event tells that there is space again, so the
//! supervisor looks for it, once in a while and only then.

use std::time::Duration;

use sm_control::event::EventAction;

use super::stage::{MachineActivity, RunningStage, SupervisorStage};
use super::{Supervisor, SupervisorTimer};
use crate::guest::GuestMachine;

/// Refusal of what needs a machine without waiting requests.
pub(super) const NO_SPACE: &str =
    "the VM waits for disk space on the host: free some, and try again";

/// The reason in events, of which others have none.
const REASON: &str = "no_disk_space";

/// Time between two looks for space.
pub(super) const LOOK: Duration = Duration::from_secs(1);

impl<G: GuestMachine> Supervisor<G> {
    /// Pauses a machine of which a request waits for space. One that does something else
    /// runs on: it will be paused by the next request.
    pub(super) fn pause_for_space(&mut self) {
        self.set_timer(SupervisorTimer::Space, self.space_interval);
        if self.is_about_to_end() {
            return;
        }
        if let (
            Some(guest),
            SupervisorStage::Running(RunningStage {
                machine: machine @ MachineActivity::Free,
                ..
            }),
        ) = (&mut self.guest, &mut self.stage)
        {
            tracing::warn!("the host has no space for what the guest writes: it is paused");
            match guest.pause() {
                Ok(()) => {
                    *machine = MachineActivity::NoSpace;
                    self.note_space(EventAction::Pause);
                }
                Err(error) => tracing::warn!(error, "the VM is not paused"),
            }
        }
    }

    fn note_space(&self, action: EventAction) {
        self.note(action, |event| event.with("reason", REASON));
    }

    /// Lets the requests that wait for space be executed again, if there is some.
    pub(super) fn look_for_space(&mut self) {
        let is_copying = self.stage.is_copying();
        let Some(guest) = &mut self.guest else {
            return;
        };
        if !guest.has_space() {
            return self.set_timer(SupervisorTimer::Space, self.space_interval);
        }
        let resumed = match &mut self.stage {
            SupervisorStage::Running(RunningStage {
                machine: machine @ MachineActivity::NoSpace,
                ..
            }) => {
                *machine = MachineActivity::Free;
                tracing::info!("the host has space again");
                let resumed = guest.resume();
                if resumed.is_ok() {
                    self.note_space(EventAction::Unpause);
                }
                resumed
            }
            // Its end is a resume, too.
            SupervisorStage::Running(RunningStage {
                machine:
                    MachineActivity::Paused
                    | MachineActivity::Copying(_)
                    | MachineActivity::Publishing(_),
                ..
            }) => Ok(()),
            SupervisorStage::Starting(_) | SupervisorStage::Resetting(_) if is_copying => Ok(()),
            SupervisorStage::Running(_)
            | SupervisorStage::Starting(_)
            | SupervisorStage::Resetting(_)
            | SupervisorStage::Ending(_) => guest.pause().and_then(|()| guest.resume()),
        };
        if let Err(error) = resumed {
            tracing::warn!(error, "requests that wait for space are not executed again");
        }
    }
}
