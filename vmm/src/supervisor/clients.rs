//! Attached clients and the control socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::PollFlags;
use sm_control::event::EventAction;
use sm_control::launch::{ControlAnswer, ControlCall, LaunchRequest, Status, VmmReport};
use sm_guest_proto::frame::FrameType;

use super::restarting::EndRequest;
use super::stage::{MachineActivity, Resetting, RunningStage, Startup, SupervisorStage};
use super::{Supervisor, SupervisorTimer, interest};
use crate::agent::Purpose;
use crate::conn::Conn;
use crate::guest::{GuestMachine, SnapshotGuard, SnapshotPlan};

/// The role of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientRole {
    /// It may make control calls.
    Control,
    /// It waits for the VM's end.
    Waiting,
    /// It reads the output log, and is notified of new output.
    Following,
    /// The launcher of a detached VM: receives reports until the workload runs.
    Launcher,
    /// It receives the workload's output, and sends input if `stdin`.
    Attached {
        stdin: bool,
        /// True for the launcher; if it disconnects before the start, the start is
        /// cancelled.
        launcher: bool,
    },
}

/// A connected client.
#[derive(Debug)]
pub(super) struct ConnectedClient {
    pub(super) conn: Conn,
    pub(super) role: ClientRole,
    /// True if the client is dropped after all queued bytes were sent.
    pub(super) closing: bool,
    /// Time of the connection, or of its last call.
    pub(super) active: Instant,
    /// True if it uses the spare descriptor.
    pub(super) on_spare: bool,
    /// True after it has sent end of file on STDIN.
    pub(super) stdin_ended: bool,
    /// True after it has missed output, and was notified.
    pub(super) missed_output: bool,
    /// The snapshot that it requested, which is not removed while the client is
    /// connected.
    pub(super) snapshot_guard: Option<SnapshotGuard>,
}

impl ConnectedClient {
    pub(super) fn launcher(stream: UnixStream, request: &LaunchRequest) -> io::Result<Self> {
        let role = if request.attach {
            ClientRole::Attached {
                stdin: request.config.workload.stdin,
                launcher: true,
            }
        } else {
            ClientRole::Launcher
        };
        Self::new(stream, role)
    }

    pub(super) fn new(stream: UnixStream, role: ClientRole) -> io::Result<Self> {
        Ok(Self {
            conn: Conn::new(stream)?,
            role,
            closing: false,
            active: Instant::now(),
            on_spare: false,
            stdin_ended: false,
            missed_output: false,
            snapshot_guard: None,
        })
    }

    pub(super) fn is_done(&self) -> bool {
        self.closing && self.conn.unsent() == 0
    }

    fn is_launcher(&self) -> bool {
        matches!(
            self.role,
            ClientRole::Launcher | ClientRole::Attached { launcher: true, .. }
        )
    }

    pub(super) fn is_attached(&self) -> bool {
        matches!(self.role, ClientRole::Attached { .. })
    }
}

impl<G: GuestMachine> Supervisor<G> {
    pub(super) fn add_client(&mut self, client: ConnectedClient) {
        let id = self.next_client;
        self.next_client += 1;
        self.clients.insert(id, client);
    }

    /// Returns the poll flags for a client; `None` to skip it.
    pub(super) fn client_interest(&self, client: &ConnectedClient) -> Option<PollFlags> {
        let write = client.conn.has_sendable();
        let read = !client.conn.ended()
            && match client.role {
                // A client that does not read its answers gets no further ones.
                ClientRole::Control
                | ClientRole::Waiting
                | ClientRole::Following
                | ClientRole::Launcher => !client.conn.is_full(),
                ClientRole::Attached { .. } => self.takes_input(),
            };
        let flags = interest(read, write);
        // Before the workload accepts input, a disconnected launcher still matters:
        // hang-ups are reported without interest flags.
        let watch_hang_up =
            client.is_launcher() && matches!(self.stage, SupervisorStage::Starting(_));
        (!flags.is_empty() || watch_hang_up).then_some(flags)
    }

    /// Returns true if frames of clients can be forwarded to the guest now.
    fn takes_input(&self) -> bool {
        let is_requested = match &self.stage {
            SupervisorStage::Starting(startup)
            | SupervisorStage::Resetting(Resetting { startup, .. }) => {
                matches!(startup, Startup::Requested)
            }
            SupervisorStage::Running(_) => true,
            // Input is read and discarded, to detect its end.
            SupervisorStage::Ending(_) => return true,
        };
        is_requested && self.main.as_ref().is_some_and(|main| !main.is_full())
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

    /// Processes the frames that have arrived from clients.
    pub(super) fn pump_clients(&mut self) {
        let ids: Vec<u64> = self.clients.keys().copied().collect();
        for id in ids {
            self.pump_client(id);
        }
        if self.is_at_call_limit() && !self.is_set(SupervisorTimer::Idle) {
            self.set_timer(SupervisorTimer::Idle, self.idle_timeout);
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
                ClientRole::Attached { stdin, .. } => {
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
                        self.signal(None, signal);
                    }
                }
                ClientRole::Control if frame.kind == FrameType::Request => {
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
                ClientRole::Control
                | ClientRole::Waiting
                | ClientRole::Following
                | ClientRole::Launcher => {}
            }
        }
    }

    /// Handles the end of a client's stream. A client that made a call still gets its
    /// answer.
    fn client_ended(&mut self, id: u64) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        if client.role == ClientRole::Control && client.conn.unsent() > 0 {
            client.closing = true;
        } else if !client.closing {
            self.drop_client(id);
        }
    }

    /// Drops a client, with the consequences for the VM.
    pub(super) fn drop_client(&mut self, id: u64) {
        let Some(client) = self.clients.remove(&id) else {
            return;
        };
        let is_launcher = client.is_launcher();
        let ConnectedClient {
            role,
            stdin_ended,
            conn,
            ..
        } = client;
        drop(conn);
        self.reopen_spare();
        // A descriptor is free again.
        self.clear_timer(SupervisorTimer::Accept);
        if is_launcher && matches!(self.stage, SupervisorStage::Starting(_)) {
            // No client knows of a new VM, and none will.
            self.request.config.auto_remove |= !self.request.existing;
            self.cancel();
            return;
        }
        if is_launcher && self.accesses_files() {
            return self.end_file_access();
        }
        // A client that disconnects without ending its input ends it by that, or detaches
        // if the workload has a terminal.
        let ClientRole::Attached { stdin: true, .. } = role else {
            return;
        };
        let last = !self
            .clients
            .values()
            .any(|other| matches!(other.role, ClientRole::Attached { stdin: true, .. }));
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
            ControlCall::Signal { signal } => match self.signal(Some(id), signal) {
                Some(answer) => answer,
                None => return,
            },
            // The answer comes first, because the end may be immediate.
            ControlCall::Stop { grace_ms } => {
                self.answer(id, &ControlAnswer::Done);
                return self.stop(EndRequest::Client, grace_ms);
            }
            ControlCall::Destroy => {
                self.answer(id, &ControlAnswer::Done);
                self.end_is_requested(EndRequest::Client);
                self.cancel_restart(EndRequest::Client);
                self.destroy("it was removed while it was running");
                // The record is removed, too.
                return self.abandon_record();
            }
            ControlCall::Pause => self.pause(true),
            ControlCall::Resume => self.pause(false),
            ControlCall::LimitMemory { bytes } => {
                self.limit_memory(bytes);
                ControlAnswer::Done
            }
            ControlCall::NetworkRules {
                ref allow,
                ref deny,
            } => self.set_network_rules(allow, deny),
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
                    leave_paused: stop,
                };
                return self.start_snapshot(id, plan);
            }
            ControlCall::Wait => {
                let exit = self.stage.exit().filter(|exit| !exit.restarting);
                if let Some(exit) = exit.cloned() {
                    return self.answer(id, &ControlAnswer::Ended(exit));
                }
                if let Err(text) = self.check_persistent_limit(id) {
                    return self.answer(id, &ControlAnswer::Error(text));
                }
                if let Some(client) = self.clients.get_mut(&id) {
                    client.role = ClientRole::Waiting;
                }
                return;
            }
            ControlCall::Follow => {
                if let Err(text) = self.check_persistent_limit(id) {
                    return self.answer(id, &ControlAnswer::Error(text));
                }
                self.answer(id, &ControlAnswer::Done);
                if let Some(client) = self.clients.get_mut(&id) {
                    client.role = ClientRole::Following;
                    // No more output will follow.
                    client.closing = self.stage.has_ended() && !self.stage.is_restarting();
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
            stage: self.stage.public(),
            paused: self.stage.is_paused(),
            lacks_space: self.stage.lacks_space(),
            vmm_pid: std::process::id(),
            epoch: self.epoch.clone(),
            started_ns: self.started_ns,
            clients: self.clients.values().filter(|c| c.is_attached()).count(),
            published: self
                .guest
                .as_ref()
                .map(GuestMachine::published)
                .unwrap_or_default(),
            restarting: self.stage.is_restarting(),
            restarts: self.request.restarts.count,
            health: self.health_report(),
            balloon: self.guest.as_ref().and_then(GuestMachine::balloon),
        }
    }

    fn attach(&mut self, id: u64, stdin: bool) {
        if self.stage.has_ended() {
            let text = "the workload has ended".to_owned();
            return self.answer(id, &ControlAnswer::Error(text));
        }
        if let Err(text) = self.check_persistent_limit(id) {
            return self.answer(id, &ControlAnswer::Error(text));
        }
        self.answer(id, &ControlAnswer::Done);
        if let Some(client) = self.clients.get_mut(&id) {
            client.role = ClientRole::Attached {
                stdin: stdin && self.request.config.workload.stdin,
                launcher: false,
            };
        }
    }

    fn pause(&mut self, pause: bool) -> ControlAnswer {
        const CAPTURED: &str = "a snapshot of this VM is being taken: try again when that is done";
        let refusal = match &self.stage {
            SupervisorStage::Starting(startup) if startup.is_copying() => Some(CAPTURED),
            // The workload must start in time, and could not.
            SupervisorStage::Starting(_) => Some("the workload has not started yet"),
            SupervisorStage::Resetting(_) => {
                Some("this VM is being reset to its snapshot: try again when that is done")
            }
            SupervisorStage::Ending(_) => Some("the workload has ended"),
            SupervisorStage::Running(running) => match running.machine {
                MachineActivity::Preparing(_)
                | MachineActivity::Copying(_)
                | MachineActivity::Publishing(_) => Some(CAPTURED),
                MachineActivity::Free | MachineActivity::Paused | MachineActivity::NoSpace
                    if pause && self.is_about_to_end() =>
                {
                    Some("the VM is about to end")
                }
                MachineActivity::Free | MachineActivity::Paused | MachineActivity::NoSpace => None,
            },
        };
        if let Some(text) = refusal {
            return ControlAnswer::Error(text.to_owned());
        }
        let (Some(guest), SupervisorStage::Running(running)) = (&mut self.guest, &mut self.stage)
        else {
            return ControlAnswer::Error("the VM has ended".into());
        };
        let (result, machine) = match pause {
            true => (guest.pause(), MachineActivity::Paused),
            false => (guest.resume(), MachineActivity::Free),
        };
        match result {
            Ok(()) => {
                running.machine = machine;
                let action = match pause {
                    true => EventAction::Pause,
                    false => EventAction::Unpause,
                };
                self.note(action, |event| event);
                ControlAnswer::Done
            }
            Err(text) => ControlAnswer::Error(text),
        }
    }

    /// Limits the memory of the guest, at once or when its workload starts.
    fn limit_memory(&mut self, bytes: Option<u64>) {
        self.request.config.memory_limit = bytes;
        if let SupervisorStage::Running(_) | SupervisorStage::Resetting(_) = &self.stage
            && let Some(guest) = &mut self.guest
        {
            guest.limit_memory(bytes);
        }
    }

    /// Replaces the rules of the network, now and for further runs.
    fn set_network_rules(&mut self, allow: &[String], deny: &[String]) -> ControlAnswer {
        let (allow, deny) = (allow.to_vec(), deny.to_vec());
        if let Some(guest) = &mut self.guest
            && let Err(text) = guest.set_network_rules(allow.clone(), deny.clone())
        {
            return ControlAnswer::Error(text);
        }
        let network = &mut self.request.config.network;
        (network.allow, network.deny) = (allow, deny);
        ControlAnswer::Done
    }

    fn stats(&mut self, id: u64) {
        match &mut self.agent {
            Some(agent) if agent.is_behind() => {
                let text = "the guest does not answer".to_owned();
                self.answer(id, &ControlAnswer::Error(text));
            }
            Some(agent) => agent.request_stats(Purpose::Stats { client: id }),
            None => {
                let text = "the guest is not ready yet".to_owned();
                self.answer(id, &ControlAnswer::Error(text));
            }
        }
    }

    /// Sends a report to launcher and attached clients.
    pub(super) fn report(&mut self, report: &VmmReport) {
        for client in self.clients.values_mut() {
            if client.is_launcher() || client.is_attached() {
                client.conn.queue_json(FrameType::Control, report);
            }
        }
    }

    /// Releases a launcher that does not stay attached, when the workload runs.
    pub(super) fn release_launcher(&mut self) {
        self.clear_timer(SupervisorTimer::Start);
        for client in self.clients.values_mut() {
            client.closing |= client.role == ClientRole::Launcher;
        }
    }

    /// Closes the clients after the last messages were queued.
    pub(super) fn close_clients(&mut self) {
        let ended = self.stage.exit().cloned();
        let awaits_snapshot = self.stage.awaited_by();
        let restarting = self.stage.is_restarting();
        let calls_on = self.stage.is_unwritten() || restarting;
        for (&id, client) in &mut self.clients {
            // The end of this run is not that for which they wait.
            if restarting && matches!(client.role, ClientRole::Waiting | ClientRole::Following) {
                continue;
            }
            if let (ClientRole::Waiting, Some(exit)) = (client.role, &ended) {
                let answer = ControlAnswer::Ended(exit.clone());
                client.conn.queue_json(FrameType::Control, &answer);
            }
            // Other clients may still ask for the exit status.
            let calls_on = calls_on && client.role == ClientRole::Control;
            client.closing = awaits_snapshot != Some(id) && !calls_on;
        }
    }

    /// Closes a client after its last message was queued.
    pub(super) fn close_client(&mut self, id: u64) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.closing = true;
        }
    }

    /// Resumes the vCPUs if they are paused.
    pub(super) fn resume_vcpus(&mut self) -> Result<(), String> {
        if let SupervisorStage::Running(RunningStage { machine, .. }) = &mut self.stage
            && machine.is_paused()
        {
            *machine = MachineActivity::Free;
            if let Some(guest) = &mut self.guest {
                guest.resume()?;
            }
        }
        Ok(())
    }
}
