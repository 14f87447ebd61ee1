//! Health checks of the workload.

use sm_control::launch::{HealthReport, HealthStatus};

use super::*;

fn checked(retries: u32) -> SupervisorSetup {
    SupervisorSetup {
        health_retries: Some(retries),
        ..SupervisorSetup::default()
    }
}

/// Plays the guest's side of the next check, which must be one.
fn check(f: &Fixture) -> FramedPeer {
    let (to, stream) = f.connections.recv().unwrap();
    assert_eq!(to, port::EXEC);
    let mut check = FramedPeer(stream);
    let hello: ExecControl = check.receive_json(FrameType::Control);
    assert!(matches!(hello, ExecControl::Hello(_)));
    let request: ExecRequest = check.receive_json(FrameType::Request);
    assert_eq!(
        (request.role, request.argv),
        (Role::Exec, vec!["check".to_owned()])
    );
    assert_eq!(request.timeout_ms, 30_000);
    check
}

fn report(f: &Fixture) -> HealthReport {
    match f.control().call(&ControlCall::Status).unwrap() {
        ControlAnswer::Status(status) => status.health.unwrap(),
        other => panic!("{other:?}"),
    }
}

/// Returns the report after `results` checks.
fn after(f: &Fixture, results: usize) -> HealthReport {
    loop {
        let report = report(f);
        if report.results.len() == results {
            return report;
        }
    }
}

#[test]
fn as_many_failures_as_permitted_make_a_workload_unhealthy() {
    let mut f = fixture(checked(2));
    let (_agent, mut main) = f.start();
    let mut first = check(&f);
    assert_eq!(report(&f).status, HealthStatus::Starting);
    first.exit(1);
    let mut second = check(&f);
    assert_eq!(after(&f, 1).failing_streak, 1);
    second.send(FrameType::Stdout, b"no\x1b answer");
    second.exit(3);
    let mut third = check(&f);
    let unhealthy = after(&f, 2);
    assert_eq!(unhealthy.status, HealthStatus::Unhealthy);
    let last = &unhealthy.results[1];
    assert_eq!((last.exit_code, last.output.as_str()), (3, "no  answer"));
    third.exit(0);
    let _fourth = check(&f);
    let healthy = after(&f, 3);
    assert_eq!(
        (healthy.status, healthy.failing_streak),
        (HealthStatus::Healthy, 0)
    );
    main.exit(0);
    f.finish();
    let events = f.record.events();
    assert_eq!(events, ["start", "health_status", "health_status", "die"]);
}

/// A guest that floods the host, disconnects, or sends what is no frame.
#[test]
fn a_guest_that_misbehaves_fails_its_checks_only() {
    let mut f = fixture(checked(3));
    let (_agent, mut main) = f.start();
    let mut flood = check(&f);
    for _ in 0..50 {
        flood.send(FrameType::Stdout, &[b'x'; 60_000]);
    }
    flood.exit(1);
    drop(check(&f));
    check(&f).0.write_all(&[0xff; 64]).unwrap();
    let _next = check(&f);
    let unhealthy = after(&f, 3);
    assert_eq!(unhealthy.status, HealthStatus::Unhealthy);
    assert_eq!(unhealthy.results[0].output.len(), 1000);
    let codes: Vec<_> = unhealthy
        .results
        .iter()
        .map(|result| result.exit_code)
        .collect();
    assert_eq!(codes, [1, 125, 125]);
    main.exit(0);
    f.finish();
}

#[test]
fn a_check_is_left_out_while_the_machine_is_paused() {
    let mut f = fixture(checked(1));
    let (_agent, mut main) = f.start();
    let mut first = check(&f);
    f.control().call(&ControlCall::Pause).unwrap();
    first.exit(0);
    after(&f, 1);
    assert!(
        f.connections
            .recv_timeout(Duration::from_millis(50))
            .is_err()
    );
    f.control().call(&ControlCall::Resume).unwrap();
    let _second = check(&f);
    main.exit(0);
    f.finish();
}
