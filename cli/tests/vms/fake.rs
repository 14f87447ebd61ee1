//! A user whose VMs are records, a held lock, and sockets.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output};

use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use sm_guest_proto::frame::{FrameHeader, FrameType, HEADER_LEN, encode};

pub(crate) struct User {
    directory: tempfile::TempDir,
}

impl User {
    pub(crate) fn new() -> Self {
        let user = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        for path in ["data/sm/vms", "run/sm/vms"] {
            fs::create_dir_all(user.path(path)).unwrap();
        }
        for path in ["data/sm/vms", "run/sm/vms", "run/sm"] {
            fs::set_permissions(user.path(path), fs::Permissions::from_mode(0o700)).unwrap();
        }
        user
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        crate::common::sm(self.directory.path(), arguments)
    }

    /// Runs a command with the signal dispositions of a foreground command in a shell: no
    /// signal is ignored, even if this test ignores some.
    pub(crate) fn foreground(&self, arguments: &[&str]) -> Command {
        let sm = self.command(arguments);
        let mut command = Command::new("env");
        command.arg("--default-signal").arg(sm.get_program());
        command.args(sm.get_args());
        command.current_dir(self.directory.path());
        for (name, value) in sm.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }

    pub(crate) fn sm(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Creates a VM whose process is this one.
    pub(crate) fn vm(&self, number: u8, name: &str) -> Vm {
        let short = format!("{number:02x}").repeat(6);
        let id = format!("{short}{}", "0".repeat(52));
        let directory = self.path("data/sm/vms").join(&id);
        let sockets = self.path("run/sm/vms").join(&short);
        fs::create_dir(&directory).unwrap();
        fs::create_dir(&sockets).unwrap();
        let config = json!({
            "id": id, "name": name, "image": "oci:x", "image_digest": "sha256:0",
            "created_ns": number, "memory": 64 << 20, "cpus": 1, "kernel": "/k",
            "auto_remove": false, "read_only": false, "stop_timeout_ms": 1000,
            "workload": {
                "argv": ["sleep"], "env": [], "cwd": "/", "user": "", "tty": false,
                "stdin": true, "hostname": "h", "stop_signal": 15,
            },
        });
        fs::write(directory.join("config.json"), config.to_string()).unwrap();
        fs::write(directory.join("console.log"), b"one\n\xff two\nthree\n").unwrap();
        let lock = File::create(directory.join("lock")).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        Vm {
            short,
            directory,
            sockets,
            lock: Some(lock),
        }
    }
}

pub(crate) struct Vm {
    pub(crate) short: String,
    pub(crate) directory: PathBuf,
    pub(crate) sockets: PathBuf,
    lock: Option<File>,
}

impl Vm {
    /// Ends the VM's process.
    pub(crate) fn dies(&mut self) {
        self.lock = None;
    }

    pub(crate) fn listens(&self, name: &str) -> UnixListener {
        UnixListener::bind(self.sockets.join(name)).unwrap()
    }

    /// Answers every call on the control socket with the status running.
    pub(crate) fn answers(&self) {
        let listener = self.listens("control.sock");
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                while receive(&mut stream).is_some() {
                    send_running(&mut stream);
                }
            }
        });
    }
}

pub(crate) fn send(stream: &mut UnixStream, kind: FrameType, payload: &[u8]) {
    let mut bytes = Vec::new();
    encode(kind, payload, &mut bytes).unwrap();
    // The client may have disconnected.
    let _ = stream.write_all(&bytes);
}

pub(crate) fn send_json(stream: &mut UnixStream, message: &Value) {
    send(stream, FrameType::Control, message.to_string().as_bytes());
}

/// Answers a call for the status.
pub(crate) fn send_running(stream: &mut UnixStream) {
    let status = json!({"status": {
        "stage": "running", "paused": false, "vmm_pid": 1, "epoch": "",
        "started_ns": 1, "clients": 0, "published": [],
    }});
    send_json(stream, &status);
}

/// Returns the next frame, `None` at the end.
pub(crate) fn receive(stream: &mut UnixStream) -> Option<(FrameType, Vec<u8>)> {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).ok()?;
    let header = FrameHeader::decode(header).unwrap();
    let mut payload = vec![0; header.len];
    stream.read_exact(&mut payload).ok()?;
    Some((header.kind, payload))
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
