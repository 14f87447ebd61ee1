use std::os::unix::net::UnixStream;

use sm_event_loop::Slab;

use super::*;

/// A process that does not exist: signals for it go nowhere.
const ABSENT: i32 = i32::MAX;

/// Starts a command with a time limit of a day, and returns its session and client.
fn running(reactor: &Reactor, sessions: &mut Slab<Session>) -> (Key, UnixStream) {
    let (client, ours) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let key = sessions.insert(Session::new(ours.into()));
    let session = sessions.get_mut(key).unwrap();
    let (stdout, _) = rustix::pipe::pipe().unwrap();
    let (status, _) = stdio::status_pipe().unwrap();
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
        Ask::Nothing
    ));
    (key, client)
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
            session.lose_client(&reactor, key);
        }
        assert_eq!(reactor.counts().1, 2);
        sessions.remove(key);
        assert_eq!(reactor.counts(), (0, 0));
    }
    assert_eq!(sessions.slots(), 1);
}
