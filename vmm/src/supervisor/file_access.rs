//! A machine that was started for access to the files of an idle VM.
//!
//! Its root and mounts are those of a run, but no workload runs: clients perform operations
//! on files over the exec socket. It powers itself off, and so writes its disks back, when
//! its launcher disconnects.

use sm_control::exit::ExitReason;
use sm_control::launch::{LaunchPurpose, VmmReport};
use sm_control::timings::unix_nanos;

use super::stage::{RunningStage, SupervisorStage};
use super::{Supervisor, SupervisorTimer};
use crate::guest::GuestMachine;

impl<G: GuestMachine> Supervisor<G> {
    /// Returns true if the machine was started for access to files.
    pub(super) fn accesses_files(&self) -> bool {
        match self.request.purpose {
            LaunchPurpose::Files => true,
            LaunchPurpose::Workload => false,
        }
    }

    /// Continues the start when root and mounts are complete.
    pub(super) fn files_are_ready(&mut self) {
        self.stage = SupervisorStage::Running(RunningStage::default());
        self.started_ns = unix_nanos();
        self.reach("files ready");
        self.clear_timer(SupervisorTimer::Start);
        self.report(&VmmReport::Started { pid: 0 });
        if let Some(guest) = &mut self.guest {
            guest.workload_started();
        }
    }

    /// Ends the access: the guest powers itself off.
    pub(super) fn end_file_access(&mut self) {
        // It may be paused until the host has space.
        if let Err(error) = self.resume_vcpus() {
            tracing::warn!(error, "the VM stays paused");
        }
        self.conclude(0, ExitReason::Workload, None);
    }
}
