//! Guests that violate the protocol.

use super::*;
use sm_guest_proto::container::ContainerId;

#[test]
fn an_agent_of_another_version_is_refused_with_a_sentence() {
    let mut f = fixture(SupervisorSetup::default());
    let mut agent = f.dial();
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    agent.send_json(&ControlReply::Hello(AgentHello {
        protocol: 99,
        ..AgentHello::default()
    }));
    f.finish();
    assert!(f.exit().message.unwrap().contains("version 99"));
}

#[test]
fn garbage_from_the_guest_ends_the_vm_with_a_reason() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    main.0.write_all(&[0x77; 64]).unwrap();
    assert_eq!(f.events().last().unwrap(), "ended 125");
    f.finish();
    assert_eq!(f.exit().reason, ExitReason::GuestFailed);
}

#[test]
fn a_workload_starts_once() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    // One write: the stream is closed after the first of these messages.
    let started = serde_json::to_vec(&ExecReply::Started {
        container: ContainerId::default(),
        pid: 42,
    })
    .unwrap();
    let mut bytes = Vec::new();
    for _ in 0..3 {
        frame::encode(FrameType::Control, &started, &mut bytes).unwrap();
    }
    main.0.write_all(&bytes).unwrap();
    assert_eq!(f.events(), ["exit 125", "ended 125"]);
    f.finish();
    let exit = f.exit();
    assert_eq!(exit.reason, ExitReason::GuestFailed);
    assert!(exit.message.unwrap().contains("not asked for"));
    let started = |phase: &&Phase| phase.name == "workload started";
    assert_eq!(exit.phases.iter().filter(started).count(), 1);
}

#[test]
fn a_workload_does_not_start_before_its_request() {
    let mut f = fixture(SupervisorSetup::default());
    let mut agent = f.dial();
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    let mut main = FramedPeer(f.connections.recv().unwrap().1);
    main.send_json(&ExecReply::Started {
        container: ContainerId::default(),
        pid: 42,
    });
    assert_eq!(f.events(), ["exit 125", "ended 125"]);
    f.finish();
    assert_eq!(f.exit().reason, ExitReason::StartFailed);
}

#[test]
fn an_agent_that_disconnects_cannot_reconnect() {
    let mut f = fixture(SupervisorSetup::default());
    for first in [true, false, false] {
        assert_eq!(f.dial().receive().is_some(), first);
        // A call is answered after earlier events were handled.
        let status = f.control().call(&ControlCall::Status);
        assert!(matches!(status, Ok(ControlAnswer::Status(_))));
    }
    assert_eq!(f.events(), ["exit 125", "ended 125"]);
    f.finish();
    let exit = f.exit();
    assert!(exit.message.unwrap().contains("disconnected"));
    let ready = |phase: &&Phase| phase.name == "agent ready";
    assert_eq!(exit.phases.iter().filter(ready).count(), 1);
}

#[test]
fn text_of_a_guest_is_short_and_has_no_control_characters() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main, _) = f.boot();
    let long = format!("no\x1b[2J such\nprogram {}", "x".repeat(1 << 15));
    main.send(FrameType::Error, long.as_bytes());
    main.exit(127);
    f.finish();
    let message = f.exit().message.unwrap();
    assert!(message.starts_with("no [2J such program x"), "{message}");
    assert!(message.len() < 3000);
}

#[test]
fn an_answer_is_short() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, _main) = f.start();
    let mut control = f.control();
    let asked = std::thread::spawn(move || control.call(&ControlCall::Stats));
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(
        request,
        ControlRequest::Stats {
            container: ContainerId::default(),
        }
    );
    // The header alone suffices.
    let header = FrameHeader {
        kind: FrameType::Control,
        len: 1 << 20,
    };
    agent.0.write_all(&header.encode().unwrap()).unwrap();
    assert!(asked.join().unwrap().is_err());
    f.finish();
    let message = f.exit().message.unwrap();
    assert!(
        message.contains("Control frame of 10") && message.contains("exceeds the limit of 65536"),
        "{message}"
    );
}

/// A large frame would be buffered completely, and once more for each attached client.
#[test]
fn a_guest_cannot_have_large_frames_buffered() {
    for (kind, len) in [
        (FrameType::Stdout, frame::BULK_PAYLOAD + 1),
        (FrameType::Error, 16 << 20),
        (FrameType::Exit, 17),
    ] {
        let mut f = fixture(SupervisorSetup::default());
        let (_agent, mut main) = f.start();
        // The header alone suffices.
        let header = FrameHeader { kind, len }.encode().unwrap();
        main.0.write_all(&header).unwrap();
        f.finish();
        let exit = f.exit();
        assert_eq!(exit.reason, ExitReason::GuestFailed);
        assert!(exit.message.unwrap().contains("exceeds the limit"));
    }
}

#[test]
fn a_guest_that_breaks_its_vsock_device_is_ended_with_the_reason() {
    let mut f = fixture(SupervisorSetup::default());
    let (agent, main) = f.start();
    f.dial
        .send(SupervisorEvent::Unreachable("a ring is broken".to_owned()));
    drop((agent, main));
    f.finish();
    let message = f.exit().message.unwrap();
    assert!(
        message.contains("vsock driver broke its device: a ring is broken"),
        "{message}"
    );
}

#[test]
fn frames_that_only_a_host_sends_end_the_vm() {
    for kind in [FrameType::Stdin, FrameType::Signal, FrameType::Request] {
        let mut f = fixture(SupervisorSetup::default());
        let (_agent, mut main) = f.start();
        main.send(kind, b"x");
        f.finish();
        let message = f.exit().message.unwrap();
        assert!(message.contains("unexpected"), "{message}");
    }
}

#[test]
fn other_users_cannot_control_it_even_where_they_can_connect() {
    use std::os::unix::fs::PermissionsExt as _;
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: another user is not tried");
        return;
    }
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    // The permissions of the directories are too wide by mistake.
    let socket = f.record.control_socket();
    let opened = socket
        .ancestors()
        .take_while(|path| path.starts_with(f.record.home()));
    for path in opened {
        let mode = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(path, mode).unwrap();
    }
    let nobody = rustix::process::Uid::from_raw(65_534);
    let said = std::thread::scope(|scope| {
        let stranger = scope.spawn(|| {
            // The call changes the credentials of this thread only.
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            let mut stranger = UnixStream::connect(&socket).unwrap();
            let mut said = Vec::new();
            // The stream ends or is reset.
            let _ = stranger.read_to_end(&mut said);
            said
        });
        stranger.join().unwrap()
    });
    assert!(said.is_empty());
    f.control().call(&ControlCall::Status).unwrap();
    main.exit(0);
    f.finish();
}
