//! The peer of an accepted connection.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use sm_guest_proto::port::HOST_CID;

use crate::sys;

/// The other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// A vsock socket in the context `cid`.
    Vsock { cid: u32 },
    /// A unix socket: the listener is one, which a guest has none of.
    Local,
    /// Anything else.
    Unknown,
}

impl Peer {
    /// The peer that a socket address names, in the kernel's layout.
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

    /// Returns true if this peer is served. Only the host may give orders: a process of the
    /// guest reaches the same ports through vsock's loopback, and needs no privilege
    /// to connect.
    pub(crate) fn is_served(self) -> bool {
        match self {
            Self::Vsock { cid } => cid == HOST_CID,
            Self::Local => true,
            Self::Unknown => false,
        }
    }
}

/// Takes a connection that waits at `listener`.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Peer)> {
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
        // The hypervisor, loopback, this guest, another guest, any.
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

    /// The layout is the kernel's, not only this test's.
    #[test]
    fn a_vsock_address_has_its_cid_where_it_is_looked_for() {
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
