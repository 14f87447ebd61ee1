//! Many clients, and too few descriptors.

use super::*;
use sm_guest_proto::container::ContainerId;

fn connect(f: &Fixture) -> FramedPeer {
    FramedPeer(UnixStream::connect(f.record.control_socket()).unwrap())
}

fn call(client: &mut FramedPeer, call: &ControlCall) {
    client.send(FrameType::Request, &serde_json::to_vec(call).unwrap());
}

/// Clients that wait and those that are attached do not use up places of control clients.
#[test]
fn hundreds_of_waiting_clients_do_not_prevent_a_stop() {
    let mut f = fixture(SupervisorSetup {
        detached: true,
        ..SupervisorSetup::default()
    });
    let (mut agent, mut main) = f.start();
    // The test has the other end of each connection.
    crate::descriptors::raise();
    let mut waiting: Vec<FramedPeer> = (0..300)
        .map(|number| {
            let mut client = connect(&f);
            match number % 3 {
                0 => {
                    call(&mut client, &ControlCall::Attach { stdin: false });
                    let done: ControlAnswer = client.receive_json(FrameType::Control);
                    assert_eq!(done, ControlAnswer::Done);
                }
                _ => call(&mut client, &ControlCall::Wait),
            }
            client
        })
        .collect();
    for _ in 0..100 {
        let status = f.control().call(&ControlCall::Status).unwrap();
        assert!(matches!(status, ControlAnswer::Status(_)));
    }
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
    main.exit(7);
    for (number, client) in waiting.iter_mut().enumerate() {
        match number % 3 {
            // Reports of phases precede the exit.
            0 => while client.receive().unwrap().0 != FrameType::Exit {},
            _ => {
                let answer = client.receive_json(FrameType::Control);
                assert!(matches!(answer, ControlAnswer::Ended(exit) if exit.status == 7));
            }
        }
    }
    drop(waiting);
    f.finish();
}

/// Clients beyond the maximum wait in the backlog, and are not disconnected.
#[test]
fn idle_connections_are_evicted() {
    let mut f = fixture(SupervisorSetup {
        detached: true,
        idle_timeout: Some(Duration::from_millis(50)),
        ..SupervisorSetup::default()
    });
    let (_agent, mut main) = f.start();
    let mut idle: Vec<FramedPeer> = (0..100).map(|_| connect(&f)).collect();
    let status = f.control().call(&ControlCall::Status).unwrap();
    assert!(matches!(status, ControlAnswer::Status(_)));
    assert!(idle[0].receive().is_none(), "its place was given to others");
    main.exit(0);
    drop(idle);
    f.finish();
}

#[test]
fn the_next_client_is_served_when_one_disconnects() {
    let mut f = fixture(SupervisorSetup {
        detached: true,
        // The idle timeout never expires.
        idle_timeout: Some(Duration::from_secs(3600)),
        ..SupervisorSetup::default()
    });
    let (_agent, mut main) = f.start();
    let idle: Vec<FramedPeer> = (0..64).map(|_| connect(&f)).collect();
    let mut next = f.control();
    let asked = std::thread::spawn(move || next.call_and_wait(&ControlCall::Status));
    drop(idle);
    let status = asked.join().unwrap().unwrap();
    assert!(matches!(status, ControlAnswer::Status(_)));
    main.exit(0);
    f.finish();
}

/// Opens all available descriptors, up to a limit, which is per process.
fn take_all_descriptors() -> Vec<std::fs::File> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let few = Rlimit {
        current: Some(64),
        ..getrlimit(Resource::Nofile)
    };
    setrlimit(Resource::Nofile, few).unwrap();
    let null = || std::fs::File::open("/dev/null").ok();
    let taken: Vec<_> = std::iter::from_fn(null).collect();
    assert!(!taken.is_empty());
    taken
}

/// The listener stays readable, so it is not polled until a deadline.
#[test]
fn a_connection_that_cannot_be_accepted_makes_no_loop_spin() {
    let name = "a_connection_that_cannot_be_accepted_makes_no_loop_spin";
    if !in_own_process(module_path!(), name, &mut this_program()) {
        return;
    }
    let (f, mut supervisor) = not_running(SupervisorSetup::default());
    let clients = [socket(), socket()];
    let address = rustix::net::SocketAddrUnix::new(f.record.control_socket()).unwrap();
    let taken = take_all_descriptors();
    for client in &clients {
        rustix::net::connect(client, &address).unwrap();
    }
    let listens = |supervisor: &Supervisor<FakeGuest>| {
        assert!(supervisor.next_deadline().is_some());
        supervisor.accepts()
    };
    let before = supervisor.clients.len();
    supervisor.accept();
    assert_eq!(supervisor.clients.len(), before + 1, "with the spare one");
    assert!(listens(&supervisor));
    supervisor.accept();
    assert_eq!(supervisor.clients.len(), before + 1);
    assert!(!listens(&supervisor) && supervisor.is_set(SupervisorTimer::Accept));
    drop(taken);
    // Either the deadline or the end of a client re-enables the listener.
    let last = *supervisor.clients.keys().last().unwrap();
    supervisor.drop_client(last);
    assert!(listens(&supervisor));
    supervisor.accept();
    assert_eq!(supervisor.clients.len(), before + 1);
    assert!(supervisor.spare.is_some());
}

/// The limit is per process, so the test runs in a process of its own.
#[test]
fn a_process_without_descriptors_serves_clients_one_by_one() {
    let name = "a_process_without_descriptors_serves_clients_one_by_one";
    if !in_own_process(module_path!(), name, &mut this_program()) {
        return;
    }
    let mut f = fixture(SupervisorSetup {
        detached: true,
        ..SupervisorSetup::default()
    });
    let (mut agent, mut main) = f.start();
    f.control().call(&ControlCall::Status).unwrap();
    let mut more: Vec<FramedPeer> = (0..3).map(|_| FramedPeer(socket())).collect();
    let address = rustix::net::SocketAddrUnix::new(f.record.control_socket()).unwrap();
    let taken = take_all_descriptors();
    for client in &more {
        rustix::net::connect(&client.0, &address).unwrap();
    }
    // The first client is served with the spare descriptor.
    call(&mut more[0], &ControlCall::Status);
    let status: ControlAnswer = more[0].receive_json(FrameType::Control);
    assert!(matches!(status, ControlAnswer::Status(_)));
    call(&mut more[0], &ControlCall::Wait);
    let refused: ControlAnswer = more[0].receive_json(FrameType::Control);
    assert!(matches!(refused, ControlAnswer::Error(text) if text.contains("no descriptors")));
    // The others wait, without being disconnected.
    call(&mut more[1], &ControlCall::Status);
    call(&mut more[0], &ControlCall::Status);
    let status: ControlAnswer = more[0].receive_json(FrameType::Control);
    assert!(matches!(status, ControlAnswer::Status(_)));
    drop(taken);
    let status: ControlAnswer = more[1].receive_json(FrameType::Control);
    assert!(matches!(status, ControlAnswer::Status(_)));
    call(&mut more[1], &ControlCall::Stop { grace_ms: None });
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
    drop(more);
    f.finish();
}

fn socket() -> UnixStream {
    use rustix::net::{AddressFamily, SocketType};
    rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)
        .unwrap()
        .into()
}

#[test]
fn a_client_that_sends_no_more_gets_its_answer() {
    let mut f = fixture(SupervisorSetup::default());
    let (_agent, mut main) = f.start();
    let mut client = FramedPeer(UnixStream::connect(f.record.control_socket()).unwrap());
    let call = serde_json::to_vec(&ControlCall::Status).unwrap();
    client.send(FrameType::Request, &call);
    client.0.shutdown(std::net::Shutdown::Write).unwrap();
    let answer: ControlAnswer = client.receive_json(FrameType::Control);
    assert!(matches!(answer, ControlAnswer::Status(_)), "{answer:?}");
    assert!(client.receive().is_none());
    main.exit(0);
    f.finish();
}
