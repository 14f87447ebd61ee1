//! The binary of the guest agent.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use sm_snapshot::state_file::hex_digest;
use thiserror::Error;

/// The agent embedded at build time (see `build.rs`), and its SHA-256.
#[cfg(sm_embedded_agent)]
const EMBEDDED: Option<(&[u8], &str)> = Some((
    include_bytes!(env!("SM_EMBEDDED_AGENT")),
    env!("SM_EMBEDDED_AGENT_SHA256"),
));
#[cfg(not(sm_embedded_agent))]
const EMBEDDED: Option<(&[u8], &str)> = None;

const NAME: &str = "sm-guest-agent";
/// Variable with the agent's binary.
pub(crate) const VARIABLE: &str = "SM_AGENT";

/// An error of finding the guest agent.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AgentError {
    /// None is named, inside this program, or beside it.
    #[error("no guest agent found")]
    None,
    /// The file is no program.
    #[error("{path:?} is not a guest agent: it is no ELF binary")]
    NotElf {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("cannot read the guest agent {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The agent's binary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Agent {
    bytes: Cow<'static, [u8]>,
    /// SHA-256 in hexadecimal, if it is known without hashing.
    digest: Option<&'static str>,
}

impl Agent {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the SHA-256 in hexadecimal.
    pub(crate) fn digest(&self) -> String {
        self.digest
            .map_or_else(|| hex_digest(&self.bytes), str::to_owned)
    }
}

impl From<Vec<u8>> for Agent {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Cow::Owned(bytes),
            digest: None,
        }
    }
}

/// Reads the agent: `explicit`, else the one embedded in this program, else
/// `sm-guest-agent` beside the program or in `../libexec/sm`.
///
/// # Errors
/// There is none, or it cannot be read.
pub(crate) fn read(explicit: Option<&Path>) -> Result<Agent, AgentError> {
    if explicit.is_none()
        && let Some((bytes, digest)) = EMBEDDED
    {
        return Ok(Agent {
            bytes: Cow::Borrowed(bytes),
            digest: Some(digest),
        });
    }
    let path = match explicit {
        Some(path) => path.to_owned(),
        None => beside_the_program().ok_or(AgentError::None)?,
    };
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(source) => return Err(AgentError::Read { path, source }),
    };
    if !bytes.starts_with(b"\x7fELF") {
        return Err(AgentError::NotElf { path });
    }
    Ok(bytes.into())
}

/// Describes the agent for `sm doctor`: its origin and size.
pub(crate) fn describe(explicit: Option<&Path>) -> Result<String, AgentError> {
    let agent = read(explicit)?;
    let origin = match agent.digest {
        Some(_) => "built in",
        None => "a file",
    };
    Ok(format!("{origin}, {} KiB", agent.bytes.len() / 1024))
}

fn beside_the_program() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let directory = program.parent()?;
    [
        directory.join(NAME),
        directory.join("../libexec/sm").join(NAME),
    ]
    .into_iter()
    .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_that_of_the_binary() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(Agent::from(b"abc".to_vec()).digest(), abc);
        if let Some((bytes, digest)) = EMBEDDED {
            assert_eq!(digest, hex_digest(bytes));
        }
    }
}
