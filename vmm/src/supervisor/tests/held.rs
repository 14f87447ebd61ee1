//! A machine that is paused while its memory is copied, and requests during that time.

use super::snapshots::{ask_for_snapshot, expect_thaw, freeze, published};
use super::*;
use sm_guest_proto::container::ContainerId;

/// Memory may be large and the disk slow: no other client waits for that.
#[test]
fn a_vm_serves_its_clients_while_its_memory_is_copied() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let asked = ask_for_snapshot(&f, "large", false);
    freeze(&mut agent);
    f.control().call(&ControlCall::Status).unwrap();
    for call in [ControlCall::Pause, ControlCall::Reset] {
        let error = f.control().call_and_wait(&call).unwrap_err().to_string();
        assert!(
            error.contains("snapshot of this VM is being taken"),
            "{error}"
        );
    }
    f.dial.send(SupervisorEvent::Captured(Ok(())));
    expect_thaw(&mut agent);
    assert_eq!(*f.guest.captured.lock().unwrap(), Some(AfterCapture::Run));
    f.dial.send(SupervisorEvent::Snapshot(published(9)));
    assert!(matches!(
        asked.join().unwrap(),
        Ok(ControlAnswer::Snapshot(SnapshotReport { pages: 9, .. }))
    ));
    assert!(!*f.guest.capture_cancelled.lock().unwrap());
    main.exit(0);
    f.finish();
}

/// Waits until the state of a fixture's guest satisfies a condition.
pub(super) fn until(f: &Fixture, is_so: impl Fn(&FakeState) -> bool) {
    while !is_so(&f.guest) {
        f.control().call(&ControlCall::Status).unwrap();
    }
}

fn hear_signal(agent: &mut FramedPeer, expected: u8) {
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert!(
        matches!(request, ControlRequest::SignalMain { signal, .. } if signal == expected),
        "{request:?}"
    );
}

fn expect_signal(agent: &mut FramedPeer, expected: u8) {
    hear_signal(agent, expected);
    agent.send_json(&ControlReply::Done);
}

/// The copy may take longer than the stop grace. The stop grace starts when the workload
/// runs.
#[test]
fn a_vm_that_is_stopped_while_its_memory_is_copied_has_its_time_to_stop() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let asked = ask_for_snapshot(&f, "large", false);
    freeze(&mut agent);
    f.control()
        .call(&ControlCall::Stop { grace_ms: Some(1) })
        .unwrap();
    expect_signal(&mut agent, 15);
    until(&f, |guest| *guest.capture_cancelled.lock().unwrap());
    f.dial
        .send(SupervisorEvent::Captured(Err("it was given up".into())));
    expect_thaw(&mut agent);
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("given up"), "{error}");
    expect_signal(&mut agent, 9);
    main.exit(137);
    f.finish();
    assert_eq!(f.exit().reason, ExitReason::Workload);
}

#[test]
fn a_vm_that_is_stopped_while_it_freezes_has_its_time_to_stop() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let asked = ask_for_snapshot(&f, "warm", false);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Freeze);
    f.control()
        .call(&ControlCall::Stop { grace_ms: Some(1) })
        .unwrap();
    // The agent does not answer, as it has not frozen the workload yet.
    hear_signal(&mut agent, 15);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Thaw);
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("to stop"), "{error}");
    hear_signal(&mut agent, 9);
    main.exit(143);
    f.finish();
    assert_eq!(f.exit().status, 143);
    assert!(f.guest.snapshot.lock().unwrap().is_none());
}

/// The workload would be frozen while it shuts down.
#[test]
fn a_vm_that_is_about_to_stop_makes_no_snapshot() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    f.control()
        .call(&ControlCall::Stop { grace_ms: None })
        .unwrap();
    expect_signal(&mut agent, 15);
    let refused = ask_for_snapshot(&f, "late", false).join().unwrap();
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("about to end"), "{error}");
    main.exit(0);
    f.finish();
}

/// A slow disk does not count as a slow guest.
#[test]
fn the_time_to_start_does_not_pass_while_memory_is_copied() {
    let timeout = Duration::from_secs(3);
    let mut f = fixture(SupervisorSetup {
        wants_root: true,
        slow_copies: true,
        start_timeout_ms: Some(3000),
        ..SupervisorSetup::default()
    });
    let (mut agent, mut main) = f.boot_to_root();
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::Freeze);
    agent.send_json(&ControlReply::Done);
    until(&f, |guest| *guest.roots.lock().unwrap() == 1);
    // The sleep exceeds the time limit of the start: the timer must be suspended.
    std::thread::sleep(timeout);
    f.control().call(&ControlCall::Status).unwrap();
    f.dial.send(SupervisorEvent::Captured(Ok(())));
    expect_thaw(&mut agent);
    let _: ExecRequest = main.receive_json(FrameType::Request);
    main.send_json(&ExecReply::Started {
        container: ContainerId::default(),
        pid: 1,
    });
    main.exit(0);
    f.finish();
    assert_eq!(f.exit().status, 0);
}

/// The workload does not run again, so it cannot be blamed for not stopping.
#[test]
fn a_vm_that_stays_paused_is_not_reported_as_unresponsive() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, _main) = f.start();
    let asked = ask_for_snapshot(&f, "large", true);
    freeze(&mut agent);
    f.control()
        .call(&ControlCall::Stop { grace_ms: Some(1) })
        .unwrap();
    expect_signal(&mut agent, 15);
    until(&f, |guest| *guest.capture_cancelled.lock().unwrap());
    // The copy was complete before the cancellation.
    f.dial.send(SupervisorEvent::Captured(Ok(())));
    while agent.receive().is_some() {}
    f.dial.send(SupervisorEvent::Snapshot(published(3)));
    assert!(asked.join().unwrap().is_ok());
    f.finish();
    let message = f.exit().message.unwrap();
    assert!(
        message.contains("while snapshot \"large\" of it"),
        "{message}"
    );
}

/// The client was notified of a failure, so no snapshot may exist.
#[test]
fn a_vm_that_is_removed_while_its_memory_is_copied_leaves_no_snapshot() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, _main) = f.start();
    let asked = ask_for_snapshot(&f, "large", false);
    freeze(&mut agent);
    f.control().call(&ControlCall::Destroy).unwrap();
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("exited before its snapshot"), "{error}");
    assert!(*f.guest.capture_cancelled.lock().unwrap());
    // The copy was complete before the cancellation.
    f.dial.send(SupervisorEvent::Captured(Ok(())));
    f.finish();
    let captured = *f.guest.captured.lock().unwrap();
    assert!(captured.is_none_or(|then| then == AfterCapture::Discard));
}

/// The guest cannot answer: the signal is delivered if the workload continues.
#[test]
fn a_signal_to_a_machine_that_stays_paused_is_answered_at_once() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let asked = ask_for_snapshot(&f, "slow", true);
    freeze(&mut agent);
    until(&f, |guest| guest.captured.lock().unwrap().is_some());
    let signalled = f.control().call(&ControlCall::Signal { signal: 10 });
    assert!(matches!(signalled, Ok(ControlAnswer::Done)));
    super::signals::expect(&mut agent, 10);
    let failed = Err("the disk is full".to_owned());
    f.dial.send(SupervisorEvent::Snapshot(failed));
    expect_thaw(&mut agent);
    assert!(asked.join().unwrap().is_err());
    // The machine is free again.
    f.control().call(&ControlCall::Pause).unwrap();
    f.control().call(&ControlCall::Resume).unwrap();
    main.exit(0);
    f.finish();
    assert_eq!(f.exit().reason, ExitReason::Workload);
}

/// The end of the VM counts, rather than the snapshot that is still published.
#[test]
fn a_vm_that_has_ended_is_not_paused_because_of_its_end() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    // The exit record cannot be written, so the process answers calls after the end.
    std::fs::create_dir(f.record.directory().join(".exit.json.new")).unwrap();
    let asked = ask_for_snapshot(&f, "slow", true);
    freeze(&mut agent);
    until(&f, |guest| guest.captured.lock().unwrap().is_some());
    main.exit(6);
    assert_eq!(f.events(), ["exit 6", "ended 6"]);
    for call in [ControlCall::Pause, ControlCall::Resume] {
        let error = f.control().call(&call).unwrap_err().to_string();
        assert!(error.contains("the workload has ended"), "{error}");
    }
    f.dial.send(SupervisorEvent::Snapshot(published(5)));
    assert!(asked.join().unwrap().is_ok());
    f.terminate.write_all(b"x").unwrap();
    f.finish();
}
