//! Calls on a control socket whose server is a thread.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::error::Error as _;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use sm_control::launch::{ControlAnswer, ControlCall, VmmReport};
use sm_control::session::{Event, Session};
use sm_control::{Control, ControlError, Endpoint, MAX_ANSWER};
use sm_guest_proto::frame::{self, FrameDecoder, FrameHeader, FrameType};

/// Starts a server that accepts one connection and passes it to `serve`.
fn process<T: Send + 'static>(
    serve: impl FnOnce(UnixStream) -> T + Send + 'static,
) -> (tempfile::TempDir, Endpoint, JoinHandle<T>) {
    let directory = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::new(directory.path().join("control.sock"), "web");
    let listener = UnixListener::bind(&endpoint.socket).unwrap();
    let process = std::thread::spawn(move || serve(listener.accept().unwrap().0));
    (directory, endpoint, process)
}

fn receive(stream: &mut UnixStream, decoder: &mut FrameDecoder) -> (FrameType, Vec<u8>) {
    let mut buffer = [0; 512];
    loop {
        if let Some(frame) = decoder.next_frame().unwrap() {
            return (frame.kind, frame.payload.to_vec());
        }
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "the client is gone");
        decoder.push(&buffer[..count]);
    }
}

fn send(stream: &mut UnixStream, kind: FrameType, payload: &[u8]) {
    let mut bytes = Vec::new();
    frame::encode(kind, payload, &mut bytes).unwrap();
    stream.write_all(&bytes).unwrap();
}

fn answer(stream: &mut UnixStream, message: &impl serde::Serialize) {
    let json = serde_json::to_vec(message).unwrap();
    send(stream, FrameType::Control, &json);
}

#[test]
fn a_socket_without_listener_means_not_running() {
    let directory = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::new(directory.path().join("control.sock"), "web");
    let refused = |endpoint: &Endpoint| {
        let error = Control::connect(endpoint).unwrap_err();
        assert!(matches!(&error, ControlError::NotRunning(name) if name == "web"));
        assert_eq!(error.to_string(), "VM \"web\" is not running");
    };
    refused(&endpoint);
    // A killed process leaves its socket behind.
    drop(UnixListener::bind(&endpoint.socket).unwrap());
    refused(&endpoint);
}

#[test]
fn a_refusal_carries_the_message_of_the_vm() {
    let (_directory, endpoint, process) = process(|mut stream| {
        let (kind, payload) = receive(&mut stream, &mut FrameDecoder::new());
        answer(&mut stream, &ControlAnswer::Error("it is paused".into()));
        (kind, payload)
    });
    let mut control = Control::connect(&endpoint).unwrap();
    let error = control.call(&ControlCall::Reset).unwrap_err();
    assert!(matches!(&error, ControlError::Refused(_)));
    assert_eq!(error.to_string(), "it is paused");
    assert_eq!(
        process.join().unwrap(),
        (FrameType::Request, br#""reset""#.to_vec())
    );
}

#[test]
fn a_closed_or_invalid_stream_is_an_io_error_with_a_cause() {
    let (_directory, endpoint, process) = process(drop);
    let mut control = Control::connect(&endpoint).unwrap();
    process.join().unwrap();
    let error = control.call(&ControlCall::Pause).unwrap_err();
    assert!(matches!(&error, ControlError::Io { .. }));
    assert_eq!(error.to_string(), "cannot talk to the VM's process");
    assert!(error.source().is_some());

    let (_directory, endpoint, process) = self::process(|mut stream| {
        receive(&mut stream, &mut FrameDecoder::new());
        send(&mut stream, FrameType::Control, b"{");
    });
    let mut control = Control::connect(&endpoint).unwrap();
    let error = control.call(&ControlCall::Pause).unwrap_err();
    assert!(matches!(&error, ControlError::Io { .. }), "{error}");
    process.join().unwrap();

    let (_directory, endpoint, process) = self::process(|mut stream| {
        receive(&mut stream, &mut FrameDecoder::new());
        let header = FrameHeader {
            kind: FrameType::Control,
            len: MAX_ANSWER + 1,
        };
        stream.write_all(&header.encode().unwrap()).unwrap();
    });
    let mut control = Control::connect(&endpoint).unwrap();
    let error = control.call(&ControlCall::Pause).unwrap_err();
    let cause = error.source().unwrap().to_string();
    assert!(cause.contains("exceeds the limit of 1048576"), "{cause}");
    process.join().unwrap();
}

#[test]
fn an_attached_client_sends_input_and_receives_events() {
    let (_directory, endpoint, process) = process(|mut stream| {
        let mut decoder = FrameDecoder::new();
        let (_, call) = receive(&mut stream, &mut decoder);
        answer(&mut stream, &ControlAnswer::Done);
        let input = receive(&mut stream, &mut decoder);
        send(&mut stream, FrameType::Stdout, b"out");
        answer(&mut stream, &serde_json::json!({"of_a_later_version": 1}));
        answer(&mut stream, &VmmReport::Warning("slow".into()));
        send(&mut stream, FrameType::Exit, &3u32.to_be_bytes());
        (serde_json::from_slice::<ControlCall>(&call).unwrap(), input)
    });
    let control = Control::connect(&endpoint).unwrap();
    let mut session = Session::attach(endpoint, control, true).unwrap();
    session.writer().write_stdin(b"in").unwrap();
    let mut events = Vec::new();
    while let Some(event) = session.next_event().unwrap() {
        events.push(format!("{event:?}"));
    }
    let expected = [
        Event::Stdout(b"out"),
        // The report of a later version before this event is skipped.
        Event::Warning("slow".into()),
        Event::Exit(3),
    ];
    assert_eq!(events, expected.map(|event| format!("{event:?}")));
    let (call, input) = process.join().unwrap();
    assert_eq!(call, ControlCall::Attach { stdin: true });
    assert_eq!(input, (FrameType::Stdin, b"in".to_vec()));
}

#[test]
fn follow_returns_the_stream_after_the_answer() {
    let (_directory, endpoint, process) = process(|mut stream| {
        receive(&mut stream, &mut FrameDecoder::new());
        answer(&mut stream, &ControlAnswer::Done);
        stream.write_all(b"x").unwrap();
    });
    let control = Control::connect(&endpoint).unwrap();
    let mut stream = control.follow().unwrap();
    process.join().unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"x");
}
