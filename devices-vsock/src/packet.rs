//! Packet headers (virtio 1.3 section 5.10.6).

/// Length of a header in bytes.
pub(crate) const HEADER_LEN: u32 = 44;
/// Context identifier of the host.
pub(crate) const HOST_CID: u64 = 2;
/// A stream of bytes.
pub(crate) const TYPE_STREAM: u16 = 1;
/// A sequence of messages.
pub(crate) const TYPE_SEQPACKET: u16 = 2;
/// RW of a sequence of messages: end of a message.
pub(crate) const END_OF_MESSAGE: u32 = 1;
/// SHUTDOWN: the sender will receive no more.
pub(crate) const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN: the sender will send no more.
pub(crate) const SHUTDOWN_SEND: u32 = 2;

/// Operation of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Operation {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Operation {
    fn from_raw(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A header, in the host's byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) src_cid: u64,
    pub(crate) dst_cid: u64,
    pub(crate) src_port: u32,
    pub(crate) dst_port: u32,
    pub(crate) len: u32,
    pub(crate) kind: u16,
    pub(crate) op: u16,
    pub(crate) flags: u32,
    pub(crate) buf_alloc: u32,
    pub(crate) fwd_cnt: u32,
}

impl Header {
    pub(crate) fn operation(&self) -> Option<Operation> {
        Operation::from_raw(self.op)
    }

    pub(crate) fn encode(&self) -> [u8; HEADER_LEN as usize] {
        let mut bytes = [0; HEADER_LEN as usize];
        let mut rest = bytes.as_mut_slice();
        let mut put = |field: &[u8]| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(field.len());
            now.copy_from_slice(field);
            rest = later;
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; HEADER_LEN as usize]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }
}

/// Takes the first field; zero past the end, which does not occur: the fields add up to the
/// header's length.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((field, later)) => {
            *rest = later;
            *field
        }
        None => [0; N],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_round_trip(cids in any::<(u64, u64)>(), ports in any::<(u32, u32)>(), rest in any::<(u32, u16, u16, u32, u32, u32)>()) {
            let header = Header {
                src_cid: cids.0, dst_cid: cids.1, src_port: ports.0, dst_port: ports.1,
                len: rest.0, kind: rest.1, op: rest.2, flags: rest.3, buf_alloc: rest.4, fwd_cnt: rest.5,
            };
            prop_assert_eq!(Header::decode(&header.encode()), header);
        }
    }

    #[test]
    fn fields_have_the_offsets_of_the_specification() {
        let bytes = Header {
            src_cid: 3,
            len: 0x0102_0304,
            op: 5,
            fwd_cnt: 0x0a0b_0c0d,
            ..Header::default()
        }
        .encode();
        assert_eq!(bytes[0], 3);
        assert_eq!(bytes[24..28], [4, 3, 2, 1]);
        assert_eq!(bytes[30..32], [5, 0]);
        assert_eq!(bytes[40..44], [0x0d, 0x0c, 0x0b, 0x0a]);
    }
}
