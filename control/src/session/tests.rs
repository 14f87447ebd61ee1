use super::*;

/// The peer reads nothing, so a thread that writes input blocks.
#[test]
fn hanging_up_wakes_a_blocked_writer_and_the_reader() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut session = Session::new(ours, None).unwrap();
    let writer = session.writer();
    let blocked = std::thread::spawn({
        let writer = writer.clone();
        move || loop {
            if let Err(error) = writer.write_stdin(&[0; BULK_PAYLOAD]) {
                break error.kind();
            }
        }
    });
    let reader = std::thread::spawn(move || matches!(session.next_event(), Ok(None)));
    // The writer is blocked, and holds the lock, once the buffers are full.
    while writer.stream.try_lock().is_ok() || !is_full(&writer.hang_up) {
        std::thread::yield_now();
    }
    writer.hang_up();
    assert_eq!(blocked.join().unwrap(), io::ErrorKind::BrokenPipe);
    assert!(reader.join().unwrap());
    drop(theirs);
}

fn is_full(stream: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(stream, PollFlags::OUT)];
    poll(&mut fds, Some(&now)).unwrap() == 0
}

/// The header alone is sufficient: no memory is allocated for the payload.
#[test]
fn a_frame_over_its_types_limit_is_refused_by_its_header() {
    for (kind, len) in [
        (FrameType::Stdout, BULK_PAYLOAD + 1),
        (FrameType::Stderr, 16 << 20),
        (FrameType::Error, 16 << 20),
        (FrameType::Control, frame::MESSAGE_PAYLOAD + 1),
        (FrameType::Exit, 17),
        (FrameType::Stdin, 16 << 20),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut session = Session::new(ours, None).unwrap();
        let header = FrameHeader { kind, len }.encode().unwrap();
        theirs.write_all(&header).unwrap();
        drop(theirs);
        let error = session.next_event().unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::InvalidData,
            "{kind:?}: {error}"
        );
        assert_eq!(session.payload.capacity(), 0);
    }
}

/// As with an agent that does not have the request for a signal beside the session.
#[test]
fn a_signal_on_the_session_waits_for_nobody_and_is_not_lost() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let session = Session::new(ours, None).unwrap();
    let writer = session.writer();
    let blocked = std::thread::spawn({
        let writer = writer.clone();
        move || writer.write_stdin(&vec![0; 4 << 20])
    });
    while writer.stream.try_lock().is_ok() || !is_full(&writer.hang_up) {
        std::thread::yield_now();
    }
    for signal in [2, 15] {
        writer.signal(signal).unwrap();
    }
    let mut signals = Vec::new();
    let mut decoder = frame::FrameDecoder::new();
    let mut buffer = [0; 4096];
    while signals.len() < 2 {
        let count = theirs.read(&mut buffer).unwrap();
        decoder.push(&buffer[..count]);
        while let Some(frame) = decoder.next_frame().unwrap() {
            if frame.kind == FrameType::Signal {
                signals.extend_from_slice(frame.payload);
            }
        }
    }
    assert_eq!(signals, [2, 15]);
    writer.hang_up();
    let _ = blocked.join().unwrap();
    // Nothing is queued without limit.
    for _ in 0..MAX_QUEUED_SIGNALS {
        writer.signals.lock().unwrap().push_back(1);
    }
    let error = writer.signal(1).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}
