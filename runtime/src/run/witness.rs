//! Machines that are started to tell what makes them distinct.

use sm_control::launch::Testimony;
use sm_control::session::{Event, Session};

use super::{Launched, not_started, talking, vmm_died};
use crate::Error;
use crate::reaper::Process;

impl Launched {
    /// Follows the VMM's reports until it has told what makes the machine distinct.
    /// The machine lives as long as the witness.
    pub(crate) fn until_evidence(mut self) -> Result<(Testimony, Witness), Error> {
        loop {
            match self.session.next_event().map_err(talking)? {
                Some(Event::Evidence(told)) => {
                    let witness = Witness {
                        session: Some(self.session),
                        child: self.child,
                    };
                    return Ok((told, witness));
                }
                Some(Event::Ended(exit)) => {
                    // The process has nothing left to do; a zombie of it would stay.
                    let _ = self.child.wait();
                    return Err(not_started(exit));
                }
                Some(_) => {}
                None => return Err(vmm_died(&self.record, &mut self.child)),
            }
        }
    }
}

/// A machine that was started for evidence, which ends with this value.
pub(crate) struct Witness {
    session: Option<Session>,
    child: Process,
}

impl Drop for Witness {
    fn drop(&mut self) {
        // Without its launcher it ends, and removes what it has.
        self.session = None;
        let _ = self.child.wait();
    }
}
