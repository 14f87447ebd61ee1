//! An agent for tests, without a machine, a cgroup or processes.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use sm_event_loop::Key;
use sm_guest_proto::control::ControlReply;
use sm_guest_proto::frame::{FrameDecoder, FrameType};

use super::{Agent, Listeners};
use crate::cgroup::Cgroup;
use crate::control::Control;
use crate::facts::Facts;

/// A time that no test reaches.
pub(super) const HOUR: Duration = Duration::from_secs(3600);

pub(super) struct Fixture {
    pub(super) agent: Agent,
    _peers: [UnixStream; 3],
    _directory: tempfile::TempDir,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let pairs: [_; 3] = std::array::from_fn(|_| UnixStream::pair().unwrap());
        let [(exec, a), (forward, b), (control, c)] = pairs;
        let listeners = Listeners {
            exec: exec.into(),
            forward: forward.into(),
            control: control.into(),
        };
        // An ordinary directory, in which the agent's writes have no effect.
        let cgroup = Cgroup::create(directory.path(), "containers").unwrap();
        let path = directory.path().to_owned();
        Self {
            agent: Agent::new(listeners, path, cgroup, Facts::default()).unwrap(),
            _peers: [a, b, c],
            _directory: directory,
        }
    }

    /// Adds a control connection. Returns its key and the host's end.
    pub(super) fn host(&mut self) -> (Key, Host) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let key = self.agent.controls.insert(Control::accepted(ours.into()));
        self.agent.settle_control(key);
        (key, Host(theirs))
    }

    /// Waits once and handles the events.
    pub(super) fn turn(&mut self) {
        self.agent.reactor.wait().unwrap();
        while let Some(event) = self.agent.reactor.take_event() {
            self.agent.handle(event);
        }
    }
}

/// The host's end of a control connection.
pub(super) struct Host(UnixStream);

impl Host {
    /// Returns the reply that the agent has sent.
    pub(super) fn reply(&mut self) -> ControlReply {
        self.0.set_nonblocking(true).unwrap();
        let mut bytes = vec![0; 65536];
        let count = self.0.read(&mut bytes).unwrap();
        let mut decoder = FrameDecoder::new();
        decoder.push(&bytes[..count]);
        let frame = decoder.next_frame().unwrap().unwrap();
        assert_eq!(frame.kind, FrameType::Control);
        let reply = serde_json::from_slice(frame.payload).unwrap();
        assert!(decoder.next_frame().unwrap().is_none(), "one reply");
        reply
    }
}
