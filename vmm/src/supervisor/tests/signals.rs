//! Signals of clients, and what the guest answers.

use super::*;
use sm_guest_proto::container::ContainerId;

type Asked = std::thread::JoinHandle<Result<ControlAnswer, sm_control::ControlError>>;

/// Asks for a signal on a connection of its own.
pub(super) fn ask(f: &Fixture, signal: u8) -> Asked {
    let mut control = f.control();
    std::thread::spawn(move || control.call(&ControlCall::Signal { signal }))
}

/// Receives a signal as the agent does.
pub(super) fn expect(agent: &mut FramedPeer, signal: u8) {
    let request: ControlRequest = agent.receive_json(FrameType::Control);
    let stop = false;
    assert_eq!(
        request,
        ControlRequest::SignalMain {
            container: ContainerId::default(),
            signal,
            stop
        }
    );
}

#[test]
fn a_signal_is_answered_as_the_agent_answers_it() {
    let mut f = fixture(SupervisorSetup::default());
    let (mut agent, mut main) = f.start();
    let first = ask(&f, 10);
    expect(&mut agent, 10);
    let second = ask(&f, 12);
    expect(&mut agent, 12);
    agent.send_json(&ControlReply::Error {
        message: "no such\x1b[2J process".to_owned(),
    });
    let error = first.join().unwrap().unwrap_err().to_string();
    assert_eq!(error, "no such [2J process");
    agent.send_json(&ControlReply::Done);
    assert!(matches!(second.join().unwrap(), Ok(ControlAnswer::Done)));
    main.exit(0);
    f.finish();
}

#[test]
fn a_signal_that_is_not_answered_is_an_error() {
    let mut f = fixture(SupervisorSetup {
        signal_timeout: Some(Duration::from_millis(20)),
        ..SupervisorSetup::default()
    });
    let (mut agent, mut main) = f.start();
    for signal in [10, 12] {
        let asked = ask(&f, signal);
        expect(&mut agent, signal);
        let error = asked.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("does not answer"), "{error}");
    }
    // Late answers are no answers to others.
    for _ in 0..2 {
        agent.send_json(&ControlReply::Done);
    }
    f.control().call(&ControlCall::Status).unwrap();
    main.exit(0);
    f.finish();
}

/// A guest that answers nothing is asked no more after a while.
#[test]
fn a_guest_that_does_not_answer_is_not_asked_without_end() {
    let mut f = fixture(SupervisorSetup {
        signal_timeout: Some(Duration::from_secs(600)),
        ..SupervisorSetup::default()
    });
    let (_agent, mut main) = f.start();
    let mut client = FramedPeer(UnixStream::connect(f.record.control_socket()).unwrap());
    let call = serde_json::to_vec(&ControlCall::Signal { signal: 10 }).unwrap();
    for _ in 0..300 {
        client.send(FrameType::Request, &call);
    }
    // Those beyond the limit are refused at once.
    for _ in 0..44 {
        let answer: ControlAnswer = client.receive_json(FrameType::Control);
        let refused = "the guest does not answer".to_owned();
        assert_eq!(answer, ControlAnswer::Error(refused));
    }
    main.exit(0);
    for _ in 0..256 {
        let answer: ControlAnswer = client.receive_json(FrameType::Control);
        assert!(matches!(answer, ControlAnswer::Error(text) if text.contains("the VM ended")));
    }
    assert!(client.receive().is_none());
    f.finish();
}

#[test]
fn a_signal_is_answered_when_the_vm_ends() {
    for (signal, delivered) in [(9, true), (15, false)] {
        let mut f = fixture(SupervisorSetup::default());
        let (mut agent, mut main) = f.start();
        let asked = ask(&f, signal);
        expect(&mut agent, signal);
        main.exit(7);
        assert_eq!(asked.join().unwrap().is_ok(), delivered, "{signal}");
        f.finish();
    }
}

/// The agent answers before the workload can end, but on another stream.
#[test]
fn an_answer_counts_although_the_end_is_seen_first() {
    let (_f, mut supervisor) = not_running(SupervisorSetup::default());
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut agent = FramedPeer(theirs);
    let (mut client, clients) = {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (FramedPeer(ours), theirs)
    };
    supervisor.agent = Some(AgentLink::new(ours, ContainerId::default()).unwrap());
    supervisor.stage = stage::SupervisorStage::Running(stage::RunningStage::default());
    let id = supervisor.next_client;
    let role = super::super::clients::ClientRole::Control;
    supervisor.add_client(ConnectedClient::new(clients, role).unwrap());
    assert!(supervisor.signal(Some(id), 15).is_none());
    // The hello is answered, and then the signal.
    let link = supervisor.agent.as_mut().unwrap();
    agent.send_json(&ControlReply::Done);
    link.conn.read();
    link.next_reply().unwrap().unwrap();
    agent.send_json(&ControlReply::Done);
    supervisor.conclude(0, ExitReason::Workload, None);
    let answer: ControlAnswer = client.receive_json(FrameType::Control);
    assert_eq!(answer, ControlAnswer::Done);
}
