//! The binary of the guest agent.

use std::borrow::Cow;
use std::path::PathBuf;

use sm_snapshot::state_file::hex_digest;

use crate::Error;

/// The agent embedded at build time (see `build.rs`), and its SHA-256.
#[cfg(sm_embedded_agent)]
const EMBEDDED: Option<(&[u8], &str)> = Some((
    include_bytes!(env!("SM_EMBEDDED_AGENT")),
    env!("SM_EMBEDDED_AGENT_SHA256"),
));
#[cfg(not(sm_embedded_agent))]
const EMBEDDED: Option<(&[u8], &str)> = None;

const NAME: &str = "sm-guest-agent";

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

/// Reads the agent: `$SM_AGENT`, else the one embedded in this program, else
/// `sm-guest-agent` next to it or in `../libexec/sm/`.
pub(crate) fn read() -> Result<Agent, Error> {
    let explicit = std::env::var_os("SM_AGENT")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from);
    if explicit.is_none()
        && let Some((bytes, digest)) = EMBEDDED
    {
        return Ok(Agent {
            bytes: Cow::Borrowed(bytes),
            digest: Some(digest),
        });
    }
    let path = match explicit {
        Some(path) => path,
        None => beside_the_program().ok_or_else(|| {
            Error::Option(format!(
                "no guest agent found: set SM_AGENT to the {NAME} binary, or build with \
                 \"cargo xtask build\", which embeds it"
            ))
        })?,
    };
    let bytes = std::fs::read(&path).map_err(|source| Error::File {
        operation: "read the guest agent",
        path: path.clone(),
        source,
    })?;
    if !bytes.starts_with(b"\x7fELF") {
        return Err(Error::Option(format!(
            "{path:?} is not a guest agent: it is no ELF binary"
        )));
    }
    Ok(bytes.into())
}

/// Describes the agent for `sm doctor`: its origin and size.
pub(crate) fn describe() -> Result<String, Error> {
    let agent = read()?;
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
