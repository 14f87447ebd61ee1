//! Packets as the guest sees them.

use super::{GUEST, HEADER, HOST};
use crate::packet::Header;

/// Requests a connection.
pub const REQUEST: u16 = 1;
/// Accepts a connection.
pub const RESPONSE: u16 = 2;
/// Refuses or ends a connection.
pub const RST: u16 = 3;
/// Ends one direction, or both.
pub const SHUTDOWN: u16 = 4;
/// Data.
pub const RW: u16 = 5;
/// Grants credit.
pub const CREDIT_UPDATE: u16 = 6;

/// A packet as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// 1 for streams, 2 for messages.
    pub kind: u16,
    /// Operation.
    pub op: u16,
    /// Flags of a SHUTDOWN: 1 no more received, 2 no more sent.
    pub flags: u32,
    /// Window of the sender for data.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken so far.
    pub fwd_cnt: u32,
    /// Length field of the header, if it differs from the payload's length.
    pub len: Option<u32>,
    /// Data.
    pub payload: Vec<u8>,
}

impl Packet {
    /// Creates a packet of the guest with 64 KiB of window and no data.
    #[must_use]
    pub fn from_guest(src_port: u32, dst_port: u32, op: u16) -> Self {
        Self {
            src_cid: GUEST,
            dst_cid: HOST,
            src_port,
            dst_port,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 1 << 16,
            fwd_cnt: 0,
            len: None,
            payload: Vec::new(),
        }
    }

    /// Creates an answer to this packet.
    #[must_use]
    pub fn reply(&self, op: u16) -> Self {
        Self::from_guest(self.dst_port, self.src_port, op)
    }

    /// Returns its header, with a length of data that need not be true.
    #[must_use]
    pub fn header(&self, len: u32) -> [u8; HEADER] {
        let header = Header {
            src_cid: self.src_cid,
            dst_cid: self.dst_cid,
            src_port: self.src_port,
            dst_port: self.dst_port,
            len,
            kind: self.kind,
            op: self.op,
            flags: self.flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        };
        header.encode()
    }

    /// Decodes the header of a packet, with the length that it claims.
    pub(super) fn read(bytes: &[u8; HEADER]) -> Self {
        let header = Header::decode(bytes);
        Self {
            src_cid: header.src_cid,
            dst_cid: header.dst_cid,
            src_port: header.src_port,
            dst_port: header.dst_port,
            kind: header.kind,
            op: header.op,
            flags: header.flags,
            buf_alloc: header.buf_alloc,
            fwd_cnt: header.fwd_cnt,
            len: Some(header.len),
            payload: Vec::new(),
        }
    }

    /// Decodes the packet in a receive buffer.
    ///
    /// # Panics
    /// If it is malformed.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Self {
        let (header, payload) = bytes.split_first_chunk().unwrap();
        let mut packet = Self::read(header);
        packet.payload = payload.to_vec();
        let len = packet.len.take();
        assert_eq!(len, Some(packet.payload.len() as u32), "length field");
        packet
    }
}
