//! A fake machine under a real supervisor; the test plays the agent.
//!
//! A test provides the record ([`fixture`]), which can be a fake one or one on disk.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on is a failed test"
)]

mod guest;
mod peer;

use std::fs::File;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use sm_control::config::{HealthCheck, RestartPolicy, VmConfig};
use sm_control::id::VmId;
use sm_control::launch::{
    ImageSource, LaunchPurpose, LaunchRequest, Paging, RestartProgress, StartSource,
};
use sm_control::session::{Event, Session};
use sm_control::workload::Workload;
use sm_control::{Control, Endpoint};
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::{AgentHello, ControlReply, ControlRequest, Refreshed};
use sm_guest_proto::exec::{ExecControl, ExecReply, ExecRequest, Hello, Role};
use sm_guest_proto::frame::FrameType;
use sm_guest_proto::{PROTOCOL_VERSION, port};
use sm_snapshot::manifest::Layer;

pub(crate) use self::guest::{FakeGuest, FakeState};
pub use self::peer::{FramedPeer, in_own_process};
use super::{Supervisor, SupervisorParts};
use crate::conn::shortage;
use crate::environment::VmRecord;
use crate::guest::{EventSender, SupervisorEvent, event_channel};
use crate::restart::NextRun;

/// A supervisor on a thread, or before its start, with its environment.
#[derive(Debug)]
pub struct Fixture<R> {
    /// Its record.
    pub record: R,
    /// The launcher's end of the launch stream.
    pub launcher: Option<Session>,
    control: Endpoint,
    pub(crate) dial: EventSender,
    pub(crate) connections: Receiver<(u32, UnixStream)>,
    pub(crate) guest: Arc<FakeState>,
    #[cfg_attr(not(test), expect(dead_code, reason = "only this crate's tests look"))]
    pub(crate) terminate: UnixStream,
    thread: Option<std::thread::JoinHandle<io::Result<Option<NextRun>>>>,
}

/// Deviations from the defaults of a test.
#[derive(Clone, Copy, Debug, Default)]
pub struct SupervisorSetup {
    /// True if the launcher does not attach.
    pub(crate) detached: bool,
    /// True if the workload has standard input.
    pub(crate) stdin: bool,
    /// True if the record is removed with the VM.
    pub(crate) auto_remove: bool,
    pub(crate) restored: Option<Layer>,
    /// True for a launch stream whose buffers exceed the limit of unsent bytes.
    pub(crate) large_buffers: bool,
    pub(crate) wants_root: bool,
    /// True if the test sends the event that memory is copied for an image snapshot.
    pub(crate) slow_copies: bool,
    /// True for a machine that is started for its identity report.
    pub(crate) identity_report: bool,
    pub(crate) prepare_timeout: Option<Duration>,
    /// Time limit for the guest to power itself off; the default is short, as most agents
    /// of tests do not.
    pub(crate) power_off_timeout: Option<Duration>,
    pub(crate) start_timeout_ms: Option<u64>,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) signal_timeout: Option<Duration>,
    /// Number of sends at the start for which the kernel lacks memory.
    pub(crate) shortage: u32,
    /// True if the record existed before the start.
    pub(crate) existing: bool,
    pub(crate) restart: RestartPolicy,
    pub(crate) expire: Option<Duration>,
    /// Retries of the workload's health check, if it has one.
    pub(crate) health_retries: Option<u32>,
    /// Milliseconds of the wait before this run, if a restart policy has started it.
    pub(crate) restarted: Option<u64>,
    /// The purpose of the start.
    pub(crate) purpose: LaunchPurpose,
}

impl SupervisorSetup {
    /// Makes the launcher not attach.
    #[must_use]
    pub fn detached(self) -> Self {
        Self {
            detached: true,
            ..self
        }
    }

    /// Sets whether the record is removed with the VM.
    #[must_use]
    pub fn auto_remove(self, auto_remove: bool) -> Self {
        Self {
            auto_remove,
            ..self
        }
    }

    /// Sets the restart policy.
    #[must_use]
    pub fn restart(self, restart: RestartPolicy) -> Self {
        Self { restart, ..self }
    }

    /// Makes the start one for access to the files of an idle VM.
    #[must_use]
    pub fn files(self) -> Self {
        Self {
            purpose: LaunchPurpose::Files,
            existing: true,
            detached: true,
            ..self
        }
    }

    /// Makes the run one that a restart policy has started after this wait.
    #[cfg(test)]
    pub(crate) fn restarted(self, delay_ms: u64) -> Self {
        Self {
            restarted: Some(delay_ms),
            ..self
        }
    }

    /// Returns the configuration of a VM with this setup.
    #[must_use]
    pub fn config(self, id: VmId, name: String) -> VmConfig {
        let mut config = VmConfig::new(id, name);
        config.image = "oci:x".into();
        config.image_digest = "sha256:0".into();
        config.workload = Workload {
            argv: vec!["prog".into()],
            stdin: self.stdin,
            hostname: "box".into(),
            stop_signal: 15,
            ..Workload::default()
        };
        config.memory_bytes = 64 << 20;
        config.kernel = "/k".into();
        config.auto_remove = self.auto_remove;
        config.stop_timeout = Duration::from_secs(600);
        config.restart = self.restart;
        config.expire = self.expire;
        config.health = self.health_retries.map(|retries| HealthCheck {
            interval_ms: 1,
            retries,
            ..HealthCheck::new(vec!["check".into()])
        });
        config
    }
}

/// Starts a supervisor with a fake machine, for a VM with this record.
///
/// # Panics
/// The record cannot be used.
pub fn fixture<R: VmRecord + Clone + 'static>(
    record: R,
    config: VmConfig,
    lock: File,
    setup: SupervisorSetup,
) -> Fixture<R> {
    let (fixture, supervisor) = not_running(record, config, lock, setup);
    Fixture {
        thread: Some(std::thread::spawn(move || {
            shortage::begin(setup.shortage);
            supervisor.run()
        })),
        ..fixture
    }
}

pub(crate) fn not_running<R: VmRecord + Clone + 'static>(
    record: R,
    config: VmConfig,
    lock: File,
    setup: SupervisorSetup,
) -> (Fixture<R>, Supervisor<FakeGuest>) {
    let control = Endpoint::new(record.control_socket(), &config.name);
    let request = LaunchRequest {
        version: String::new(),
        data: PathBuf::new(),
        run: PathBuf::new(),
        cache: PathBuf::new(),
        config: config.into(),
        purpose: setup.purpose,
        cmdline: String::new(),
        source: match setup.identity_report {
            true => StartSource::IdentityReport("warm".to_owned()),
            false => StartSource::Image(ImageSource {
                root: Vec::new(),
                modules: None,
                cold: false,
            }),
        },
        paging: Paging::Map,
        root_disk: None,
        upper_size: Some(5),
        shm_size: Some(6),
        mounts: Vec::new(),
        attach: !setup.detached,
        columns: 80,
        rows: 24,
        start_timeout_ms: setup.start_timeout_ms.unwrap_or(600_000),
        phases: Vec::new(),
        existing: setup.existing,
        restarts: RestartProgress {
            count: u32::from(setup.restarted.is_some()),
            delay_ms: setup.restarted.unwrap_or_default(),
        },
    };
    let (launcher, theirs) = UnixStream::pair().unwrap();
    if setup.large_buffers {
        rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 1 << 20).unwrap();
    }
    let (terminate, terminated) = UnixStream::pair().unwrap();
    let (dial, events) = event_channel().unwrap();
    let (sender, connections) = channel();
    let guest = Arc::new(FakeState {
        ended: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
        end: Mutex::new(None),
        paused: Mutex::new(false),
        space: Mutex::new(true),
        full: Mutex::new(false),
        changes: Mutex::new(Vec::new()),
        changed: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
        merges: Mutex::new(0),
        limits: Mutex::new(Vec::new()),
        rules: Mutex::new(Vec::new()),
        console: Mutex::new(String::new()),
        snapshot: Mutex::new(None),
        captured: Mutex::new(None),
        capture_cancelled: Mutex::new(false),
        closed: Mutex::new(false),
        delivers: Mutex::new(false),
        commands: Mutex::new(None),
        order: Mutex::new(Vec::new()),
        roots: Mutex::new(0),
        source_discarded: Mutex::new(false),
    });
    let parts = SupervisorParts {
        guest: FakeGuest {
            connections: sender,
            state: guest.clone(),
            restored: setup.restored,
            events: dial.clone(),
            wants_root: setup.wants_root,
            slow_copies: setup.slow_copies,
        },
        warnings: vec!["it rains".to_owned()],
        events,
        request,
        lock,
        launcher: Some(theirs),
        listener: UnixListener::bind(record.control_socket()).unwrap(),
        terminate: terminated,
        log: record.output_log().unwrap(),
        record: Arc::new(record.clone()),
    };
    let mut supervisor = Supervisor::new(parts).unwrap();
    supervisor.power_off_timeout = setup.power_off_timeout.unwrap_or(Duration::from_millis(20));
    supervisor.record_retry = Duration::from_millis(20);
    supervisor.space_interval = Duration::from_millis(20);
    if let Some(timeout) = setup.signal_timeout {
        supervisor.signal_timeout = timeout;
    }
    if let Some(timeout) = setup.idle_timeout {
        supervisor.idle_timeout = timeout;
    }
    if let Some(timeout) = setup.prepare_timeout {
        supervisor.prepare_timeout = timeout;
    }
    let fixture = Fixture {
        record,
        control,
        launcher: Some(Session::new(launcher, None).unwrap()),
        dial,
        connections,
        guest,
        terminate,
        thread: None,
    };
    (fixture, supervisor)
}

impl<R> Fixture<R> {
    /// Connects as an agent does.
    pub(crate) fn dial(&self) -> FramedPeer {
        let (theirs, ours) = UnixStream::pair().unwrap();
        self.dial.send(SupervisorEvent::Agent(theirs));
        FramedPeer(ours)
    }

    /// Lets the guest write to a full disk of the host, or makes space there; the supervisor
    /// soon notices it.
    ///
    /// # Panics
    /// The supervisor has panicked.
    pub fn set_space(&self, has_space: bool) {
        *self.guest.space.lock().unwrap() = has_space;
        if !has_space {
            self.dial.send(SupervisorEvent::NoSpace);
        }
    }

    /// Plays the agent up to the request for the workload.
    pub(crate) fn boot(&mut self) -> (FramedPeer, FramedPeer, ExecRequest) {
        let (agent, mut main) = self.boot_to_root();
        let request: ExecRequest = main.receive_json(FrameType::Request);
        (agent, main, request)
    }

    /// Plays the agent until its root is attached.
    pub(crate) fn boot_to_root(&mut self) -> (FramedPeer, FramedPeer) {
        let mut agent = self.dial();
        let request = agent.receive_json(FrameType::Control);
        assert!(matches!(request, ControlRequest::Hello(_)));
        agent.send_json(&ControlReply::Hello(AgentHello {
            protocol: PROTOCOL_VERSION,
            init_us: 1000,
            ready_us: 3000,
            ..AgentHello::default()
        }));
        let ControlRequest::Refresh(refresh) = agent.receive_json(FrameType::Control) else {
            panic!("identity comes before anything else");
        };
        assert!(refresh.entropy.len() >= 32 && refresh.hostname == "box");
        agent.send_json(&ControlReply::Refreshed(Refreshed::default()));
        let request = agent.receive_json(FrameType::Control);
        assert!(matches!(request, ControlRequest::AttachRoot(_)));
        let (to, stream) = self.connections.recv().unwrap();
        assert_eq!(to, port::EXEC);
        let mut main = FramedPeer(stream);
        let hello: ExecControl = main.receive_json(FrameType::Control);
        assert!(matches!(hello, ExecControl::Hello(_)));
        main.send_json(&ExecReply::Hello(Hello {
            protocol: PROTOCOL_VERSION,
        }));
        agent.send_json(&ControlReply::Done);
        (agent, main)
    }

    /// Plays the agent until the workload runs. Returns the agent's control connection,
    /// and that of the workload.
    ///
    /// # Panics
    /// The supervisor sends something else.
    pub fn start(&mut self) -> (FramedPeer, FramedPeer) {
        let (agent, mut main, request) = self.boot();
        assert_eq!(
            (request.role, request.argv),
            (Role::Main, vec!["prog".into()])
        );
        main.send_json(&ExecReply::Started {
            container: ContainerId::default(),
            pid: 42,
        });
        let session = self.launcher.as_mut().unwrap();
        let mut warned = false;
        loop {
            match session.next_event().unwrap().unwrap() {
                Event::Phase(_) => {}
                Event::Warning(_) => warned = true,
                Event::Started { pid } => {
                    assert!(warned, "before it runs");
                    assert_eq!(pid, 42);
                    return (agent, main);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Plays the agent of a machine for access to files until it is ready. Returns the
    /// agent's control connection, and the one that no workload uses.
    ///
    /// # Panics
    /// The supervisor sends something else.
    pub fn start_for_files(&mut self) -> (FramedPeer, FramedPeer) {
        let peers = self.boot_to_root();
        let session = self.launcher.as_mut().unwrap();
        loop {
            match session.next_event().unwrap().unwrap() {
                Event::Phase(_) | Event::Warning(_) => {}
                Event::Started { pid } => {
                    assert_eq!(pid, 0, "no workload runs");
                    return peers;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Returns events of the launcher as text, without phases.
    ///
    /// # Panics
    /// The launch stream breaks.
    pub fn events(&mut self) -> Vec<String> {
        let mut session = self.launcher.take().unwrap();
        let mut events = Vec::new();
        while let Some(event) = session.next_event().unwrap() {
            match event {
                Event::Phase(_) | Event::IdentityReport(_) => {}
                Event::Stdout(bytes) => events.push(format!("out {}", text(bytes))),
                Event::Stderr(bytes) => events.push(format!("err {}", text(bytes))),
                Event::Started { pid } => events.push(format!("started {pid}")),
                Event::Exit(status) => events.push(format!("exit {status}")),
                Event::Ended(exit) => events.push(format!("ended {}", exit.status)),
                Event::Warning(text) => assert_eq!(text, "it rains"),
                Event::Error(text) => events.push(text),
                other => panic!("{other:?}"),
            }
        }
        events
    }

    /// Returns the VM's control socket.
    #[cfg(test)]
    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.control
    }

    /// Connects to the VM's control socket.
    ///
    /// # Panics
    /// The connection is refused.
    #[must_use]
    pub fn control(&self) -> Control {
        Control::connect(&self.control).unwrap()
    }

    /// Waits for the end of the supervisor.
    ///
    /// # Panics
    /// The supervisor failed, or starts another run.
    pub fn finish(&mut self) {
        assert!(self.next_run().is_none(), "the VM is restarted");
    }

    /// Waits for the end of the supervisor; returns the next run.
    pub(crate) fn next_run(&mut self) -> Option<NextRun> {
        self.thread.take().unwrap().join().unwrap().unwrap()
    }
}

/// Returns bytes as text.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
