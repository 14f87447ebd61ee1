//! Snapshots of the running workload.
//!
//! The sequence: freeze the workload, write back dirty data, pause the machine while its
//! memory is copied, thaw the workload; the snapshot is published concurrently. Clients
//! are served all the time. The captured workload is frozen, in a guest whose agent is
//! idle: a clone gets a new identity before it thaws the workload.
//!
//! A reset, which restores a clone to its snapshot, is a start without creating a
//! machine.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use sm_control::launch::{ControlAnswer, SnapshotReport, Stage};
use sm_guest_proto::control::{ControlReply, ControlRequest};
use sm_guest_proto::port;
use sm_snapshot::manifest::Layer;

use super::{Supervisor, Timer, printable};
use crate::agent::Purpose;
use crate::guest::{AfterCapture, Guest, SnapshotMade, SnapshotPlan, Start};

/// Time limit for the guest to freeze its workload and write back its data. (The agent
/// has a shorter limit, if it still runs.)
pub(super) const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);

/// The purpose of a pause.
#[derive(Debug)]
pub(super) enum Held {
    /// A base snapshot: the agent has connected.
    Agent(UnixStream),
    /// An image snapshot: the workload has not started.
    Root,
    /// A workload snapshot that a client requested: the workload is frozen.
    Workload,
}

/// A snapshot in progress.
#[derive(Debug)]
pub(super) struct SnapshotJob {
    /// Distinguishes answers for this job from those for earlier ones.
    id: u64,
    /// The client that requested it.
    client: u64,
    plan: SnapshotPlan,
    asked: Instant,
    frozen_us: u64,
    /// True after its memory was copied: the rest does not involve the machine.
    captured: bool,
}

impl SnapshotJob {
    pub(super) fn name(&self) -> &str {
        &self.plan.name
    }

    /// Returns true if the machine stays paused permanently.
    pub(super) fn stays(&self) -> bool {
        self.captured && self.plan.stay
    }

    /// Returns true if nothing else may pause or resume the machine.
    pub(super) fn needs_machine(&self) -> bool {
        !self.captured || self.plan.stay
    }
}

impl<G: Guest> Supervisor<G> {
    pub(super) fn begin_snapshot(&mut self, client: u64, plan: SnapshotPlan) {
        let taken = self
            .guest
            .as_ref()
            .map_or(Ok(()), |guest| guest.check_snapshot(&plan.name));
        let refusal = if let Err(error) = &taken {
            error
        } else if self.stage == Stage::Starting {
            "the workload has not started yet"
        } else if self.stage == Stage::Ending {
            "the workload has ended"
        } else if self.paused {
            "the VM is paused: unpause it first"
        } else if self.snapshot.is_some() || self.held.is_some() {
            "a snapshot of this VM is being taken already"
        } else if self.is_about_to_end() {
            "the VM is about to end"
        } else if self.resetting.is_some() {
            "this VM is being reset to its snapshot"
        } else if let Some(agent) = &mut self.agent {
            self.snapshots += 1;
            let job = self.snapshots;
            agent.ask(Purpose::Freeze { job }, &ControlRequest::Freeze);
            self.snapshot = Some(SnapshotJob {
                id: job,
                client,
                plan,
                asked: Instant::now(),
                frozen_us: 0,
                captured: false,
            });
            return self.set_timer(Timer::Prepare, self.prepare_timeout);
        } else {
            "the guest's agent is gone"
        };
        self.answer(client, &ControlAnswer::Error(refusal.to_owned()));
    }

    /// Returns true if `job` is in progress: it may have been cancelled.
    fn is_current(&self, job: u64) -> bool {
        self.snapshot.as_ref().is_some_and(|now| now.id == job)
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
        let (Some(job), Some(guest)) = (&mut self.snapshot, &mut self.guest) else {
            return;
        };
        match guest.snapshot(job.plan.clone()) {
            Ok(()) => self.hold(Held::Workload),
            Err(error) => {
                self.thaw();
                self.snapshot_failed(&error);
            }
        }
    }

    /// Records that the machine is paused. The copy of memory is no delay of the guest,
    /// so its time to start is suspended.
    pub(super) fn hold(&mut self, held: Held) {
        self.held = Some(held);
        self.start_left = self.take_timer(Timer::Start);
    }

    /// Handles the end of the memory copy of a paused machine.
    pub(super) fn captured(&mut self, copied: Result<(), String>) {
        let Some(held) = self.held.take() else {
            return;
        };
        if let Some(left) = self.start_left.take() {
            self.set_timer(Timer::Start, left);
        }
        let job = self.snapshot.as_ref();
        let then = match &held {
            // The client was already notified of the failure.
            Held::Workload if job.is_none() => AfterCapture::Forget,
            Held::Workload if job.is_some_and(|job| job.plan.stay) && copied.is_ok() => {
                AfterCapture::Stay
            }
            Held::Agent(_) | Held::Root | Held::Workload => AfterCapture::Run,
        };
        if let Some(Err(error)) = self.guest.as_mut().map(|guest| guest.captured(then)) {
            return self.host_failed(&error);
        }
        if let Err(error) = &copied {
            tracing::warn!(error, "a snapshot was not taken");
        }
        match held {
            Held::Agent(_) | Held::Root if self.ended.is_some() => {}
            Held::Agent(stream) => self.meet_agent(stream),
            Held::Root => self.go_on_with_root(),
            Held::Workload => self.workload_captured(copied, then),
        }
    }

    fn workload_captured(&mut self, copied: Result<(), String>, then: AfterCapture) {
        match then {
            // The machine ends when its snapshot is published, or when the stop grace is
            // over.
            AfterCapture::Stay => self.begin_grace(),
            AfterCapture::Run | AfterCapture::Forget => self.thaw(),
        }
        match (copied, &mut self.snapshot) {
            (Ok(()), Some(job)) => {
                job.frozen_us = u64::try_from(job.asked.elapsed().as_micros()).unwrap_or(u64::MAX);
                job.captured = true;
            }
            (Err(error), _) => self.snapshot_failed(&error),
            (Ok(()), None) => {}
        }
    }

    /// Returns true if the workload is frozen, or about to be, and the machine still
    /// runs.
    pub(super) fn is_getting_ready_for_snapshot(&self) -> bool {
        self.held.is_none() && self.snapshot.as_ref().is_some_and(|job| !job.captured)
    }

    /// Cancels the copy of a paused machine, which is needed for something else.
    pub(super) fn give_up_capture(&self) {
        if let Some(guest) = &self.guest {
            guest.give_up_capture();
        }
    }

    /// Handles the end of publishing.
    pub(super) fn snapshot_made(&mut self, made: Result<SnapshotMade, String>) {
        let Some(job) = self.snapshot.take() else {
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
                if job.plan.stay && self.ended.is_none() {
                    if let Some(Err(error)) = self.guest.as_mut().map(Guest::resume) {
                        self.guest_broke(&error);
                    }
                    self.thaw();
                }
            }
        }
        if self.ended.is_some() {
            self.close_client(job.client);
            self.release_when_published();
        }
    }

    /// Returns the client that waits for the result of its snapshot.
    pub(super) fn awaits_snapshot(&self) -> Option<u64> {
        self.snapshot.as_ref().map(|job| job.client)
    }

    /// Resets the machine to its snapshot, and starts it as after a restore.
    pub(super) fn reset(&mut self, client: u64) {
        let refusal = if self.stage != Stage::Running {
            "the workload does not run"
        } else if self.paused {
            "the VM is paused: unpause it first"
        } else if self.snapshot.is_some() || self.held.is_some() {
            "a snapshot of this VM is being taken"
        } else if self.is_about_to_end() {
            "the VM is about to end"
        } else if self.resetting.is_some() {
            "this VM is being reset already"
        } else if self.start() != Start::Restored(Layer::App) {
            "it was not started from a workload snapshot, so it cannot be reset"
        } else {
            return self.put_back(client);
        };
        self.answer(client, &ControlAnswer::Error(refusal.to_owned()));
    }

    fn put_back(&mut self, client: u64) {
        self.agent = None;
        self.agent_awaited = true;
        self.main = None;
        self.main_requested = false;
        self.phases.clear();
        self.clear_guest_timers();
        self.set_timer(
            Timer::Start,
            Duration::from_millis(self.request.start_timeout_ms),
        );
        self.resetting = Some(client);
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
                if let Some(client) = self.resetting.take() {
                    self.answer(client, &ControlAnswer::Error(error.clone()));
                }
                self.guest_broke(&error);
            }
        }
    }

    /// Cancels a snapshot or a reset when the VM ends. A snapshot that was captured is
    /// published nevertheless, and its result reported later.
    pub(super) fn cancel_snapshot(&mut self) {
        if let Some(client) = self.resetting.take() {
            let text = "the VM exited before the reset completed".to_owned();
            self.answer(client, &ControlAnswer::Error(text));
        }
        if !self.snapshot.as_ref().is_some_and(|job| job.captured) {
            self.give_up_capture();
            self.snapshot_failed("the VM exited before its snapshot was taken");
        }
    }

    pub(super) fn snapshot_failed(&mut self, why: &str) {
        self.clear_timer(Timer::Prepare);
        if let Some(job) = self.snapshot.take() {
            self.answer(job.client, &ControlAnswer::Error(why.to_owned()));
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
