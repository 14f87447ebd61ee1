//! Attached clients and the control socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::PollFlags;
use sm_control::launch::{ControlAnswer, ControlCall, LaunchRequest, Report, Stage, Status};
use sm_guest_proto::frame::FrameType;

use super::snapshots::SnapshotJob;
use super::{Supervisor, Timer, interest};
use crate::agent::Purpose;
use crate::conn::Conn;
use crate::guest::{Guest, Kept, SnapshotPlan};

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// It may make control calls.
    Control,
    /// It wants to hear how the VM ends.
    Waiting,
    /// It reads the output log, and wants to hear when there is more.
    Following,
    /// The launcher of a detached VM: hears reports until the workload runs.
    Launcher,
    /// It gets the workload's output, and gives input if `stdin`.
    Attached {
        stdin: bool,
        /// It is the launcher; losing it before the start cancels the start.
        launcher: bool,
    },
}

/// A connected client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) conn: Conn,
    pub(super) role: Role,
    /// Nothing more is to be sent; it goes once everything is.
    pub(super) closing: bool,
    /// When it came, or made its last call.
    pub(super) active: Instant,
    /// It has the descriptor that is kept for when there are no more.
    pub(super) on_spare: bool,
    /// It has sent end of file on its STDIN.
    pub(super) stdin_ended: bool,
    /// It has missed output, and was told.
    pub(super) left_behind: bool,
    /// The snapshot that it asked for, kept until it goes.
    pub(super) kept: Option<Kept>,
}

impl Client {
    pub(super) fn launcher(stream: UnixStream, request: &LaunchRequest) -> io::Result<Self> {
        let role = if request.attach {
            Role::Attached {
                stdin: request.config.workload.stdin,
                launcher: true,
            }
        } else {
            Role::Launcher
        };
        Self::new(stream, role)
    }

    pub(super) fn new(stream: UnixStream, role: Role) -> io::Result<Self> {
        Ok(Self {
            conn: Conn::new(stream)?,
            role,
            closing: false,
            active: Instant::now(),
            on_spare: false,
            stdin_ended: false,
            left_behind: false,
            kept: None,
        })
    }

    pub(super) fn is_done(&self) -> bool {
        self.closing && self.conn.unsent() == 0
    }

    fn is_launcher(&self) -> bool {
        matches!(
            self.role,
            Role::Launcher | Role::Attached { launcher: true, .. }
        )
    }

    pub(super) fn is_attached(&self) -> bool {
        matches!(self.role, Role::Attached { .. })
    }
}

impl<G: Guest> Supervisor<G> {
    pub(super) fn add_client(&mut self, client: Client) {
        let id = self.next_client;
        self.next_client += 1;
        self.clients.insert(id, client);
    }

    /// What to wait for on a client; `None` leaves it out.
    pub(super) fn client_interest(&self, client: &Client) -> Option<PollFlags> {
        let write = client.conn.unsent() > 0;
        let read = !client.conn.ended()
            && match client.role {
                // Answers that are not read are no reason to make more.
                Role::Control | Role::Waiting | Role::Following | Role::Launcher => {
                    !client.conn.is_full()
                }
                Role::Attached { .. } => self.takes_input(),
            };
        let flags = interest(read, write);
        // Before the workload takes input a vanished launcher still matters:
        // hang-ups are reported without being asked for.
        let watch_hang_up = client.is_launcher() && self.stage == Stage::Starting;
        (!flags.is_empty() || watch_hang_up).then_some(flags)
    }

    /// Whether frames from clients can go to the guest now.
    fn takes_input(&self) -> bool {
        match (&self.main, self.stage) {
            (Some(main), Stage::Starting | Stage::Running) => {
                self.main_requested && !main.is_full()
            }
            // Read and ignored, so that its end is seen.
            (_, Stage::Ending) => true,
            (None, _) => false,
        }
    }

    pub(super) fn client_ready(&mut self, id: u64, flags: PollFlags) {
        let takes_input = self.takes_input();
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        let may_read = takes_input || !client.is_attached();
        if may_read {
            client.conn.read();
        } else if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
            self.drop_client(id);
        }
    }

    /// Handles the frames that have arrived from clients.
    pub(super) fn pump_clients(&mut self) {
        let ids: Vec<u64> = self.clients.keys().copied().collect();
        for id in ids {
            self.pump_client(id);
        }
        if self.places_are_taken() && !self.is_set(Timer::Idle) {
            self.set_timer(Timer::Idle, self.idle_timeout);
        }
    }

    fn pump_client(&mut self, id: u64) {
        loop {
            let takes_input = self.takes_input();
            let Some(client) = self.clients.get_mut(&id) else {
                return;
            };
            let waits = match client.is_attached() {
                true => !takes_input,
                false => client.conn.is_full(),
            };
            if waits {
                return;
            }
            let ended = client.conn.ended();
            let frame = match client.conn.decoder.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) if ended => return self.client_ended(id),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "dropped a client that does not send frames");
                    return self.drop_client(id);
                }
            };
            match client.role {
                Role::Attached { stdin, .. } => {
                    let kind = frame.kind;
                    let accepted = match kind {
                        FrameType::Stdin => stdin && !client.stdin_ended,
                        FrameType::Resize => true,
                        _ => false,
                    };
                    if accepted {
                        client.stdin_ended |= kind == FrameType::Stdin && frame.payload.is_empty();
                        if let Some(main) = &mut self.main {
                            main.queue(kind, frame.payload);
                        }
                    } else if let (FrameType::Signal, &[signal]) = (kind, frame.payload) {
                        self.signal(signal);
                    }
                }
                Role::Control if frame.kind == FrameType::Request => {
                    client.active = Instant::now();
                    let call = serde_json::from_slice(frame.payload);
                    match call {
                        Ok(call) => self.call(id, &call),
                        Err(error) => {
                            let text = format!("not a request this version knows: {error}");
                            self.answer(id, &ControlAnswer::Error(text));
                        }
                    }
                }
                Role::Control | Role::Waiting | Role::Following | Role::Launcher => {}
            }
        }
    }

    /// The client will send nothing more. One that made a call still gets its answer.
    fn client_ended(&mut self, id: u64) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        if client.role == Role::Control && client.conn.unsent() > 0 {
            client.closing = true;
        } else if !client.closing {
            self.drop_client(id);
        }
    }

    /// Forgets a client, with what that means for the VM.
    pub(super) fn drop_client(&mut self, id: u64) {
        let Some(client) = self.clients.remove(&id) else {
            return;
        };
        let is_launcher = client.is_launcher();
        let Client {
            role,
            stdin_ended,
            conn,
            ..
        } = client;
        drop(conn);
        self.keep_spare();
        // There is a place, and a descriptor.
        self.clear_timer(Timer::Accept);
        if is_launcher && self.stage == Stage::Starting {
            // Nobody has learnt of this VM yet, and nobody will.
            self.request.config.auto_remove = true;
            self.cancel();
            return;
        }
        // A client that leaves without ending its input ends it by leaving;
        // on a terminal it merely detaches.
        let Role::Attached { stdin: true, .. } = role else {
            return;
        };
        let last = !self
            .clients
            .values()
            .any(|other| matches!(other.role, Role::Attached { stdin: true, .. }));
        if last
            && !stdin_ended
            && !self.request.config.workload.tty
            && let Some(main) = &mut self.main
        {
            main.queue(FrameType::Stdin, &[]);
        }
    }

    fn call(&mut self, id: u64, call: &ControlCall) {
        let answer = match *call {
            ControlCall::Status => ControlAnswer::Status(self.status()),
            ControlCall::Attach { stdin } => return self.attach(id, stdin),
            ControlCall::Signal { signal } => self.signal(signal),
            // Answered first: the end may be at once.
            ControlCall::Stop { grace_ms } => {
                self.answer(id, &ControlAnswer::Done);
                return self.stop(grace_ms);
            }
            ControlCall::Destroy => {
                self.answer(id, &ControlAnswer::Done);
                self.destroy("it was removed while it was running");
                // Its record goes, too.
                return self.forgo_record();
            }
            ControlCall::Pause => self.pause(true),
            ControlCall::Resume => self.pause(false),
            ControlCall::Stats => return self.stats(id),
            ControlCall::Profile { on } => ControlAnswer::Profile(
                self.guest
                    .as_ref()
                    .map(|guest| guest.profile(on))
                    .unwrap_or_default(),
            ),
            ControlCall::Reset => return self.reset(id),
            ControlCall::Snapshot {
                ref name,
                stop,
                ephemeral,
            } => {
                let plan = SnapshotPlan {
                    name: name.clone(),
                    ephemeral,
                    stay: stop,
                };
                return self.begin_snapshot(id, plan);
            }
            ControlCall::Wait => {
                if let Some(exit) = self.ended.clone() {
                    return self.answer(id, &ControlAnswer::Ended(exit));
                }
                if let Err(text) = self.may_stay(id) {
                    return self.answer(id, &ControlAnswer::Error(text));
                }
                if let Some(client) = self.clients.get_mut(&id) {
                    client.role = Role::Waiting;
                }
                return;
            }
            ControlCall::Follow => {
                if let Err(text) = self.may_stay(id) {
                    return self.answer(id, &ControlAnswer::Error(text));
                }
                self.answer(id, &ControlAnswer::Done);
                if let Some(client) = self.clients.get_mut(&id) {
                    client.role = Role::Following;
                    // There will be no more.
                    client.closing = self.ended.is_some();
                }
                return;
            }
        };
        self.answer(id, &answer);
    }

    pub(super) fn answer(&mut self, id: u64, answer: &ControlAnswer) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.conn.queue_json(FrameType::Control, answer);
        }
    }

    fn status(&self) -> Status {
        Status {
            stage: self.stage,
            paused: self.paused,
            vmm_pid: std::process::id(),
            epoch: self.epoch.clone(),
            started_ns: self.started_ns,
            clients: self.clients.values().filter(|c| c.is_attached()).count(),
            published: self
                .guest
                .as_ref()
                .map(Guest::published)
                .unwrap_or_default(),
        }
    }

    fn attach(&mut self, id: u64, stdin: bool) {
        if self.stage == Stage::Ending {
            let text = "the workload has ended".to_owned();
            return self.answer(id, &ControlAnswer::Error(text));
        }
        if let Err(text) = self.may_stay(id) {
            return self.answer(id, &ControlAnswer::Error(text));
        }
        self.answer(id, &ControlAnswer::Done);
        if let Some(client) = self.clients.get_mut(&id) {
            client.role = Role::Attached {
                stdin: stdin && self.request.config.workload.stdin,
                launcher: false,
            };
        }
    }

    fn signal(&mut self, signal: u8) -> ControlAnswer {
        // Nothing but this ends a workload that is held; other signals wait for it to
        // go on, as they do for a frozen process.
        if signal == sm_control::signal::KILL {
            self.give_up_capture();
            if let Err(error) = self.let_run() {
                return ControlAnswer::Error(error);
            }
        }
        match (&mut self.agent, self.stage) {
            (Some(agent), Stage::Running) if agent.is_behind() => {
                ControlAnswer::Error("the guest does not answer".into())
            }
            (Some(agent), Stage::Running) => {
                agent.signal_main(signal, false);
                ControlAnswer::Done
            }
            (_, Stage::Starting) => ControlAnswer::Error("the workload has not started yet".into()),
            _ => ControlAnswer::Error("the workload has ended".into()),
        }
    }

    fn pause(&mut self, pause: bool) -> ControlAnswer {
        let job = self.snapshot.as_ref();
        let busy = self.held.is_some() || job.is_some_and(SnapshotJob::needs_machine);
        if busy || self.resetting.is_some() {
            let what = if busy {
                "a snapshot of this VM is being made"
            } else {
                "this VM is being put back to its snapshot"
            };
            return ControlAnswer::Error(format!("{what}: try again when that is done"));
        }
        let refusal = match self.stage {
            // It has to be there in time, and would not.
            Stage::Starting => Some("the workload has not started yet"),
            Stage::Ending => Some("the workload has ended"),
            Stage::Running if pause && self.is_about_to_end() => Some("the VM is about to end"),
            Stage::Running => None,
        };
        if let Some(text) = refusal {
            return ControlAnswer::Error(text.to_owned());
        }
        let Some(guest) = &mut self.guest else {
            return ControlAnswer::Error("the VM has ended".into());
        };
        let result = if pause { guest.pause() } else { guest.resume() };
        match result {
            Ok(()) => {
                self.paused = pause;
                ControlAnswer::Done
            }
            Err(text) => ControlAnswer::Error(text),
        }
    }

    fn stats(&mut self, id: u64) {
        match &mut self.agent {
            Some(agent) if agent.is_behind() => {
                let text = "the guest does not answer".to_owned();
                self.answer(id, &ControlAnswer::Error(text));
            }
            Some(agent) => agent.ask(
                Purpose::Stats { client: id },
                &sm_guest_proto::control::ControlRequest::Stats,
            ),
            None => {
                let text = "the guest is not ready yet".to_owned();
                self.answer(id, &ControlAnswer::Error(text));
            }
        }
    }

    /// Tells launcher and attached clients.
    pub(super) fn report(&mut self, report: &Report) {
        for client in self.clients.values_mut() {
            if client.is_launcher() || client.is_attached() {
                client.conn.queue_json(FrameType::Control, report);
            }
        }
    }

    /// The workload runs: a launcher that does not stay attached goes.
    pub(super) fn release_launcher(&mut self) {
        self.clear_timer(Timer::Start);
        for client in self.clients.values_mut() {
            client.closing |= client.role == Role::Launcher;
        }
    }

    /// The last messages have been queued.
    pub(super) fn close_clients(&mut self) {
        let ended = self.ended.clone();
        let awaits_snapshot = self.awaits_snapshot();
        let stays = self.unwritten.is_some();
        for (&id, client) in &mut self.clients {
            if let (Role::Waiting, Some(exit)) = (client.role, &ended) {
                let answer = ControlAnswer::Ended(exit.clone());
                client.conn.queue_json(FrameType::Control, &answer);
            }
            // Others may still be asked how it ended.
            let calls_on = stays && client.role == Role::Control;
            client.closing = awaits_snapshot != Some(id) && !calls_on;
        }
    }

    /// The last message to this one has been queued.
    pub(super) fn close_client(&mut self, id: u64) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.closing = true;
        }
    }

    /// Lets the vCPUs run again if they were held on request.
    pub(super) fn let_run(&mut self) -> Result<(), String> {
        if std::mem::take(&mut self.paused)
            && let Some(guest) = &mut self.guest
        {
            guest.resume()?;
        }
        Ok(())
    }
}
