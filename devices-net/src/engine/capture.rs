//! Frames in a file that packet analysers read (draft-ietf-opsawg-pcap).

use std::fs::File;
use std::io::{self, BufWriter, IoSlice, Write as _};
use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use super::link::GuestFrame;
use crate::wire::{Checksum, EthernetHeader, HEAD, IpPacket, IpProtocol, TcpSegment, UdpHeader};

/// Numbers of the file's header: times in microseconds, version 2.4, and Ethernet.
const MAGIC: u32 = 0xa1b2_c3d4;
const VERSION: [u16; 2] = [2, 4];
const ETHERNET: u32 = 1;
/// Longest frame, which is never cut.
const SNAP_LEN: u32 = 1 << 18;
const FILE_HEADER: u64 = 24;
const FRAME_HEADER: u64 = 16;

/// Writes the frames of a guest to a file, as the guest sees them, with complete checksums: those
/// of a guest are not verified, as they never pass a network. Segments are as large as the guest
/// sends and receives them.
///
/// It ends when the file is as large as it may be, or cannot be written. Writing to a slow file
/// system slows the guest's network down.
#[derive(Debug)]
pub struct FrameCapture {
    file: BufWriter<File>,
    left: u64,
    frame: Vec<u8>,
}

impl FrameCapture {
    /// Begins a capture of at most `limit` bytes, at the position of the file, which is to be
    /// empty.
    ///
    /// # Errors
    /// The header does not fit, or cannot be written.
    pub fn new(file: File, limit: u64) -> io::Result<Self> {
        let left = limit.checked_sub(FILE_HEADER);
        let left = left.ok_or(io::ErrorKind::FileTooLarge)?;
        let mut file = BufWriter::new(file);
        file.write_all(&MAGIC.to_le_bytes())?;
        for part in VERSION {
            file.write_all(&part.to_le_bytes())?;
        }
        file.write_all(&[0; 8])?;
        file.write_all(&SNAP_LEN.to_le_bytes())?;
        file.write_all(&ETHERNET.to_le_bytes())?;
        file.flush()?;
        Ok(Self {
            file,
            left,
            frame: Vec::new(),
        })
    }

    /// Writes a frame of the guest.
    ///
    /// # Errors
    /// There is no room for it, or it cannot be written.
    pub(crate) fn write_frame(&mut self, frame: &dyn GuestFrame) -> io::Result<()> {
        self.frame.clear();
        self.frame.resize(frame.len(), 0);
        match frame.copy_out(0, &mut self.frame) {
            true => self.write(),
            false => Ok(()),
        }
    }

    /// Writes a frame for the guest.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn write_parts(&mut self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        self.frame.clear();
        for part in parts {
            self.frame.extend_from_slice(part);
        }
        self.write()
    }

    fn write(&mut self) -> io::Result<()> {
        let size = FRAME_HEADER + self.frame.len() as u64;
        let left = self.left.checked_sub(size);
        self.left = left.ok_or(io::ErrorKind::FileTooLarge)?;
        complete_checksum(&mut self.frame);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let len = u32::try_from(self.frame.len()).map_err(io::Error::other)?;
        for number in [seconds, now.subsec_micros(), len, len] {
            self.file.write_all(&number.to_le_bytes())?;
        }
        self.file.write_all(&self.frame)
    }

    /// Passes on what was written.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Computes the checksum of a frame's TCP segment or datagram.
fn complete_checksum(frame: &mut [u8]) {
    let head = frame.get(..HEAD).unwrap_or(frame);
    let Ok((ethernet, _)) = EthernetHeader::parse(head) else {
        return;
    };
    let Ok(Some(packet)) = IpPacket::parse(ethernet.ether_type, head, frame.len()) else {
        return;
    };
    let offset = match packet.protocol {
        IpProtocol::TCP => TcpSegment::CHECKSUM,
        IpProtocol::UDP => UdpHeader::CHECKSUM,
        _ => return,
    };
    if packet.fragment.is_some() {
        return;
    }
    let (source, destination): (IpAddr, IpAddr) = (packet.source, packet.destination);
    let Ok(len) = u32::try_from(packet.len) else {
        return;
    };
    let content = frame.get_mut(packet.offset..packet.offset + packet.len);
    let Some(content) = content else { return };
    let at = usize::from(offset);
    let Some(place) = content.get_mut(at..at + 2) else {
        return;
    };
    place.fill(0);
    let mut sum = Checksum::pseudo(source, destination, packet.protocol, len);
    sum.add(content);
    let sum = match (sum.complement(), packet.protocol) {
        // Zero means "no checksum".
        (0, IpProtocol::UDP) => u16::MAX,
        (sum, _) => sum,
    };
    if let Some(place) = content.get_mut(at..at + 2) {
        place.copy_from_slice(&sum.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::wire::{EtherType, Head, MacAddress};

    /// A datagram with a part of its checksum.
    fn datagram(payload: &[u8]) -> Vec<u8> {
        let (from, to) = (Ipv4Addr::new(100, 96, 0, 2), Ipv4Addr::new(192, 0, 2, 7));
        let udp = UdpHeader::new((from.into(), 5), (to.into(), 6), payload.len());
        let mut head = Head::new();
        head.push(&EthernetHeader {
            destination: MacAddress([2; 6]),
            source: MacAddress([4; 6]),
            ether_type: EtherType::IPV4,
        });
        let len = UdpHeader::LEN + payload.len();
        head.push_ip(from.into(), to.into(), IpProtocol::UDP, len, None);
        head.push(&udp);
        [head.bytes(), payload].concat()
    }

    #[test]
    fn the_file_has_frames_with_checksums_and_a_bound() {
        let path = std::env::temp_dir().join(format!("sm-capture-{}", std::process::id()));
        let frame = datagram(b"hello");
        let size = FRAME_HEADER + frame.len() as u64;
        let file = File::create(&path).unwrap();
        let mut capture = FrameCapture::new(file, FILE_HEADER + 2 * size + 1).unwrap();
        capture.write_frame(&frame.as_slice()).unwrap();
        let (first, second) = frame.split_at(20);
        capture
            .write_parts(&[IoSlice::new(first), IoSlice::new(second)])
            .unwrap();
        let error = capture.write_frame(&frame.as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        capture.flush().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(bytes.len() as u64, FILE_HEADER + 2 * size);
        assert_eq!(bytes[..8], [0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0]);
        let stored = &bytes[40..40 + frame.len()];
        assert_eq!(bytes[32..36], bytes[36..40]);
        assert_eq!(usize::from(bytes[32]), frame.len());
        let transport = &stored[34..];
        let len = u32::try_from(transport.len()).unwrap();
        let ends: [IpAddr; 2] = [[100, 96, 0, 2].into(), [192, 0, 2, 7].into()];
        let mut sum = Checksum::pseudo(ends[0], ends[1], IpProtocol::UDP, len);
        sum.add(transport);
        assert_eq!(sum.complement(), 0);
        assert_eq!(stored[42..], *b"hello");
        assert!(FrameCapture::new(File::open("/dev/null").unwrap(), 10).is_err());
    }
}
