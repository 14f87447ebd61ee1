//! Changes of a VM that runs: limits of the guest's memory, and rules of its network.

use super::*;

fn limit(f: &Fixture, bytes: Option<u64>) {
    let answer = f.control().call(&ControlCall::LimitMemory { bytes });
    assert_eq!(answer.unwrap(), ControlAnswer::Done);
}

fn limits(f: &Fixture) -> Vec<Option<u64>> {
    f.guest.limits.lock().unwrap().clone()
}

#[test]
fn rules_of_the_network_are_replaced() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    let call = |allow: &str| {
        let (allow, deny) = (vec![allow.to_owned()], vec!["all".to_owned()]);
        f.control().call(&ControlCall::NetworkRules { allow, deny })
    };
    assert_eq!(call("host").unwrap(), ControlAnswer::Done);
    let refused = call("none").unwrap_err().to_string();
    assert!(refused.contains("a rule is invalid"), "{refused}");
    let rules = f.guest.rules.lock().unwrap().clone();
    assert_eq!(rules, [(vec!["host".to_owned()], vec!["all".to_owned()])]);
    main.exit(0);
    f.finish();
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
