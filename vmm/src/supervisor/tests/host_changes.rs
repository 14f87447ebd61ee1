//! Changes of the host's files under a running workload.

use super::*;

fn noted(agent: &mut FramedPeer, answer: &ControlReply) -> Vec<String> {
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    let ControlRequest::NoteHostChanges { changes, .. } = request else {
        panic!("{request:?}");
    };
    agent.send_json(answer);
    changes.into_iter().map(|change| change.path).collect()
}

#[test]
fn a_guest_is_notified_again_when_it_was_busy() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    f.guest.change("a");
    f.guest.change("b");
    assert_eq!(noted(&mut agent, &ControlReply::Busy), ["a", "b"]);
    assert_eq!(noted(&mut agent, &ControlReply::Done), ["a", "b"]);
    f.guest.change("c");
    assert_eq!(noted(&mut agent, &ControlReply::Done), ["c"]);
    main.exit(0);
    f.finish();
}

/// The timer of changes is none of the workload's end.
#[test]
fn a_vm_whose_files_the_host_changes_can_be_paused() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    f.guest.change("a");
    noted(&mut agent, &ControlReply::Busy);
    // The request is repeated in a moment.
    let mut control = f.control();
    for _ in 0..20 {
        control.call(&ControlCall::Pause).unwrap();
        control.call(&ControlCall::Resume).unwrap();
    }
    main.exit(0);
    f.finish();
}
