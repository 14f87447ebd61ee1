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
