//! The end of a VM.

use super::*;
use sm_guest_proto::container::ContainerId;

#[test]
fn waiting_clients_are_notified_of_the_end() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    let mut waiter = FramedPeer(UnixStream::connect(f.record.control_socket()).unwrap());
    let call = serde_json::to_vec(&ControlCall::Wait).unwrap();
    waiter.send(FrameType::Request, &call);
    // A later connection is served after an earlier one.
    f.control().call(&ControlCall::Status).unwrap();
    main.exit(9);
    let answer = waiter.receive_json(FrameType::Control);
    assert!(matches!(answer, ControlAnswer::Ended(exit) if exit.status == 9));
    f.finish();
}

#[test]
fn a_launcher_that_leaves_before_the_start_cancels_it() {
    let mut f = fixture(SupervisorSetup::default());
    f.launcher = None;
    f.finish();
    assert!(!f.record.directory().exists());
    assert!(!f.record.sockets().exists());
    assert_eq!(f.guest.end.lock().unwrap().clone(), Some(GuestEnd::Stopped));
}

#[test]
fn a_missing_command_is_reported_with_its_status() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main, _) = f.boot();
    main.send(FrameType::Error, b"prog: not found");
    main.exit(127);
    assert_eq!(f.events(), ["exit 127", "ended 127"]);
    f.finish();
    let exit = f.exit();
    assert_eq!(exit.reason, ExitReason::StartFailed);
    assert_eq!(exit.message.as_deref(), Some("prog: not found"));
}

#[test]
fn a_guest_that_dies_is_reported_with_its_console() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, main) = f.start();
    "booting\r\n\n\x1b[31mKernel panic - not syncing\r\n"
        .clone_into(&mut f.guest.console.lock().unwrap());
    f.guest
        .end(GuestEnd::Guest("the guest reset itself".into()));
    drop(main);
    let events = f.events();
    assert_eq!(events.last().unwrap(), "ended 125");
    f.finish();
    let exit = f.exit();
    assert_eq!(exit.reason, ExitReason::GuestFailed);
    let message = exit.message.unwrap();
    assert!(message.starts_with("the guest reset itself"), "{message}");
    assert!(
        message.contains("Kernel panic") && !message.contains('\x1b'),
        "{message}"
    );
}

#[test]
fn stopping_signals_first() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let answer = f.control().call(&ControlCall::Stop { grace_ms: None });
    assert_eq!(answer.unwrap(), ControlAnswer::Done);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(
        request,
        ControlRequest::SignalMain {
            container: ContainerId::default(),
            signal: 15,
            stop: true
        }
    );
    assert!(*f.guest.closed.lock().unwrap(), "nobody new comes in");
    main.exit(143);
    f.finish();
    assert_eq!(f.exit().status, 143);
}

#[test]
fn stopping_kills_after_the_grace() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    f.control()
        .call(&ControlCall::Stop { grace_ms: Some(0) })
        .unwrap();
    for signal in [15, 9] {
        let request: ControlRequest = agent.receive_json(FrameType::Control);
        assert_eq!(
            request,
            ControlRequest::SignalMain {
                container: ContainerId::default(),
                signal,
                stop: signal == 15
            }
        );
    }
    main.exit(137);
    f.finish();
    let exit = f.exit();
    assert_eq!((exit.status, exit.oom_killed), (137, false));
}

#[test]
fn termination_of_the_process_stops_the_workload() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    f.terminate.write_all(b"x").unwrap();
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(
        request,
        ControlRequest::SignalMain {
            container: ContainerId::default(),
            signal: 15,
            stop: true
        }
    );
    main.exit(0);
    f.finish();
}

#[test]
fn an_unexplained_kill_is_checked_for_lack_of_memory() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    main.exit(137);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(
        request,
        ControlRequest::Stats {
            container: ContainerId::default(),
        }
    );
    agent.send_json(&ControlReply::Stats(GuestStats {
        oom_kills: 1,
        main_oom_kills: 1,
        ..GuestStats::default()
    }));
    f.finish();
    let exit = f.exit();
    assert!(exit.oom_killed && exit.message.unwrap().contains("ran out of memory"));
    assert_eq!(exit.cause, Some(FailureCause::OutOfMemory));
}

/// Another process of the guest may have been killed by the OOM killer at any time.
#[test]
fn a_kill_is_not_for_lack_of_memory_because_something_else_ran_out_of_it() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    main.exit(137);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(
        request,
        ControlRequest::Stats {
            container: ContainerId::default(),
        }
    );
    agent.send_json(&ControlReply::Stats(GuestStats {
        oom_kills: 3,
        main_oom_kills: 0,
        ..GuestStats::default()
    }));
    f.finish();
    let exit = f.exit();
    assert_eq!((exit.status, exit.oom_killed), (137, false));
    assert_eq!(exit.message, None);
}

#[test]
fn the_last_bytes_of_the_workload_are_delivered_before_the_stop() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    *f.guest.delivers.lock().unwrap() = true;
    main.exit(0);
    // Clients that wait for the workload do not wait for the delivery.
    assert_eq!(f.events(), ["exit 0", "ended 0"]);
    assert_eq!(f.guest.end.lock().unwrap().clone(), None);
    f.dial.send(SupervisorEvent::Delivered);
    f.finish();
    assert!(*f.guest.closed.lock().unwrap());
    assert_eq!(f.guest.end.lock().unwrap().clone(), Some(GuestEnd::Stopped));
}

#[test]
fn a_client_that_does_not_read_does_not_delay_the_release() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    *f.guest.delivers.lock().unwrap() = true;
    main.exit(0);
    f.finish();
    assert_eq!(f.guest.end.lock().unwrap().clone(), Some(GuestEnd::Stopped));
}

#[test]
fn a_guest_whose_workload_has_ended_is_asked_to_power_off() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    main.exit(0);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::PowerOff { grace_ms: 0 });
    assert_eq!(f.exit().status, 0, "its end is on record already");
    f.finish();
    assert!(agent.receive().is_none(), "one that does not is stopped");
}

/// The machine has bytes that clients of commands have not read when the guest is off.
#[test]
fn the_last_bytes_of_commands_are_delivered_before_the_release() {
    for is_read in [true, false] {
        let mut f = fixture(SupervisorSetup::default());
        let (mut agent, mut main) = f.start();
        let (send, asked) = std::sync::mpsc::channel();
        *f.guest.commands.lock().unwrap() = Some(send);
        main.exit(0);
        let request: ControlRequest = agent.receive_json(FrameType::Control);
        assert_eq!(request, ControlRequest::PowerOff { grace_ms: 0 });
        agent.send_json(&ControlReply::Done);
        assert!(agent.receive().is_none());
        f.guest.end(GuestEnd::Guest("the guest is off".into()));
        asked.recv().unwrap();
        // An event of published ports may be late, and says nothing about commands.
        f.dial.send(SupervisorEvent::Delivered);
        asked.recv().unwrap();
        if is_read {
            *f.guest.commands.lock().unwrap() = None;
            f.guest.order.lock().unwrap().push("read");
            f.dial.send(SupervisorEvent::Delivered);
        }
        f.finish();
        let order = f.guest.order.lock().unwrap().clone();
        match is_read {
            true => assert_eq!(order, ["read", "released"]),
            // Not longer than a fixed time.
            false => assert_eq!(order, ["released"]),
        }
    }
}

#[test]
fn a_guest_whose_agent_is_gone_is_stopped() {
    let mut f = fixture(SupervisorSetup::default());
    let (agent, mut main) = f.start();
    drop(agent);
    main.exit(4);
    f.finish();
    assert_eq!(f.exit().reason, ExitReason::Workload);
    assert_eq!(f.guest.end.lock().unwrap().clone(), Some(GuestEnd::Stopped));
}

#[test]
fn a_vm_that_is_destroyed_is_stopped_at_once() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, _main) = f.start();
    f.control().call(&ControlCall::Destroy).unwrap();
    f.finish();
    assert!(agent.receive().is_none(), "nothing is asked of it");
}

#[test]
fn a_paused_vm_that_is_stopped_runs_first() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    f.control().call(&ControlCall::Pause).unwrap();
    f.control()
        .call(&ControlCall::Stop { grace_ms: None })
        .unwrap();
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(
        request,
        ControlRequest::SignalMain {
            container: ContainerId::default(),
            signal: 15,
            stop: true
        }
    );
    assert!(!*f.guest.paused.lock().unwrap());
    // It cannot be paused again before its end.
    let error = f.control().call(&ControlCall::Pause).unwrap_err();
    assert!(error.to_string().contains("about to end"), "{error}");
    main.exit(143);
    f.finish();
    assert_eq!(f.exit().status, 143);
}

#[test]
fn a_paused_vm_runs_to_be_killed_and_holds_other_signals() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    f.control().call(&ControlCall::Pause).unwrap();
    // It is pending, as for a frozen process.
    f.control()
        .call(&ControlCall::Signal { signal: 10 })
        .unwrap();
    assert!(*f.guest.paused.lock().unwrap());
    let killed = signals::ask(&f, 9);
    for signal in [10, 9] {
        signals::expect(&mut agent, signal);
        agent.send_json(&ControlReply::Done);
    }
    killed.join().unwrap().unwrap();
    assert!(!*f.guest.paused.lock().unwrap());
    main.exit(137);
    let _: ControlRequest = agent.receive_json(FrameType::Control);
    agent.send_json(&ControlReply::Stats(GuestStats::default()));
    f.finish();
}

#[test]
fn a_paused_vm_that_is_removed_ends() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, _main) = f.start();
    f.control().call(&ControlCall::Pause).unwrap();
    f.control().call(&ControlCall::Destroy).unwrap();
    f.finish();
    assert!(agent.receive().is_none(), "nothing is asked of it");
}

#[test]
fn a_vm_that_ends_while_it_is_paused_is_not_paused_any_more() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, _main) = f.start();
    // The exit record cannot be written, so the process stays.
    std::fs::create_dir(f.record.directory().join(".exit.json.new")).unwrap();
    f.control().call(&ControlCall::Pause).unwrap();
    f.guest.end(GuestEnd::Host("it failed".into()));
    f.events();
    let ControlAnswer::Status(status) = f.control().call(&ControlCall::Status).unwrap() else {
        panic!("it answers with its status");
    };
    assert_eq!((status.stage, status.paused), (Stage::Ending, false));
    f.control().call(&ControlCall::Destroy).unwrap();
    f.finish();
}

#[test]
fn a_guest_that_powers_itself_off_is_not_stopped() {
    let mut f = fixture(SupervisorSetup {
        power_off_timeout: Some(Duration::from_secs(600)),
        ..SupervisorSetup::default()
    });
    let (mut agent, mut main) = f.start();
    main.exit(0);
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    assert_eq!(request, ControlRequest::PowerOff { grace_ms: 0 });
    agent.send_json(&ControlReply::Done);
    let off = GuestEnd::Guest("the guest powered itself off".into());
    f.guest.end(off.clone());
    f.finish();
    assert_eq!(f.guest.end.lock().unwrap().clone(), Some(off));
}

#[test]
fn an_exit_record_that_cannot_be_written_is_reported_and_retried() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    // The exit record cannot be written.
    let obstacle = f.record.directory().join(".exit.json.new");
    std::fs::create_dir(&obstacle).unwrap();
    let mut waiter = FramedPeer(UnixStream::connect(f.record.control_socket()).unwrap());
    let call = serde_json::to_vec(&ControlCall::Wait).unwrap();
    waiter.send(FrameType::Request, &call);
    f.control().call(&ControlCall::Status).unwrap();
    main.exit(9);
    // Both attached clients and new ones are notified.
    assert_eq!(f.events(), ["exit 9", "ended 9"]);
    let told: ControlAnswer = waiter.receive_json(FrameType::Control);
    assert!(matches!(told, ControlAnswer::Ended(exit) if exit.status == 9));
    let told = f.control().call(&ControlCall::Wait).unwrap();
    assert!(matches!(told, ControlAnswer::Ended(exit) if exit.status == 9));
    assert_eq!(f.record.exit(), None);
    let status = f.control().call(&ControlCall::Status).unwrap();
    assert!(matches!(status, ControlAnswer::Status(status) if status.stage == Stage::Ending));
    std::fs::remove_dir(&obstacle).unwrap();
    f.finish();
    assert_eq!(f.exit().status, 9);
    assert!(!f.record.sockets().exists());
}

#[test]
fn a_vm_whose_exit_record_cannot_be_written_can_be_terminated() {
    for destroy in [false, true] {
        let mut f = fixture(SupervisorSetup::default());
        let (_agent, mut main) = f.start();
        std::fs::create_dir(f.record.directory().join(".exit.json.new")).unwrap();
        main.exit(9);
        assert_eq!(f.events(), ["exit 9", "ended 9"]);
        match destroy {
            true => {
                f.control().call(&ControlCall::Destroy).unwrap();
            }
            false => f.terminate.write_all(b"x").unwrap(),
        }
        f.finish();
        assert_eq!(f.exit().reason, ExitReason::Lost);
    }
}
