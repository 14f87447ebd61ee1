//! Machines that are started for their identity report.

use sm_control::launch::VmIdentityReport;
use sm_control::session::{Event, Session};

use super::{Launched, not_started, talking, vmm_exited};
use crate::Error;
use crate::reaper::Process;

impl Launched {
    /// Processes events of the VMM until it has sent the identity report. The machine
    /// lives as long as the returned value.
    pub(crate) fn until_identity_report(
        mut self,
    ) -> Result<(VmIdentityReport, ReportingVm), Error> {
        loop {
            match self.session.next_event().map_err(talking)? {
                Some(Event::IdentityReport(report)) => {
                    let reporting = ReportingVm {
                        session: Some(self.session),
                        child: self.child,
                    };
                    return Ok((report, reporting));
                }
                Some(Event::Ended(exit)) => {
                    // Reaps the process, which is about to exit.
                    let _ = self.child.wait();
                    return Err(not_started(exit));
                }
                Some(_) => {}
                None => return Err(vmm_exited(&self.record, &mut self.child, self.existing)),
            }
        }
    }
}

/// A machine that was started for its identity report, and exits when this is dropped.
pub(crate) struct ReportingVm {
    session: Option<Session>,
    child: Process,
}

impl Drop for ReportingVm {
    fn drop(&mut self) {
        // The VMM exits and cleans up when its launcher closes the connection.
        self.session = None;
        let _ = self.child.wait();
    }
}
