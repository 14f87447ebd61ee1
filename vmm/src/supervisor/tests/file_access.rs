//! Machines that are started for access to the files of an idle VM.

use super::*;

fn setup() -> SupervisorSetup {
    let setup = SupervisorSetup {
        power_off_timeout: Some(Duration::from_secs(600)),
        ..SupervisorSetup::default().files()
    };
    // None of these has a meaning without a workload.
    SupervisorSetup {
        health_retries: Some(1),
        ..setup
    }
}

/// Receives the request to power off, and plays the rest of the guest's life.
fn powers_off(f: &Fixture, agent: &mut FramedPeer) {
    let request = agent.receive_json(FrameType::Control);
    assert!(matches!(request, ControlRequest::PowerOff { grace_ms: 0 }));
    agent.send_json(&ControlReply::Done);
    f.guest.end(GuestEnd::Guest("it is off".to_owned()));
}

fn status(f: &Fixture) -> sm_control::launch::Status {
    match f.control().call(&ControlCall::Status).unwrap() {
        ControlAnswer::Status(status) => status,
        other => panic!("{other:?}"),
    }
}

#[test]
fn no_workload_runs_and_the_end_of_the_launcher_is_that_of_the_machine() {
    let mut f = fixture(setup());
    let (mut agent, mut main) = f.start_for_files();
    let status = status(&f);
    // Operations on files are not refused.
    assert_eq!((status.stage, status.paused), (Stage::Running, false));
    assert_eq!(status.health, None);
    let waiting = f.control();
    drop(f.launcher.take());
    powers_off(&f, &mut agent);
    waiting
        .wait_until(Instant::now() + Duration::from_secs(600))
        .unwrap();
    f.finish();
    // Nothing was asked of the agent's exec server.
    assert!(main.receive().is_none());
}

#[test]
fn a_machine_that_waits_for_space_ends_with_its_launcher() {
    let mut f = fixture(setup());
    let (mut agent, _main) = f.start_for_files();
    f.set_space(false);
    while !status(&f).lacks_space {
        std::thread::yield_now();
    }
    drop(f.launcher.take());
    powers_off(&f, &mut agent);
    f.finish();
    assert!(!*f.guest.paused.lock().unwrap());
}

#[test]
fn a_signal_to_the_process_lets_the_guest_write_its_disks_back() {
    let mut f = fixture(setup());
    let (mut agent, _main) = f.start_for_files();
    (&f.terminate).write_all(b"x").unwrap();
    powers_off(&f, &mut agent);
    f.finish();
}
