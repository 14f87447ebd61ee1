//! The peer of an accepted connection.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use sm_guest_proto::port::HOST_CID;

use crate::sys;

/// The peer of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    /// A vsock socket in the context `cid`.
    Vsock { cid: u32 },
    /// A unix socket. The listener is one only in tests, never in a guest.
    Local,
    /// Any other address.
    Unknown,
}

impl Peer {
    /// Parses a socket address in the kernel's layout.
    fn parse(address: &[u8]) -> Self {
        let Some(family) = address.first_chunk::<2>() else {
            return Self::Unknown;
        };
        match libc::c_int::from(u16::from_ne_bytes(*family)) {
            // sockaddr_vm: family, two reserved bytes, port, CID.
            libc::AF_VSOCK => match address.get(8..).and_then(<[u8]>::first_chunk) {
                Some(cid) => Self::Vsock {
                    cid: u32::from_ne_bytes(*cid),
                },
                None => Self::Unknown,
            },
            libc::AF_UNIX => Self::Local,
            _ => Self::Unknown,
        }
    }

    /// Returns true if this peer is served. Only the host may send requests: processes of
    /// the guest can reach the same ports through vsock's loopback, without privileges.
    fn is_served(self) -> bool {
        match self {
            Self::Vsock { cid } => cid == HOST_CID,
            Self::Local => true,
            Self::Unknown => false,
        }
    }
}

/// Maximum number of connections from peers that are not served that one event closes.
const STRANGERS: usize = 64;

/// Accepts a pending connection of a peer that is served, and closes those of other peers
/// before it. `None` if there were so many of those that the caller should serve others
/// first; the listener is still readable then.
///
/// # Errors
/// As accept(2), `WouldBlock` if no connection is pending.
pub(crate) fn accept_served(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    first_served(|| accept(listener))
}

fn first_served<S>(mut accept: impl FnMut() -> io::Result<(S, Peer)>) -> io::Result<Option<S>> {
    for _ in 0..STRANGERS {
        let (socket, peer) = accept()?;
        if peer.is_served() {
            return Ok(Some(socket));
        }
    }
    Ok(None)
}

/// Accepts a connection that is pending at `listener`.
fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Peer)> {
    let mut address = [0; 128];
    let (socket, len) = sys::accept(listener, &mut address)?;
    Ok((
        socket,
        Peer::parse(address.get(..len).unwrap_or(&address[..0])),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;
    use std::os::unix::net::{UnixListener, UnixStream};

    fn vsock(cid: u32) -> Vec<u8> {
        let family = u16::try_from(libc::AF_VSOCK).unwrap().to_ne_bytes();
        let port = 1028u32.to_ne_bytes();
        [&family[..], &[0, 0], &port, &cid.to_ne_bytes(), &[0; 4]].concat()
    }

    #[test]
    fn only_the_host_is_served_over_vsock() {
        assert!(Peer::parse(&vsock(2)).is_served());
        // The hypervisor, loopback, this guest, another guest, and the wildcard.
        for cid in [0, 1, 3, 4, u32::MAX] {
            assert_eq!(Peer::parse(&vsock(cid)), Peer::Vsock { cid });
            assert!(!Peer::parse(&vsock(cid)).is_served(), "{cid}");
        }
        for short in 0..12 {
            assert!(!Peer::parse(&vsock(2)[..short]).is_served(), "{short}");
        }
        let internet = u16::try_from(libc::AF_INET).unwrap().to_ne_bytes();
        assert!(!Peer::parse(&[&internet[..], &[0; 14]].concat()).is_served());
    }

    #[test]
    fn strangers_are_closed_and_the_host_is_served() {
        let stranger = Peer::Vsock { cid: 1 };
        let host = Peer::Vsock { cid: HOST_CID };
        let run = |peers: &[Peer]| {
            let mut waiting = peers.iter().zip(0usize..);
            let first = first_served(|| {
                let next = waiting.next().ok_or(io::ErrorKind::WouldBlock)?;
                Ok((next.1, *next.0))
            });
            (first.map_err(|error| error.kind()), waiting.count())
        };
        assert_eq!(run(&[host, host]), (Ok(Some(0)), 1));
        assert_eq!(run(&[stranger, Peer::Unknown, host]), (Ok(Some(2)), 0));
        assert_eq!(run(&[stranger; 3]), (Err(io::ErrorKind::WouldBlock), 0));
        // An unlimited number of them would keep the agent from its other work.
        let mut many = vec![stranger; STRANGERS + 1];
        many.push(host);
        assert_eq!(run(&many), (Ok(None), 2));
    }

    /// The sockets of strangers are closed.
    #[test]
    fn the_socket_of_a_stranger_is_closed() {
        use std::io::Read as _;
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let mut ours = Some(ours);
        let served = first_served(|| {
            let ours = ours.take().ok_or(io::ErrorKind::WouldBlock)?;
            Ok((OwnedFd::from(ours), Peer::Unknown))
        });
        assert_eq!(served.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }

    /// The offsets are those of the kernel's structure.
    #[test]
    fn the_offset_of_a_vsock_cid_matches_the_kernel() {
        assert_eq!(std::mem::offset_of!(libc::sockaddr_vm, svm_family), 0);
        assert_eq!(std::mem::offset_of!(libc::sockaddr_vm, svm_cid), 8);
    }

    #[test]
    fn a_unix_socket_is_local() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        let (socket, peer) = accept(listener.as_fd()).unwrap();
        assert_eq!(peer, Peer::Local);
        assert!(rustix::io::fcntl_getfd(&socket).unwrap().bits() != 0);
    }
}
