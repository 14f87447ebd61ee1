//! Credentials of the peer of a unix socket.

use std::io;
use std::os::fd::AsFd;

use rustix::net::sockopt::socket_peercred;

/// Returns true if the peer of a unix socket has the same user ID as this process, or is
/// root. This protects a socket whose directory has too wide permissions by mistake.
///
/// # Errors
/// `socket` is not a connected unix socket.
pub fn is_trusted_peer(socket: impl AsFd) -> io::Result<bool> {
    let peer = socket_peercred(socket)?.uid;
    let trusted = peer == rustix::process::geteuid() || peer.is_root();
    if !trusted {
        tracing::debug!(uid = peer.as_raw(), "a peer is of another user");
    }
    Ok(trusted)
}
