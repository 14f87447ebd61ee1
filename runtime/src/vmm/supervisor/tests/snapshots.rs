//! Snapshots, clones and machines that are put back.

use super::*;

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
    let agent = f.dial();
    answer_as_restored(f, agent, vmgenid_seen)
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
