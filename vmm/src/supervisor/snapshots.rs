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

use super::stage::{Copied, Machine, Next, Resetting, Running, SnapshotJob, Stage, Startup};
use super::{Supervisor, Timer, printable};
use crate::agent::Purpose;
use crate::guest::{AfterCapture, Guest, SnapshotMade, SnapshotPlan};

/// Time limit for the guest to freeze its workload and write back its data. (The agent
/// has a shorter limit, if it still runs.)
pub(super) const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);

impl<G: Guest> Supervisor<G> {
    pub(super) fn begin_snapshot(&mut self, client: u64, plan: SnapshotPlan) {
        if let Err(refusal) = self.try_begin_snapshot(client, plan) {
            self.answer(client, &ControlAnswer::Error(refusal));
        }
    }

    fn try_begin_snapshot(&mut self, client: u64, plan: SnapshotPlan) -> Result<(), String> {
        if let Some(guest) = &self.guest {
            guest.check_snapshot(&plan.name)?;
        }
        let is_about_to_end = self.is_about_to_end();
        let refusal = match &mut self.stage {
            Stage::Starting(_) => "the workload has not started yet",
            Stage::Resetting(_) => "this VM is being reset to its snapshot",
            Stage::Ending(_) => "the workload has ended",
            Stage::Running(running) => match (&running.machine, &running.publishing) {
                (Machine::Paused, _) => "the VM is paused: unpause it first",
                (Machine::Preparing(_) | Machine::Copying(_) | Machine::Staying(_), _)
                | (Machine::Free, Some(_)) => "a snapshot of this VM is being taken already",
                (Machine::Free, None) if is_about_to_end => "the VM is about to end",
                (Machine::Free, None) => match &mut self.agent {
                    None => "the guest's agent is gone",
                    Some(agent) => {
                        self.snapshots += 1;
                        let job = self.snapshots;
                        agent.ask(Purpose::Freeze { job }, &ControlRequest::Freeze);
                        running.machine = Machine::Preparing(SnapshotJob {
                            id: job,
                            client,
                            plan,
                            asked: Instant::now(),
                            frozen_us: 0,
                        });
                        self.set_timer(Timer::Prepare, self.prepare_timeout);
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
            Stage::Running(Running {
                machine: Machine::Preparing(now),
                ..
            }) => now.id == job,
            Stage::Starting(_) | Stage::Running(_) | Stage::Resetting(_) | Stage::Ending(_) => {
                false
            }
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
                agent.ask(Purpose::Prepare { job }, &ControlRequest::PrepareSnapshot);
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
        self.clear_timer(Timer::Prepare);
        if reply != ControlReply::Done {
            self.thaw();
            return self.snapshot_failed(&refused("prepare the guest", reply));
        }
        let (
            Stage::Running(Running {
                machine: machine @ Machine::Preparing(_),
                ..
            }),
            Some(guest),
        ) = (&mut self.stage, &mut self.guest)
        else {
            return;
        };
        let Machine::Preparing(job) = std::mem::take(machine) else {
            return;
        };
        match guest.snapshot(job.plan.clone()) {
            Ok(()) => *machine = Machine::Copying(job),
            Err(error) => {
                *machine = Machine::Preparing(job);
                self.thaw();
                self.snapshot_failed(&error);
            }
        }
    }

    /// Records that the machine of a startup is paused, and the step that follows. The
    /// copy of memory is no delay of the guest, so its time to start is suspended.
    pub(super) fn hold_startup(&mut self, next: Next) {
        let left = self.take_timer(Timer::Start);
        if let Some(startup) = self.stage.startup() {
            *startup = Startup::Copying { next, left };
        }
    }

    /// Handles the end of the memory copy of a paused machine.
    pub(super) fn captured(&mut self, copied: Result<(), String>) {
        if let Err(error) = &copied {
            tracing::warn!(error, "a snapshot was not taken");
        }
        match &mut self.stage {
            Stage::Starting(startup) | Stage::Resetting(Resetting { startup, .. }) => {
                match std::mem::replace(startup, Startup::Preparing) {
                    Startup::Copying { next, left } => self.startup_captured(next, left),
                    other => *startup = other,
                }
            }
            Stage::Running(running) => match &running.machine {
                Machine::Copying(job) => {
                    let then = match job.plan.stay && copied.is_ok() {
                        true => AfterCapture::Stay,
                        false => AfterCapture::Run,
                    };
                    if self.let_go(then) {
                        self.workload_captured(copied, then);
                    }
                }
                Machine::Free | Machine::Paused | Machine::Preparing(_) | Machine::Staying(_) => {}
            },
            Stage::Ending(ending) => {
                let Some(purpose) = ending.copying.take() else {
                    return;
                };
                let then = match purpose {
                    Copied::ForCache => AfterCapture::Run,
                    // The client was already notified of the failure.
                    Copied::ForNobody => AfterCapture::Forget,
                };
                let continues = self.let_go(then);
                if continues && purpose == Copied::ForNobody {
                    self.thaw();
                }
            }
        }
    }

    /// Ends the pause of the machine, unless it is to stay paused. Returns false if that
    /// fails, which ends the VM.
    fn let_go(&mut self, then: AfterCapture) -> bool {
        match self.guest.as_mut().map(|guest| guest.captured(then)) {
            Some(Err(error)) => {
                self.host_failed(&error);
                if let Stage::Ending(ending) = &mut self.stage {
                    ending.copying = None;
                }
                false
            }
            Some(Ok(())) | None => true,
        }
    }

    fn startup_captured(&mut self, next: Next, left: Option<Duration>) {
        if let Some(left) = left {
            self.set_timer(Timer::Start, left);
        }
        if !self.let_go(AfterCapture::Run) {
            return;
        }
        match next {
            Next::Agent(stream) => self.meet_agent(stream),
            Next::Workload => self.go_on_with_root(),
        }
    }

    fn workload_captured(&mut self, copied: Result<(), String>, then: AfterCapture) {
        match then {
            // The machine ends when its snapshot is published, or when the stop grace is
            // over.
            AfterCapture::Stay => self.begin_grace(),
            AfterCapture::Run | AfterCapture::Forget => self.thaw(),
        }
        let Stage::Running(running) = &mut self.stage else {
            return;
        };
        let mut job = match std::mem::take(&mut running.machine) {
            Machine::Copying(job) => job,
            other => {
                running.machine = other;
                return;
            }
        };
        if let Err(error) = copied {
            return self.answer(job.client, &ControlAnswer::Error(error));
        }
        job.frozen_us = u64::try_from(job.asked.elapsed().as_micros()).unwrap_or(u64::MAX);
        match job.plan.stay {
            true => running.machine = Machine::Staying(job),
            false => running.publishing = Some(job),
        }
    }

    /// Cancels the copy of a paused machine, which is needed for something else.
    pub(super) fn give_up_capture(&self) {
        if let Some(guest) = &self.guest {
            guest.give_up_capture();
        }
    }

    /// Handles the end of publishing.
    pub(super) fn snapshot_made(&mut self, made: Result<SnapshotMade, String>) {
        let job = match &mut self.stage {
            Stage::Running(running) => match std::mem::take(&mut running.machine) {
                Machine::Staying(job) => Some(job),
                other => {
                    running.machine = other;
                    running.publishing.take()
                }
            },
            Stage::Ending(ending) => ending.publishing.take(),
            Stage::Starting(_) | Stage::Resetting(_) => None,
        };
        let Some(job) = job else {
            return;
        };
        match made {
            Ok(SnapshotMade { report, kept }) => {
                let name = job.plan.name;
                let why = format!("it was stopped when snapshot \"{name}\" of it was taken");
                let report = SnapshotReport {
                    name,
                    frozen_us: job.frozen_us,
                    ..report
                };
                self.answer(job.client, &ControlAnswer::Snapshot(report));
                // The snapshot is kept until the client has opened it, or disconnects.
                if let Some(client) = self.clients.get_mut(&job.client) {
                    client.kept = kept;
                }
                if job.plan.stay {
                    self.destroy(&why);
                }
            }
            Err(error) => {
                self.answer(job.client, &ControlAnswer::Error(error));
                if job.plan.stay && !self.stage.has_ended() {
                    if let Some(Err(error)) = self.guest.as_mut().map(Guest::resume) {
                        self.guest_broke(&error);
                    }
                    self.thaw();
                }
            }
        }
        if self.stage.has_ended() {
            self.close_client(job.client);
            self.release_when_published();
        }
    }

    /// Resets the machine to its snapshot, and starts it as after a restore.
    pub(super) fn reset(&mut self, client: u64) {
        let refusal = match &self.stage {
            Stage::Starting(_) | Stage::Ending(_) => "the workload does not run",
            Stage::Resetting(_) => "this VM is being reset already",
            Stage::Running(running) => match (&running.machine, &running.publishing) {
                (Machine::Paused, _) => "the VM is paused: unpause it first",
                (Machine::Preparing(_) | Machine::Copying(_) | Machine::Staying(_), _)
                | (Machine::Free, Some(_)) => "a snapshot of this VM is being taken",
                (Machine::Free, None) if self.is_about_to_end() => "the VM is about to end",
                (Machine::Free, None) if self.restored() != Some(Layer::App) => {
                    "it was not started from a workload snapshot, so it cannot be reset"
                }
                (Machine::Free, None) => return self.put_back(client),
            },
        };
        self.answer(client, &ControlAnswer::Error(refusal.to_owned()));
    }

    fn put_back(&mut self, client: u64) {
        self.agent = None;
        self.main = None;
        self.phases.clear();
        self.clear_guest_timers();
        self.set_timer(
            Timer::Start,
            Duration::from_millis(self.request.start_timeout_ms),
        );
        self.stage = Stage::Resetting(Resetting {
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
                self.stage = Stage::Running(Running::default());
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
        before: Stage,
    ) -> (Option<Copied>, Option<SnapshotJob>) {
        match before {
            Stage::Starting(startup) => {
                self.give_up_capture();
                (startup.copying(), None)
            }
            Stage::Resetting(Resetting { client, startup }) => {
                let text = "the VM exited before the reset completed".to_owned();
                self.answer(client, &ControlAnswer::Error(text));
                self.give_up_capture();
                (startup.copying(), None)
            }
            Stage::Running(running) => match running.machine {
                Machine::Free | Machine::Paused => {
                    if running.publishing.is_none() {
                        self.give_up_capture();
                    }
                    (None, running.publishing)
                }
                Machine::Preparing(job) => {
                    self.ended_before_capture(&job);
                    (None, running.publishing)
                }
                Machine::Copying(job) => {
                    self.ended_before_capture(&job);
                    (Some(Copied::ForNobody), running.publishing)
                }
                Machine::Staying(job) => (None, Some(job)),
            },
            Stage::Ending(ending) => (ending.copying, ending.publishing),
        }
    }

    fn ended_before_capture(&mut self, job: &SnapshotJob) {
        self.give_up_capture();
        let text = "the VM exited before its snapshot was taken".to_owned();
        self.answer(job.client, &ControlAnswer::Error(text));
    }

    /// Answers the client of a snapshot for which the guest did not get ready.
    pub(super) fn snapshot_failed(&mut self, why: &str) {
        self.clear_timer(Timer::Prepare);
        if let Stage::Running(Running { machine, .. }) = &mut self.stage {
            match std::mem::take(machine) {
                Machine::Preparing(job) => {
                    self.answer(job.client, &ControlAnswer::Error(why.to_owned()));
                }
                other => *machine = other,
            }
        }
    }

    /// Thaws the workload. If it is to stop, its stop grace starts now.
    pub(super) fn thaw(&mut self) {
        self.begin_grace();
        if let Some(agent) = &mut self.agent {
            agent.ask(Purpose::Thaw, &ControlRequest::Thaw);
        }
    }
}

fn refused(what: &str, reply: ControlReply) -> String {
    printable(&match reply {
        ControlReply::Error { message } => format!("cannot {what}: {message}"),
        other => format!("cannot {what}: the guest answered {other:?}"),
    })
}
