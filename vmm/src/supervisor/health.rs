//! Checks of the workload's health: commands beside it, one at a time.
//!
//! A check is a connection to the agent's exec server. The agent kills a command that takes
//! too long; a guest that does not answer at all fails the check, too. A check that cannot
//! run, because the machine is held, is left out. Output of the guest is bounded.

use std::collections::VecDeque;
use std::time::Duration;

use rustix::event::PollFlags;
use sm_control::config::HealthCheck;
use sm_control::event::EventAction;
use sm_control::launch::{HealthReport, HealthResult, HealthStatus};
use sm_control::timings::unix_nanos;
use sm_guest_proto::exec::{ExecControl, Hello, Role};
use sm_guest_proto::frame::{ExitStatus, FrameType};
use sm_guest_proto::{PROTOCOL_VERSION, port};

use super::stage::{MachineActivity, SupervisorStage};
use super::{Supervisor, SupervisorTimer, interest, printable};
use crate::conn::Conn;
use crate::guest::GuestMachine;

/// Results that are kept.
const KEPT_RESULTS: usize = 5;
/// Bytes of a check's output that are kept.
const KEPT_OUTPUT: usize = 1000;
/// Time for the guest to report the end of a check beyond the check's own limit.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait before a check in the start period.
const START_INTERVAL: Duration = Duration::from_secs(5);
/// Status of a check that did not end in time.
const TIMED_OUT: u32 = 124;
/// Status of a check that could not be run.
const NOT_RUN: u32 = 125;

/// The health of a workload.
#[derive(Debug)]
pub(super) struct Health {
    check: HealthCheck,
    report: HealthReport,
    started_ns: u64,
    results: VecDeque<HealthResult>,
    probe: Option<Probe>,
}

/// A check that runs.
#[derive(Debug)]
struct Probe {
    conn: Conn,
    start_ns: u64,
    output: Vec<u8>,
}

impl Health {
    fn new(check: HealthCheck) -> Self {
        Self {
            check,
            report: HealthReport::default(),
            started_ns: unix_nanos(),
            results: VecDeque::new(),
            probe: None,
        }
    }

    fn is_in_start_period(&self) -> bool {
        let age_ms = unix_nanos().saturating_sub(self.started_ns) / 1_000_000;
        age_ms < self.check.start_period_ms
    }

    /// Returns the wait before the next check.
    fn interval(&self) -> Duration {
        let interval = Duration::from_millis(self.check.interval_ms);
        match self.is_in_start_period() {
            true => interval.min(START_INTERVAL),
            false => interval,
        }
    }

    /// Adds a result; returns true if the status changes.
    fn add(&mut self, result: HealthResult) -> bool {
        let before = self.report.status;
        if result.exit_code == 0 {
            self.report.status = HealthStatus::Healthy;
            self.report.failing_streak = 0;
        } else if before != HealthStatus::Starting || !self.is_in_start_period() {
            self.report.failing_streak = self.report.failing_streak.saturating_add(1);
            if self.report.failing_streak >= self.check.retries.max(1) {
                self.report.status = HealthStatus::Unhealthy;
            }
        }
        if self.results.len() == KEPT_RESULTS {
            self.results.pop_front();
        }
        self.results.push_back(result);
        self.report.status != before
    }
}

impl<G: GuestMachine> Supervisor<G> {
    /// Starts the checks of a workload that runs now.
    pub(super) fn watch_health(&mut self) {
        self.forget_health();
        let check = self.request.config.health.clone();
        if let Some(health) = check.map(Health::new) {
            self.set_timer(SupervisorTimer::Health, health.interval());
            self.health = Some(health);
        }
    }

    /// Ends the checks.
    pub(super) fn forget_health(&mut self) {
        self.health = None;
        self.clear_timer(SupervisorTimer::Health);
        self.clear_timer(SupervisorTimer::HealthTimeout);
    }

    pub(super) fn health_report(&self) -> Option<HealthReport> {
        let health = self.health.as_ref()?;
        Some(HealthReport {
            results: health.results.iter().cloned().collect(),
            ..health.report.clone()
        })
    }

    /// Returns the descriptor of a check that runs, with its poll flags.
    pub(super) fn health_interest(&self) -> Option<(rustix::fd::BorrowedFd<'_>, PollFlags)> {
        let probe = self.health.as_ref()?.probe.as_ref()?;
        Some((probe.conn.fd(), interest(true, probe.conn.has_sendable())))
    }

    /// Starts a check, unless the guest cannot run it now.
    pub(super) fn start_health_check(&mut self) {
        let can_run = match &self.stage {
            SupervisorStage::Running(running) => matches!(running.machine, MachineActivity::Free),
            SupervisorStage::Starting(_)
            | SupervisorStage::Resetting(_)
            | SupervisorStage::Ending(_) => false,
        };
        let (Some(health), Some(guest)) = (&mut self.health, &mut self.guest) else {
            return;
        };
        if !can_run || health.probe.is_some() {
            let interval = health.interval();
            return self.set_timer(SupervisorTimer::Health, interval);
        }
        let timeout = health.check.timeout_ms;
        let workload = &self.request.config.workload;
        let mut request = workload.request(80, 24);
        request.argv.clone_from(&health.check.command);
        request.container.clone_from(&self.container);
        request.role = Role::Exec;
        request.tty = false;
        request.stdin = false;
        request.rlimits.clear();
        request.sysctls.clear();
        request.timeout_ms = timeout;
        match guest.connect(port::EXEC).and_then(Conn::new) {
            Ok(mut conn) => {
                let hello = Hello {
                    protocol: PROTOCOL_VERSION,
                };
                conn.queue_json(FrameType::Control, &ExecControl::Hello(hello));
                conn.queue_json(FrameType::Request, &request);
                health.probe = Some(Probe {
                    conn,
                    start_ns: unix_nanos(),
                    output: Vec::new(),
                });
                let limit = Duration::from_millis(timeout).saturating_add(ANSWER_TIMEOUT);
                self.set_timer(SupervisorTimer::HealthTimeout, limit);
            }
            Err(error) => {
                let now = unix_nanos();
                self.health_checked(HealthResult {
                    start_ns: now,
                    end_ns: now,
                    exit_code: NOT_RUN,
                    output: format!("the check cannot be run: {error}"),
                });
            }
        }
    }

    /// Handles a check that did not end in time.
    pub(super) fn health_check_timed_out(&mut self) {
        let halted = self.stage.is_halted();
        self.end_health_check(
            |_| (TIMED_OUT, "the check did not end in time".to_owned()),
            halted,
        );
    }

    /// Ends the check that runs, without a result: the workload is about to be frozen.
    pub(super) fn leave_out_health_check(&mut self) {
        self.end_health_check(|_| (NOT_RUN, String::new()), true);
    }

    /// Reads what the check has sent.
    pub(super) fn read_health_check(&mut self) {
        if let Some(probe) = self
            .health
            .as_mut()
            .and_then(|health| health.probe.as_mut())
        {
            probe.conn.read();
        }
    }

    /// Sends the request of a check.
    pub(super) fn flush_health_check(&mut self) {
        if let Some(probe) = self
            .health
            .as_mut()
            .and_then(|health| health.probe.as_mut())
        {
            // The end of the stream is handled on a read.
            let _ = probe.conn.flush();
        }
    }

    /// Processes frames of the check.
    pub(super) fn pump_health_check(&mut self) {
        loop {
            let probe = self
                .health
                .as_mut()
                .and_then(|health| health.probe.as_mut());
            let Some(probe) = probe else {
                return;
            };
            let ended = probe.conn.ended();
            let status = match probe.conn.decoder.next_frame() {
                Ok(Some(frame)) => match frame.kind {
                    FrameType::Stdout | FrameType::Stderr | FrameType::Error => {
                        let room = KEPT_OUTPUT.saturating_sub(probe.output.len());
                        let kept = frame.payload.get(..room).unwrap_or(frame.payload);
                        probe.output.extend_from_slice(kept);
                        continue;
                    }
                    FrameType::Exit => {
                        ExitStatus::parse(frame.payload).map_or(NOT_RUN, |exit| exit.status)
                    }
                    _ => continue,
                },
                Ok(None) if ended => NOT_RUN,
                Ok(None) => return,
                Err(_) => NOT_RUN,
            };
            self.end_health_check(
                |output| (status, printable(&String::from_utf8_lossy(output))),
                false,
            );
        }
    }

    /// Ends the check that runs, with the status and text that `result` returns for its
    /// output. One that is not counted leaves no result.
    fn end_health_check(&mut self, result: impl FnOnce(&[u8]) -> (u32, String), ignored: bool) {
        self.clear_timer(SupervisorTimer::HealthTimeout);
        let Some(probe) = self.health.as_mut().and_then(|health| health.probe.take()) else {
            return;
        };
        let (exit_code, output) = result(&probe.output);
        let checked = HealthResult {
            start_ns: probe.start_ns,
            end_ns: unix_nanos(),
            exit_code,
            output,
        };
        match ignored {
            true => self.wait_for_health_check(),
            false => self.health_checked(checked),
        }
    }

    fn health_checked(&mut self, result: HealthResult) {
        let Some(health) = &mut self.health else {
            return;
        };
        if health.add(result) {
            let status = health.report.status;
            self.note(EventAction::HealthStatus, |event| {
                event.with("health_status", status.as_str())
            });
        }
        self.wait_for_health_check();
    }

    fn wait_for_health_check(&mut self) {
        if let Some(health) = &self.health {
            let interval = health.interval();
            self.set_timer(SupervisorTimer::Health, interval);
        }
    }
}
