//! Snapshots of a VM whose disk has many layers.

use super::held::until;
use super::snapshots::{ask_for_snapshot, expect_thaw, freeze};
use super::*;
use crate::guest::{MergeStep, SupervisorEvent};

/// Requests a snapshot that waits for a merge.
fn wait(f: &Fixture) -> std::thread::JoinHandle<Result<ControlAnswer, sm_control::ControlError>> {
    *f.guest.full.lock().unwrap() = true;
    let asked = ask_for_snapshot(f, "warm", false);
    until(f, |guest| *guest.merges.lock().unwrap() == 1);
    assert!(f.guest.snapshot.lock().unwrap().is_none());
    asked
}

fn is_report(answer: Result<ControlAnswer, sm_control::ControlError>) -> bool {
    matches!(answer.unwrap(), ControlAnswer::Snapshot(_))
}

#[test]
fn a_snapshot_waits_for_a_merge_and_the_vm_runs() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let asked = wait(&f);
    assert!(!*f.guest.paused.lock().unwrap());
    f.dial
        .send(SupervisorEvent::Merge(MergeStep::Durable(Ok(()))));
    freeze(&mut agent);
    expect_thaw(&mut agent);
    assert!(is_report(asked.join().unwrap()));
    main.exit(0);
    f.finish();
}

/// A host without space for a merge, for example.
#[test]
fn a_snapshot_is_taken_after_a_merge_that_failed() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let asked = wait(&f);
    let failed = MergeStep::Written(Err("no space".to_owned()));
    f.dial.send(SupervisorEvent::Merge(failed));
    freeze(&mut agent);
    expect_thaw(&mut agent);
    assert!(is_report(asked.join().unwrap()));
    assert_eq!(
        *f.guest.merges.lock().unwrap(),
        1,
        "it is not tried for ever"
    );
    main.exit(0);
    f.finish();
}

#[test]
fn a_snapshot_that_waits_ends_with_the_vm() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    let asked = wait(&f);
    main.exit(0);
    let error = asked.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("before its snapshot was taken"), "{error}");
    f.finish();
}
