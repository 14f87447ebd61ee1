//! Frames for the guest.

use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use super::capture::FrameCapture;
use super::config::EngineConfig;
use super::flow::FlowKey;
use super::journal::Journal;
use super::link::{GuestLink, LinkFull};
use super::rate::Rates;
use super::stats::EngineStats;
use crate::header::{GsoType, NetHeader};
use crate::wire::{
    Checksum, EtherType, EthernetHeader, Fragment, Head, IcmpUnreachable, IpProtocol,
    MAX_IP_PACKET, MacAddress, QUOTED_TRANSPORT, TcpSegment, UdpHeader,
};

/// Maximum number of parts of one frame: headers, and 64 KiB in chunks that begin and end
/// anywhere.
pub(crate) const MAX_PARTS: usize = 18;
/// Length of an IPv4 header without options.
const IPV4: usize = 20;
/// Length of an IPv6 header without extensions, and of a fragment's extension header.
const IPV6: usize = 40;
const IPV6_FRAGMENT: usize = 8;
/// Length of a TCP header without options.
const TCP: usize = 20;

/// The addresses of frames for the guest.
#[derive(Clone, Copy)]
pub(crate) struct Framer<'a> {
    pub(crate) config: &'a EngineConfig,
    /// Ethernet address of the guest.
    pub(crate) guest: MacAddress,
}

impl Framer<'_> {
    fn head(&self, address: IpAddr) -> Head {
        let mut head = Head::new();
        head.push(&EthernetHeader {
            destination: self.guest,
            source: self.config.gateway_mac,
            ether_type: match address {
                IpAddr::V4(_) => EtherType::IPV4,
                IpAddr::V6(_) => EtherType::IPV6,
            },
        });
        head
    }

    /// A frame without payload, with a complete checksum: the answer to a segment without a
    /// flow.
    pub(crate) fn stray_segment(&self, key: &FlowKey, segment: &TcpSegment) -> Head {
        let (source, destination) = (key.remote().ip(), key.guest().ip());
        let mut head = self.head(source);
        head.push_ip(
            source,
            destination,
            IpProtocol::TCP,
            segment.built_len(),
            None,
        );
        let start = head.len();
        head.push_tcp(source, destination, segment);
        complete(&mut head, start, TcpSegment::CHECKSUM, &[]);
        head
    }

    /// The frame of an error about a packet from `guest` to `remote`, which is quoted by its
    /// addresses and the first bytes of its transport header.
    pub(crate) fn unreachable(
        &self,
        error: IcmpUnreachable,
        guest: IpAddr,
        remote: IpAddr,
        protocol: IpProtocol,
        transport: [u8; QUOTED_TRANSPORT],
    ) -> Head {
        let mut quoted = Head::new();
        quoted.push_ip(guest, remote, protocol, transport.len(), None);
        quoted.extend(&transport);
        let mut head = self.head(guest);
        let gateway = self.config.gateway(guest);
        error.push(&mut head, gateway, guest, quoted.bytes());
        head
    }
}

/// Sends frames, for the duration of one call of the engine.
pub(crate) struct Output<'a> {
    pub(crate) link: &'a mut dyn GuestLink,
    pub(crate) framer: Framer<'a>,
    pub(crate) stats: &'a mut EngineStats,
    pub(crate) journal: &'a mut Journal,
    pub(crate) rates: &'a mut Rates,
    pub(crate) capture: &'a mut Option<FrameCapture>,
    pub(crate) now: Instant,
}

/// Ends a capture that cannot go on.
pub(crate) fn end_capture(capture: &mut Option<FrameCapture>, error: &std::io::Error) {
    if let Some(mut ended) = capture.take() {
        let _ = ended.flush();
        tracing::warn!(%error, "the capture of the guest's frames has ended");
    }
}

/// Largest payload of a packet with a TCP header without options.
pub(crate) fn largest_segment(mtu: u16, v6: bool) -> u16 {
    let headers = TCP + if v6 { IPV6 } else { IPV4 };
    mtu.saturating_sub(u16::try_from(headers).unwrap_or(0))
}

impl Output<'_> {
    /// Largest payload of one frame of a flow whose packets have at most `mss` bytes.
    pub(crate) fn largest_payload(&self, v6: bool, mss: u16) -> u32 {
        let offloads = self.link.offloads();
        let (segmented, headers) = match v6 {
            true => (offloads.tso_v6, TCP + IPV6),
            false => (offloads.tso_v4, TCP + IPV4),
        };
        let mss = u32::from(mss.max(1));
        if segmented {
            let most = u32::try_from(MAX_IP_PACKET - headers).unwrap_or(0);
            // Whole packets: a short one at the end of each frame would cost as much.
            (most / mss * mss).max(mss)
        } else {
            mss
        }
    }

    fn transmit(&mut self, header: NetHeader, parts: &[IoSlice<'_>]) -> Result<(), LinkFull> {
        let result = self.link.transmit(&header, parts);
        match result {
            Ok(()) => {
                let len: usize = parts.iter().map(|part| part.len()).sum();
                self.stats.frames_to_guest += 1;
                self.stats.bytes_to_guest += len as u64;
                if let Some(capture) = &mut self.capture
                    && let Err(error) = capture.write_parts(parts)
                {
                    end_capture(self.capture, &error);
                }
            }
            Err(LinkFull) => self.stats.link_full += 1,
        }
        result
    }

    /// Sends headers, and what follows them, with complete checksums.
    pub(crate) fn frame(&mut self, head: &Head, payload: &[u8]) -> Result<(), LinkFull> {
        let parts = [IoSlice::new(head.bytes()), IoSlice::new(payload)];
        self.transmit(NetHeader::default(), &parts)
    }

    /// Sends a segment of a flow to the guest. `payload` has at most `MAX_PARTS - 1` parts,
    /// and packets get at most `mss` bytes of it.
    pub(crate) fn segment(
        &mut self,
        key: &FlowKey,
        segment: &TcpSegment,
        mss: u16,
        payload: &[IoSlice<'_>],
    ) -> Result<(), LinkFull> {
        let (source, destination) = (key.remote().ip(), key.guest().ip());
        let mut head = self.framer.head(source);
        let len = segment.built_len() + segment.payload;
        head.push_ip(source, destination, IpProtocol::TCP, len, None);
        let start = head.len();
        head.push_tcp(source, destination, segment);
        let mut header = partial_checksum(start, TcpSegment::CHECKSUM);
        if segment.payload > usize::from(mss) {
            let gso_type = match source {
                IpAddr::V4(_) => GsoType::TcpV4,
                IpAddr::V6(_) => GsoType::TcpV6,
            };
            header.gso = gso_type;
            header.gso_size = mss;
            header.hdr_len = u16::try_from(head.len()).unwrap_or(0);
        }
        if !self.link.offloads().checksum {
            complete(&mut head, start, TcpSegment::CHECKSUM, payload);
            header = NetHeader::default();
        }
        let mut parts = [IoSlice::new(&[]); MAX_PARTS];
        let count = 1 + payload.len().min(MAX_PARTS - 1);
        parts[1..count].copy_from_slice(&payload[..count - 1]);
        parts[0] = IoSlice::new(head.bytes());
        self.transmit(header, &parts[..count])
    }

    /// Sends a datagram to the guest, in fragments if it is large. Fragments that find no
    /// room are lost, and the datagram with them.
    pub(crate) fn datagram(
        &mut self,
        source: SocketAddr,
        destination: SocketAddr,
        payload: &[u8],
        id: u32,
    ) -> Result<(), LinkFull> {
        let (from, to) = (source.ip(), destination.ip());
        let ends = ((from, source.port()), (to, destination.port()));
        let mut udp = UdpHeader::new(ends.0, ends.1, payload.len());
        let total = UdpHeader::LEN + payload.len();
        if total <= self.room(from, false) {
            let mut head = self.framer.head(from);
            head.push_ip(from, to, IpProtocol::UDP, total, None);
            let start = head.len();
            let mut header = partial_checksum(start, UdpHeader::CHECKSUM);
            if !self.link.offloads().checksum {
                udp.complete(payload);
                header = NetHeader::default();
            }
            head.push(&udp);
            let parts = [IoSlice::new(head.bytes()), IoSlice::new(payload)];
            return self.transmit(header, &parts);
        }
        udp.complete(payload);
        let mut transport = Head::new();
        transport.push(&udp);
        self.packet(from, to, IpProtocol::UDP, transport.bytes(), payload, id)
    }

    /// Bytes that follow the IP header of the largest packet.
    fn room(&self, address: IpAddr, fragment: bool) -> usize {
        let headers = match address {
            IpAddr::V4(_) => IPV4,
            IpAddr::V6(_) if fragment => IPV6 + IPV6_FRAGMENT,
            IpAddr::V6(_) => IPV6,
        };
        usize::from(self.framer.config.mtu).saturating_sub(headers)
    }

    /// Sends a packet with a complete checksum, whose transport header is `transport`, in
    /// fragments if it is large.
    pub(crate) fn packet(
        &mut self,
        from: IpAddr,
        to: IpAddr,
        protocol: IpProtocol,
        transport: &[u8],
        payload: &[u8],
        id: u32,
    ) -> Result<(), LinkFull> {
        let total = transport.len() + payload.len();
        if total <= self.room(from, false) {
            let mut head = self.framer.head(from);
            head.push_ip(from, to, protocol, total, None);
            head.extend(transport);
            let parts = [IoSlice::new(head.bytes()), IoSlice::new(payload)];
            return self.transmit(NetHeader::default(), &parts);
        }
        let room = self.room(from, true) & !7;
        let mut done = 0;
        while done < total && room > transport.len() {
            let now = room.min(total - done);
            let fragment = Fragment {
                id,
                offset: u16::try_from(done).map_err(|_| LinkFull)?,
                more: done + now < total,
            };
            let mut head = self.framer.head(from);
            head.push_ip(from, to, protocol, now, Some(fragment));
            let mut rest = now;
            if done == 0 {
                head.extend(transport);
                rest -= transport.len();
            }
            let start = done.saturating_sub(transport.len());
            let part = payload.get(start..start + rest).unwrap_or_default();
            let parts = [IoSlice::new(head.bytes()), IoSlice::new(part)];
            match self.transmit(NetHeader::default(), &parts) {
                // The first fragments are on their way, and would not be sent again.
                Err(LinkFull) if done > 0 => break,
                result => result?,
            }
            done += now;
        }
        Ok(())
    }
}

/// The header of a frame whose transport header is `start` bytes from its beginning, and has the
/// sum of the pseudo header in its checksum field.
fn partial_checksum(start: usize, offset: u16) -> NetHeader {
    NetHeader {
        needs_csum: true,
        csum_start: u16::try_from(start).unwrap_or(u16::MAX),
        csum_offset: offset,
        ..NetHeader::default()
    }
}

/// Completes a checksum that has the sum of the pseudo header.
fn complete(head: &mut Head, start: usize, offset: u16, payload: &[IoSlice<'_>]) {
    let mut sum = Checksum::new();
    sum.add(head.bytes().get(start..).unwrap_or_default());
    payload.iter().for_each(|part| sum.add(part));
    head.set_u16(start + usize::from(offset), sum.complement());
}
