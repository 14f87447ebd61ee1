//! Address of a VM's socket.

use std::path::PathBuf;

/// A socket of a VM, and the VM's name for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Path of the unix socket.
    pub socket: PathBuf,
    /// Name of the VM.
    pub name: String,
}

impl Endpoint {
    /// Creates an endpoint from the path of a socket and the name of its VM.
    pub fn new(socket: impl Into<PathBuf>, name: impl Into<String>) -> Self {
        Self {
            socket: socket.into(),
            name: name.into(),
        }
    }
}
