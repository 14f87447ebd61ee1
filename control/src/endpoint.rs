//! The socket and the name of a VM.

use std::path::PathBuf;

/// A socket of a VM, and the name by which messages call that VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Path of the unix socket.
    pub socket: PathBuf,
    /// Name of the VM.
    pub name: String,
}

impl Endpoint {
    /// The socket at `socket`, of the VM called `name`.
    pub fn new(socket: impl Into<PathBuf>, name: impl Into<String>) -> Self {
        Self {
            socket: socket.into(),
            name: name.into(),
        }
    }
}
