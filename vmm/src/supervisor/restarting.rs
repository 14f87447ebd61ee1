//! The wait between two runs of a VM.
//!
//! The exit record of the run is on disk, marked: another run follows as long as this
//! process is there. It serves the control socket meanwhile. A stop cancels the next run.

use std::time::Duration;

use sm_control::exit::{ExitReason, ExitRecord};
use sm_control::launch::StartSource;

use super::stage::{Ending, PendingRestart, SupervisorStage};
use super::{Supervisor, SupervisorTimer};
use crate::guest::GuestMachine;
use crate::restart::{NextRun, after_run};

/// Time for clients of the run before to read their last bytes, beyond the wait.
const LAST_BYTES: Duration = Duration::from_secs(2);

/// The side that asked for the end of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum EndRequest {
    /// None: the workload ended by itself, or the guest failed.
    #[default]
    None,
    /// A client, or the VM's own time limit.
    Client,
    /// The host, by a signal to this process. A reboot is no reason to forget the VM.
    Host,
}

impl<G: GuestMachine> Supervisor<G> {
    /// Notes a request for the end of the VM; one of a client counts more.
    pub(super) fn end_is_requested(&mut self, by: EndRequest) {
        if self.end_request != EndRequest::Client {
            self.end_request = by;
        }
    }

    /// Returns the next run after `exit`, if the restart policy asks for one.
    pub(super) fn next_run(&self, exit: &ExitRecord) -> Option<PendingRestart> {
        let request = &self.request;
        let progress = request.restarts;
        // The caller of a start that failed has the error.
        let not_started = exit.reason == ExitReason::StartFailed && progress.count == 0;
        let reporting = matches!(request.source, StartSource::IdentityReport(_));
        let ended_by_request =
            self.end_request != EndRequest::None || exit.reason == ExitReason::Destroyed;
        if not_started || reporting || ended_by_request || request.config.auto_remove {
            return None;
        }
        // Callers may have changed the policy since the start.
        let policy = match self.record.current_config() {
            Ok(config) => config.map_or(request.config.restart, |config| config.restart),
            Err(error) => {
                tracing::warn!(%error, "the VM is not restarted: its record cannot be read");
                return None;
            }
        };
        if !policy.restarts_after(exit, progress.count) {
            return None;
        }
        let ran = match exit.started_ns {
            0 => Duration::ZERO,
            started => Duration::from_nanos(exit.finished_ns.saturating_sub(started)),
        };
        Some(PendingRestart {
            progress: after_run(progress, ran),
            due: false,
            late: false,
        })
    }

    /// Starts the wait for the next run.
    pub(super) fn wait_for_restart(&mut self, next: PendingRestart) {
        let delay = Duration::from_millis(next.progress.delay_ms);
        tracing::info!(?delay, count = next.progress.count, "the VM is restarted");
        self.set_timer(SupervisorTimer::Restart, delay);
    }

    /// Handles the end of the wait.
    pub(super) fn restart_is_due(&mut self) {
        let unread = self
            .clients
            .values()
            .any(|c| c.closing && c.conn.unsent() > 0);
        let SupervisorStage::Ending(Ending {
            restart: Some(restart),
            ..
        }) = &mut self.stage
        else {
            return;
        };
        if unread && !std::mem::replace(&mut restart.late, true) {
            return self.set_timer(SupervisorTimer::Restart, LAST_BYTES);
        }
        restart.due = true;
    }

    /// Cancels the next run.
    pub(super) fn cancel_restart(&mut self, by: EndRequest) {
        let SupervisorStage::Ending(ending) = &mut self.stage else {
            return;
        };
        if ending.restart.take().is_none() {
            return;
        }
        ending.exit.restarting = false;
        ending.exit.stopped = by == EndRequest::Client;
        let exit = ending.exit.clone();
        self.clear_timer(SupervisorTimer::Restart);
        match self.write_exit(&exit, true) {
            true => self.close_record(),
            false => {
                if let SupervisorStage::Ending(ending) = &mut self.stage {
                    ending.unwritten = true;
                }
                self.set_timer(SupervisorTimer::Record, self.record_retry);
            }
        }
    }

    /// Returns the next run, once its time has come and the machine of this one is gone.
    pub(super) fn take_next_run(&mut self) -> Option<NextRun> {
        let SupervisorStage::Ending(Ending {
            restart: Some(restart),
            ..
        }) = &self.stage
        else {
            return None;
        };
        let mut request = self.request.clone();
        request.restarts = restart.progress;
        request.existing = true;
        request.attach = false;
        request.phases = Vec::new();
        // Callers may have given it another name, for instance.
        if let Ok(Some(config)) = self.record.current_config() {
            request.config = config.into();
        }
        // The next run creates this socket anew.
        let _ = std::fs::remove_file(self.record.exec_socket());
        Some(NextRun {
            request,
            lock: self.lock.take()?,
            listener: self.listener.take()?,
        })
    }
}
