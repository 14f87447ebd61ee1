use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use sm_event_loop::Slab;
use sm_guest_proto::frame::FrameDecoder;

use super::*;
use crate::reactor::refusal;

/// A process that does not exist: signals for it go nowhere.
const ABSENT: i32 = i32::MAX;

/// Starts a command with a time limit of a day, and returns its session and client.
fn running(reactor: &Reactor, sessions: &mut Slab<Session>) -> (Key, UnixStream) {
    let (key, client, _) = starting(reactor, sessions);
    (key, client)
}

/// Starts a command like [`running`], and also returns the child's end of its status pipe.
fn starting(reactor: &Reactor, sessions: &mut Slab<Session>) -> (Key, UnixStream, std::fs::File) {
    let (client, ours) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let key = sessions.insert(Session::new(ours.into()));
    let session = sessions.get_mut(key).unwrap();
    let (stdout, _) = rustix::pipe::pipe().unwrap();
    let (status, child_status) = stdio::status_pipe().unwrap();
    let ends = AgentEnds {
        stdin: None,
        stdout,
        stderr: None,
    };
    let pid = Pid::from_raw(ABSENT).unwrap();
    session.started(&ExecRequest::default(), pid, ends, status);
    session.set_timeout(reactor, key, 86_400_000);
    assert!(matches!(
        session.settle(reactor, key, &mut []),
        SessionAction::Nothing
    ));
    (key, client, child_status.into())
}

impl Session {
    /// Handles an event as the agent does.
    fn turn(&mut self, reactor: &Reactor, key: Key, which: u8) {
        let mut scratch = vec![0; 100_000];
        self.ready(reactor, key, which, Readiness::UNKNOWN, &mut scratch);
        self.settle(reactor, key, &mut scratch);
    }
}

/// Returns the kinds and payloads of the frames that a client has received.
fn frames(mut client: UnixStream) -> Vec<(FrameType, Vec<u8>)> {
    client.set_nonblocking(true).unwrap();
    let mut bytes = Vec::new();
    // The end, or that there is nothing more for now.
    let _ = client.read_to_end(&mut bytes);
    let mut decoder = FrameDecoder::new();
    decoder.push(&bytes);
    std::iter::from_fn(|| {
        let frame = decoder.next_frame().unwrap()?;
        Some((frame.kind, frame.payload.to_vec()))
    })
    .collect()
}

/// Root in the workload can open the status pipe through `/proc`.
#[test]
fn a_status_report_has_a_maximum_length() {
    let reactor = Reactor::new().unwrap();
    let mut sessions = Slab::new();
    let (key, client, mut status) = starting(&reactor, &mut sessions);
    status.write_all(&7_u32.to_le_bytes()).unwrap();
    status.write_all(&[b'x'; 50_000]).unwrap();
    let session = sessions.get_mut(key).unwrap();
    session.ready(&reactor, key, part::STATUS, Readiness::default(), &mut []);
    let frames = frames(client);
    let kinds: Vec<_> = frames.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [FrameType::Error, FrameType::Exit]);
    assert_eq!(frames[0].1.len(), 3999);
}

#[test]
fn a_status_pipe_that_is_held_open_does_not_hold_the_exit() {
    let reactor = Reactor::new().unwrap();
    let mut sessions = Slab::new();
    let (key, client, mut status) = starting(&reactor, &mut sessions);
    status.write_all(&7_u32.to_le_bytes()).unwrap();
    let session = sessions.get_mut(key).unwrap();
    session.exited(3, 0);
    let mut scratch = vec![0; 100_000];
    assert!(matches!(
        session.settle(&reactor, key, &mut scratch),
        SessionAction::Finished
    ));
    let frames = frames(client);
    let kinds: Vec<_> = frames.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [FrameType::Control, FrameType::Exit]);
    assert_eq!(ExitStatus::parse(&frames[1].1).unwrap().status, 3);
}

#[test]
fn a_client_that_cannot_be_watched_leaves_no_session() {
    let reactor = Reactor::new().unwrap();
    let (_client, ours) = UnixStream::pair().unwrap();
    let mut session = Session::new(ours.into());
    refusal::begin(1);
    // Nothing would ever settle it again.
    let ask = session.settle(&reactor, Key::new(0, 0), &mut []);
    assert!(matches!(ask, SessionAction::Finished), "{ask:?}");
}

#[test]
fn a_protocol_error_of_a_started_command_counts_as_a_lost_client() {
    let reactor = Reactor::new().unwrap();
    let mut sessions = Slab::new();
    let (key, mut client, status) = starting(&reactor, &mut sessions);
    drop(status);
    let session = sessions.get_mut(key).unwrap();
    session.turn(&reactor, key, part::STATUS);
    client.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    session.turn(&reactor, key, part::CLIENT);
    // The command has been sent SIGHUP, and its time until SIGKILL runs.
    assert!(session.hangup.is_some());
    assert!(session.outputs.iter().all(Option::is_none));
    assert!(session.client.is_none());
}

#[test]
fn the_time_limit_of_a_command_ends_with_it() {
    let reactor = Reactor::new().unwrap();
    let mut sessions = Slab::new();
    let (key, _client) = running(&reactor, &mut sessions);
    assert_eq!(reactor.counts().1, 1);
    sessions.get_mut(key).unwrap().exited(0, 0);
    assert_eq!(reactor.counts().1, 0);
}

#[test]
fn a_session_leaves_nothing_in_the_event_loop() {
    let reactor = Reactor::new().unwrap();
    let mut sessions = Slab::new();
    for _ in 0..100 {
        let (key, client) = running(&reactor, &mut sessions);
        drop(client);
        let session = sessions.get_mut(key).unwrap();
        // The client is lost, again and again: there is one time until SIGKILL.
        for _ in 0..3 {
            session.drop_client(&reactor, key);
        }
        assert_eq!(reactor.counts().1, 2);
        sessions.remove(key);
        assert_eq!(reactor.counts(), (0, 0));
    }
    assert_eq!(sessions.slots(), 1);
}
