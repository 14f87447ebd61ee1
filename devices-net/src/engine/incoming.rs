//! Frames of the guest.

use std::net::IpAddr;

use sm_event_loop::Registry;

use super::flow::{DNS_PORT, FlowKey, TokenKind, token};
use super::link::GuestFrame;
use super::output::end_capture;
use super::turn::Turn;
use super::{Flows, NetEngine, udp};
use crate::wire::{
    ArpRequest, EtherType, EthernetHeader, HEAD, IcmpEcho, IcmpUnreachable, IpPacket, IpProtocol,
    MalformedFrame, NeighbourSolicitation, QUOTED_TRANSPORT, TcpSegment, UdpHeader,
    neighbour_advertisement,
};

impl NetEngine {
    /// Takes a frame of the guest. What it causes to be sent to the guest is sent by
    /// [`Self::serve`].
    pub fn guest_frame(&mut self, frame: &dyn GuestFrame, registry: &mut dyn Registry) {
        self.apply(registry);
        self.stats.frames_from_guest += 1;
        self.stats.bytes_from_guest += frame.len() as u64;
        if let Some(capture) = &mut self.capture
            && let Err(error) = capture.write_frame(frame)
        {
            end_capture(&mut self.capture, &error);
        }
        let mut head = [0; HEAD];
        let len = frame.len().min(HEAD);
        let Some(head) = head.get_mut(..len).filter(|head| !head.is_empty()) else {
            self.stats.malformed += 1;
            return;
        };
        if !frame.copy_out(0, head) || self.parse(head, frame, registry).is_err() {
            self.stats.malformed += 1;
        }
    }

    fn parse(
        &mut self,
        head: &[u8],
        frame: &dyn GuestFrame,
        registry: &mut dyn Registry,
    ) -> Result<(), MalformedFrame> {
        let (ethernet, content) = EthernetHeader::parse(head)?;
        if ethernet.source.is_unicast() {
            self.guest = ethernet.source;
        }
        if ethernet.ether_type == EtherType::ARP {
            if let Some(request) = ArpRequest::parse(content)?
                && request.target_ip == self.config.gateway_v4
            {
                self.answers.push(request.reply(self.config.gateway_mac));
            }
            return Ok(());
        }
        let Some(packet) = IpPacket::parse(ethernet.ether_type, head, frame.len())? else {
            self.stats.unsupported += 1;
            return Ok(());
        };
        let transport = head.get(packet.offset..).unwrap_or_default();
        if let Some(solicitation) = NeighbourSolicitation::parse(&packet, transport)? {
            self.solicited(&packet, &solicitation, &ethernet);
            return Ok(());
        }
        if packet.source != self.config.guest(packet.source)
            || !is_reachable(packet.destination)
            || self.config.is_guest(packet.destination)
        {
            self.stats.misaddressed += 1;
            return Ok(());
        }
        if packet.fragment.is_some() {
            return self.fragment(&packet, frame, registry);
        }
        let (mut turn, mut flows) = self.turn(registry);
        flows.packet(&mut turn, &packet, transport, frame)
    }

    /// Answers the question for the gateway's IPv6 address.
    fn solicited(
        &mut self,
        packet: &IpPacket,
        solicitation: &NeighbourSolicitation,
        ethernet: &EthernetHeader,
    ) {
        let IpAddr::V6(source) = packet.source else {
            return;
        };
        if solicitation.target != self.config.gateway_v6 {
            return;
        }
        let all_nodes = std::net::Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        let receiver = if source.is_unspecified() {
            all_nodes
        } else {
            source
        };
        let owner = self.config.gateway_mac;
        let head = neighbour_advertisement(owner, solicitation.target, ethernet.source, receiver);
        self.answers.push(head);
    }

    fn fragment(
        &mut self,
        packet: &IpPacket,
        frame: &dyn GuestFrame,
        registry: &mut dyn Registry,
    ) -> Result<(), MalformedFrame> {
        let now = registry.now();
        let Ok(whole) = self.fragments.add(packet, frame, now) else {
            self.stats.fragments_dropped += 1;
            return Ok(());
        };
        if self.fragments_timer.is_none()
            && let Some(at) = self.fragments.expire(now)
        {
            let token = token(TokenKind::Fragments, 0);
            self.fragments_timer = Some(registry.set_timer(at, token));
        }
        let Some(whole) = whole else {
            return Ok(());
        };
        self.stats.reassembled += 1;
        let head = whole.bytes.get(..HEAD).unwrap_or(&whole.bytes);
        let (mut turn, mut flows) = self.turn(registry);
        let result = flows.packet(&mut turn, &whole.packet, head, &whole.bytes.as_slice());
        self.fragments.recycle(whole);
        result
    }
}

/// Returns true for addresses of one host. One of IPv4 in a form for IPv6 sockets is none of
/// packets (RFC 4291 2.5.5.2): the flow would be of another family on the host.
fn is_reachable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_multicast() && !address.is_broadcast(),
        IpAddr::V6(address) => !address.is_multicast() && address.to_ipv4_mapped().is_none(),
    }
}

impl Flows<'_> {
    /// Processes a packet that is complete. `transport` is the beginning of its content.
    pub(super) fn packet(
        &mut self,
        turn: &mut Turn<'_>,
        packet: &IpPacket,
        transport: &[u8],
        frame: &dyn GuestFrame,
    ) -> Result<(), MalformedFrame> {
        let ends = |source, destination| {
            FlowKey::new((packet.source, source), (packet.destination, destination))
        };
        let quoted = transport.first_chunk::<QUOTED_TRANSPORT>().copied();
        let quoted = quoted.ok_or(MalformedFrame::Truncated)?;
        if packet.hops <= 1 && !turn.config.is_gateway(packet.destination) {
            let (guest, remote) = (packet.source, packet.destination);
            turn.unreachable(
                IcmpUnreachable::HopLimit,
                guest,
                remote,
                packet.protocol,
                quoted,
            );
            return Ok(());
        }
        match packet.protocol {
            IpProtocol::TCP => {
                let segment = TcpSegment::parse(transport, packet.len)?;
                let key = ends(segment.source, segment.destination);
                let payload = packet.offset + segment.header_len;
                self.tcp.receive(turn, key, &segment, frame, payload);
                if let Some((key, other)) = turn.name_clients.pop() {
                    self.dns.adopt(turn, key, other);
                }
            }
            IpProtocol::UDP => {
                let (header, len) = UdpHeader::parse(transport, packet.len)?;
                let key = ends(header.source.get(), header.destination.get());
                let payload = (packet.offset + UdpHeader::LEN, len);
                if self.exposed.receive(turn, &key, frame, payload) {
                    return Ok(());
                }
                if self.dns.is_on()
                    && key.remote().port() == DNS_PORT
                    && turn.config.is_gateway(packet.destination)
                {
                    self.dns.receive(turn, key, frame, payload, None);
                    return Ok(());
                }
                if key.remote().port() == DNS_PORT && turn.policy.restricts_names() {
                    // The answers matter.
                    if let Some(server) = udp::judge(turn, &key, header.len.get()) {
                        (self.dns).receive(turn, key, frame, payload, Some(server));
                    }
                    return Ok(());
                }
                let dont_fragment = packet.dont_fragment;
                (self.udp).receive(turn, key, &header, frame, payload, dont_fragment);
            }
            protocol => match IcmpEcho::parse(protocol, transport, packet.len) {
                Some(echo) => {
                    let payload = (packet.offset + IcmpEcho::LEN, quoted);
                    self.echoes.receive(turn, ends(0, 0), echo, frame, payload);
                }
                None => turn.stats.unsupported += 1,
            },
        }
        Ok(())
    }
}
