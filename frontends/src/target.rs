//! Targets of connections in the guest.

use sm_devices_vsock::ConnectOptions;
use sm_guest_proto::forward::ForwardHeader;
use sm_guest_proto::port;

/// The target of a frontend's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForwardTarget {
    /// The agent's exec server: the client speaks the exec protocol itself.
    Exec,
    /// A TCP port in the guest, through the agent's forwarder.
    Tcp(ForwardHeader),
    /// A vsock port in the guest.
    Vsock(u32),
}

impl ForwardTarget {
    pub(crate) fn frontend(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Tcp(_) | Self::Vsock(_) => "unix",
        }
    }

    /// Returns the vsock port and the options, including the bytes to send first.
    pub(crate) fn connect_arguments(self) -> (u32, ConnectOptions) {
        match self {
            Self::Exec => (port::EXEC, ConnectOptions::default()),
            Self::Vsock(port) => (port, ConnectOptions::default()),
            Self::Tcp(header) => (
                port::FORWARD,
                ConnectOptions::default()
                    .preamble(header.encode().to_vec())
                    .status_reply(true)
                    .wait(header.wait()),
            ),
        }
    }
}
