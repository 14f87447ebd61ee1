//! The other end of a stream with frames, and tests in a process of their own.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use sm_guest_proto::frame::{self, ExitStatus, FrameHeader, FrameType, HEADER_LEN};

/// A blocking peer with framing.
#[derive(Debug)]
pub struct FramedPeer(pub UnixStream);

impl FramedPeer {
    /// Returns the next frame; `None` at the end of the stream.
    ///
    /// # Panics
    /// The bytes are no frame.
    pub fn receive(&mut self) -> Option<(FrameType, Vec<u8>)> {
        let mut header = [0; HEADER_LEN];
        self.0.read_exact(&mut header).ok()?;
        let header = FrameHeader::decode(header).unwrap();
        let mut payload = vec![0; header.len];
        self.0.read_exact(&mut payload).unwrap();
        Some((header.kind, payload))
    }

    /// Sends a frame.
    ///
    /// # Panics
    /// The frame is too long, or the peer has disconnected.
    pub fn send(&mut self, kind: FrameType, payload: &[u8]) {
        let mut bytes = Vec::new();
        frame::encode(kind, payload, &mut bytes).unwrap();
        self.0.write_all(&bytes).unwrap();
    }

    /// Sends a message in a frame for messages.
    ///
    /// # Panics
    /// See [`Self::send`].
    pub fn send_json(&mut self, message: &impl serde::Serialize) {
        self.send(FrameType::Control, &serde_json::to_vec(message).unwrap());
    }

    /// Returns the message of the next frame, which must be of the `expected` type.
    ///
    /// # Panics
    /// The next frame has another type.
    pub fn receive_json<T: serde::de::DeserializeOwned>(&mut self, expected: FrameType) -> T {
        let (kind, payload) = self.receive().expect("a frame");
        assert_eq!(kind, expected);
        serde_json::from_slice(&payload).unwrap()
    }

    /// Sends the exit of the workload.
    ///
    /// # Panics
    /// See [`Self::send`].
    pub fn exit(&mut self, status: u32) {
        let exit = ExitStatus {
            status,
            peak_rss_kib: Some(7),
        };
        self.send(FrameType::Exit, &exit.to_payload());
    }
}

/// Runs the test `name`, which is relative to [`module_path`], in a process of its own.
/// Returns true in that process.
///
/// # Panics
/// The test fails.
pub fn in_own_process(module: &str, name: &str, command: &mut std::process::Command) -> bool {
    const OWN: &str = "SM_TEST_OWN_PROCESS";
    if std::env::var_os(OWN).is_some() {
        return true;
    }
    let (_crate, module) = module.split_once("::").expect("tests are in modules");
    let test = command
        .args(["--exact", "--nocapture", &format!("{module}::{name}")])
        .env(OWN, "1")
        .output()
        .unwrap();
    assert!(test.status.success(), "{test:?}");
    assert!(String::from_utf8_lossy(&test.stdout).contains("1 passed"));
    false
}
