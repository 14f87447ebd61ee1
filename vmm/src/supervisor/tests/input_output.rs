//! Input, output and clients of a running workload.

use super::*;

#[test]
fn a_workload_runs_to_its_end() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    main.send(FrameType::Stdout, b"hello");
    main.send(FrameType::Stderr, b"oops");
    main.exit(3);
    assert_eq!(f.events(), ["out hello", "err oops", "exit 3", "ended 3"]);
    f.finish();
    let exit = f.exit();
    assert_eq!((exit.status, exit.reason), (3, ExitReason::Workload));
    assert_eq!(exit.peak_rss_kib, Some(7));
    let names: Vec<_> = exit.phases.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "kernel reached init",
            "agent ready",
            "identity refreshed",
            "root attached",
            "workload started",
            "first output",
            "exit"
        ]
    );
    assert!(!f.record.sockets().exists());
    assert!(!f.record.is_locked());
}

#[test]
fn output_is_logged_without_any_client() {
    let mut f = fixture(SupervisorSetup {
        detached: true,
        ..SupervisorSetup::default()
    });
    let (_agent, mut main) = f.start();
    assert_eq!(
        f.events(),
        [""; 0],
        "a launcher that does not attach is let go"
    );
    let chunk = vec![b'x'; 64 * 1024];
    for _ in 0..8 {
        main.send(FrameType::Stdout, &chunk);
    }
    main.exit(0);
    f.finish();
    assert_eq!(f.record.output().len(), 8 * chunk.len());
}

#[test]
fn input_passes_in_order_and_its_end_too() {
    let mut f = fixture(SupervisorSetup {
        stdin: true,
        ..SupervisorSetup::default()
    });
    let (_agent, mut main) = f.start();
    let writer = f.launcher.as_ref().unwrap().writer();
    let input: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    let sender = std::thread::spawn({
        let input = input.clone();
        move || {
            writer.write_stdin(&input).unwrap();
            writer.resize(100, 50).unwrap();
            writer.close_stdin().unwrap();
        }
    });
    let mut seen = Vec::new();
    let mut resized = None;
    loop {
        match main.receive().unwrap() {
            (FrameType::Stdin, bytes) if bytes.is_empty() => break,
            (FrameType::Stdin, bytes) => seen.extend(bytes),
            (FrameType::Resize, size) => resized = Some(frame::parse_resize(&size).unwrap()),
            other => panic!("{other:?}"),
        }
    }
    sender.join().unwrap();
    assert!(seen == input, "every byte arrives, in order");
    assert_eq!(resized, Some((100, 50)));
    main.exit(0);
    f.finish();
}

#[test]
fn a_client_that_does_not_read_stalls_the_workload_and_loses_nothing() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    let chunk = vec![1u8; 64 * 1024];
    let total = 32;
    let workload = std::thread::spawn(move || {
        for _ in 0..total {
            main.send(FrameType::Stdout, &chunk);
        }
        main.exit(0);
    });
    // Status is still served, and memory is bounded, however long this takes.
    let status = f.control().call(&ControlCall::Status).unwrap();
    assert!(matches!(status, ControlAnswer::Status(_)));
    let events = f.events();
    let bytes: usize = events
        .iter()
        .filter_map(|e| e.strip_prefix("out "))
        .map(str::len)
        .sum();
    assert_eq!(bytes, total * 64 * 1024);
    workload.join().unwrap();
    f.finish();
}

#[test]
fn a_client_that_leaves_ends_its_input_and_the_workload_goes_on() {
    let mut f = fixture(SupervisorSetup {
        stdin: true,
        ..SupervisorSetup::default()
    });
    let (_agent, mut main) = f.start();
    f.launcher = None;
    assert_eq!(main.receive().unwrap(), (FrameType::Stdin, Vec::new()));
    main.exit(9);
    f.finish();
    assert_eq!(f.exit().status, 9);
}

#[test]
fn a_client_that_attaches_later_sees_output_from_then_on() {
    let mut f = fixture(SupervisorSetup {
        detached: true,
        ..SupervisorSetup::default()
    });
    let (_agent, mut main) = f.start();
    assert_eq!(
        f.events(),
        [""; 0],
        "a launcher that does not attach is let go"
    );
    f.launcher = Some(Session::attach(f.endpoint().clone(), f.control(), false).unwrap());
    main.send(FrameType::Stdout, b"late");
    main.exit(0);
    assert_eq!(f.events(), ["out late", "exit 0", "ended 0"]);
    f.finish();
}

#[test]
fn calls_are_answered() {
    let mut f = fixture(SupervisorSetup {
        auto_remove: true,
        ..SupervisorSetup::default()
    });
    let (mut agent, _main) = f.start();
    let mut control = f.control();
    let ControlAnswer::Status(status) = control.call(&ControlCall::Status).unwrap() else {
        panic!("a status");
    };
    assert_eq!((status.paused, status.clients), (false, 1));
    control.call(&ControlCall::Pause).unwrap();
    assert!(*f.guest.paused.lock().unwrap());
    control.call(&ControlCall::Resume).unwrap();
    assert!(!*f.guest.paused.lock().unwrap());
    control.call(&ControlCall::Destroy).unwrap();
    assert!(agent.receive().is_none());
    f.finish();
    assert!(!f.record.directory().exists(), "it was to be removed");
}

/// The last frames may wait for space behind a frame that fills a connection, and only
/// that space wakes the loop.
#[test]
fn waiting_frames_continue_when_space_is_free() {
    let mut f = fixture(SupervisorSetup {
        large_buffers: true,
        ..SupervisorSetup::default()
    });
    let (_agent, main) = f.start();
    let mut bytes = Vec::new();
    let large = vec![b'x'; frame::BULK_PAYLOAD];
    for _ in 0..=crate::conn::HIGH_WATER / large.len() {
        frame::encode(FrameType::Stdout, &large, &mut bytes).unwrap();
    }
    let exit = ExitStatus {
        status: 5,
        peak_rss_kib: None,
    };
    frame::encode(FrameType::Exit, &exit.to_payload(), &mut bytes).unwrap();
    let written = std::thread::spawn(move || {
        (&main.0).write_all(&bytes).unwrap();
        main
    });
    let events = f.events();
    let _main = written.join().unwrap();
    assert!(events.ends_with(&["exit 5".to_owned(), "ended 5".to_owned()]));
    f.finish();
}

#[test]
fn tens_of_megabytes_come_back_as_they_went() {
    let mut f = fixture(SupervisorSetup {
        stdin: true,
        ..SupervisorSetup::default()
    });
    let (_agent, mut main) = f.start();
    let writer = f.launcher.as_ref().unwrap().writer();
    let input: Vec<u8> = (0..4_000_000u32).flat_map(u32::to_le_bytes).collect();
    let sender = std::thread::spawn({
        let input = input.clone();
        move || {
            writer.write_stdin(&input).unwrap();
            writer.close_stdin().unwrap();
        }
    });
    let cat = std::thread::spawn(move || {
        loop {
            match main.receive().unwrap() {
                (FrameType::Stdin, bytes) if bytes.is_empty() => break,
                (FrameType::Stdin, bytes) => main.send(FrameType::Stdout, &bytes),
                other => panic!("{other:?}"),
            }
        }
        main.exit(0);
    });
    let mut session = f.launcher.take().unwrap();
    let mut output = Vec::new();
    while let Some(event) = session.next_event().unwrap() {
        if let Event::Stdout(bytes) = event {
            output.extend_from_slice(bytes);
        }
    }
    assert!(output == input, "every byte comes back, in order");
    sender.join().unwrap();
    cat.join().unwrap();
    f.finish();
}

/// The workload is stopped by another client, and its exit report is behind unread
/// output.
#[test]
fn a_client_that_does_not_read_does_not_hide_the_end() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let chunk = vec![b'x'; 64 * 1024];
    let chunks = 18;
    let sent = std::thread::spawn({
        let chunk = chunk.clone();
        move || {
            for _ in 0..chunks {
                main.send(FrameType::Stdout, &chunk);
            }
            main.exit(143);
        }
    });
    f.control()
        .call(&ControlCall::Stop { grace_ms: Some(1) })
        .unwrap();
    for signal in [15, 9] {
        let request: ControlRequest = agent.receive_json(FrameType::Control);
        assert!(
            matches!(request, ControlRequest::SignalMain { signal: sent, .. } if sent == signal)
        );
        agent.send_json(&ControlReply::Done);
    }
    sent.join().unwrap();
    // The client receives the status when it reads again.
    let mut session = f.launcher.take().unwrap();
    let (mut told, mut status) = (false, None);
    while let Some(event) = session.next_event().unwrap() {
        match event {
            Event::Warning(text) => told |= text.contains("output is missing"),
            Event::Exit(exit) => status = Some(exit),
            _ => {}
        }
    }
    assert_eq!((told, status), (true, Some(143)));
    f.finish();
    let exit = f.exit();
    assert_eq!((exit.status, exit.reason), (143, ExitReason::Workload));
    assert_eq!(f.record.output().len(), chunks * chunk.len());
}

/// It would be hung up on, and the start would be cancelled.
#[test]
fn a_lack_of_memory_ends_no_connection() {
    let mut f = fixture(SupervisorSetup {
        shortage: 10,
        ..SupervisorSetup::default()
    });
    let (_agent, mut main) = f.start();
    main.exit(0);
    assert_eq!(f.events(), ["exit 0", "ended 0"]);
    f.finish();
}
