//! Limits of the guest's memory.

use super::*;

fn limit(f: &Fixture, bytes: Option<u64>) {
    let answer = f.control().call(&ControlCall::LimitMemory { bytes });
    assert_eq!(answer.unwrap(), ControlAnswer::Done);
}

fn limits(f: &Fixture) -> Vec<Option<u64>> {
    f.guest.limits.lock().unwrap().clone()
}

#[test]
fn a_guest_whose_workload_runs_is_limited_at_once() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    limit(&f, Some(1 << 20));
    assert_eq!(limits(&f), [None, Some(1 << 20)]);
    let ControlAnswer::Status(status) = f.control().call(&ControlCall::Status).unwrap() else {
        panic!("no status");
    };
    assert_eq!(status.balloon.unwrap().target, 1 << 20);
    limit(&f, None);
    assert_eq!(limits(&f), [None, Some(1 << 20), None]);
    main.exit(0);
    f.finish();
}
