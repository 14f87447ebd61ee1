//! A host without disk space.

use super::held::until;
use super::snapshots::ask_for_snapshot;
use super::*;
use crate::guest::SupervisorEvent;

/// Lets the guest write to a full disk; returns when the VM is paused.
fn fill(f: &Fixture) {
    f.set_space(false);
    until(f, |guest| *guest.paused.lock().unwrap());
}

fn status(f: &Fixture) -> sm_control::launch::Status {
    match f.control().call(&ControlCall::Status).unwrap() {
        ControlAnswer::Status(status) => status,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_vm_waits_for_space_and_goes_on() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    assert!(!status(&f).lacks_space);
    fill(&f);
    let now = status(&f);
    assert!(now.paused && now.lacks_space);
    let refused = ask_for_snapshot(&f, "warm", false).join().unwrap();
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("waits for disk space"), "{error}");
    f.set_space(true);
    until(&f, |guest| !*guest.paused.lock().unwrap());
    let now = status(&f);
    assert!(!now.paused && !now.lacks_space);
    main.exit(0);
    assert_eq!(
        events(&f),
        ["start", "pause no_disk_space", "unpause no_disk_space"]
    );
    f.finish();
}

/// The actions so far with their reasons, without those of the end.
fn events(f: &Fixture) -> Vec<String> {
    let events = f.record.noted();
    let shown = events.iter().map(|event| {
        let reason = event.attributes.get("reason");
        let reason = reason.map_or_else(String::new, |reason| format!(" {reason}"));
        format!("{}{reason}", event.action)
    });
    shown.take_while(|event| event != "die").collect()
}

#[test]
fn a_client_may_unpause_or_stop_a_vm_that_waits_for_space() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    fill(&f);
    f.control().call(&ControlCall::Resume).unwrap();
    assert!(!*f.guest.paused.lock().unwrap());
    assert_eq!(events(&f), ["start", "pause no_disk_space", "unpause"]);
    // The request fails again.
    fill(&f);
    f.control()
        .call(&ControlCall::Stop { grace_ms: None })
        .unwrap();
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert!(matches!(request, ControlRequest::SignalMain { .. }));
    // It is not paused on its way to its end.
    f.dial.send(SupervisorEvent::NoSpace);
    assert!(!status(&f).paused);
    main.exit(143);
    f.finish();
}

#[test]
fn a_vm_that_a_client_has_paused_stays_paused() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    f.control().call(&ControlCall::Pause).unwrap();
    f.dial.send(SupervisorEvent::NoSpace);
    let now = status(&f);
    assert!(now.paused && !now.lacks_space);
    f.control().call(&ControlCall::Resume).unwrap();
    main.exit(0);
    f.finish();
}
