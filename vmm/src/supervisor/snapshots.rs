//! Making a snapshot of the workload as it runs.
//!
//! Freeze the workload, have dirty data written back, hold the machine while its memory
//! is copied, let the workload go on; publishing the snapshot goes on beside it. Clients
//! are served all the time. What is captured
//! is thus a workload that does nothing, in a guest whose agent is idle: a clone
//! gives itself an identity before it thaws the workload.
//!
//! Also: putting a clone back to its snapshot, which is a start without making a
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

/// How long the guest may take to stop its workload and write back its data before
/// the attempt is given up. (The agent gives up earlier, if it still runs.)
pub(super) const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);

/// Whom the machine that is held lets wait.
#[derive(Debug)]
pub(super) enum Held {
    /// The agent, which has dialled: a base snapshot is made.
    Agent(UnixStream),
    /// The workload, which has not started: an image snapshot is made.
    Root,
    /// The workload, which is frozen: somebody asked for a snapshot.
    Workload,
}

/// A snapshot on its way.
#[derive(Debug)]
pub(super) struct SnapshotJob {
    /// Tells answers to it from answers to an earlier one.
    id: u64,
    /// Who asked for it.
    client: u64,
    plan: SnapshotPlan,
    asked: Instant,
    frozen_us: u64,
    /// Its memory has been copied: what is left happens beside the machine.
    captured: bool,
}

impl SnapshotJob {
    pub(super) fn name(&self) -> &str {
        &self.plan.name
    }

    /// Whether the machine is held for good.
    pub(super) fn stays(&self) -> bool {
        self.captured && self.plan.stay
    }

    /// Whether nothing else may hold or resume the machine.
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
            "a snapshot of this VM is being made already"
        } else if self.is_about_to_end() {
            "the VM is about to end"
        } else if self.resetting.is_some() {
            "this VM is being put back to its snapshot"
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

    /// Whether `job` is the one on its way: it may have been given up.
    fn is_current(&self, job: u64) -> bool {
        self.snapshot.as_ref().is_some_and(|now| now.id == job)
    }

    /// The guest has not got ready in time.
    pub(super) fn preparing_took_too_long(&mut self) {
        let seconds = self.prepare_timeout.as_secs();
        // Late answers are ignored; this request waits behind what is late.
        self.thaw();
        self.snapshot_failed(&format!(
            "the guest did not get ready for a snapshot within {seconds} s"
        ));
    }

    /// The agent has answered the request to freeze.
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

    /// The agent has answered the request to prepare.
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

    /// The machine is held. That takes as long as its memory takes to be copied, which is
    /// no fault of the guest's.
    pub(super) fn hold(&mut self, held: Held) {
        self.held = Some(held);
        self.start_left = self.take_timer(Timer::Start);
    }

    /// The memory of the machine, which is held for that, was copied, or could not be.
    pub(super) fn captured(&mut self, copied: Result<(), String>) {
        let Some(held) = self.held.take() else {
            return;
        };
        if let Some(left) = self.start_left.take() {
            self.set_timer(Timer::Start, left);
        }
        let job = self.snapshot.as_ref();
        let then = match &held {
            // Its client was told that there is no snapshot.
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
            tracing::warn!(error, "a snapshot was not made");
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
            // It ends when its snapshot is published, or when its time is over.
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

    /// Whether the workload is frozen, or about to be, and the machine still runs.
    pub(super) fn is_getting_ready_for_snapshot(&self) -> bool {
        self.held.is_none() && self.snapshot.as_ref().is_some_and(|job| !job.captured)
    }

    /// Has the machine held no longer for a snapshot than it must be: something is
    /// wanted of it that it could not do.
    pub(super) fn give_up_capture(&self) {
        if let Some(guest) = &self.guest {
            guest.give_up_capture();
        }
    }

    /// The snapshot was published, or could not be.
    pub(super) fn snapshot_made(&mut self, made: Result<SnapshotMade, String>) {
        let Some(job) = self.snapshot.take() else {
            return;
        };
        match made {
            Ok(SnapshotMade { report, kept }) => {
                let name = job.plan.name;
                let why = format!("it was stopped when snapshot \"{name}\" of it was made");
                let report = SnapshotReport {
                    name,
                    frozen_us: job.frozen_us,
                    ..report
                };
                self.answer(job.client, &ControlAnswer::Snapshot(report));
                // Until the client has opened it, or is gone.
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

    /// The client that hears later what came of its snapshot.
    pub(super) fn awaits_snapshot(&self) -> Option<u64> {
        self.snapshot.as_ref().map(|job| job.client)
    }

    /// Puts the machine back, and brings it up as after its start.
    pub(super) fn reset(&mut self, client: u64) {
        let refusal = if self.stage != Stage::Running {
            "the workload does not run"
        } else if self.paused {
            "the VM is paused: unpause it first"
        } else if self.snapshot.is_some() || self.held.is_some() {
            "a snapshot of this VM is being made"
        } else if self.is_about_to_end() {
            "the VM is about to end"
        } else if self.resetting.is_some() {
            "this VM is being put back already"
        } else if self.start() != Start::Restored(Layer::App) {
            "it was not started from a snapshot of a workload, so there is nothing to put it back to"
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

    /// The VM ends before it was captured, or put back. One that was captured is
    /// published all the same: what comes of it is not known yet.
    pub(super) fn cancel_snapshot(&mut self) {
        if let Some(client) = self.resetting.take() {
            let text = "the VM ended before it was put back".to_owned();
            self.answer(client, &ControlAnswer::Error(text));
        }
        if !self.snapshot.as_ref().is_some_and(|job| job.captured) {
            self.give_up_capture();
            self.snapshot_failed("the VM ended before its snapshot was made");
        }
    }

    pub(super) fn snapshot_failed(&mut self, why: &str) {
        self.clear_timer(Timer::Prepare);
        if let Some(job) = self.snapshot.take() {
            self.answer(job.client, &ControlAnswer::Error(why.to_owned()));
        }
    }

    /// Lets the workload run. If it is asked to stop, its time begins now.
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
