//! Runs that follow by a restart policy.

use sm_control::config::RestartPolicy;
use sm_guest_proto::container::ContainerId;

use super::*;

fn always() -> SupervisorSetup {
    SupervisorSetup::default().restart(RestartPolicy::Always)
}

/// Plays a run that ends with `status`; returns after its end was reported.
fn ended(setup: SupervisorSetup, status: u32) -> Fixture {
    let mut f = fixture(setup);
    let (_agent, mut main) = f.start();
    main.exit(status);
    let last = f.events().pop().unwrap();
    assert_eq!(last, format!("ended {status}"));
    f
}

fn status(f: &Fixture) -> sm_control::launch::Status {
    match f.control().call(&ControlCall::Status).unwrap() {
        ControlAnswer::Status(status) => status,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_next_run_takes_over_lock_and_control_socket() {
    let mut f = ended(always(), 0);
    assert!(f.exit().restarting && !f.exit().stopped);
    let restarting = status(&f);
    assert!(restarting.restarting && restarting.stage == Stage::Ending);
    let next = f.next_run().expect("another run");
    assert_eq!(
        (next.request.restarts.count, next.request.restarts.delay_ms),
        (1, 100)
    );
    assert!(next.request.existing && !next.request.attach);
    assert!(f.record.is_locked(), "without a gap");
    assert!(f.record.sockets().exists());
    // A client that connects now waits for the next run.
    let _waiting = UnixStream::connect(f.record.control_socket()).unwrap();
    next.listener.set_nonblocking(false).unwrap();
    next.listener.accept().unwrap();
}

#[test]
fn failures_are_restarted_and_successes_are_not() {
    let on_failure = SupervisorSetup::default().restart(RestartPolicy::OnFailure { max: 1 });
    let mut f = ended(on_failure, 0);
    f.finish();
    assert!(!f.exit().restarting && !f.record.sockets().exists());
    let mut f = ended(on_failure, 1);
    assert!(f.next_run().is_some());
    let mut f = ended(SupervisorSetup::default(), 1);
    f.finish();
}

#[test]
fn a_vm_that_a_client_stops_stays_ended() {
    let mut f = fixture(always());
    let (mut agent, mut main) = f.start();
    let stop = ControlCall::Stop { grace_ms: None };
    f.control().call(&stop).unwrap();
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    main.exit(143);
    f.finish();
    assert!(f.exit().stopped && !f.exit().restarting);
    assert_eq!(f.record.events(), ["start", "kill", "die", "stop"]);
}

#[test]
fn a_vm_that_a_client_kills_stays_ended() {
    let mut f = fixture(always());
    let (mut agent, mut main) = f.start();
    let (control, thread) = (f.control(), std::thread::spawn);
    let killed = thread(move || {
        let mut control = control;
        control.call(&ControlCall::Signal { signal: 9 })
    });
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    agent.send_json(&ControlReply::Done);
    main.exit(137);
    // It may be the guest's OOM killer.
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    agent.send_json(&ControlReply::Stats(GuestStats::default()));
    f.finish();
    killed.join().unwrap().unwrap();
    assert!(f.exit().stopped);
}

/// The host goes down: the VM is to run after the reboot.
#[test]
fn a_signal_to_the_process_is_no_stop_by_a_client() {
    let mut f = fixture(always());
    let (mut agent, mut main) = f.start();
    f.terminate.write_all(b"x").unwrap();
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    main.exit(143);
    f.finish();
    assert!(!f.exit().stopped && !f.exit().restarting);
    assert!(RestartPolicy::UnlessStopped.resumes_after(&f.exit()));
}

#[test]
fn a_stop_cancels_the_next_run() {
    for call in [ControlCall::Stop { grace_ms: None }, ControlCall::Destroy] {
        // A delay that the test does not wait for.
        let mut f = ended(always().restarted(20_000), 1);
        let mut waiter = FramedPeer(UnixStream::connect(f.record.control_socket()).unwrap());
        let wait = serde_json::to_vec(&ControlCall::Wait).unwrap();
        waiter.send(FrameType::Request, &wait);
        assert!(status(&f).restarting, "the waiter was served before");
        f.control().call(&call).unwrap();
        let answer = waiter.receive_json(FrameType::Control);
        assert!(matches!(answer, ControlAnswer::Ended(exit) if exit.stopped));
        f.finish();
        assert!(f.exit().stopped && !f.exit().restarting, "{call:?}");
        assert!(!f.record.is_locked() && !f.record.sockets().exists());
    }
}

#[test]
fn a_start_that_fails_is_tried_again_only_by_a_policy() {
    let missing = |setup: SupervisorSetup| {
        let mut f = fixture(setup);
        let (_agent, mut main, _) = f.boot();
        main.send(FrameType::Error, b"prog: not found");
        main.exit(127);
        f
    };
    missing(always()).finish();
    let mut f = missing(always().restarted(100));
    assert!(f.next_run().is_some());
}

#[test]
fn a_launcher_that_leaves_does_not_remove_an_existing_vm() {
    let mut f = fixture(SupervisorSetup {
        existing: true,
        ..SupervisorSetup::default()
    });
    f.launcher = None;
    f.finish();
    assert_eq!(f.exit().reason, ExitReason::StartFailed);
    assert!(f.record.directory().exists());
}

#[test]
fn a_run_that_lasts_too_long_is_stopped() {
    let mut f = fixture(SupervisorSetup {
        expire: Some(Duration::from_millis(1)),
        ..always()
    });
    let (mut agent, mut main) = f.start();
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    let stop = ControlRequest::SignalMain {
        container: ContainerId::default(),
        signal: 15,
        stop: true,
    };
    assert_eq!(request, stop);
    main.exit(143);
    f.finish();
    assert!(f.exit().stopped);
}
