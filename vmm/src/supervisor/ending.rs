//! The end of a VM: stop, failures, the exit record, the last messages.

use std::time::Duration;

use sm_control::config::LaunchConfig;
use sm_control::exit::{ExitReason, ExitRecord, FailureCause};
use sm_control::launch::VmmReport;
use sm_control::signal;
use sm_control::timings::unix_nanos;
use sm_control::with_causes;
use sm_guest_proto::frame::{ExitStatus, FrameType};

use super::guest_side::IDENTITY_REFRESHED;
use super::machine_end::DELIVERY_TIMEOUT;
use super::restarting::EndRequest;
use super::stage::{Ending, MachineActivity, MachineEnd, RunningStage, SupervisorStage};
use super::{Supervisor, SupervisorTimer, printable};
use crate::agent::Purpose;
use crate::guest::{GuestEnd, GuestMachine};

/// Delay before the exit record is written again after a failure.
pub(super) const RECORD_RETRY: Duration = Duration::from_secs(1);
/// Time limit for the workload's exit report after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for the agent's answer about OOM kills.
const OOM_TIMEOUT: Duration = Duration::from_secs(1);

/// Exit status of a command that SIGKILL killed.
const KILLED: u32 = 128 + signal::KILL as u32;
/// Docker's status for failures other than those of the command.
const OUR_FAILURE: u32 = 125;

/// Lines of the guest's console in a failure message.
const TAIL_LINES: usize = 12;
/// Most characters of such a line.
const MAX_LINE: usize = 400;

impl<G: GuestMachine> Supervisor<G> {
    pub(super) fn timer_fired(&mut self, timer: SupervisorTimer) {
        match timer {
            SupervisorTimer::Start => {
                let seconds = self.request.start_timeout_ms / 1000;
                self.start_failed(&format!("the guest was not ready after {seconds} s"));
            }
            SupervisorTimer::StopGrace => self.end_grace(),
            SupervisorTimer::Kill if self.stage.is_copying() => {
                self.destroy("copying its memory did not end when the VM was to stop");
            }
            // The loop tries again after each wait.
            SupervisorTimer::Accept | SupervisorTimer::Shortage => {}
            SupervisorTimer::Signal => self.signals_are_overdue(),
            SupervisorTimer::Space => self.look_for_space(),
            SupervisorTimer::Idle => self.drop_idle_clients(),
            SupervisorTimer::Record => self.retry_exit_record(),
            SupervisorTimer::Health => self.start_health_check(),
            SupervisorTimer::HealthTimeout => self.health_check_timed_out(),
            SupervisorTimer::Restart => self.restart_is_due(),
            SupervisorTimer::Expire => {
                tracing::info!("the VM is stopped, as its time has passed");
                self.stop(EndRequest::Client, None);
            }
            SupervisorTimer::Prepare => self.preparing_took_too_long(),
            SupervisorTimer::Kill => self.destroy("the workload did not end when it was killed"),
            SupervisorTimer::OomCheck => self.oom_checked(false),
            SupervisorTimer::HostChanges => self.collect_host_changes(),
            // A stream that could not be opened in time ends as well.
            SupervisorTimer::StreamEnded => self.host_failed("the guest agent disconnected"),
            SupervisorTimer::Delivery => {
                tracing::info!("clients did not read the guest's last bytes in time");
                self.delivery_is_over();
            }
            SupervisorTimer::PowerOff => {
                tracing::warn!("the guest did not power itself off");
                self.stop_machine();
            }
            SupervisorTimer::End => {
                tracing::error!("the machine did not end when it was stopped");
                self.machine_has_ended();
            }
        }
    }

    /// Sends the workload its stop signal, and SIGKILL after the grace. There is no other
    /// run.
    pub(super) fn stop(&mut self, by: EndRequest, grace_ms: Option<u64>) {
        self.end_is_requested(by);
        match &self.stage {
            SupervisorStage::Starting(_) => self.destroy("it was stopped before its workload ran"),
            SupervisorStage::Resetting(_) => {
                self.destroy("it was stopped before its workload ran again")
            }
            SupervisorStage::Running(_) if self.accesses_files() => self.end_file_access(),
            SupervisorStage::Running(_) => {
                // A paused workload could not handle its signal.
                if let Err(error) = self.resume_vcpus() {
                    return self.destroy(&format!("it was stopped while paused, and {error}"));
                }
                // No new connections are accepted; existing ones continue until the
                // workload ends.
                if let Some(guest) = &mut self.guest {
                    guest.close_published();
                }
                let stop_signal = self.request.config.workload.stop_signal;
                if let Some(agent) = &mut self.agent {
                    agent.signal_main(stop_signal, true, None);
                }
                self.note_signal(stop_signal);
                let grace = grace_ms.unwrap_or_else(|| self.stop_timeout_ms());
                if let SupervisorStage::Running(running) = &mut self.stage {
                    running.stop_grace = Some(Duration::from_millis(grace));
                }
                self.start_grace();
            }
            SupervisorStage::Ending(_) => self.cancel_restart(by),
        }
    }

    /// Returns the VM's own stop timeout in milliseconds, which callers may have changed.
    fn stop_timeout_ms(&self) -> u64 {
        match self.record.current_config() {
            Ok(Some(config)) => LaunchConfig::from(config).stop_timeout_ms,
            Ok(None) | Err(_) => self.request.config.stop_timeout_ms,
        }
    }

    /// Starts the stop grace, if the workload is to stop.
    pub(super) fn start_grace(&mut self) {
        match &self.stage {
            SupervisorStage::Running(RunningStage {
                stop_grace: Some(grace),
                ..
            }) => {
                let grace = *grace;
                self.clear_timer(SupervisorTimer::Kill);
                self.set_timer(SupervisorTimer::StopGrace, grace);
            }
            SupervisorStage::Starting(_)
            | SupervisorStage::Running(_)
            | SupervisorStage::Resetting(_)
            | SupervisorStage::Ending(_) => {}
        }
    }

    /// Handles the end of the stop grace, unless the workload could not run.
    fn end_grace(&mut self) {
        let machine = match &self.stage {
            SupervisorStage::Running(running) => &running.machine,
            // None of these has a workload that was asked to stop.
            SupervisorStage::Starting(_)
            | SupervisorStage::Resetting(_)
            | SupervisorStage::Ending(_) => return,
        };
        match machine {
            MachineActivity::Publishing(job) => {
                let name = &job.plan.name;
                let why = format!("it was stopped while snapshot \"{name}\" of it was written");
                return self.destroy(&why);
            }
            MachineActivity::Copying(_) => {
                // Its stop grace starts when it runs again.
                self.cancel_capture();
                return self.set_timer(SupervisorTimer::Kill, KILL_TIMEOUT);
            }
            MachineActivity::Preparing(_) => {
                self.thaw();
                return self.snapshot_failed("the VM is to stop");
            }
            MachineActivity::Free | MachineActivity::Paused | MachineActivity::NoSpace => {}
        }
        // The exit report may be behind output that a client does not read.
        self.skip_slow_clients();
        if let Some(agent) = &mut self.agent {
            agent.signal_main(signal::KILL, false, None);
        }
        self.set_timer(SupervisorTimer::Kill, KILL_TIMEOUT);
    }

    /// Ends the VM without waiting for its workload.
    pub(super) fn destroy(&mut self, why: &str) {
        self.conclude(KILLED, ExitReason::Destroyed, Some(why.to_owned()));
    }

    /// Cancels the start, because the launcher disconnected before the workload ran.
    pub(super) fn cancel(&mut self) {
        self.conclude(
            OUR_FAILURE,
            ExitReason::StartFailed,
            Some("the start was cancelled".to_owned()),
        );
    }

    /// Handles a failure of the start that may not be caused by the start source, such as
    /// a timeout or an error on the host. A cached snapshot is not removed.
    pub(super) fn start_failed(&mut self, message: &str) {
        let source = self.guest.as_ref().filter(|_| self.is_blank());
        match source.and_then(GuestMachine::cached_source) {
            Some(name) => self.conclude_start(
                &format!(
                    "{message}; it was restored from snapshot \"{name}\", which is kept and \
                     may be the cause"
                ),
                Some(FailureCause::AutomaticSnapshot),
            ),
            None => self.conclude_start(message, None),
        }
    }

    /// Handles a misbehaviour of the guest itself before its workload runs.
    pub(super) fn start_failed_in_guest(&mut self, message: &str, cause: Option<FailureCause>) {
        // Before the guest has an identity, the defect must come from the snapshot.
        let blank = self.is_blank();
        let source = self.guest.as_mut().filter(|_| blank);
        let discarded = match source.and_then(GuestMachine::discard_source) {
            Some(name) => format!(
                "; it was restored from snapshot \"{name}\", which is removed now, so that the \
                 next start boots a kernel"
            ),
            None => String::new(),
        };
        self.conclude_start(&format!("{message}{discarded}"), cause);
    }

    /// Returns true if the guest has no identity yet, and so has run nothing of its own.
    fn is_blank(&self) -> bool {
        !self.phases.iter().any(|p| p.name == IDENTITY_REFRESHED)
    }

    fn conclude_start(&mut self, message: &str, cause: Option<FailureCause>) {
        let message = self.with_console(message);
        let record = self.exit_record(OUR_FAILURE, ExitReason::StartFailed, Some(message));
        self.finish(ExitRecord { cause, ..record });
    }

    /// Handles a guest that violated the protocol or disappeared.
    pub(super) fn guest_broke(&mut self, what: &str) {
        match &self.stage {
            SupervisorStage::Starting(_) => self.start_failed_in_guest(what, None),
            SupervisorStage::Running(_) | SupervisorStage::Resetting(_) => self.guest_failed(what),
            SupervisorStage::Ending(_) => {}
        }
    }

    /// Handles the exit of the workload.
    pub(super) fn workload_exited(&mut self, exit: ExitStatus) {
        self.reach("exit");
        let reason = match self.stage {
            SupervisorStage::Starting(_) => ExitReason::StartFailed,
            SupervisorStage::Running(_)
            | SupervisorStage::Resetting(_)
            | SupervisorStage::Ending(_) => ExitReason::Workload,
        };
        let record = ExitRecord {
            peak_rss_kib: exit.peak_rss_kib,
            ..self.exit_record(exit.status, reason, self.start_error.clone())
        };
        // SIGKILL that the host did not send may be from the guest's OOM killer.
        let unexplained = exit.status == KILLED
            && !self.is_set(SupervisorTimer::StopGrace)
            && !self.is_set(SupervisorTimer::Kill);
        // No pause is needed any more, and the machine has to answer a question.
        self.cancel_capture();
        if let Err(error) = self.resume_vcpus() {
            tracing::warn!(error, "the VM stays paused");
        }
        let copying = self.stage.is_copying();
        match &mut self.agent {
            Some(agent) if unexplained => {
                agent.request_stats(Purpose::OomCheck);
                self.provisional = Some(record);
                let more = if copying {
                    KILL_TIMEOUT
                } else {
                    Duration::ZERO
                };
                self.set_timer(SupervisorTimer::OomCheck, OOM_TIMEOUT + more);
            }
            _ => self.finish(record),
        }
    }

    pub(super) fn oom_checked(&mut self, oom_killed: bool) {
        let Some(mut record) = self.provisional.take() else {
            return;
        };
        if oom_killed {
            record.oom_killed = true;
            record.cause = Some(FailureCause::OutOfMemory);
            record.message = Some(
                self.with_console("the guest ran out of memory and its kernel killed the workload"),
            );
        }
        self.finish(record);
    }

    /// Handles the end of the machine, expected or not.
    pub(super) fn guest_ended(&mut self) {
        let end = self.guest.as_ref().and_then(GuestMachine::end);
        self.skip_slow_clients();
        if !self.stage.has_ended() {
            // Bytes that the guest sent before its end still count; at most a socket
            // buffer is left.
            if let Some(main) = &mut self.main {
                main.read_available();
            }
            self.pump_main();
        }
        if let Some(record) = self.provisional.take() {
            self.finish(record);
        }
        if !self.stage.has_ended() {
            match end {
                Some(GuestEnd::Guest(what)) => self.guest_broke(&what),
                Some(GuestEnd::Host(what)) => self.host_failed(&what),
                Some(GuestEnd::Stopped) | None => self.host_failed("the machine was stopped"),
            }
        }
        self.clear_guest_timers();
        self.machine_has_ended();
    }

    /// Handles a failure of the machine that the guest did not cause.
    pub(super) fn host_failed(&mut self, what: &str) {
        match &self.stage {
            SupervisorStage::Starting(_) => self.start_failed(what),
            SupervisorStage::Running(_) | SupervisorStage::Resetting(_) => self.guest_failed(what),
            SupervisorStage::Ending(_) => {}
        }
    }

    /// Ends a VM whose workload has started, and cannot continue.
    fn guest_failed(&mut self, what: &str) {
        let message = self.with_console(what);
        self.conclude(OUR_FAILURE, ExitReason::GuestFailed, Some(message));
    }

    fn exit_record(&self, status: u32, reason: ExitReason, message: Option<String>) -> ExitRecord {
        ExitRecord {
            status,
            reason,
            message,
            cause: None,
            oom_killed: false,
            finished_ns: unix_nanos(),
            started_ns: self.started_ns,
            peak_rss_kib: None,
            phases: self.phases.clone(),
            stopped: false,
            restarting: false,
            restarts: self.request.restarts.count,
        }
    }

    pub(super) fn conclude(&mut self, status: u32, reason: ExitReason, message: Option<String>) {
        let record = self.exit_record(status, reason, message);
        self.finish(record);
    }

    /// Writes the exit record, notifies all clients, and stops the machine.
    ///
    /// Invariant: no client is notified of the end before the exit record is on disk. If
    /// it cannot be written, clients are notified nevertheless, and this process stays,
    /// to answer others and to retry, until it succeeds or is terminated.
    fn finish(&mut self, exit: ExitRecord) {
        if self.stage.has_ended() {
            return;
        }
        let restart = self.next_run(&exit);
        let by_client = self.end_request == EndRequest::Client;
        let exit = ExitRecord {
            stopped: by_client || exit.reason == ExitReason::Destroyed,
            restarting: restart.is_some(),
            ..exit
        };
        if let Some(guest) = &mut self.guest {
            guest.is_ending();
        }
        let written = self.write_exit(&exit, true);
        self.note_end(&exit);
        let ending = SupervisorStage::Ending(Ending {
            exit: exit.clone(),
            unwritten: !written,
            machine: MachineEnd::Delivering,
            copying: None,
            publishing: None,
            restart,
        });
        let before = std::mem::replace(&mut self.stage, ending);
        let (copying, publishing) = self.cancel_captures(before);
        if let SupervisorStage::Ending(ending) = &mut self.stage {
            ending.copying = copying;
            ending.publishing = publishing;
        }
        self.clear_guest_timers();
        self.clear_timer(SupervisorTimer::Expire);
        self.forget_health();
        if !written {
            self.set_timer(SupervisorTimer::Record, self.record_retry);
        }
        if let Some(restart) = restart {
            self.wait_for_restart(restart);
        }
        let payload = ExitStatus {
            status: exit.status,
            peak_rss_kib: exit.peak_rss_kib,
        }
        .to_payload();
        self.conclude_signals();
        self.broadcast(FrameType::Exit, &payload);
        self.report(&VmmReport::Ended(exit));
        self.close_clients();
        self.main = None;
        if written && restart.is_none() {
            self.listener = None;
        }
        // Clients do not wait for the release of the machine.
        self.flush();
        // The last bytes of a workload are delivered before the machine stops.
        let delivers = self.ended_by_itself()
            && self.guest.as_mut().is_some_and(|guest| {
                guest.close_published();
                guest.is_delivering()
            });
        match delivers {
            true => self.set_timer(SupervisorTimer::Delivery, DELIVERY_TIMEOUT),
            false => self.power_off(),
        }
    }

    /// Writes the exit record. Returns true if no retry is needed.
    pub(super) fn write_exit(&self, exit: &ExitRecord, first: bool) -> bool {
        match self.record.write_exit(exit) {
            Ok(()) if first => true,
            Ok(()) => {
                tracing::info!("how the VM ended is on record now");
                true
            }
            // The record is about to be removed, or was removed.
            Err(_) if self.request.config.auto_remove || !self.record.directory().exists() => true,
            Err(error) => {
                if first {
                    tracing::error!(
                        error = with_causes(&error),
                        "cannot write down how the VM ended: trying again until it can be"
                    );
                }
                false
            }
        }
    }

    /// Retries to write the exit record.
    fn retry_exit_record(&mut self) {
        let SupervisorStage::Ending(ending) = &self.stage else {
            return;
        };
        if !ending.unwritten {
            return;
        }
        match self.write_exit(&ending.exit, false) {
            true => self.close_record(),
            false => self.set_timer(SupervisorTimer::Record, self.record_retry),
        }
    }

    /// Abandons the exit record, because this process has to exit.
    pub(super) fn abandon_record(&mut self) {
        if self.stage.is_unwritten() {
            tracing::error!("the exit status is lost");
            self.close_record();
        }
    }

    /// Closes the control socket, because the exit record is available.
    pub(super) fn close_record(&mut self) {
        if let SupervisorStage::Ending(ending) = &mut self.stage {
            ending.unwritten = false;
        }
        self.clear_timer(SupervisorTimer::Record);
        if self.stage.is_restarting() {
            return;
        }
        self.listener = None;
        self.close_clients();
        if self.guest.is_none() {
            self.clean_up();
        }
    }

    pub(super) fn ended_by_itself(&self) -> bool {
        let exit = self.stage.exit();
        exit.is_some_and(|exit| exit.reason == ExitReason::Workload)
    }

    /// Appends the last lines of the guest's console to `message`, which may quote the
    /// guest.
    fn with_console(&self, message: &str) -> String {
        let message = printable(message);
        // Some lines are empty and skipped.
        let console = self.guest.as_ref().map(|g| g.console_tail(4 * TAIL_LINES));
        let tail = indented(&console.unwrap_or_default());
        if tail.is_empty() {
            message
        } else {
            format!("{message}\nLast lines of the guest's console:\n{tail}")
        }
    }
}

/// Returns the last lines of a console, indented, without control characters.
fn indented(console: &str) -> String {
    let clean = |line: &str| -> String {
        line.trim_end()
            .chars()
            .take(MAX_LINE)
            .filter(|c| !c.is_control() || *c == '\t')
            .collect()
    };
    let lines: Vec<String> = console
        .lines()
        .map(clean)
        .filter(|line| !line.is_empty())
        .collect();
    let first = lines.len().saturating_sub(TAIL_LINES);
    let tail: Vec<String> = lines
        .iter()
        .skip(first)
        .map(|line| format!("  {line}"))
        .collect();
    tail.join("\n")
}
