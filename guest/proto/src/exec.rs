//! The exec protocol: one command per connection to guest port [`crate::port::EXEC`].
//!
//! The client sends CONTROL ([`Hello`]) and REQUEST ([`ExecRequest`]) without waiting in
//! between. The agent answers with CONTROL ([`ExecReply::Hello`]), once the command runs
//! with CONTROL ([`ExecReply::Started`]), then with STDOUT and STDERR frames, and last
//! with EXIT. If a command cannot be started, the agent answers with ERROR (a sentence)
//! and EXIT with Docker's status: 127 not found, 126 not executable, 125 for a failure of
//! the agent.
//!
//! When the client closes its connection before EXIT, the agent sends the command SIGHUP
//! and, after a grace period, SIGKILL, unless it is [`ExecRequest::detached`]. The workload ([`Role::Main`]) continues instead:
//! its output is buffered in its pipes, up to their capacity, until a client sends
//! [`ExecControl::AttachMain`].

use serde::{Deserialize, Serialize};

use crate::container::ContainerId;
use crate::files::FileRequest;
use crate::privileges::Privileges;

/// The first message in either direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The sender's [`crate::PROTOCOL_VERSION`].
    pub protocol: u32,
}

/// CONTROL messages that a client sends on an exec connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecControl {
    /// Version of the client. Must be the first frame.
    Hello(Hello),
    /// Sent instead of a REQUEST: take over the standard streams of the command that runs
    /// as [`Role::Main`] of a container. Answered like a REQUEST, with [`ExecReply::Started`] and the
    /// output that no earlier connection received, or with ERROR and EXIT when there is
    /// no such command. The connection that held the streams before is closed.
    AttachMain {
        /// The container.
        container: ContainerId,
    },
    /// Sent instead of a REQUEST: send a signal to a command that another connection has
    /// started. Answered with EXIT; its status is not 0, and ERROR precedes it, when
    /// there is no such command. A signal on a separate connection does not wait behind
    /// standard input that the command does not read.
    Signal {
        /// The command's container.
        container: ContainerId,
        /// The command's process identifier, as in [`ExecReply::Started`].
        pid: u32,
        /// Signal number.
        signal: u8,
    },
    /// Sent instead of a REQUEST: perform an operation on files; see [`crate::files`].
    Files(FileRequest),
    /// Sent instead of a REQUEST: list the processes of a container. Answered with STDOUT, the JSON of an array of [`GuestProcess`], and EXIT.
    /// An agent that does not know the message answers with ERROR and EXIT.
    Processes {
        /// The container.
        container: ContainerId,
    },
}

/// A process in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestProcess {
    /// Process identifier, as processes of the workload see it.
    pub pid: u32,
    /// That of its parent; 0 for a process whose parent the workload does not see.
    pub ppid: u32,
    /// Effective user.
    pub uid: u32,
    /// State: a letter, as in `/proc/PID/stat`.
    pub state: String,
    /// CPU time in milliseconds.
    pub cpu_ms: u64,
    /// Time since its start, in milliseconds.
    pub age_ms: u64,
    /// Resident set size in KiB.
    pub rss_kib: u64,
    /// Size of its address space in KiB.
    pub vsz_kib: u64,
    /// Program and arguments, separated by spaces and cut off at 1000 bytes; its name in
    /// brackets if it has none.
    pub command: String,
}

/// CONTROL messages that the agent sends on an exec connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecReply {
    /// Answer to the client's HELLO.
    Hello(Hello),
    /// The command runs. The EXIT frame of the connection is that of this command.
    Started {
        /// Its container.
        container: ContainerId,
        /// Its process identifier as processes of the container see it.
        pid: u32,
    },
}

/// The role of a command in its container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The container's main command. It continues when its client disconnects.
    Main,
    /// An additional command beside the main command.
    #[default]
    Exec,
}

/// A command to run. Absent fields have their type's default value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecRequest {
    /// Container of the command.
    pub container: ContainerId,
    /// Program and arguments. A program name without `/` is searched in the request's
    /// `PATH`.
    pub argv: Vec<String>,
    /// `NAME=value` entries. The agent adds `PATH`, `HOME` and, on a terminal, `TERM` if
    /// they are absent.
    pub env: Vec<String>,
    /// Working directory; `/` when empty. A missing directory is created for
    /// [`Role::Main`], as Docker does for `WorkingDir`.
    pub cwd: String,
    /// `user[:group]` by name or number, resolved in the guest; root when empty.
    pub user: String,
    /// Additional groups, by name or number.
    pub groups: Vec<String>,
    /// Run on a new pseudo-terminal, whose output is sent as STDOUT.
    pub tty: bool,
    /// Terminal width in columns, if `tty` is set.
    pub cols: u16,
    /// Terminal height in rows, if `tty` is set.
    pub rows: u16,
    /// Connect standard input to STDIN frames; otherwise it is `/dev/null`.
    pub stdin: bool,
    /// Continue when the client disconnects. The standard streams are `/dev/null`, and `tty`
    /// and `stdin` have no effect.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub detached: bool,
    /// Role of the command in its container.
    pub role: Role,
    /// Files to write before the command starts.
    pub stage_files: Vec<StageFile>,
    /// Commands to run after `argv`, in order, as long as each one exits with status 0.
    /// The reported status is that of the last command run.
    pub chain: Vec<Vec<String>>,
    /// Milliseconds after which the command is killed (status 124); 0 for no timeout.
    pub timeout_ms: u64,
    /// Resource limits set before the command starts.
    pub rlimits: Vec<Rlimit>,
    /// Limits of its privileges; absent for those of the container's main command, and for
    /// none if that does not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub privileges: Option<Privileges>,
    /// Parameters of the kernel set before the command starts, in this order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sysctls: Vec<Sysctl>,
}

/// A file that the agent writes before it starts a command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageFile {
    /// Absolute path in the guest; missing parent directories are created.
    pub path: String,
    /// Permission bits, such as `0o644`.
    pub mode: u32,
    /// Contents.
    #[serde(with = "crate::base64_bytes")]
    pub data: Vec<u8>,
}

/// A parameter of the guest's kernel (proc_sys(5)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sysctl {
    /// Path below `/proc/sys`, such as `net/core/somaxconn`.
    pub path: String,
    /// Its value.
    pub value: String,
}

/// One resource limit, as in `setrlimit(2)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// Lower-case name without the `RLIMIT_` prefix, such as `nofile`.
    pub name: String,
    /// Soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is unlimited.
    pub hard: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimal_request_is_enough() {
        let request: ExecRequest = serde_json::from_str(r#"{"argv":["true"]}"#).unwrap();
        assert_eq!(request.argv, ["true"]);
        assert_eq!(request.role, Role::Exec);
        assert_eq!(request.container, ContainerId::default());
        assert!(!request.tty);
    }

    #[test]
    fn control_messages_have_a_stable_json_form() {
        let container = ContainerId::default();
        let json = serde_json::to_string(&ExecControl::AttachMain { container }).unwrap();
        assert_eq!(json, r#"{"attach_main":{"container":"main"}}"#);
        let started = ExecReply::Started {
            container: ContainerId::default(),
            pid: 1,
        };
        let json = serde_json::to_string(&started).unwrap();
        assert_eq!(json, r#"{"started":{"container":"main","pid":1}}"#);
    }

    #[test]
    fn staged_bytes_survive_json() {
        let file = StageFile {
            path: "/a".into(),
            mode: 0o600,
            data: vec![0, 255, 10],
        };
        let json = serde_json::to_string(&file).unwrap();
        assert_eq!(serde_json::from_str::<StageFile>(&json).unwrap(), file);
    }
}
