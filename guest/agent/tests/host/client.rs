//! A blocking client of the agent's protocols.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use sm_guest_proto::PROTOCOL_VERSION;
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::{ControlReply, ControlRequest};
use sm_guest_proto::exec::{ExecControl, ExecReply, ExecRequest, Hello};
use sm_guest_proto::frame::{ExitStatus, FrameDecoder, FrameType, encode};

/// A framed connection.
pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    decoder: FrameDecoder,
}

/// The complete output of a command.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) error: Option<String>,
    pub(crate) status: Option<u32>,
    pub(crate) pid: Option<u32>,
    pub(crate) peak_rss_kib: Option<u64>,
}

impl Output {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Connection {
    pub(crate) fn open(directory: &Path, name: &str) -> Self {
        let stream = UnixStream::connect(directory.join(name)).unwrap();
        // No test waits forever; no result depends on the length of this timeout.
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        Self {
            stream,
            decoder: FrameDecoder::new(),
        }
    }

    pub(crate) fn send(&mut self, kind: FrameType, payload: &[u8]) {
        let mut bytes = Vec::new();
        encode(kind, payload, &mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    /// Returns the next frame, `None` at the end of the stream.
    pub(crate) fn next(&mut self) -> Option<(FrameType, Vec<u8>)> {
        let mut chunk = vec![0; 65536];
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some((frame.kind, frame.payload.to_vec()));
            }
            match self.stream.read(&mut chunk).unwrap() {
                0 => return None,
                count => self.decoder.push(&chunk[..count]),
            }
        }
    }

    pub(crate) fn next_kind(&mut self, kind: FrameType) -> Vec<u8> {
        let (got, payload) = self.next().expect("a frame");
        assert_eq!(got, kind, "{}", String::from_utf8_lossy(&payload));
        payload
    }

    pub(crate) fn hello(&mut self) {
        let hello = ExecControl::Hello(Hello {
            protocol: PROTOCOL_VERSION,
        });
        self.send(FrameType::Control, &serde_json::to_vec(&hello).unwrap());
    }

    /// Reads until the stream ends.
    pub(crate) fn collect(&mut self) -> Output {
        let mut output = Output::default();
        while let Some((kind, payload)) = self.next() {
            assert!(output.status.is_none(), "{kind:?} after EXIT");
            match kind {
                FrameType::Stdout => output.stdout.extend(payload),
                FrameType::Stderr => output.stderr.extend(payload),
                FrameType::Error => output.error = Some(String::from_utf8(payload).unwrap()),
                FrameType::Exit => {
                    let exit = ExitStatus::parse(&payload).unwrap();
                    output.status = Some(exit.status);
                    output.peak_rss_kib = exit.peak_rss_kib;
                }
                FrameType::Control => {
                    if let ExecReply::Started { container, pid } =
                        serde_json::from_slice(&payload).unwrap()
                    {
                        assert!(output.stdout.is_empty(), "STARTED comes before output");
                        assert_eq!(container, ContainerId::default());
                        output.pid = Some(pid);
                    }
                }
                other => panic!("unexpected {other:?}"),
            }
        }
        output
    }
}

/// Sends HELLO and the request.
pub(crate) fn start(directory: &Path, request: &ExecRequest) -> Connection {
    let mut connection = Connection::open(directory, "exec");
    connection.hello();
    connection.send(FrameType::Request, &serde_json::to_vec(request).unwrap());
    connection
}

/// Starts a command and waits until it runs.
pub(crate) fn start_running(directory: &Path, request: &ExecRequest) -> Connection {
    start_running_with_pid(directory, request).0
}

/// Starts a command, waits until it runs, and returns its process identifier too.
pub(crate) fn start_running_with_pid(directory: &Path, request: &ExecRequest) -> (Connection, u32) {
    let mut connection = start(directory, request);
    let reply: ExecReply =
        serde_json::from_slice(&connection.next_kind(FrameType::Control)).unwrap();
    assert!(matches!(reply, ExecReply::Hello(_)));
    let reply: ExecReply =
        serde_json::from_slice(&connection.next_kind(FrameType::Control)).unwrap();
    let ExecReply::Started { pid, .. } = reply else {
        panic!("{reply:?}");
    };
    (connection, pid)
}

/// Signals a command through a separate connection.
pub(crate) fn signal_beside(directory: &Path, pid: u32, signal: u8) -> Output {
    let container = ContainerId::default();
    let mut connection = Connection::open(directory, "exec");
    connection.hello();
    let message = serde_json::to_vec(&ExecControl::Signal {
        container,
        pid,
        signal,
    })
    .unwrap();
    connection.send(FrameType::Control, &message);
    connection.collect()
}

/// Takes over the main command's streams.
pub(crate) fn attach_main(directory: &Path) -> Connection {
    let mut connection = Connection::open(directory, "exec");
    connection.hello();
    let container = ContainerId::default();
    let attach = serde_json::to_vec(&ExecControl::AttachMain { container }).unwrap();
    connection.send(FrameType::Control, &attach);
    connection
}

/// Runs a command until it exits.
pub(crate) fn run(directory: &Path, request: &ExecRequest) -> Output {
    start(directory, request).collect()
}

/// Returns a request to run `script` in a shell.
pub(crate) fn shell(script: &str) -> ExecRequest {
    ExecRequest {
        argv: vec!["sh".into(), "-c".into(), script.into()],
        ..ExecRequest::default()
    }
}

/// A control connection after HELLO.
pub(crate) struct ControlClient(Connection);

impl ControlClient {
    pub(crate) fn open(directory: &Path) -> Self {
        let mut client = Self(Connection::open(directory, "control"));
        let hello = client.ask(&ControlRequest::Hello(Hello {
            protocol: PROTOCOL_VERSION,
        }));
        let ControlReply::Hello(hello) = hello else {
            panic!("{hello:?}");
        };
        assert_eq!(hello.protocol, PROTOCOL_VERSION);
        assert!(hello.cpus > 0 && hello.memory_kib > 0);
        client
    }

    pub(crate) fn send(&mut self, request: &ControlRequest) {
        let json = serde_json::to_vec(request).unwrap();
        self.0.send(FrameType::Control, &json);
    }

    pub(crate) fn ask(&mut self, request: &ControlRequest) -> ControlReply {
        self.send(request);
        self.reply()
    }

    pub(crate) fn reply(&mut self) -> ControlReply {
        serde_json::from_slice(&self.0.next_kind(FrameType::Control)).unwrap()
    }
}

/// Returns the request for the figures of the only container.
pub(crate) fn stats_request() -> ControlRequest {
    ControlRequest::Stats {
        container: ContainerId::default(),
    }
}

/// Returns the request for the identity that the only container sees.
pub(crate) fn identity_request() -> ControlRequest {
    ControlRequest::IdentityReport {
        container: ContainerId::default(),
    }
}
