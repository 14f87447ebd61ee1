//! Host sockets of flows.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType, acceptfrom_with, bind,
    connect, getsockname, listen, sendmsg, socket_with, socketpair, sockopt,
};

use crate::wire::IcmpUnreachable;

/// Clients that wait to be accepted.
const BACKLOG: i32 = 128;
/// Sizes of packets that every network passes (RFC 8200 5, RFC 1191 3).
const MIN_MTU_V6: u16 = 1280;
const MIN_MTU_V4: u16 = 68;

/// Meaning of a socket's error for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The peer has no such port, or has reset the connection.
    Refused,
    /// The guest is notified of this.
    Unreachable(IcmpUnreachable),
    /// The host lacks something that it may have later.
    Resources,
}

impl Failure {
    pub(crate) fn of(error: Errno) -> Self {
        match error {
            Errno::CONNREFUSED | Errno::CONNRESET | Errno::CONNABORTED => Self::Refused,
            Errno::NETUNREACH | Errno::NETDOWN | Errno::AFNOSUPPORT => {
                Self::Unreachable(IcmpUnreachable::Network)
            }
            Errno::ACCESS | Errno::PERM => Self::Unreachable(IcmpUnreachable::Prohibited),
            Errno::MFILE
            | Errno::NFILE
            | Errno::NOBUFS
            | Errno::NOMEM
            | Errno::AGAIN
            | Errno::NOSPC => Self::Resources,
            _ => Self::Unreachable(IcmpUnreachable::Host),
        }
    }

    /// The same for an error of another part of the program.
    pub(crate) fn of_io(error: &io::Error) -> Self {
        Errno::from_io_error(error).map_or(Self::Resources, Self::of)
    }
}

fn family(address: SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

fn open(address: SocketAddr, kind: SocketType) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(family(address), kind, flags, None)
}

/// Starts to connect a TCP socket. It becomes writable when it is connected.
pub(crate) fn connect_stream(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = open(address, SocketType::STREAM)?;
    // The guest has decided about the size of its segments; waiting costs 40 ms.
    sockopt::set_tcp_nodelay(&socket, true)?;
    // Urgent data is data (RFC 6093).
    sockopt::set_socket_oobinline(&socket, true)?;
    match connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// Opens a UDP socket for one peer.
pub(crate) fn connect_datagram(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let socket = open(address, SocketType::DGRAM)?;
    connect(&socket, &address)?;
    Ok(socket)
}

/// Opens a socket for clients of a port of the host.
pub(crate) fn bind_port(address: SocketAddr, kind: SocketType) -> Result<OwnedFd, Errno> {
    let socket = open(address, kind)?;
    if address.is_ipv6() {
        // The same port of IPv4 is another one.
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if kind == SocketType::STREAM {
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &address)?;
    if kind == SocketType::STREAM {
        listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}

/// Creates a pair of stream sockets.
pub(crate) fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Returns the address of a socket.
pub(crate) fn local_address(socket: &OwnedFd) -> Result<SocketAddr, Errno> {
    SocketAddr::try_from(getsockname(socket)?)
}

/// Accepts a client; returns its socket and its address.
pub(crate) fn accept(listener: &OwnedFd) -> Result<(OwnedFd, SocketAddr), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (socket, address) = acceptfrom_with(listener, flags)?;
    let address = address.ok_or(Errno::CONNABORTED)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_oobinline(&socket, true)?;
    Ok((socket, SocketAddr::try_from(address)?))
}

/// Has a UDP socket refuse datagrams that are larger than packets on the way may be, or send them
/// in fragments.
pub(crate) fn set_dont_fragment(socket: &OwnedFd, v6: bool, dont: bool) {
    // A socket of the other family has no such option, and fragments datagrams.
    let _ = match (v6, dont) {
        (false, true) => sockopt::set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::DO),
        (false, false) => sockopt::set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::WANT),
        (true, true) => sockopt::set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::DO),
        (true, false) => sockopt::set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::WANT),
    };
}

/// Returns the size of the largest packet on the way to the peer of a socket, as far as the host
/// knows, and at most `most`.
pub(crate) fn path_mtu(socket: &OwnedFd, v6: bool, most: u16) -> u16 {
    let (known, least) = match v6 {
        true => (sockopt::ipv6_mtu(socket), MIN_MTU_V6),
        false => (sockopt::ip_mtu(socket), MIN_MTU_V4),
    };
    let known = known.ok().and_then(|mtu| u16::try_from(mtu).ok());
    known.unwrap_or(most).max(least).min(most)
}

/// Sends bytes to a stream, as many as it accepts.
pub(crate) fn send(socket: BorrowedFd<'_>, bytes: &[IoSlice<'_>]) -> Result<usize, Errno> {
    rustix::io::retry_on_intr(|| {
        let mut control = SendAncillaryBuffer::default();
        sendmsg(socket, bytes, &mut control, SendFlags::NOSIGNAL)
    })
}

/// Takes the error of a socket.
pub(crate) fn take_error(socket: &OwnedFd) -> Result<(), Errno> {
    sockopt::socket_error(socket.as_fd())?
}
