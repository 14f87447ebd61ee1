//! Snapshots, clones and resets.

use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::IdentityReport;

use super::held::until;
use super::*;

/// Requests a snapshot on a thread; the answer arrives when it is published.
pub(super) fn ask_for_snapshot(
    f: &Fixture,
    name: &str,
    stop: bool,
) -> std::thread::JoinHandle<Result<ControlAnswer, sm_control::ControlError>> {
    let mut control = f.control();
    let call = ControlCall::Snapshot {
        name: name.to_owned(),
        stop,
        ephemeral: false,
    };
    std::thread::spawn(move || control.call_and_wait(&call))
}

/// Plays an agent that freezes its workload and prepares.
pub(super) fn freeze(agent: &mut FramedPeer) {
    for expected in [ControlRequest::Freeze, ControlRequest::PrepareSnapshot] {
        let request: ControlRequest = agent.receive_json(FrameType::Control);
        assert_eq!(request, expected);
        agent.send_json(&ControlReply::Done);
    }
}

pub(super) fn expect_thaw(agent: &mut FramedPeer) {
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Thaw);
    agent.send_json(&ControlReply::Done);
}

#[test]
fn a_snapshot_is_of_a_frozen_workload_that_goes_on() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let asked = ask_for_snapshot(&f, "warm", false);
    freeze(&mut agent);
    expect_thaw(&mut agent);
    let ControlAnswer::Snapshot(report) = asked.join().unwrap().unwrap() else {
        panic!("a report");
    };
    assert_eq!((report.name.as_str(), report.pages), ("warm", 7));
    assert_eq!(report.warnings, ["a file is lost"]);
    let plan = f.guest.snapshot.lock().unwrap().clone().unwrap();
    assert!(!plan.leave_paused && !plan.ephemeral);
    main.exit(0);
    f.finish();
    assert_eq!(f.exit().reason, ExitReason::Workload);
}

#[test]
fn a_snapshot_that_fails_leaves_the_workload_running() {
    let mut f = fixture(SupervisorSetup::default());
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
    // A failure does not prevent the next attempt; nor does a name that is taken.
    let asked = ask_for_snapshot(&f, "raced", true);
    freeze(&mut agent);
    expect_thaw(&mut agent);
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
    main.exit(4);
    f.finish();
    assert_eq!(f.exit().status, 4);
}

#[test]
fn a_name_that_is_taken_is_refused_before_anything_is_frozen() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let refused = ask_for_snapshot(&f, "taken", false).join().unwrap();
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
    assert!(f.guest.snapshot.lock().unwrap().is_none());
    // The agent's next request is about the end.
    main.exit(0);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::PowerOff { grace_ms: 0 });
    f.finish();
}

pub(super) fn published(pages: u64) -> Result<PublishedSnapshot, String> {
    let report = SnapshotReport {
        pages,
        ..SnapshotReport::default()
    };
    Ok(PublishedSnapshot {
        report,
        guard: None,
    })
}

/// A captured snapshot is published, whatever happens to the VM.
#[test]
fn a_vm_that_ends_while_its_snapshot_is_published_reports_the_result() {
    for stays in [false, true] {
        for outcome in [published(5), Err("the disk is full".to_owned())] {
            let succeeds = outcome.is_ok();
            let mut f = fixture(SupervisorSetup::default());
            let (mut agent, mut main) = f.start();
            let asked = ask_for_snapshot(&f, "slow", stays);
            freeze(&mut agent);
            if !stays {
                expect_thaw(&mut agent);
            }
            until(&f, |guest| guest.captured.lock().unwrap().is_some());
            main.exit(6);
            // All other clients are notified of the end at once.
            assert_eq!(f.events(), ["exit 6", "ended 6"]);
            while agent.receive().is_some() {}
            f.dial.send(SupervisorEvent::Snapshot(outcome));
            match asked.join().unwrap() {
                Ok(ControlAnswer::Snapshot(report)) => {
                    assert!(succeeds);
                    assert_eq!((report.name.as_str(), report.pages), ("slow", 5));
                }
                Err(error) => {
                    assert!(!succeeds);
                    assert!(error.to_string().contains("the disk is full"), "{error}");
                }
                other => panic!("{other:?}"),
            }
            f.finish();
            assert_eq!(f.exit().status, 6);
        }
    }
}

#[test]
fn a_vm_that_ends_before_it_is_captured_makes_no_snapshot() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let asked = ask_for_snapshot(&f, "slow", false);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Freeze);
    main.exit(0);
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(
        error.contains("exited before its snapshot was taken"),
        "{error}"
    );
    f.finish();
    assert!(f.guest.snapshot.lock().unwrap().is_none());
}

#[test]
fn a_starting_vm_is_not_paused() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main, _) = f.boot();
    let error = f.control().call(&ControlCall::Pause).unwrap_err();
    assert!(error.to_string().contains("has not started yet"), "{error}");
    assert!(!*f.guest.paused.lock().unwrap());
    main.send_json(&ExecReply::Started {
        container: ContainerId::default(),
        pid: 1,
    });
    main.exit(0);
    f.finish();
}

/// A timeout does not indicate a corrupt snapshot.
#[test]
fn a_start_that_takes_too_long_discards_no_snapshot() {
    let mut f = fixture(SupervisorSetup {
        restored: Some(Layer::Image),
        start_timeout_ms: Some(20),
        ..SupervisorSetup::default()
    });
    f.finish();
    let message = f.exit().message.unwrap();
    assert!(message.contains("not ready after"), "{message}");
    assert!(message.contains("\"image-x\", which is kept"), "{message}");
    assert_eq!(f.exit().cause, Some(FailureCause::AutomaticSnapshot));
    assert!(!*f.guest.source_discarded.lock().unwrap());
}

#[test]
fn a_failure_of_the_host_discards_no_snapshot_and_a_crash_of_the_guest_does() {
    for (end, discards) in [
        (GuestEnd::Host("no memory".to_owned()), false),
        (GuestEnd::Guest("a triple fault".to_owned()), true),
    ] {
        let mut f = fixture(SupervisorSetup {
            restored: Some(Layer::Base),
            ..SupervisorSetup::default()
        });
        let _agent = f.dial();
        f.guest.end(end);
        f.finish();
        assert_eq!(f.exit().reason, ExitReason::StartFailed);
        assert_eq!(*f.guest.source_discarded.lock().unwrap(), discards);
    }
}

#[test]
fn a_vm_that_is_to_stop_ends_with_its_snapshot() {
    let mut f = fixture(SupervisorSetup::default());
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
fn restored(f: &mut Fixture, vmgenid_seen: bool) -> (FramedPeer, FramedPeer) {
    let agent = f.dial();
    answer_as_restored(f, agent, vmgenid_seen, 0)
}

pub(super) fn answer_as_restored(
    f: &mut Fixture,
    mut agent: FramedPeer,
    vmgenid_seen: bool,
    realtime_ns: u64,
) -> (FramedPeer, FramedPeer) {
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
    let mut main = FramedPeer(stream);
    let _: ExecControl = main.receive_json(FrameType::Control);
    agent.send_json(&ControlReply::Refreshed(Refreshed {
        vmgenid_seen,
        realtime_ns,
    }));
    (agent, main)
}

#[test]
fn a_clone_gets_its_identity_before_its_workload_goes_on() {
    let mut f = fixture(SupervisorSetup {
        restored: Some(Layer::App),
        ..SupervisorSetup::default()
    });
    let (mut agent, mut main) = restored(&mut f, true);
    expect_thaw(&mut agent);
    let attach: ExecControl = main.receive_json(FrameType::Control);
    assert_eq!(
        attach,
        ExecControl::AttachMain {
            container: ContainerId::default(),
        }
    );
    main.send_json(&ExecReply::Started {
        container: ContainerId::default(),
        pid: 42,
    });
    main.send(FrameType::Stdout, b"on");
    main.exit(0);
    let events = f.events();
    assert_eq!(events, ["started 42", "out on", "exit 0", "ended 0"]);
    f.finish();
}

#[test]
fn a_clone_without_a_new_generation_id_never_thaws() {
    let mut f = fixture(SupervisorSetup {
        restored: Some(Layer::App),
        ..SupervisorSetup::default()
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
    let mut f = fixture(SupervisorSetup {
        restored: Some(Layer::Image),
        ..SupervisorSetup::default()
    });
    let (mut agent, mut main) = restored(&mut f, true);
    expect_thaw(&mut agent);
    let request: ExecRequest = main.receive_json(FrameType::Request);
    assert_eq!(request.role, Role::Main);
    main.send_json(&ExecReply::Started {
        container: ContainerId::default(),
        pid: 1,
    });
    main.exit(0);
    f.finish();
}

/// Processes that are started in a clone must wait for the clone's identity, too.
#[test]
fn an_image_snapshot_is_of_a_frozen_guest() {
    let mut f = fixture(SupervisorSetup {
        wants_root: true,
        ..SupervisorSetup::default()
    });
    let (mut agent, mut main) = f.boot_to_root();
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Freeze);
    assert_eq!(*f.guest.roots.lock().unwrap(), 0);
    agent.send_json(&ControlReply::Done);
    expect_thaw(&mut agent);
    assert_eq!(*f.guest.roots.lock().unwrap(), 1);
    let _: ExecRequest = main.receive_json(FrameType::Request);
    main.send_json(&ExecReply::Started {
        container: ContainerId::default(),
        pid: 1,
    });
    main.exit(0);
    f.finish();
}

#[test]
fn a_guest_that_does_not_freeze_starts_without_an_image_snapshot() {
    let mut f = fixture(SupervisorSetup {
        wants_root: true,
        ..SupervisorSetup::default()
    });
    let (mut agent, mut main) = f.boot_to_root();
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    agent.send_json(&ControlReply::Error {
        message: "no freezer".into(),
    });
    expect_thaw(&mut agent);
    let _: ExecRequest = main.receive_json(FrameType::Request);
    assert_eq!(*f.guest.roots.lock().unwrap(), 0);
    main.send_json(&ExecReply::Started {
        container: ContainerId::default(),
        pid: 1,
    });
    main.exit(0);
    f.finish();
}

#[test]
fn a_guest_that_is_never_ready_fails_the_snapshot() {
    let mut f = fixture(SupervisorSetup {
        prepare_timeout: Some(Duration::from_millis(20)),
        ..SupervisorSetup::default()
    });
    let (mut agent, mut main) = f.start();
    let asked = ask_for_snapshot(&f, "late", true);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Freeze);
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("did not get ready"), "{error}");
    // The workload must not stay frozen, and late answers are ignored.
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Thaw);
    agent.send_json(&ControlReply::Done);
    agent.send_json(&ControlReply::Done);
    let status = f.control().call(&ControlCall::Status).unwrap();
    assert!(matches!(status, ControlAnswer::Status(_)));
    assert!(f.guest.snapshot.lock().unwrap().is_none());
    main.exit(3);
    f.finish();
    assert_eq!(f.exit().status, 3);
}

#[test]
fn a_snapshot_that_is_being_made_is_not_paused_nor_resumed_under() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let asked = ask_for_snapshot(&f, "warm", false);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Freeze);
    for call in [ControlCall::Pause, ControlCall::Resume] {
        let error = f.control().call(&call).unwrap_err().to_string();
        assert!(error.contains("try again"), "{error}");
    }
    assert!(!*f.guest.paused.lock().unwrap());
    agent.send_json(&ControlReply::Done);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::PrepareSnapshot);
    agent.send_json(&ControlReply::Done);
    expect_thaw(&mut agent);
    asked.join().unwrap().unwrap();
    f.control().call(&ControlCall::Pause).unwrap();
    assert!(*f.guest.paused.lock().unwrap());
    f.control().call(&ControlCall::Resume).unwrap();
    main.exit(0);
    f.finish();
}

#[test]
fn every_start_has_an_epoch_that_its_owner_can_ask_for() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    let ControlAnswer::Status(status) = f.control().call(&ControlCall::Status).unwrap() else {
        panic!("a status");
    };
    assert!(uuid::Uuid::parse_str(&status.epoch).is_ok());
    main.exit(0);
    f.finish();
}

#[test]
fn a_snapshot_whose_guest_does_not_start_is_discarded_and_named() {
    let mut f = fixture(SupervisorSetup {
        restored: Some(Layer::Image),
        ..SupervisorSetup::default()
    });
    let (_agent, _main) = restored(&mut f, false);
    f.finish();
    assert!(*f.guest.source_discarded.lock().unwrap());
    let exit = f.exit();
    assert_eq!(exit.cause, Some(FailureCause::NoGenerationId));
    let message = exit.message.unwrap();
    assert!(
        message.contains("\"image-x\", which is removed"),
        "{message}"
    );
}

#[test]
fn a_reset_machine_has_a_new_identity() {
    let mut f = fixture(SupervisorSetup {
        restored: Some(Layer::App),
        ..SupervisorSetup::default()
    });
    let (mut agent, mut main) = restored(&mut f, true);
    expect_thaw(&mut agent);
    let _: ExecControl = main.receive_json(FrameType::Control);
    main.send_json(&ExecReply::Started {
        container: ContainerId::default(),
        pid: 42,
    });
    main.send(FrameType::Stdout, b"one");
    let status = f.control().call(&ControlCall::Status).unwrap();
    assert!(matches!(status, ControlAnswer::Status(_)));

    let mut control = f.control();
    let asked = std::thread::spawn(move || control.call_and_wait(&ControlCall::Reset));
    assert!(agent.receive().is_none(), "old streams end");
    assert!(main.receive().is_none());
    let (to, stream) = f.connections.recv().unwrap();
    assert_eq!(to, port::CONTROL);
    let (mut agent, mut main) = answer_as_restored(&mut f, FramedPeer(stream), true, 0);
    expect_thaw(&mut agent);
    let attach: ExecControl = main.receive_json(FrameType::Control);
    assert_eq!(
        attach,
        ExecControl::AttachMain {
            container: ContainerId::default(),
        }
    );
    main.send_json(&ExecReply::Started {
        container: ContainerId::default(),
        pid: 42,
    });
    assert!(matches!(asked.join().unwrap(), Ok(ControlAnswer::Done)));
    main.send(FrameType::Stdout, b"one again");
    main.exit(0);
    let events = f.events();
    assert_eq!(events.first().unwrap(), "started 42");
    assert!(events.contains(&"out one again".to_owned()), "{events:?}");
    f.finish();
}

#[test]
fn a_reset_in_progress_refuses_what_needs_the_machine_and_can_be_stopped() {
    let mut f = fixture(SupervisorSetup {
        restored: Some(Layer::App),
        ..SupervisorSetup::default()
    });
    let (_agent, mut main) = restored(&mut f, true);
    main.send_json(&ExecReply::Started {
        container: ContainerId::default(),
        pid: 42,
    });
    let session = f.launcher.as_mut().unwrap();
    while !matches!(
        session.next_event().unwrap().unwrap(),
        Event::Started { .. }
    ) {}
    let mut control = f.control();
    let asked = std::thread::spawn(move || control.call_and_wait(&ControlCall::Reset));
    let (to, _stream) = f.connections.recv().unwrap();
    assert_eq!(to, port::CONTROL);
    let snapshot = ControlCall::Snapshot {
        name: "last".to_owned(),
        stop: false,
        ephemeral: false,
    };
    for (call, why) in [
        (ControlCall::Reset, "being reset already"),
        (ControlCall::Pause, "being reset to its snapshot"),
        (snapshot, "being reset to its snapshot"),
    ] {
        let error = f.control().call(&call).unwrap_err().to_string();
        assert!(error.contains(why), "{call:?}: {error}");
    }
    f.control()
        .call(&ControlCall::Stop { grace_ms: None })
        .unwrap();
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(
        error.contains("exited before the reset completed"),
        "{error}"
    );
    f.finish();
    assert_eq!(f.exit().reason, ExitReason::Destroyed);
}

#[test]
fn a_machine_of_an_image_cannot_be_reset() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    let refused = f.control().call(&ControlCall::Reset).unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("not started from a workload snapshot")
    );
    main.exit(0);
    f.finish();
}

#[test]
fn a_machine_started_for_its_identity_report_lives_as_long_as_its_launcher() {
    let mut f = fixture(SupervisorSetup {
        detached: true,
        identity_report: true,
        restored: Some(Layer::App),
        ..SupervisorSetup::default()
    });
    let mut agent = f.dial();
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    agent.send_json(&ControlReply::Hello(AgentHello {
        protocol: PROTOCOL_VERSION,
        ..AgentHello::default()
    }));
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    agent.send_json(&ControlReply::Refreshed(Refreshed {
        vmgenid_seen: true,
        ..Refreshed::default()
    }));
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(
        request,
        ControlRequest::IdentityReport {
            container: ContainerId::default(),
        },
        "and no thaw"
    );
    agent.send_json(&ControlReply::IdentityReport(IdentityReport::default()));
    let mut launcher = f.launcher.take().unwrap();
    let told = std::iter::from_fn(|| match launcher.next_event().unwrap().unwrap() {
        Event::IdentityReport(_) => None,
        other => Some(format!("{other:?}")),
    });
    assert!(told.count() > 0, "phases come first");
    let status = f.control().call(&ControlCall::Status).unwrap();
    assert!(
        matches!(status, ControlAnswer::Status(_)),
        "it is still there"
    );
    assert_eq!(f.guest.end.lock().unwrap().clone(), None);
    drop(launcher);
    f.finish();
    assert!(!f.record.directory().exists(), "nothing of it is left");
}
