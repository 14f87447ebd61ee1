//! Where the guest agent's binary comes from.

use std::borrow::Cow;
use std::path::PathBuf;

use crate::Error;

/// Set at build time to the agent to embed; see `build.rs`.
#[cfg(sm_embedded_agent)]
const EMBEDDED: Option<&[u8]> = Some(include_bytes!(env!("SM_EMBEDDED_AGENT")));
#[cfg(not(sm_embedded_agent))]
const EMBEDDED: Option<&[u8]> = None;

const NAME: &str = "sm-guest-agent";

/// The agent's binary: `$SM_AGENT`, else the one built into this program, else
/// `sm-guest-agent` next to it or in `../libexec/sm/`.
pub(crate) fn read() -> Result<Cow<'static, [u8]>, Error> {
    let explicit = std::env::var_os("SM_AGENT")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from);
    if explicit.is_none()
        && let Some(bytes) = EMBEDDED
    {
        return Ok(Cow::Borrowed(bytes));
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
    Ok(Cow::Owned(bytes))
}

/// Whether there is an agent, for `sm doctor`; how it is found, in words.
pub(crate) fn describe() -> Result<String, Error> {
    let bytes = read()?;
    let origin = match bytes {
        Cow::Borrowed(_) => "built in",
        Cow::Owned(_) => "a file",
    };
    Ok(format!("{origin}, {} KiB", bytes.len() / 1024))
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
