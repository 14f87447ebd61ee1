//! The log of events while many VMs live and end.

use std::collections::BTreeMap;
use std::thread;

use super::*;

const VMS: usize = 50;

/// Plays the life of a VM: it is stopped if `number` is odd, and exits otherwise.
fn live(sm: &Sm, number: usize) {
    let setup = SupervisorSetup::default().detached();
    let mut f = supervised(sm, Some(&format!("vm{number}")), setup);
    let (mut agent, mut main) = f.start();
    if number % 2 == 1 {
        f.control()
            .call(&ControlCall::Stop { grace_ms: None })
            .unwrap();
        let _: ControlRequest = agent.receive_json(FrameType::Control);
        main.exit(143);
    } else {
        main.exit(3);
    }
    f.finish();
    let mut vm = sm.vm(&format!("vm{number}")).unwrap();
    vm.remove(Force::No).unwrap();
}

#[test]
fn events_of_fifty_vms_are_complete_and_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let sm = sm_in(directory.path());
    let limit = std::time::SystemTime::now() + Duration::from_secs(120);
    let limit = limit.duration_since(std::time::UNIX_EPOCH).unwrap();
    let limit = u64::try_from(limit.as_nanos()).unwrap();
    let query = EventQuery::new().until(limit).follow(true);
    let mut follower = sm.events(query).unwrap();
    let mut lives: BTreeMap<String, Vec<(EventAction, Option<String>)>> = BTreeMap::new();
    let mut seen = Vec::new();
    thread::scope(|scope| {
        for number in 0..VMS {
            let sm = &sm;
            scope.spawn(move || live(sm, number));
        }
        let mut destroyed = 0;
        while destroyed < VMS {
            let event = follower.wait_event().unwrap();
            let event = event.expect("all events within the time limit");
            destroyed += usize::from(event.action == EventAction::Destroy);
            let status = event.attributes.get("exit_code").cloned();
            let life = lives.entry(event.name.clone()).or_default();
            life.push((event.action, status));
            seen.push(event);
        }
    });
    assert_eq!(lives.len(), VMS);
    for number in 0..VMS {
        let (status, stop) = match number % 2 {
            1 => ("143", true),
            _ => ("3", false),
        };
        let mut expected = vec![
            (EventAction::Create, None),
            (EventAction::Start, None),
            (EventAction::Die, Some(status.to_owned())),
            (EventAction::Destroy, None),
        ];
        if stop {
            expected.insert(2, (EventAction::Kill, None));
            expected.insert(4, (EventAction::Stop, None));
        }
        assert_eq!(lives[&format!("vm{number}")], expected, "vm{number}");
    }
    // A reader that comes later sees the same.
    let mut later = sm.events(EventQuery::new().since(0)).unwrap();
    for event in &seen {
        assert_eq!(later.next_event().unwrap().as_ref(), Some(event));
    }
    assert!(later.next_event().unwrap().is_none());
}
