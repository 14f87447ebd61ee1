//! Snapshots of the running workload.
//!
//! The sequence: freeze the workload, write back dirty data, pause the machine while its
//! memory is copied, thaw the workload; the snapshot is published concurrently. Clients
//! are served all the time. The captured workload is frozen, in a guest whose agent is
//! idle: a clone gets a new identity before it thaws the workload.
//!
//! A reset, which restores a clone to its snapshot, is a start without creating a
//! machine.

use std::time::{Duration, Instant};

use sm_control::launch::{ControlAnswer, SnapshotReport};
use sm_guest_proto::control::{ControlReply, ControlRequest};
use sm_guest_proto::port;
use sm_snapshot::manifest::Layer;

use super::space::NO_SPACE;
use super::stage::{
    Copied, MachineActivity, Resetting, RunningStage, SnapshotJob, Startup, StartupStep,
    SupervisorStage,
};
use super::{Supervisor, SupervisorTimer, printable};
use crate::agent::Purpose;
use crate::guest::{
    AfterCapture, GuestMachine, MergeEnd, MergeStep, PublishedSnapshot, SnapshotPlan,
};

/// Time limit for the guest to freeze its workload and write back its data. (The agent
/// has a shorter limit, if it still runs.)
pub(super) const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);

/// The answer for a snapshot that will not be taken.
const ENDED: &str = "the VM exited before its snapshot was taken";

impl<G: GuestMachine> Supervisor<G> {
    pub(super) fn start_snapshot(&mut self, client: u64, plan: SnapshotPlan) {
        if self.waits_for_merge() {
            return self.waiting_snapshots.push((client, plan));
        }
        self.start_snapshot_now(client, plan);
    }

    /// Returns true if layers of a disk are merged, and have to be before the machine is
    /// captured.
    fn waits_for_merge(&mut self) -> bool {
        let can_start = match &self.stage {
            SupervisorStage::Running(running) => {
                matches!(running.machine, MachineActivity::Free) && running.publishing.is_none()
            }
            SupervisorStage::Starting(_)
            | SupervisorStage::Resetting(_)
            | SupervisorStage::Ending(_) => false,
        };
        match &mut self.guest {
            Some(guest) => can_start && guest.is_full() && guest.merge(true),
            None => false,
        }
    }

    /// Handles a step of a merge. Snapshots that waited for its end are taken, also with
    /// more layers if it has failed.
    pub(super) fn merge_went_on(&mut self, step: MergeStep) {
        let end = self.guest.as_mut().and_then(|guest| guest.merge_step(step));
        if let Some(end) = end {
            for (client, plan) in std::mem::take(&mut self.waiting_snapshots) {
                match end {
                    MergeEnd::Done => self.start_snapshot(client, plan),
                    MergeEnd::Failed => self.start_snapshot_now(client, plan),
                }
            }
        }
    }

    fn start_snapshot_now(&mut self, client: u64, plan: SnapshotPlan) {
        if let Err(refusal) = self.try_start_snapshot(client, plan) {
            self.answer(client, &ControlAnswer::Error(refusal));
        }
    }

    fn try_start_snapshot(&mut self, client: u64, plan: SnapshotPlan) -> Result<(), String> {
        if let Some(guest) = &self.guest {
            guest.check_snapshot(&plan.name)?;
        }
        let is_about_to_end = self.is_about_to_end();
        let refusal = match &mut self.stage {
            SupervisorStage::Starting(_) => "the workload has not started yet",
            SupervisorStage::Resetting(_) => "this VM is being reset to its snapshot",
            SupervisorStage::Ending(_) => "the workload has ended",
            SupervisorStage::Running(running) => match (&running.machine, &running.publishing) {
                (MachineActivity::Paused, _) => "the VM is paused: unpause it first",
                (MachineActivity::NoSpace, _) => NO_SPACE,
                (
                    MachineActivity::Preparing(_)
                    | MachineActivity::Copying(_)
                    | MachineActivity::Publishing(_),
                    _,
                )
                | (MachineActivity::Free, Some(_)) => {
                    "a snapshot of this VM is being taken already"
                }
                (MachineActivity::Free, None) if is_about_to_end => "the VM is about to end",
                (MachineActivity::Free, None) => match &mut self.agent {
                    None => "the guest's agent is gone",
                    Some(agent) => {
                        self.snapshots += 1;
                        let job = self.snapshots;
                        agent.send_request(Purpose::Freeze { job }, &ControlRequest::Freeze);
                        running.machine = MachineActivity::Preparing(SnapshotJob {
                            id: job,
                            client,
                            plan,
                            requested_at: Instant::now(),
                            frozen_us: 0,
                            warning: None,
                        });
                        self.leave_out_health_check();
                        self.set_timer(SupervisorTimer::Prepare, self.prepare_timeout);
                        return Ok(());
                    }
                },
            },
        };
        Err(refusal.to_owned())
    }

    /// Returns whether the guest prepares for `job`, which may have been cancelled.
    fn is_current(&self, job: u64) -> bool {
        match &self.stage {
            SupervisorStage::Running(RunningStage {
                machine: MachineActivity::Preparing(now),
                ..
            }) => now.id == job,
            SupervisorStage::Starting(_)
            | SupervisorStage::Running(_)
            | SupervisorStage::Resetting(_)
            | SupervisorStage::Ending(_) => false,
        }
    }

    /// Cancels a snapshot for which the guest was not ready in time.
    pub(super) fn preparing_took_too_long(&mut self) {
        let seconds = self.prepare_timeout.as_secs();
        // Late answers are ignored; this request is queued behind them.
        self.thaw();
        self.snapshot_failed(&format!(
            "the guest did not get ready for a snapshot within {seconds} s"
        ));
    }

    /// Handles the agent's answer to the request to freeze.
    pub(super) fn frozen(&mut self, job: u64, reply: ControlReply) {
        if !self.is_current(job) {
            return;
        }
        match (reply, &mut self.agent) {
            (ControlReply::Done, Some(agent)) => {
                agent.send_request(Purpose::Prepare { job }, &ControlRequest::PrepareSnapshot);
            }
            (reply, _) => {
                self.thaw();
                self.snapshot_failed(&refused("freeze the workload", reply));
            }
        }
    }

    /// Handles the agent's answer to the request to prepare.
    pub(super) fn prepared(&mut self, job: u64, reply: ControlReply) {
        if !self.is_current(job) {
            return;
        }
        self.clear_timer(SupervisorTimer::Prepare);
        if reply != ControlReply::Done {
            self.thaw();
            return self.snapshot_failed(&refused("prepare the guest", reply));
        }
        let (
            SupervisorStage::Running(RunningStage {
                machine: machine @ MachineActivity::Preparing(_),
                ..
            }),
            Some(guest),
        ) = (&mut self.stage, &mut self.guest)
        else {
            return;
        };
        let MachineActivity::Preparing(mut job) = std::mem::take(machine) else {
            return;
        };
        match guest.snapshot(job.plan.clone()) {
            Ok(warning) => {
                job.warning = warning;
                *machine = MachineActivity::Copying(job);
            }
            Err(error) => {
                *machine = MachineActivity::Preparing(job);
                self.thaw();
                self.snapshot_failed(&error);
            }
        }
    }

    /// Records that the machine of a startup is paused, and the step that follows. The
    /// copy of memory is no delay of the guest, so its time to start is suspended.
    pub(super) fn suspend_startup(&mut self, next: StartupStep) {
        let remaining = self.take_timer(SupervisorTimer::Start);
        if let Some(startup) = self.stage.startup() {
            *startup = Startup::Copying { next, remaining };
        }
    }

    /// Handles the end of the memory copy of a paused machine.
    pub(super) fn captured(&mut self, copied: Result<(), String>) {
        if let Err(error) = &copied {
            tracing::warn!(error, "a snapshot was not taken");
        }
        match &mut self.stage {
            SupervisorStage::Starting(startup)
            | SupervisorStage::Resetting(Resetting { startup, .. }) => {
                match std::mem::replace(startup, Startup::Preparing) {
                    Startup::Copying { next, remaining } => self.startup_captured(next, remaining),
                    other => *startup = other,
                }
            }
            SupervisorStage::Running(running) => match &running.machine {
                MachineActivity::Copying(job) => {
                    let then = match job.plan.leave_paused && copied.is_ok() {
                        true => AfterCapture::LeavePaused,
                        false => AfterCapture::Run,
                    };
                    if self.end_pause(then) {
                        self.workload_captured(copied, then);
                    }
                }
                MachineActivity::Free
                | MachineActivity::Paused
                | MachineActivity::NoSpace
                | MachineActivity::Preparing(_)
                | MachineActivity::Publishing(_) => {}
            },
            SupervisorStage::Ending(ending) => {
                let Some(purpose) = ending.copying.take() else {
                    return;
                };
                let then = match purpose {
                    Copied::ForCache => AfterCapture::Run,
                    // The client was already notified of the failure.
                    Copied::Discarded => AfterCapture::Discard,
                };
                let continues = self.end_pause(then);
                if continues && purpose == Copied::Discarded {
                    self.thaw();
                }
            }
        }
    }

    /// Ends the pause of the machine, unless it is to stay paused. Returns false if that
    /// fails, which ends the VM.
    fn end_pause(&mut self, then: AfterCapture) -> bool {
        match self.guest.as_mut().map(|guest| guest.captured(then)) {
            Some(Err(error)) => {
                self.host_failed(&error);
                if let SupervisorStage::Ending(ending) = &mut self.stage {
                    ending.copying = None;
                }
                false
            }
            Some(Ok(())) | None => true,
        }
    }

    fn startup_captured(&mut self, next: StartupStep, remaining: Option<Duration>) {
        if let Some(remaining) = remaining {
            self.set_timer(SupervisorTimer::Start, remaining);
        }
        if !self.end_pause(AfterCapture::Run) {
            return;
        }
        match next {
            StartupStep::Agent(stream) => self.meet_agent(stream),
            StartupStep::Workload => self.go_on_with_root(),
        }
    }

    fn workload_captured(&mut self, copied: Result<(), String>, then: AfterCapture) {
        match then {
            // The machine ends when its snapshot is published, or when the stop grace is
            // over.
            AfterCapture::LeavePaused => self.start_grace(),
            AfterCapture::Run | AfterCapture::Discard => self.thaw(),
        }
        let SupervisorStage::Running(running) = &mut self.stage else {
            return;
        };
        let mut job = match std::mem::take(&mut running.machine) {
            MachineActivity::Copying(job) => job,
            other => {
                running.machine = other;
                return;
            }
        };
        if let Err(error) = copied {
            return self.answer(job.client, &ControlAnswer::Error(error));
        }
        job.frozen_us = u64::try_from(job.requested_at.elapsed().as_micros()).unwrap_or(u64::MAX);
        match job.plan.leave_paused {
            true => running.machine = MachineActivity::Publishing(job),
            false => running.publishing = Some(job),
        }
    }

    /// Cancels the copy of a paused machine, which is needed for something else.
    pub(super) fn cancel_capture(&self) {
        if let Some(guest) = &self.guest {
            guest.cancel_capture();
        }
    }

    /// Handles the end of publishing.
    pub(super) fn snapshot_published(&mut self, published: Result<PublishedSnapshot, String>) {
        let job = match &mut self.stage {
            SupervisorStage::Running(running) => match std::mem::take(&mut running.machine) {
                MachineActivity::Publishing(job) => Some(job),
                other => {
                    running.machine = other;
                    running.publishing.take()
                }
            },
            SupervisorStage::Ending(ending) => ending.publishing.take(),
            SupervisorStage::Starting(_) | SupervisorStage::Resetting(_) => None,
        };
        let Some(job) = job else {
            return;
        };
        match published {
            Ok(PublishedSnapshot { report, guard }) => {
                let name = job.plan.name;
                let why = format!("it was stopped when snapshot \"{name}\" of it was taken");
                let report = SnapshotReport {
                    name,
                    frozen_us: job.frozen_us,
                    warnings: job.warning.into_iter().collect(),
                    ..report
                };
                if !job.plan.ephemeral {
                    self.note_snapshot(&report.name);
                }
                self.answer(job.client, &ControlAnswer::Snapshot(report));
                // The snapshot is kept until the client has opened it, or disconnects.
                if let Some(client) = self.clients.get_mut(&job.client) {
                    client.snapshot_guard = guard;
                }
                if job.plan.leave_paused {
                    self.destroy(&why);
                }
            }
            Err(error) => {
                self.answer(job.client, &ControlAnswer::Error(error));
                if job.plan.leave_paused && !self.stage.has_ended() {
                    if let Some(Err(error)) = self.guest.as_mut().map(GuestMachine::resume) {
                        self.guest_broke(&error);
                    }
                    self.thaw();
                }
            }
        }
        if self.stage.has_ended() {
            self.close_client(job.client);
            return self.release_when_published();
        }
        if let Some(guest) = &mut self.guest {
            guest.merge(false);
        }
    }

    /// Resets the machine to its snapshot, and starts it as after a restore.
    pub(super) fn reset(&mut self, client: u64) {
        let refusal = match &self.stage {
            SupervisorStage::Starting(_) | SupervisorStage::Ending(_) => {
                "the workload does not run"
            }
            SupervisorStage::Resetting(_) => "this VM is being reset already",
            SupervisorStage::Running(running) => match (&running.machine, &running.publishing) {
                (MachineActivity::Paused, _) => "the VM is paused: unpause it first",
                (MachineActivity::NoSpace, _) => NO_SPACE,
                (
                    MachineActivity::Preparing(_)
                    | MachineActivity::Copying(_)
                    | MachineActivity::Publishing(_),
                    _,
                )
                | (MachineActivity::Free, Some(_)) => "a snapshot of this VM is being taken",
                (MachineActivity::Free, None) if self.is_about_to_end() => "the VM is about to end",
                (MachineActivity::Free, None) if self.restored() != Some(Layer::App) => {
                    "it was not started from a workload snapshot, so it cannot be reset"
                }
                (MachineActivity::Free, None) => return self.start_reset(client),
            },
        };
        self.answer(client, &ControlAnswer::Error(refusal.to_owned()));
    }

    fn start_reset(&mut self, client: u64) {
        self.forget_health();
        self.host_changes.restart();
        self.agent = None;
        self.main = None;
        self.phases.clear();
        self.clear_guest_timers();
        self.set_timer(
            SupervisorTimer::Start,
            Duration::from_millis(self.request.start_timeout_ms),
        );
        self.stage = SupervisorStage::Resetting(Resetting {
            client,
            startup: Startup::AgentAwaited,
        });
        let Some(guest) = &mut self.guest else {
            return;
        };
        let called = guest.reset().and_then(|()| {
            guest
                .connect(port::CONTROL)
                .map_err(|error| format!("cannot call the guest agent: {error}"))
        });
        match called {
            Ok(stream) => self.agent_dialed(stream),
            Err(error) => {
                self.stage = SupervisorStage::Running(RunningStage::default());
                self.answer(client, &ControlAnswer::Error(error.clone()));
                self.guest_broke(&error);
            }
        }
    }

    /// Cancels a snapshot or a reset when the VM ends in the stage `before`. A snapshot
    /// that was captured is published nevertheless, and its result reported later. Returns
    /// the copy of memory and the publication that are still in progress.
    pub(super) fn cancel_captures(
        &mut self,
        before: SupervisorStage,
    ) -> (Option<Copied>, Option<SnapshotJob>) {
        for (client, _) in std::mem::take(&mut self.waiting_snapshots) {
            self.answer(client, &ControlAnswer::Error(ENDED.to_owned()));
        }
        match before {
            SupervisorStage::Starting(startup) => {
                self.cancel_capture();
                (startup.copying(), None)
            }
            SupervisorStage::Resetting(Resetting { client, startup }) => {
                let text = "the VM exited before the reset completed".to_owned();
                self.answer(client, &ControlAnswer::Error(text));
                self.cancel_capture();
                (startup.copying(), None)
            }
            SupervisorStage::Running(running) => match running.machine {
                MachineActivity::Free | MachineActivity::Paused | MachineActivity::NoSpace => {
                    if running.publishing.is_none() {
                        self.cancel_capture();
                    }
                    (None, running.publishing)
                }
                MachineActivity::Preparing(job) => {
                    self.ended_before_capture(&job);
                    (None, running.publishing)
                }
                MachineActivity::Copying(job) => {
                    self.ended_before_capture(&job);
                    (Some(Copied::Discarded), running.publishing)
                }
                MachineActivity::Publishing(job) => (None, Some(job)),
            },
            SupervisorStage::Ending(ending) => (ending.copying, ending.publishing),
        }
    }

    fn ended_before_capture(&mut self, job: &SnapshotJob) {
        self.cancel_capture();
        self.answer(job.client, &ControlAnswer::Error(ENDED.to_owned()));
    }

    /// Answers the client of a snapshot for which the guest did not get ready.
    pub(super) fn snapshot_failed(&mut self, why: &str) {
        self.clear_timer(SupervisorTimer::Prepare);
        if let SupervisorStage::Running(RunningStage { machine, .. }) = &mut self.stage {
            match std::mem::take(machine) {
                MachineActivity::Preparing(job) => {
                    self.answer(job.client, &ControlAnswer::Error(why.to_owned()));
                }
                other => *machine = other,
            }
        }
    }

    /// Thaws the workload. If it is to stop, its stop grace starts now.
    pub(super) fn thaw(&mut self) {
        self.start_grace();
        if let Some(agent) = &mut self.agent {
            agent.send_request(Purpose::Thaw, &ControlRequest::Thaw);
        }
    }
}

fn refused(what: &str, reply: ControlReply) -> String {
    printable(&match reply {
        ControlReply::Error { message } => format!("cannot {what}: {message}"),
        other => format!("cannot {what}: the guest answered {other:?}"),
    })
}
