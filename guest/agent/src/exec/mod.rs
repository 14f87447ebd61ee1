//! Exec: one command per connection.
//!
//! [`session`] is the agent's side of a running command, [`stdio`] makes the
//! descriptors between the two, [`child`] is the code that runs in the new
//! process, and [`lookup`] finds its program.

pub(crate) mod child;
mod input;
pub(crate) mod lookup;
pub(crate) mod session;
pub(crate) mod stdio;

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use sm_guest_proto::exec::ExecRequest;
use sm_guest_proto::frame::{FrameType, MAX_PAYLOAD};

/// A command to start, as the new process gets it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Launch {
    pub(crate) request: ExecRequest,
    /// Path of the terminal in the workload's view, when there is one.
    pub(crate) terminal: Option<String>,
}

/// Why a command did not start: an exit status and a sentence.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LaunchError {
    pub(crate) status: u8,
    pub(crate) message: String,
}

impl LaunchError {
    /// The agent's own failure, or a request that makes no sense (125).
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self {
            status: 125,
            message: message.into(),
        }
    }

    /// It exists but cannot be used (126).
    pub(crate) fn denied(message: impl Into<String>) -> Self {
        Self {
            status: 126,
            message: message.into(),
        }
    }

    /// It does not exist (127).
    pub(crate) fn absent(message: impl Into<String>) -> Self {
        Self {
            status: 127,
            message: message.into(),
        }
    }
}

/// Reads a launch written by the agent into a memory file.
pub(crate) fn read_launch(memory: OwnedFd) -> io::Result<Launch> {
    let mut bytes = Vec::new();
    let mut file = File::from(memory);
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Bytes taken of one frame of a client.
fn frame_limit(kind: FrameType) -> usize {
    match kind {
        // It may bring files along.
        FrameType::Request => MAX_PAYLOAD,
        FrameType::Stdin => 1 << 20,
        FrameType::Control => 1 << 16,
        // They are small, or refused or ignored whatever they hold.
        _ => 4096,
    }
}
