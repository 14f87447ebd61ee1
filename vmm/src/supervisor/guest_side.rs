//! The guest's side: from the agent's connection to the workload's exit.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use sm_control::event::EventAction;
use sm_control::exit::FailureCause;
use sm_control::id::{hex, random};
use sm_control::launch::{ControlAnswer, StartSource, VmIdentityReport, VmmReport};
use sm_control::timings::unix_nanos;
use sm_guest_proto::control::{AttachRoot, ControlReply, ControlRequest, Refresh, Upper};
use sm_guest_proto::exec::{ExecControl, ExecReply, Hello};
use sm_guest_proto::frame::{self, FrameType};
use sm_guest_proto::{PROTOCOL_VERSION, port};
use sm_snapshot::manifest::Layer;

use super::mounts;
use super::stage::{MachineEnd, Resetting, RunningStage, Startup, StartupStep, SupervisorStage};
use super::{Supervisor, SupervisorTimer, printable};
use crate::agent::{AgentLink, Purpose};
use crate::conn::Conn;
use crate::guest::GuestMachine;

/// The root disk in the guest.
const ROOT_DEVICE: &str = "/dev/vda";
/// The disk for changes to the root in the guest.
const CHANGES_DEVICE: &str = "/dev/vdb";
/// The phase after which the guest has its own identity.
pub(super) const IDENTITY_REFRESHED: &str = "identity refreshed";
/// Time limit for a restored guest's kernel to see its new generation ID.
const VMGENID_WAIT_MS: u32 = 5000;
/// Time limit for the end of the machine after a stream of it ended.
const STREAM_END_TIMEOUT: Duration = Duration::from_secs(2);

/// Returns a MAC address of an individual station that no vendor has given out (IEEE
/// 802, section 8.4).
fn local_mac() -> String {
    let [a, b, c, d, e] = random::<5>();
    format!("02:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}")
}

impl<G: GuestMachine> Supervisor<G> {
    /// Handles the connection of the agent, or the one to it.
    pub(super) fn agent_dialed(&mut self, stream: UnixStream) {
        match self.stage.startup() {
            Some(startup @ Startup::AgentAwaited) => *startup = Startup::Preparing,
            // Each start has one agent connection; others are closed.
            Some(Startup::Copying { .. } | Startup::Preparing | Startup::Requested) | None => {
                return;
            }
        }
        if self.restored().is_none() {
            self.reach("agent ready");
        }
        match self
            .guest
            .as_mut()
            .map_or(Ok(false), GuestMachine::agent_ready)
        {
            Ok(true) => self.suspend_startup(StartupStep::Agent(stream)),
            Ok(false) => self.meet_agent(stream),
            Err(error) => self.start_failed(&format!("cannot prepare the machine: {error}")),
        }
    }

    /// Inserts the image and starts the conversation with the agent.
    pub(super) fn meet_agent(&mut self, stream: UnixStream) {
        if let Some(guest) = &mut self.guest {
            guest.insert_image();
        }
        match AgentLink::new(stream, self.container.clone()) {
            Ok(agent) => self.agent = Some(agent),
            Err(error) => {
                return self.start_failed(&format!("cannot talk to the guest agent: {error}"));
            }
        }
        if let StartSource::IdentityReport(_) = self.request.source {
            return;
        }
        let exec = self
            .guest
            .as_mut()
            .map(|guest| guest.connect(port::EXEC).and_then(Conn::new));
        match exec {
            Some(Ok(mut main)) => {
                let hello = Hello {
                    protocol: PROTOCOL_VERSION,
                };
                main.queue_json(FrameType::Control, &ExecControl::Hello(hello));
                self.main = Some(main);
            }
            Some(Err(error)) => {
                self.start_failed(&format!("cannot open a stream to the guest: {error}"));
            }
            None => {}
        }
    }

    /// The agent is listening, so the time in the request is still right when it arrives.
    /// The following requests are pipelined: the guest never waits for the host.
    fn prepare_guest(&mut self) {
        let (refresh, root) = (self.new_identity(), self.attach_root());
        self.epoch.clone_from(&refresh.epoch);
        let needs_root = matches!(self.restored(), None | Some(Layer::Base))
            && !matches!(self.request.source, StartSource::IdentityReport(_));
        let Some(agent) = &mut self.agent else {
            return;
        };
        agent.send_request(Purpose::Refresh, &ControlRequest::Refresh(refresh));
        if needs_root {
            agent.send_request(Purpose::AttachRoot, &ControlRequest::AttachRoot(root));
        }
    }

    /// Returns the layer of the snapshot that the machine was restored from; `None` if a
    /// kernel was booted.
    pub(super) fn restored(&self) -> Option<Layer> {
        self.guest.as_ref().and_then(GuestMachine::restored)
    }

    fn new_identity(&self) -> Refresh {
        let uuid = || uuid::Uuid::new_v4().to_string();
        let mac = self.request.config.network.mac.clone();
        let mut refresh = Refresh {
            epoch: uuid(),
            entropy: random::<64>().to_vec(),
            realtime_ns: unix_nanos(),
            hostname: self.request.config.workload.hostname.clone(),
            machine_id: hex(&random::<16>()),
            boot_id: uuid(),
            mac: Some(mac.unwrap_or_else(local_mac)),
            vmgenid_wait_ms: match self.restored() {
                None => 0,
                Some(_) => VMGENID_WAIT_MS,
            },
            ..Refresh::default()
        };
        if let Some(guest) = &self.guest {
            guest.describe_network(&mut refresh);
        }
        refresh
    }

    fn attach_root(&self) -> AttachRoot {
        AttachRoot {
            container: self.container.clone(),
            lower: ROOT_DEVICE.to_owned(),
            upper: match self.request.root_disk {
                Some(_) => Upper::Ext4 {
                    device: CHANGES_DEVICE.to_owned(),
                },
                None => Upper::Tmpfs {
                    size: self.request.upper_size.unwrap_or(0),
                },
            },
            hostname: self.request.config.workload.hostname.clone(),
            shm_size: self.request.shm_size.unwrap_or(0),
            read_only: self.request.config.read_only,
        }
    }

    /// Processes the agent's replies.
    pub(super) fn pump_agent(&mut self) {
        loop {
            let Some(agent) = &mut self.agent else {
                return;
            };
            match agent.next_reply() {
                Ok(Some((purpose, reply))) => self.agent_replied(purpose, reply),
                Ok(None) if agent.conn.ended() => {
                    self.agent = None;
                    return self.guest_stream_ended();
                }
                Ok(None) => return,
                Err(what) => {
                    self.agent = None;
                    if self.stage.has_ended() {
                        return self.guest_stream_ended();
                    }
                    return self.guest_broke(&format!("the guest agent sent {what}"));
                }
            }
        }
    }

    fn agent_replied(&mut self, purpose: Purpose, reply: ControlReply) {
        match (purpose, reply) {
            (Purpose::Hello, ControlReply::Hello(hello)) => {
                if hello.protocol != PROTOCOL_VERSION {
                    return self.start_failed_in_guest(&format!(
                        "the guest agent speaks protocol version {}, this program {PROTOCOL_VERSION}: \
                         build both from the same source",
                        hello.protocol
                    ), None);
                }
                tracing::info!(
                    kernel = printable(&hello.kernel),
                    agent = printable(&hello.version),
                    init_us = hello.init_us,
                    ready_us = hello.ready_us,
                    "the agent is ready"
                );
                match self.restored() {
                    None => self.guest_times(hello.init_us, hello.ready_us),
                    Some(_) => self.reach("agent answered"),
                }
                self.prepare_guest();
            }
            (Purpose::Refresh, ControlReply::Refreshed(refreshed)) => {
                // The start fails without it, because the clone could repeat another VM's
                // random numbers.
                if self.restored().is_some() && !refreshed.vmgenid_seen {
                    return self.start_failed_in_guest(
                        "the guest's kernel did not notice that it was restored from a \
                         snapshot, so it could repeat another VM's random numbers; \
                         the kernel needs CONFIG_VMGENID",
                        Some(FailureCause::NoGenerationId),
                    );
                }
                self.reach(IDENTITY_REFRESHED);
                // Before the workload goes on.
                self.clock_was_set(refreshed.realtime_ns);
                if let StartSource::IdentityReport(_) = self.request.source {
                    return self.request_identity_report();
                }
                match self.restored() {
                    None | Some(Layer::Base) => {}
                    Some(Layer::Image) => {
                        // Processes that were started in the guest run only from here on.
                        self.thaw();
                        self.mount_volumes();
                    }
                    Some(Layer::App) => self.continue_workload(),
                }
            }
            (
                Purpose::AdjustClock { sent_ns, error },
                ControlReply::ClockAdjusted { realtime_ns },
            ) => self.clock_was_adjusted(error, sent_ns, realtime_ns),
            // An agent from before this request is part of an old snapshot.
            (Purpose::AdjustClock { .. }, ControlReply::Error { message }) => {
                let message = printable(&message);
                tracing::warn!(message, "the guest's clock is late");
            }
            (Purpose::AttachRoot, ControlReply::Done) => {
                self.reach("root attached");
                self.root_attached();
            }
            (Purpose::Mount, ControlReply::Done) => {
                self.reach("volumes mounted");
                self.request_workload();
            }
            (Purpose::Mount, ControlReply::Error { message }) => {
                self.start_failed_in_guest(&printable(&message), None);
            }
            (Purpose::FreezeRoot, reply) => self.root_frozen(reply),
            (Purpose::NoteHostChanges, reply) => self.host_changes_noted(reply),
            (
                Purpose::IdentityReport { requested_ns },
                ControlReply::IdentityReport(identity_report),
            ) => {
                let (reported, now) = (identity_report.realtime_ns, unix_nanos());
                let early = requested_ns.saturating_sub(reported);
                self.report(&VmmReport::IdentityReport(VmIdentityReport {
                    identity_report,
                    clock_error_ns: early.max(reported.saturating_sub(now)),
                }));
                // The VM lives until its launcher disconnects.
                self.clear_timer(SupervisorTimer::Start);
            }
            (Purpose::Freeze { job }, reply) => self.frozen(job, reply),
            (Purpose::Prepare { job }, reply) => self.prepared(job, reply),
            (Purpose::Thaw, ControlReply::Done) => {}
            // The guest waits for the end of the stream before it powers off, so that it
            // knows that its reply has arrived.
            (Purpose::PowerOff, ControlReply::Done) => self.agent = None,
            (Purpose::OomCheck, ControlReply::Stats(stats)) => {
                self.oom_checked(stats.main_oom_kills > 0);
            }
            (Purpose::Signal { number }, reply) => self.signalled(number, reply),
            (Purpose::OomCheck, _) => self.oom_checked(false),
            (Purpose::Stats { client }, ControlReply::Stats(stats)) => {
                self.answer(client, &ControlAnswer::Stats(stats));
            }
            (Purpose::Stats { client }, ControlReply::Error { message }) => {
                self.answer(client, &ControlAnswer::Error(printable(&message)));
            }
            (Purpose::Stats { client }, other) => {
                let text = printable(&format!("the guest answered {other:?}"));
                self.answer(client, &ControlAnswer::Error(text));
            }
            (Purpose::PowerOff, _) => self.stop_machine(),
            (_, ControlReply::Error { message }) => {
                let what = match purpose {
                    Purpose::Hello => "agree with the guest agent",
                    Purpose::Refresh => "give the guest an identity",
                    Purpose::Thaw => "let the workload go on",
                    Purpose::IdentityReport { .. } => "tell guests apart",
                    _ => "attach the root file system",
                };
                self.guest_broke(&format!("cannot {what}: {message}"));
            }
            (purpose, other) => {
                self.guest_broke(&format!(
                    "the guest agent answered {purpose:?} with {other:?}"
                ));
            }
        }
    }

    /// Converts uptimes of the guest to the host's clock, counting back from the moment
    /// at which the agent connected.
    fn guest_times(&mut self, init_us: u64, ready_us: u64) {
        let Some(ready) = self.phases.iter().rposition(|p| p.name == "agent ready") else {
            return;
        };
        let Some(at_ns) = self.phases.get(ready).map(|p| p.at_ns) else {
            return;
        };
        let after_init = ready_us.saturating_sub(init_us).saturating_mul(1000);
        let phase =
            sm_control::timings::Phase::at("kernel reached init", at_ns.saturating_sub(after_init));
        self.phases.insert(ready, phase.clone());
        self.report(&VmmReport::Phase(phase));
    }

    /// The guest is frozen for an image snapshot like a workload, although none runs yet:
    /// any process that is started in a clone waits until the clone has its identity.
    fn root_attached(&mut self) {
        let has_root = self.guest.as_ref().is_some_and(GuestMachine::wants_root);
        match &mut self.agent {
            Some(agent) if has_root => {
                agent.send_request(Purpose::FreezeRoot, &ControlRequest::Freeze)
            }
            _ => self.mount_volumes(),
        }
    }

    fn root_frozen(&mut self, reply: ControlReply) {
        if reply != ControlReply::Done {
            tracing::warn!(
                ?reply,
                "no image snapshot is taken: the guest does not freeze"
            );
            return self.go_on_with_root();
        }
        match self
            .guest
            .as_mut()
            .map_or(Ok(false), GuestMachine::root_attached)
        {
            Ok(true) => self.suspend_startup(StartupStep::Workload),
            Ok(false) => self.go_on_with_root(),
            Err(error) => self.start_failed(&format!("cannot prepare the machine: {error}")),
        }
    }

    /// Thaws the guest and continues the start after an image snapshot.
    pub(super) fn go_on_with_root(&mut self) {
        self.thaw();
        self.mount_volumes();
    }

    /// Mounts volumes and tmpfs; the workload follows.
    fn mount_volumes(&mut self) {
        let mounts = mounts::of_guest(&self.request.mounts);
        if mounts.is_empty() {
            return self.request_workload();
        }
        if let Some(guest) = &mut self.guest {
            guest.insert_volumes();
        }
        let container = self.container.clone();
        if let Some(agent) = &mut self.agent {
            agent.send_request(Purpose::Mount, &ControlRequest::Mount { container, mounts });
        }
    }

    fn request_workload(&mut self) {
        if self.accesses_files() {
            return self.files_are_ready();
        }
        let Some(main) = &mut self.main else {
            return;
        };
        let mut request = self
            .request
            .config
            .workload
            .request(self.request.columns, self.request.rows);
        request.container.clone_from(&self.container);
        main.queue_json(FrameType::Request, &request);
        if let Some(startup) = self.stage.startup() {
            *startup = Startup::Requested;
        }
    }

    fn request_identity_report(&mut self) {
        if let Some(agent) = &mut self.agent {
            let purpose = Purpose::IdentityReport {
                requested_ns: unix_nanos(),
            };
            agent.request_identity_report(purpose);
        }
    }

    /// Thaws the workload of the snapshot and takes over its streams.
    fn continue_workload(&mut self) {
        if let Some(agent) = &mut self.agent {
            agent.send_request(Purpose::Thaw, &ControlRequest::Thaw);
        }
        let Some(main) = &mut self.main else {
            return;
        };
        let container = self.container.clone();
        main.queue_json(FrameType::Control, &ExecControl::AttachMain { container });
        if self.request.config.workload.tty {
            let size = frame::resize_payload(self.request.columns, self.request.rows);
            main.queue(FrameType::Resize, &size);
        }
        // The workload of the snapshot may not have received the end of file.
        if self.clients.values().any(|client| client.stdin_ended) {
            main.queue(FrameType::Stdin, &[]);
        }
        if let Some(startup) = self.stage.startup() {
            *startup = Startup::Requested;
        }
    }

    /// Moves output of the workload to log and clients, while they have space.
    pub(super) fn pump_main(&mut self) {
        let Some(mut main) = self.main.take() else {
            return;
        };
        while self.has_room_for_output() {
            let ended = main.ended();
            match main.decoder.next_frame() {
                Ok(Some(frame)) => {
                    if self.main_frame(frame.kind, frame.payload).is_break() {
                        // The workload has exited; its stream is not needed any more.
                        return;
                    }
                }
                Ok(None) if ended => return self.guest_stream_ended(),
                Ok(None) => break,
                Err(error) => {
                    return self.guest_broke(&format!("the guest agent sent {error}"));
                }
            }
        }
        self.main = Some(main);
    }

    fn main_frame(&mut self, kind: FrameType, payload: &[u8]) -> std::ops::ControlFlow<()> {
        use std::ops::ControlFlow::{Break, Continue};
        match kind {
            FrameType::Stdout | FrameType::Stderr => {
                if !self.had_output {
                    self.had_output = true;
                    self.reach("first output");
                }
                self.pass_on_output(kind, payload);
            }
            FrameType::Control => match serde_json::from_slice(payload) {
                Ok(ExecReply::Hello(_)) => {}
                Ok(ExecReply::Started { container, pid })
                    if container == self.container
                        && matches!(self.stage.startup(), Some(Startup::Requested)) =>
                {
                    self.workload_started(pid);
                }
                Ok(ExecReply::Started { .. }) => {
                    self.guest_broke(
                        "the guest agent says that the workload has started, \
                                      which it was not asked for",
                    );
                    return Break(());
                }
                Err(error) => {
                    self.guest_broke(&format!("the guest agent sent {error}"));
                    return Break(());
                }
            },
            FrameType::Error if self.stage.startup().is_some() => {
                self.start_error = Some(printable(&String::from_utf8_lossy(payload)));
            }
            FrameType::Error => {}
            FrameType::Exit => {
                match frame::ExitStatus::parse(payload) {
                    Ok(exit) => self.workload_exited(exit),
                    Err(error) => self.guest_broke(&format!("the guest agent sent {error}")),
                }
                return Break(());
            }
            FrameType::Stdin | FrameType::Resize | FrameType::Signal | FrameType::Request => {
                self.guest_broke(&format!(
                    "the guest agent sent an unexpected {kind:?} frame"
                ));
                return Break(());
            }
        }
        Continue(())
    }

    fn workload_started(&mut self, pid: u32) {
        let before = std::mem::replace(
            &mut self.stage,
            SupervisorStage::Running(RunningStage::default()),
        );
        self.started_ns = unix_nanos();
        self.reach("workload started");
        self.report(&VmmReport::Started { pid });
        self.release_launcher();
        match &before {
            SupervisorStage::Resetting(_) => self.note(EventAction::Reset, |event| event),
            SupervisorStage::Starting(_)
            | SupervisorStage::Running(_)
            | SupervisorStage::Ending(_) => self.note(EventAction::Start, |event| event),
        }
        self.watch_health();
        if let Some(expire) = self.request.config.expire_ms {
            self.set_timer(SupervisorTimer::Expire, Duration::from_millis(expire));
        }
        if let Some(guest) = &mut self.guest {
            guest.workload_started();
            guest.limit_memory(self.request.config.memory_limit);
        }
        match before {
            SupervisorStage::Resetting(Resetting { client, .. }) => {
                self.answer(client, &ControlAnswer::Done);
            }
            SupervisorStage::Starting(_)
            | SupervisorStage::Running(_)
            | SupervisorStage::Ending(_) => {}
        }
    }

    /// Handles the end of a stream of the guest. The cause shows when the machine's end
    /// is known.
    pub(super) fn guest_stream_ended(&mut self) {
        match self.stage.machine_end() {
            // The guest was asked to power off, and its agent is gone.
            Some(MachineEnd::PoweringOff) => self.stop_machine(),
            Some(
                MachineEnd::Delivering
                | MachineEnd::Stopping
                | MachineEnd::Draining
                | MachineEnd::Ended,
            ) => {}
            None if self.is_set(SupervisorTimer::StreamEnded) => {}
            None => self.set_timer(SupervisorTimer::StreamEnded, STREAM_END_TIMEOUT),
        }
    }
}
