//! Hundreds of concurrent clients of all kinds.

use std::thread;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::*;
use sm_guest_proto::container::ContainerId;

/// Number of clients of each kind.
const CLIENTS: usize = 120;

/// Returns the output of `sm logs -f`.
fn followed(record: &Record) -> String {
    let mut logs = Logs::open(record.clone()).unwrap();
    let mut all = Vec::new();
    while let Some(record) = logs.wait_record().unwrap() {
        all.extend(record.bytes);
    }
    text(&all)
}

/// Plays an agent that answers each exec request with its command.
fn serve_exec(listener: &UnixListener, commands: usize) {
    for stream in listener.incoming().take(commands) {
        let mut peer = FramedPeer(stream.unwrap());
        let _: ExecControl = peer.receive_json(FrameType::Control);
        let request: ExecRequest = peer.receive_json(FrameType::Request);
        peer.send_json(&ExecReply::Started {
            container: ContainerId::default(),
            pid: 7,
        });
        peer.send(FrameType::Stdout, request.argv[0].as_bytes());
        peer.exit(0);
    }
}

/// The test runs in a user namespace with fewer inotify instances than readers of the
/// log: by default, a user has 128 for all programs.
#[test]
fn hundreds_of_clients_of_all_kinds_do_not_prevent_control() {
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", "sh", "-c"])
        .arg("echo 50 >/proc/sys/user/max_inotify_instances && exec \"$0\" \"$@\"")
        .arg(std::env::current_exe().unwrap());
    let name = "hundreds_of_clients_of_all_kinds_do_not_prevent_control";
    if !in_own_process(module_path!(), name, &mut command) {
        return;
    }
    // The VM's process raises its limit in the same way.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, most).unwrap();
    let mut f = fixture(SupervisorSetup::default().detached());
    let (mut agent, mut main) = f.vm.start();
    let exec = UnixListener::bind(f.vm.record.exec_socket()).unwrap();
    let exec = thread::spawn(move || serve_exec(&exec, 10));
    let client = |call: &ControlCall| {
        let mut peer = FramedPeer(UnixStream::connect(f.vm.record.control_socket()).unwrap());
        peer.send(FrameType::Request, &serde_json::to_vec(call).unwrap());
        peer
    };
    let mut waiting: Vec<FramedPeer> = (0..CLIENTS).map(|_| client(&ControlCall::Wait)).collect();
    let attach = ControlCall::Attach { stdin: false };
    let mut attached: Vec<FramedPeer> = (0..CLIENTS).map(|_| client(&attach)).collect();
    for client in &mut attached {
        let done: ControlAnswer = client.receive_json(FrameType::Control);
        assert_eq!(done, ControlAnswer::Done);
    }
    let following: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let record = f.vm.record.clone();
            thread::spawn(move || followed(&record))
        })
        .collect();
    let vm = f.find();
    let mut expected = String::new();
    for round in 0..10 {
        let line = format!("line {round}\n");
        main.send(FrameType::Stdout, line.as_bytes());
        for client in &mut attached {
            // The output follows the report of a phase.
            let mut frames = std::iter::from_fn(|| client.receive());
            let output = frames.find(|(kind, _)| *kind == FrameType::Stdout);
            assert_eq!(text(&output.unwrap().1), line);
        }
        expected.push_str(&line);
        let ran = vm.exec([format!("command {round}")]).output().unwrap();
        assert_eq!(text(&ran.stdout), format!("command {round}"));
        assert_eq!(vm.inspect().unwrap().state.status, VmStatus::Running);
    }
    f.vm.control()
        .call(&ControlCall::Stop { grace_ms: None })
        .unwrap();
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(
        request,
        ControlRequest::SignalMain {
            container: ContainerId::default(),
            signal: 15,
            stop: true
        }
    );
    main.send(FrameType::Stderr, b"last");
    expected.push_str("last");
    main.exit(7);
    for client in &mut waiting {
        let answer = client.receive_json(FrameType::Control);
        assert!(matches!(answer, ControlAnswer::Ended(exit) if exit.status == 7));
    }
    for client in &mut attached {
        while client.receive().unwrap().0 != FrameType::Exit {}
    }
    for reader in following {
        assert_eq!(reader.join().unwrap(), expected);
    }
    exec.join().unwrap();
    drop((waiting, attached));
    f.vm.finish();
}

/// A follower has at most one pending notification, however much output there is.
#[test]
fn a_follower_that_does_not_read_blocks_no_one() {
    let mut f = fixture(SupervisorSetup::default().detached());
    let (_agent, mut main) = f.vm.start();
    let mut follower = f.vm.control().follow().unwrap();
    // These are more notifications than a socket buffer holds.
    for _ in 0..5000 {
        main.send(FrameType::Stdout, b"x");
    }
    main.exit(0);
    let mut words = Vec::new();
    follower.read_to_end(&mut words).unwrap();
    assert!(!words.is_empty());
    f.vm.finish();
    // A follower that connects after the end is notified by the end of its connection.
    assert_eq!(followed(&f.vm.record).len(), 5000);
}
