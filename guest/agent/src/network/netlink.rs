//! Requests to rtnetlink(7): a batch of them is one system call, and one or two for the
//! answers, which exist when it returns.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, connect, recv,
    send, socket_with, sockopt,
};

use crate::sys;

/// Protocol of the sockets: `NETLINK_ROUTE`, which is 0.
const ROUTE: Option<Protocol> = None;

/// Length of a message's header (`struct nlmsghdr`).
const HEADER: usize = 16;
/// Maximum number of bytes of one answer: the kernel creates parts of lists of at most 8 KiB
/// (`NLMSG_GOODSIZE`), if the reader has no more space. A clone copies each page that is
/// written, so more would be slower.
const ANSWER: usize = 8 << 10;
/// Size of the receive buffer: the answers to a batch in which everything fails, and a part of
/// a list. The default is a setting that a workload may have changed.
const RECEIVE_BUFFER: usize = 256 << 10;

/// Flags of messages (`NLM_F_*`).
pub(super) const CREATE: u16 = 0x400;
pub(super) const REPLACE: u16 = 0x100;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const DUMP: u16 = 0x300;

/// Group of notifications of interfaces (`RTMGRP_LINK`).
const LINK_GROUP: u32 = 1;

/// Types of messages of netlink itself (`NLMSG_*`).
const ERROR: u16 = 2;
const DONE: u16 = 3;

const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
/// Attributes of addresses.
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// Requests that the kernel performs in order, each of them even if others fail.
#[derive(Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// Offset of the last message.
    last: usize,
    count: u32,
}

impl Batch {
    /// Adds a message; they are numbered from 0.
    pub(super) fn add(&mut self, kind: u16, flags: u16, fixed: &[u8], attributes: &[u8]) {
        self.last = self.bytes.len();
        self.count += 1;
        let length = HEADER + fixed.len() + attributes.len();
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags | REQUEST).to_ne_bytes());
        self.bytes.extend(self.count.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend(fixed);
        self.bytes.extend(attributes);
    }

    /// Requests an answer to the last message, after which there are no others. The kernel
    /// answers the rest only if they fail.
    fn end(&mut self) {
        if let Some([low, high]) = self.bytes.get_mut(self.last + 6..self.last + 8) {
            let flags = u16::from_ne_bytes([*low, *high]) | ACKNOWLEDGE;
            [*low, *high] = flags.to_ne_bytes();
        }
    }
}

/// Attributes of a message.
#[derive(Default)]
pub(super) struct Attributes(pub(super) Vec<u8>);

impl Attributes {
    /// Adds an attribute of at most 64 KiB.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Assigned {
    pub(super) address: IpAddr,
    pub(super) prefix: u8,
}

/// A socket to the kernel.
pub(super) struct NetlinkSocket {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl NetlinkSocket {
    /// Opens a socket in this process's network namespace. Messages of other processes do not
    /// reach it.
    pub(super) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let family = AddressFamily::NETLINK;
        let socket = socket_with(family, SocketType::RAW, flags, ROUTE)?;
        sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER)?;
        sys::check_netlink_strictly(socket.as_fd())?;
        connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self {
            socket,
            buffer: vec![0; ANSWER],
        })
    }

    /// Performs the requests of `batch`. Returns the numbers of those that failed.
    pub(super) fn perform(&mut self, mut batch: Batch) -> io::Result<Vec<(u32, Errno)>> {
        if batch.count == 0 {
            return Ok(Vec::new());
        }
        batch.end();
        send(&self.socket, &batch.bytes, SendFlags::empty())?;
        let mut failed = Vec::new();
        loop {
            for message in messages(self.receive()?) {
                let (ERROR, Some(code)) = (message.kind, message.code()) else {
                    continue;
                };
                if code != 0 {
                    let error = Errno::from_raw_os_error(code.saturating_neg());
                    failed.push((message.sequence.wrapping_sub(1), error));
                }
                if message.sequence == batch.count {
                    return Ok(failed);
                }
            }
        }
    }

    /// Returns the addresses of an interface, of both families; `None` if there are more than
    /// `maximum`. The rest of the list is unread then, so that the socket is of no further use.
    pub(super) fn addresses(
        &mut self,
        index: u32,
        maximum: usize,
    ) -> io::Result<Option<Vec<Assigned>>> {
        let mut batch = Batch::default();
        batch.add(
            RTM_GETADDR,
            DUMP,
            &interface_address(0, 0, 0, 0, index),
            &[],
        );
        send(&self.socket, &batch.bytes, SendFlags::empty())?;
        let mut found = Vec::new();
        loop {
            for message in messages(self.receive()?) {
                match message.kind {
                    RTM_NEWADDR => found.extend(assigned(message.payload, index)),
                    DONE | ERROR => match message.code() {
                        Some(code) if code < 0 => {
                            return Err(Errno::from_raw_os_error(code.saturating_neg()).into());
                        }
                        _ => return Ok(Some(found)),
                    },
                    _ => {}
                }
                if found.len() > maximum {
                    return Ok(None);
                }
            }
        }
    }

    /// Receives an answer, which exists already: the kernel works within the system call that
    /// sends the request.
    fn receive(&mut self) -> io::Result<&[u8]> {
        let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
        let (_, length) = recv(&self.socket, self.buffer.as_mut_slice(), flags)?;
        let answer = self
            .buffer
            .get(..length)
            .filter(|answer| !answer.is_empty());
        answer.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// Notifications of changes of interfaces.
pub(super) struct LinkEvents(OwnedFd);

impl LinkEvents {
    pub(super) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, ROUTE)?;
        bind(&socket, &SocketAddrNetlink::new(0, LINK_GROUP))?;
        Ok(Self(socket))
    }

    /// Waits until `holds` returns true, and checks it at each notification since the socket
    /// was opened. Returns false if that did not happen within `timeout`.
    pub(super) fn wait(&self, holds: impl Fn() -> bool, timeout: Duration) -> io::Result<bool> {
        let until = Instant::now() + timeout;
        while !holds() {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Ok(holds()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            // An error of the socket (lost notifications) is read, too.
            let _ = recv(&self.0, &mut [0; 16], RecvFlags::DONTWAIT);
        }
        Ok(true)
    }
}

/// Returns a `struct ifaddrmsg`.
pub(super) fn interface_address(
    family: u8,
    prefix: u8,
    flags: u8,
    scope: u8,
    index: u32,
) -> [u8; 8] {
    let [a, b, c, d] = index.to_ne_bytes();
    [family, prefix, flags, scope, a, b, c, d]
}

/// A message of the kernel.
struct Answer<'a> {
    kind: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Answer<'_> {
    /// Returns the code of an ERROR or DONE: 0, or a negative error number.
    fn code(&self) -> Option<i32> {
        Some(i32::from_ne_bytes(*self.payload.first_chunk()?))
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?);
        let length = usize::try_from(length).ok()?;
        let (header, payload) = bytes.get(..length)?.split_at_checked(HEADER)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Answer {
            kind: u16::from_ne_bytes(*header.get(4..)?.first_chunk()?),
            sequence: u32::from_ne_bytes(*header.get(8..)?.first_chunk()?),
            payload,
        })
    })
}

fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let (header, value) = bytes.get(..length)?.split_at_checked(4)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes(*header.get(2..)?.first_chunk()?), value))
    })
}

/// Parses an address, if it is one of the interface `index`: kernels before 4.20 list those of
/// all interfaces.
fn assigned(payload: &[u8], index: u32) -> Option<Assigned> {
    let (header, rest) = payload.split_first_chunk::<8>()?;
    let [_, prefix, _, _, of @ ..] = *header;
    if u32::from_ne_bytes(of) != index {
        return None;
    }
    let of_kind = |wanted| attributes(rest).find(|(kind, _)| *kind == wanted);
    // The peer's address of a point-to-point interface is in IFA_ADDRESS.
    let (_, value) = of_kind(IFA_LOCAL).or_else(|| of_kind(IFA_ADDRESS))?;
    let address = match value.len() {
        4 => IpAddr::from(*value.first_chunk::<4>()?),
        _ => IpAddr::from(*value.first_chunk::<16>()?),
    };
    Some(Assigned { address, prefix })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_messages_of_which_the_last_is_answered() {
        let mut batch = Batch::default();
        let attributes = Attributes::default().with(3, b"eth0\0");
        batch.add(16, 0, &[1; 16], &attributes.0);
        batch.add(20, CREATE, &[2; 8], &[]);
        batch.end();
        #[rustfmt::skip]
        let mut expected: Vec<u8> = [
            &44u32.to_ne_bytes()[..], &16u16.to_ne_bytes(), &1u16.to_ne_bytes(),
            &1u32.to_ne_bytes(), &[0; 4], &[1; 16],
            // The attribute is padded, which its length does not include.
            &9u16.to_ne_bytes(), &3u16.to_ne_bytes(), b"eth0\0\0\0\0",
        ]
        .concat();
        #[rustfmt::skip]
        expected.extend([
            &24u32.to_ne_bytes()[..], &20u16.to_ne_bytes(), &(CREATE | 5).to_ne_bytes(),
            &2u32.to_ne_bytes(), &[0; 4], &[2; 8],
        ]
        .concat());
        assert_eq!(batch.bytes, expected);
    }

    /// An answer with an address of interface 7.
    fn address_of_7() -> Vec<u8> {
        let attributes = Attributes::default()
            .with(IFA_ADDRESS, &[10, 0, 0, 9])
            .with(IFA_LOCAL, &[10, 0, 0, 1]);
        let mut batch = Batch::default();
        let fixed = interface_address(2, 24, 0, 0, 7);
        batch.add(RTM_NEWADDR, 0, &fixed, &attributes.0);
        batch.bytes
    }

    #[test]
    fn addresses_are_those_of_the_interface() {
        let bytes = address_of_7();
        let message = messages(&bytes).next().unwrap();
        assert_eq!(message.kind, RTM_NEWADDR);
        let expected = Assigned {
            address: "10.0.0.1".parse().unwrap(),
            prefix: 24,
        };
        assert_eq!(assigned(message.payload, 7), Some(expected));
        assert_eq!(assigned(message.payload, 8), None);
    }

    #[test]
    fn truncated_answers_end_the_list() {
        let bytes = [address_of_7(), address_of_7()].concat();
        assert_eq!(messages(&bytes).count(), 2);
        for length in 0..bytes.len() {
            let complete = length / (bytes.len() / 2);
            let cut = bytes.get(..length).unwrap();
            assert_eq!(messages(cut).count(), complete);
        }
        // A length of 0 does not repeat the message for ever.
        assert_eq!(messages(&[0; 64]).count(), 0);
        let payload = messages(&bytes).next().unwrap().payload;
        for length in 0..payload.len() {
            let _ = assigned(payload.get(..length).unwrap(), 7);
        }
    }
}
