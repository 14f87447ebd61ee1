//! Exec: one command per connection.
//!
//! [`session`] is the agent's side of a running command, [`stdio`] creates the
//! descriptors between the two, [`child`] is the code that runs in the new process,
//! [`status`] passes its result, and [`lookup`] finds its program.

pub(crate) mod child;
mod input;
pub(crate) mod lookup;
mod privileges;
pub(crate) mod session;
mod status;
pub(crate) mod stdio;

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use sm_guest_proto::exec::ExecRequest;
use sm_guest_proto::frame::{FrameType, MAX_PAYLOAD};

/// Data that a new process needs to start a command.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Launch {
    pub(crate) request: ExecRequest,
    /// Path of the terminal in the workload's view, if the command has one.
    pub(crate) terminal: Option<String>,
}

/// Failure to start a command: an exit status and a sentence.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LaunchError {
    pub(crate) status: u8,
    pub(crate) message: String,
}

impl LaunchError {
    /// A failure of the agent, or an invalid request (125).
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self {
            status: 125,
            message: message.into(),
        }
    }

    /// The program exists but cannot be executed (126).
    pub(crate) fn denied(message: impl Into<String>) -> Self {
        Self {
            status: 126,
            message: message.into(),
        }
    }

    /// The program does not exist (127).
    pub(crate) fn absent(message: impl Into<String>) -> Self {
        Self {
            status: 127,
            message: message.into(),
        }
    }
}

/// Reads a launch that the agent wrote to a memory file.
pub(crate) fn read_launch(memory: OwnedFd) -> io::Result<Launch> {
    let mut bytes = Vec::new();
    let mut file = File::from(memory);
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Returns the maximum payload of a frame from a client.
fn frame_limit(kind: FrameType) -> usize {
    match kind {
        // A request may contain files.
        FrameType::Request => MAX_PAYLOAD,
        FrameType::Stdin => 1 << 20,
        FrameType::Control => 1 << 16,
        // Other frames are small, refused or ignored.
        _ => 4096,
    }
}
