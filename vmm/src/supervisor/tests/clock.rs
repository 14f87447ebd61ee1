//! The guest's clock, when messages to and from it are slow.

use std::time::Duration;

use sm_control::timings::unix_nanos;
use sm_snapshot::manifest::Layer;

use super::*;

const SLOW: Duration = Duration::from_millis(300);

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap()
}

#[test]
fn a_clock_that_was_set_late_is_corrected_before_the_workload_goes_on() {
    let mut f = fixture(SupervisorSetup {
        restored: Some(Layer::App),
        ..SupervisorSetup::default()
    });
    // A clock that is behind by the time that the refresh took.
    let late = nanoseconds(SLOW);
    let agent = f.dial();
    let (mut agent, _main) =
        super::snapshots::answer_as_restored(&mut f, agent, true, unix_nanos() - late);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    let ControlRequest::AdjustClock { offset_ns } = request else {
        panic!("{request:?}");
    };
    // The middle of what is possible: the answer may have been slow instead.
    let offset = u64::try_from(offset_ns).unwrap();
    assert!(offset >= late / 2, "{offset} ns");
    agent.send_json(&ControlReply::ClockAdjusted {
        realtime_ns: unix_nanos() - late + offset,
    });
    super::snapshots::expect_thaw(&mut agent);
    // The answer shows that it was the request.
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert!(
        matches!(request, ControlRequest::AdjustClock { offset_ns } if offset_ns > 0),
        "{request:?}"
    );
    f.guest.end(GuestEnd::Guest("the guest is off".into()));
    f.finish();
}

#[test]
fn a_guest_that_is_early_or_silent_about_its_clock_is_not_asked_again() {
    for guest_ns in [0, u64::MAX] {
        let mut f = fixture(SupervisorSetup {
            restored: Some(Layer::App),
            ..SupervisorSetup::default()
        });
        let agent = f.dial();
        let (mut agent, _main) =
            super::snapshots::answer_as_restored(&mut f, agent, true, guest_ns);
        super::snapshots::expect_thaw(&mut agent);
        f.guest.end(GuestEnd::Guest("the guest is off".into()));
        f.finish();
    }
}
