//! The supervisor against a fake machine whose agent is played by the test.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use sm_guest_proto::control::{AgentHello, ControlReply, ControlRequest, GuestStats, Refreshed};
use sm_guest_proto::exec::{ExecControl, ExecReply, ExecRequest, Hello, Role};
use sm_guest_proto::frame::{self, ExitStatus, FrameHeader, FrameType, HEADER_LEN};
use sm_guest_proto::{PROTOCOL_VERSION, port};
use sm_snapshot::manifest::Layer;

use super::*;
use crate::control::Control;
use crate::home::Home;
use crate::launch::{ControlAnswer, ControlCall, Origin, SnapshotReport};
use crate::output_log::LogReader;
use crate::record::{ExitReason, Records, VmConfig, VmState};
use crate::session::{Event, Session};
use crate::vmm::guest::{GuestEnd, NoticeSender, SnapshotPlan, Start, notices};
use crate::workload::Workload;

/// A machine without a guest: streams to it go to the test.
struct FakeGuest {
    connections: Sender<(u32, UnixStream)>,
    state: Arc<FakeState>,
    start: Start,
    notices: NoticeSender,
}

struct FakeState {
    ended: OwnedFd,
    end: Mutex<Option<GuestEnd>>,
    paused: Mutex<bool>,
    /// The last snapshot that was asked for.
    snapshot: Mutex<Option<SnapshotPlan>>,
}

impl FakeState {
    fn end(&self, end: GuestEnd) {
        self.end.lock().unwrap().get_or_insert(end);
        rustix::io::write(&self.ended, &1u64.to_ne_bytes()).unwrap();
    }
}

impl Guest for FakeGuest {
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.connections.send((port, theirs)).unwrap();
        Ok(ours)
    }
    fn start(&self) -> Start {
        self.start
    }
    fn snapshot(&mut self, plan: SnapshotPlan) -> Result<(), String> {
        let made = match plan.name.as_str() {
            "taken" => Err("a snapshot named \"taken\" exists already".to_owned()),
            _ => Ok(SnapshotReport {
                pages: 7,
                ..SnapshotReport::default()
            }),
        };
        *self.state.snapshot.lock().unwrap() = Some(plan);
        self.notices.send(Notice::Snapshot(made));
        Ok(())
    }
    fn reset(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn published(&self) -> Vec<crate::Publication> {
        Vec::new()
    }
    fn pause(&mut self) -> Result<(), String> {
        *self.state.paused.lock().unwrap() = true;
        Ok(())
    }
    fn resume(&mut self) -> Result<(), String> {
        *self.state.paused.lock().unwrap() = false;
        Ok(())
    }
    fn stop(&mut self) {
        self.state.end(GuestEnd::Stopped);
    }
    fn end_event(&self) -> BorrowedFd<'_> {
        self.state.ended.as_fd()
    }
    fn end(&self) -> Option<GuestEnd> {
        self.state.end.lock().unwrap().clone()
    }
}

/// A blocking peer that speaks frames.
struct Peer(UnixStream);

impl Peer {
    fn receive(&mut self) -> Option<(FrameType, Vec<u8>)> {
        let mut header = [0; HEADER_LEN];
        self.0.read_exact(&mut header).ok()?;
        let header = FrameHeader::decode(header).unwrap();
        let mut payload = vec![0; header.len];
        self.0.read_exact(&mut payload).unwrap();
        Some((header.kind, payload))
    }

    fn send(&mut self, kind: FrameType, payload: &[u8]) {
        let mut bytes = Vec::new();
        frame::encode(kind, payload, &mut bytes).unwrap();
        self.0.write_all(&bytes).unwrap();
    }

    fn send_json(&mut self, message: &impl serde::Serialize) {
        self.send(FrameType::Control, &serde_json::to_vec(message).unwrap());
    }

    fn receive_json<T: serde::de::DeserializeOwned>(&mut self, expected: FrameType) -> T {
        let (kind, payload) = self.receive().expect("a frame");
        assert_eq!(kind, expected);
        serde_json::from_slice(&payload).unwrap()
    }

    fn exit(&mut self, status: u32) {
        let exit = ExitStatus {
            status,
            peak_rss_kib: Some(7),
        };
        self.send(FrameType::Exit, &exit.to_payload());
    }
}

struct Fixture {
    _dir: tempfile::TempDir,
    record: Record,
    launcher: Option<Session>,
    dial: NoticeSender,
    connections: Receiver<(u32, UnixStream)>,
    guest: Arc<FakeState>,
    terminate: UnixStream,
    thread: Option<std::thread::JoinHandle<io::Result<()>>>,
}

#[derive(Clone, Copy, Default)]
struct Setup {
    detached: bool,
    stdin: bool,
    auto_remove: bool,
    start: Option<Start>,
}

fn fixture(setup: Setup) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let at = |name| dir.path().join(name);
    let home = Home::new(&at("data"), &at("run"), &at("cache"));
    let records = Records::open(&home).unwrap();
    let (record, lock) = records
        .create(Some("vm"), |id, name| {
            Ok(VmConfig {
                id,
                name,
                image: "oci:x".into(),
                image_digest: "sha256:0".into(),
                created_ns: 1,
                workload: Workload {
                    argv: vec!["prog".into()],
                    stdin: setup.stdin,
                    hostname: "box".into(),
                    stop_signal: 15,
                    ..Workload::default()
                },
                memory: 64 << 20,
                cpus: 1,
                kernel: "/k".into(),
                auto_remove: setup.auto_remove,
                read_only: false,
                stop_timeout_ms: 600_000,
                publish: Vec::new(),
            })
        })
        .unwrap();
    let request = LaunchRequest {
        version: String::new(),
        data: at("data"),
        run: at("run"),
        cache: at("cache"),
        config: record.config().clone(),
        modules: None,
        cmdline: String::new(),
        origin: Origin::Image,
        paging: crate::Paging::Map,
        root: Vec::new(),
        upper_size: 5,
        shm_size: 6,
        extra_hosts: Vec::new(),
        nameservers: Vec::new(),
        attach: !setup.detached,
        columns: 80,
        rows: 24,
        start_timeout_ms: 600_000,
        phases: Vec::new(),
    };
    let (launcher, theirs) = UnixStream::pair().unwrap();
    let (terminate, terminated) = UnixStream::pair().unwrap();
    let (dial, notices) = notices().unwrap();
    let (sender, connections) = channel();
    let guest = Arc::new(FakeState {
        ended: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
        end: Mutex::new(None),
        paused: Mutex::new(false),
        snapshot: Mutex::new(None),
    });
    let parts = Parts {
        guest: FakeGuest {
            connections: sender,
            state: guest.clone(),
            start: setup.start.unwrap_or(Start::Boot),
            notices: dial.clone(),
        },
        notices,
        request,
        lock,
        launcher: theirs,
        listener: UnixListener::bind(record.control_socket()).unwrap(),
        terminate: terminated,
        log: LogWriter::create(record.directory(), 1 << 20).unwrap(),
        record: record.clone(),
    };
    let supervisor = Supervisor::new(parts).unwrap();
    Fixture {
        _dir: dir,
        record,
        launcher: Some(Session::new(launcher).unwrap()),
        dial,
        connections,
        guest,
        terminate,
        thread: Some(std::thread::spawn(move || supervisor.run())),
    }
}

impl Fixture {
    /// Plays the agent up to the request for the workload.
    fn boot(&mut self) -> (Peer, Peer, ExecRequest) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        self.dial.send(Notice::Agent(theirs));
        let mut agent = Peer(ours);
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
        let mut main = Peer(stream);
        let hello: ExecControl = main.receive_json(FrameType::Control);
        assert!(matches!(hello, ExecControl::Hello(_)));
        main.send_json(&ExecReply::Hello(Hello {
            protocol: PROTOCOL_VERSION,
        }));
        agent.send_json(&ControlReply::Done);
        let request: ExecRequest = main.receive_json(FrameType::Request);
        (agent, main, request)
    }

    fn start(&mut self) -> (Peer, Peer) {
        let (agent, mut main, request) = self.boot();
        assert_eq!(
            (request.role, request.argv),
            (Role::Main, vec!["prog".into()])
        );
        main.send_json(&ExecReply::Started { pid: 42 });
        let session = self.launcher.as_mut().unwrap();
        loop {
            match session.next_event().unwrap().unwrap() {
                Event::Phase(_) => {}
                Event::Started { pid } => {
                    assert_eq!(pid, 42);
                    return (agent, main);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Events of the launcher as text, without phases.
    fn events(&mut self) -> Vec<String> {
        let mut session = self.launcher.take().unwrap();
        let mut events = Vec::new();
        while let Some(event) = session.next_event().unwrap() {
            match event {
                Event::Phase(_) | Event::Evidence(_) => {}
                Event::Stdout(bytes) => events.push(format!("out {}", text(bytes))),
                Event::Stderr(bytes) => events.push(format!("err {}", text(bytes))),
                Event::Started { pid } => events.push(format!("started {pid}")),
                Event::Exit(status) => events.push(format!("exit {status}")),
                Event::Ended(exit) => events.push(format!("ended {}", exit.status)),
                Event::Error(text) => events.push(text),
            }
        }
        events
    }

    fn control(&self) -> Control {
        Control::connect(&self.record).unwrap()
    }

    fn finish(&mut self) {
        self.thread.take().unwrap().join().unwrap().unwrap();
    }

    fn exit(&self) -> crate::record::ExitRecord {
        match self.record.state().unwrap() {
            VmState::Exited(exit) => exit,
            VmState::Running => panic!("it has ended"),
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_workload_runs_to_its_end() {
    let mut f = fixture(Setup::default());
    let (_agent, mut main) = f.start();
    main.send(FrameType::Stdout, b"hello");
    main.send(FrameType::Stderr, b"oops");
    main.exit(3);
    assert_eq!(f.events(), ["out hello", "err oops", "exit 3", "ended 3"]);
    f.finish();
    let exit = f.exit();
    assert_eq!((exit.status, exit.reason), (3, ExitReason::Workload));
    assert_eq!(exit.peak_rss_kib, Some(7));
    let names: Vec<_> = exit.phases.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "kernel reached init",
            "agent ready",
            "identity refreshed",
            "root attached",
            "workload started",
            "first output",
            "exit"
        ]
    );
    assert!(!f.record.sockets().exists());
    f.record.remove().unwrap();
    let logged = f.record.directory().exists();
    assert!(!logged);
}

#[test]
fn output_is_logged_without_any_client() {
    let mut f = fixture(Setup {
        detached: true,
        ..Setup::default()
    });
    let (_agent, mut main) = f.start();
    assert_eq!(
        f.events(),
        [""; 0],
        "a launcher that does not attach is let go"
    );
    let chunk = vec![b'x'; 64 * 1024];
    for _ in 0..8 {
        main.send(FrameType::Stdout, &chunk);
    }
    main.exit(0);
    f.finish();
    let mut log = LogReader::open(f.record.directory()).unwrap();
    let mut total = 0;
    while let Some(record) = log.next_record().unwrap() {
        total += record.bytes.len();
    }
    assert_eq!(total, 8 * chunk.len());
}

#[test]
fn input_passes_in_order_and_its_end_too() {
    let mut f = fixture(Setup {
        stdin: true,
        ..Setup::default()
    });
    let (_agent, mut main) = f.start();
    let writer = f.launcher.as_ref().unwrap().writer();
    let input: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    let sender = std::thread::spawn({
        let input = input.clone();
        move || {
            writer.write_stdin(&input).unwrap();
            writer.resize(100, 50).unwrap();
            writer.close_stdin().unwrap();
        }
    });
    let mut seen = Vec::new();
    let mut resized = None;
    loop {
        match main.receive().unwrap() {
            (FrameType::Stdin, bytes) if bytes.is_empty() => break,
            (FrameType::Stdin, bytes) => seen.extend(bytes),
            (FrameType::Resize, size) => resized = Some(frame::parse_resize(&size).unwrap()),
            other => panic!("{other:?}"),
        }
    }
    sender.join().unwrap();
    assert!(seen == input, "every byte arrives, in order");
    assert_eq!(resized, Some((100, 50)));
    main.exit(0);
    f.finish();
}

#[test]
fn a_client_that_does_not_read_stalls_the_workload_and_loses_nothing() {
    let mut f = fixture(Setup::default());
    let (_agent, mut main) = f.start();
    let chunk = vec![1u8; 64 * 1024];
    let total = 32;
    let workload = std::thread::spawn(move || {
        for _ in 0..total {
            main.send(FrameType::Stdout, &chunk);
        }
        main.exit(0);
    });
    // Status is still served, and memory stays bounded, however long this takes.
    let status = f.control().call(&ControlCall::Status).unwrap();
    assert!(matches!(status, ControlAnswer::Status(_)));
    let events = f.events();
    let bytes: usize = events
        .iter()
        .filter_map(|e| e.strip_prefix("out "))
        .map(str::len)
        .sum();
    assert_eq!(bytes, total * 64 * 1024);
    workload.join().unwrap();
    f.finish();
}

#[test]
fn a_client_that_leaves_ends_its_input_and_the_workload_goes_on() {
    let mut f = fixture(Setup {
        stdin: true,
        ..Setup::default()
    });
    let (_agent, mut main) = f.start();
    f.launcher = None;
    assert_eq!(main.receive().unwrap(), (FrameType::Stdin, Vec::new()));
    main.exit(9);
    f.finish();
    assert_eq!(f.exit().status, 9);
}

#[test]
fn whoever_waits_is_told_the_end() {
    let mut f = fixture(Setup::default());
    let (_agent, mut main) = f.start();
    let mut waiter = Peer(UnixStream::connect(f.record.control_socket()).unwrap());
    let call = serde_json::to_vec(&ControlCall::Wait).unwrap();
    waiter.send(FrameType::Request, &call);
    // A later connection is not served before an earlier one.
    f.control().call(&ControlCall::Status).unwrap();
    main.exit(9);
    let answer = waiter.receive_json(FrameType::Control);
    assert!(matches!(answer, ControlAnswer::Ended(exit) if exit.status == 9));
    f.finish();
}

#[test]
fn a_launcher_that_leaves_before_the_start_cancels_it() {
    let mut f = fixture(Setup::default());
    f.launcher = None;
    f.finish();
    assert!(!f.record.directory().exists());
    assert!(!f.record.sockets().exists());
    assert_eq!(f.guest.end.lock().unwrap().clone(), Some(GuestEnd::Stopped));
}

#[test]
fn a_missing_command_is_reported_with_its_status() {
    let mut f = fixture(Setup::default());
    let (_agent, mut main, _) = f.boot();
    main.send(FrameType::Error, b"prog: not found");
    main.exit(127);
    assert_eq!(f.events(), ["exit 127", "ended 127"]);
    f.finish();
    let exit = f.exit();
    assert_eq!(exit.reason, ExitReason::StartFailed);
    assert_eq!(exit.message.as_deref(), Some("prog: not found"));
}

#[test]
fn a_guest_that_dies_is_reported_with_its_console() {
    let mut f = fixture(Setup::default());
    let (_agent, main) = f.start();
    std::fs::write(
        f.record.directory().join(crate::record::CONSOLE),
        "booting\r\n\x1b[31mKernel panic - not syncing\r\n",
    )
    .unwrap();
    f.guest
        .end(GuestEnd::Guest("the guest reset itself".into()));
    drop(main);
    let events = f.events();
    assert_eq!(events.last().unwrap(), "ended 125");
    f.finish();
    let exit = f.exit();
    assert_eq!(exit.reason, ExitReason::GuestFailed);
    let message = exit.message.unwrap();
    assert!(message.starts_with("the guest reset itself"), "{message}");
    assert!(
        message.contains("Kernel panic") && !message.contains('\x1b'),
        "{message}"
    );
}

#[test]
fn stopping_signals_first() {
    let mut f = fixture(Setup::default());
    let (mut agent, mut main) = f.start();
    let answer = f.control().call(&ControlCall::Stop { grace_ms: None });
    assert_eq!(answer.unwrap(), ControlAnswer::Done);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::SignalMain { signal: 15 });
    main.exit(143);
    f.finish();
    assert_eq!(f.exit().status, 143);
}

#[test]
fn stopping_kills_after_the_grace() {
    let mut f = fixture(Setup::default());
    let (mut agent, mut main) = f.start();
    f.control()
        .call(&ControlCall::Stop { grace_ms: Some(0) })
        .unwrap();
    for signal in [15, 9] {
        let request: ControlRequest = agent.receive_json(FrameType::Control);
        assert_eq!(request, ControlRequest::SignalMain { signal });
    }
    main.exit(137);
    f.finish();
    let exit = f.exit();
    assert_eq!((exit.status, exit.oom_killed), (137, false));
}

#[test]
fn termination_of_the_process_stops_the_workload() {
    let mut f = fixture(Setup::default());
    let (mut agent, mut main) = f.start();
    f.terminate.write_all(b"x").unwrap();
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::SignalMain { signal: 15 });
    main.exit(0);
    f.finish();
}

#[test]
fn an_unexplained_kill_is_checked_for_lack_of_memory() {
    let mut f = fixture(Setup::default());
    let (mut agent, mut main) = f.start();
    main.exit(137);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Stats);
    agent.send_json(&ControlReply::Stats(GuestStats {
        oom_kills: 1,
        ..GuestStats::default()
    }));
    f.finish();
    let exit = f.exit();
    assert!(exit.oom_killed && exit.message.unwrap().contains("--memory"));
}

#[test]
fn calls_are_answered() {
    let mut f = fixture(Setup {
        auto_remove: true,
        ..Setup::default()
    });
    let (mut agent, _main) = f.start();
    let mut control = f.control();
    let ControlAnswer::Status(status) = control.call(&ControlCall::Status).unwrap() else {
        panic!("a status");
    };
    assert_eq!((status.paused, status.clients), (false, 1));
    control.call(&ControlCall::Pause).unwrap();
    assert!(*f.guest.paused.lock().unwrap());
    control.call(&ControlCall::Resume).unwrap();
    assert!(!*f.guest.paused.lock().unwrap());
    control.call(&ControlCall::Signal { signal: 10 }).unwrap();
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::SignalMain { signal: 10 });
    control.call(&ControlCall::Destroy).unwrap();
    f.finish();
    assert!(!f.record.directory().exists(), "it was to be removed");
}

#[test]
fn a_client_that_attaches_later_sees_output_from_then_on() {
    let mut f = fixture(Setup {
        detached: true,
        ..Setup::default()
    });
    let (_agent, mut main) = f.start();
    assert_eq!(
        f.events(),
        [""; 0],
        "a launcher that does not attach is let go"
    );
    f.launcher = Some(f.control().attach(false).unwrap());
    main.send(FrameType::Stdout, b"late");
    main.exit(0);
    assert_eq!(f.events(), ["out late", "exit 0", "ended 0"]);
    f.finish();
}

#[test]
fn an_agent_of_another_version_is_refused_with_a_sentence() {
    let mut f = fixture(Setup::default());
    let (theirs, ours) = UnixStream::pair().unwrap();
    f.dial.send(Notice::Agent(theirs));
    let mut agent = Peer(ours);
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    agent.send_json(&ControlReply::Hello(AgentHello {
        protocol: 99,
        ..AgentHello::default()
    }));
    f.finish();
    assert!(f.exit().message.unwrap().contains("version 99"));
}

#[test]
fn garbage_from_the_guest_ends_the_vm_with_a_reason() {
    let mut f = fixture(Setup::default());
    let (_agent, mut main) = f.start();
    main.0.write_all(&[0x77; 64]).unwrap();
    assert_eq!(f.events().last().unwrap(), "ended 125");
    f.finish();
    assert_eq!(f.exit().reason, ExitReason::GuestFailed);
}

/// Asks for a snapshot on a thread; the answer comes when it was made.
fn ask_for_snapshot(
    f: &Fixture,
    name: &str,
    stop: bool,
) -> std::thread::JoinHandle<Result<ControlAnswer, crate::Error>> {
    let mut control = f.control();
    let call = ControlCall::Snapshot {
        name: name.to_owned(),
        stop,
        ephemeral: false,
    };
    std::thread::spawn(move || control.call_and_wait(&call))
}

/// Plays an agent that freezes its workload and prepares.
fn freeze(agent: &mut Peer) {
    for expected in [ControlRequest::Freeze, ControlRequest::PrepareSnapshot] {
        let request: ControlRequest = agent.receive_json(FrameType::Control);
        assert_eq!(request, expected);
        agent.send_json(&ControlReply::Done);
    }
}

fn expect_thaw(agent: &mut Peer) {
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Thaw);
    agent.send_json(&ControlReply::Done);
}

#[test]
fn a_snapshot_is_of_a_frozen_workload_that_goes_on() {
    let mut f = fixture(Setup::default());
    let (mut agent, mut main) = f.start();
    let asked = ask_for_snapshot(&f, "warm", false);
    freeze(&mut agent);
    expect_thaw(&mut agent);
    let ControlAnswer::Snapshot(report) = asked.join().unwrap().unwrap() else {
        panic!("a report");
    };
    assert_eq!((report.name.as_str(), report.pages), ("warm", 7));
    let plan = f.guest.snapshot.lock().unwrap().clone().unwrap();
    assert!(!plan.stay && !plan.ephemeral);
    main.exit(0);
    f.finish();
    assert_eq!(f.exit().reason, ExitReason::Workload);
}

#[test]
fn a_snapshot_that_fails_leaves_the_workload_running() {
    let mut f = fixture(Setup::default());
    let (mut agent, mut main) = f.start();
    let asked = ask_for_snapshot(&f, "warm", true);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Freeze);
    agent.send_json(&ControlReply::Error {
        message: "it took too long".into(),
    });
    expect_thaw(&mut agent);
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(
        error.contains("freeze the workload: it took too long"),
        "{error}"
    );
    // Another one is not kept from trying; a name that is taken is no harm either.
    let asked = ask_for_snapshot(&f, "taken", true);
    freeze(&mut agent);
    expect_thaw(&mut agent);
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
    main.exit(4);
    f.finish();
    assert_eq!(f.exit().status, 4);
}

#[test]
fn a_vm_that_is_to_stop_ends_with_its_snapshot() {
    let mut f = fixture(Setup::default());
    let (mut agent, _main) = f.start();
    let asked = ask_for_snapshot(&f, "last", true);
    freeze(&mut agent);
    assert!(asked.join().unwrap().is_ok());
    f.finish();
    let exit = f.exit();
    assert_eq!((exit.status, exit.reason), (137, ExitReason::Destroyed));
    assert!(exit.message.unwrap().contains("\"last\""));
}

/// Plays the agent of a restored guest up to its answer to the refresh.
fn restored(f: &mut Fixture, vmgenid_seen: bool) -> (Peer, Peer) {
    let (theirs, ours) = UnixStream::pair().unwrap();
    f.dial.send(Notice::Agent(theirs));
    answer_as_restored(f, Peer(ours), vmgenid_seen)
}

fn answer_as_restored(f: &mut Fixture, mut agent: Peer, vmgenid_seen: bool) -> (Peer, Peer) {
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    agent.send_json(&ControlReply::Hello(AgentHello {
        protocol: PROTOCOL_VERSION,
        ..AgentHello::default()
    }));
    let ControlRequest::Refresh(refresh) = agent.receive_json(FrameType::Control) else {
        panic!("identity comes before anything else");
    };
    assert!(refresh.vmgenid_wait_ms > 0);
    let (to, stream) = f.connections.recv().unwrap();
    assert_eq!(to, port::EXEC);
    let mut main = Peer(stream);
    let _: ExecControl = main.receive_json(FrameType::Control);
    agent.send_json(&ControlReply::Refreshed(Refreshed {
        vmgenid_seen,
        ..Refreshed::default()
    }));
    (agent, main)
}

#[test]
fn a_clone_gets_its_identity_before_its_workload_goes_on() {
    let mut f = fixture(Setup {
        start: Some(Start::Restored(Layer::App)),
        ..Setup::default()
    });
    let (mut agent, mut main) = restored(&mut f, true);
    expect_thaw(&mut agent);
    let attach: ExecControl = main.receive_json(FrameType::Control);
    assert_eq!(attach, ExecControl::AttachMain);
    main.send_json(&ExecReply::Started { pid: 42 });
    main.send(FrameType::Stdout, b"on");
    main.exit(0);
    let events = f.events();
    assert_eq!(events, ["started 42", "out on", "exit 0", "ended 0"]);
    f.finish();
}

#[test]
fn a_clone_whose_kernel_noticed_nothing_never_thaws() {
    let mut f = fixture(Setup {
        start: Some(Start::Restored(Layer::App)),
        ..Setup::default()
    });
    let (mut agent, _main) = restored(&mut f, false);
    assert!(agent.receive().is_none(), "the VM ends instead");
    f.finish();
    let exit = f.exit();
    assert_eq!(exit.reason, ExitReason::StartFailed);
    assert!(exit.message.unwrap().contains("random numbers"));
}

#[test]
fn an_image_snapshot_needs_no_root_attached() {
    let mut f = fixture(Setup {
        start: Some(Start::Restored(Layer::Image)),
        ..Setup::default()
    });
    let (_agent, mut main) = restored(&mut f, true);
    let request: ExecRequest = main.receive_json(FrameType::Request);
    assert_eq!(request.role, Role::Main);
    main.send_json(&ExecReply::Started { pid: 1 });
    main.exit(0);
    f.finish();
}

#[test]
fn a_machine_that_is_put_back_comes_up_as_another() {
    let mut f = fixture(Setup {
        start: Some(Start::Restored(Layer::App)),
        ..Setup::default()
    });
    let (mut agent, mut main) = restored(&mut f, true);
    expect_thaw(&mut agent);
    let _: ExecControl = main.receive_json(FrameType::Control);
    main.send_json(&ExecReply::Started { pid: 42 });
    main.send(FrameType::Stdout, b"one");
    let status = f.control().call(&ControlCall::Status).unwrap();
    assert!(matches!(status, ControlAnswer::Status(_)));

    let mut control = f.control();
    let asked = std::thread::spawn(move || control.call_and_wait(&ControlCall::Reset));
    assert!(agent.receive().is_none(), "old streams end");
    assert!(main.receive().is_none());
    let (to, stream) = f.connections.recv().unwrap();
    assert_eq!(to, port::CONTROL);
    let (mut agent, mut main) = answer_as_restored(&mut f, Peer(stream), true);
    expect_thaw(&mut agent);
    let attach: ExecControl = main.receive_json(FrameType::Control);
    assert_eq!(attach, ExecControl::AttachMain);
    main.send_json(&ExecReply::Started { pid: 42 });
    assert!(matches!(asked.join().unwrap(), Ok(ControlAnswer::Done)));
    main.send(FrameType::Stdout, b"one again");
    main.exit(0);
    let events = f.events();
    assert_eq!(events.first().unwrap(), "started 42");
    assert!(events.contains(&"out one again".to_owned()), "{events:?}");
    f.finish();
}

#[test]
fn a_machine_of_an_image_has_nothing_to_be_put_back_to() {
    let mut f = fixture(Setup::default());
    let (_agent, mut main) = f.start();
    let refused = f.control().call(&ControlCall::Reset).unwrap_err();
    assert!(refused.to_string().contains("not started from a snapshot"));
    main.exit(0);
    f.finish();
}
