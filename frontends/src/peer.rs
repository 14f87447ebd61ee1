//! Who is at the other end of a unix socket.

use std::io;
use std::os::fd::AsFd;

use rustix::net::sockopt::socket_peercred;

/// Whether the peer of a unix socket is of the same user as this process, or root:
/// what a directory that was opened up by mistake does not ensure.
///
/// # Errors
/// It is not a connected unix socket.
pub fn is_trusted_peer(socket: impl AsFd) -> io::Result<bool> {
    let peer = socket_peercred(socket)?.uid;
    let trusted = peer == rustix::process::geteuid() || peer.is_root();
    if !trusted {
        tracing::debug!(uid = peer.as_raw(), "a peer is of another user");
    }
    Ok(trusted)
}
