//! The headers, compared with those of `etherparse`.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on is a failed test"
)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{
    NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket, TcpHeader, TcpOptionElement,
    TransportSlice,
};
use proptest::prelude::*;
use sm_devices_net::wire::{
    EtherType, EthernetHeader, HEAD, Head, IcmpEcho, IcmpUnreachable, IpPacket, IpProtocol,
    MacAddress, SynOptions, TcpFlags, TcpSegment, UdpHeader,
};

const GATEWAY: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const GUEST: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);

/// Addresses of both ends, of one family.
type Ends = (IpAddr, IpAddr);

fn ends() -> impl Strategy<Value = Ends> {
    prop_oneof![
        any::<([u8; 4], [u8; 4])>()
            .prop_map(|(a, b)| (Ipv4Addr::from(a).into(), Ipv4Addr::from(b).into())),
        any::<([u8; 16], [u8; 16])>()
            .prop_map(|(a, b)| (Ipv6Addr::from(a).into(), Ipv6Addr::from(b).into())),
    ]
}

fn reference(ends: Ends, hops: u8) -> PacketBuilderStep<etherparse::IpHeaders> {
    let ethernet = PacketBuilder::ethernet2(GUEST.0, GATEWAY.0);
    match ends {
        (IpAddr::V4(a), IpAddr::V4(b)) => ethernet.ipv4(a.octets(), b.octets(), hops),
        (IpAddr::V6(a), IpAddr::V6(b)) => ethernet.ipv6(a.octets(), b.octets(), hops),
        _ => unreachable!("both are of one family"),
    }
}

/// A segment of the reference.
fn reference_segment(
    ends: Ends,
    ports: (u16, u16),
    numbers: (u32, u32),
    payload: &[u8],
) -> Vec<u8> {
    let options = [
        TcpOptionElement::MaximumSegmentSize(1460),
        TcpOptionElement::SelectiveAcknowledgementPermitted,
        TcpOptionElement::Timestamp(numbers.1, 0),
        TcpOptionElement::Noop,
        TcpOptionElement::WindowScale(7),
    ];
    let builder = reference(ends, 64)
        .tcp(ports.0, ports.1, numbers.0, 512)
        .syn()
        .ack(numbers.1)
        .options(&options)
        .unwrap();
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).unwrap();
    frame
}

/// The packet in a frame, and all bytes from its transport header on that a parser gets.
fn parse(frame: &[u8]) -> Option<(IpPacket, &[u8])> {
    let (ethernet, _) = EthernetHeader::parse(frame).ok()?;
    let head = &frame[..frame.len().min(HEAD)];
    let packet = IpPacket::parse(ethernet.ether_type, head, frame.len()).ok()??;
    Some((packet, head.get(packet.offset..).unwrap_or_default()))
}

fn ethernet(address: IpAddr) -> Head {
    let mut head = Head::new();
    head.push(&EthernetHeader {
        destination: GUEST,
        source: GATEWAY,
        ether_type: match address {
            IpAddr::V4(_) => EtherType::IPV4,
            IpAddr::V6(_) => EtherType::IPV6,
        },
    });
    head
}

/// Ports, numbers and length of payload of a segment, by both parsers.
type Summary = ((u16, u16), (u32, u32), usize);

fn ours(frame: &[u8]) -> Option<Summary> {
    let (packet, transport) = parse(frame)?;
    if packet.protocol != IpProtocol::TCP || packet.fragment.is_some() {
        return None;
    }
    let segment = TcpSegment::parse(transport, packet.len).ok()?;
    Some((
        (segment.source, segment.destination),
        (segment.sequence, segment.acknowledgment),
        segment.payload,
    ))
}

fn theirs(frame: &[u8]) -> Option<Summary> {
    match SlicedPacket::from_ethernet(frame).ok()?.transport? {
        TransportSlice::Tcp(segment) => Some((
            (segment.source_port(), segment.destination_port()),
            (segment.sequence_number(), segment.acknowledgment_number()),
            segment.payload().len(),
        )),
        _ => None,
    }
}

proptest! {
    #[test]
    fn segments_of_the_reference_are_understood(
        ends in ends(),
        ports: (u16, u16),
        numbers: (u32, u32),
        payload in prop::collection::vec(any::<u8>(), 0..50),
    ) {
        let frame = reference_segment(ends, ports, numbers, &payload);
        let (packet, transport) = parse(&frame).unwrap();
        prop_assert_eq!((packet.source, packet.destination, packet.hops), (ends.0, ends.1, 64));
        let segment = TcpSegment::parse(transport, packet.len).unwrap();
        prop_assert_eq!(ours(&frame), Some((ports, numbers, payload.len())));
        prop_assert_eq!(ours(&frame), theirs(&frame));
        prop_assert_eq!(segment.flags, TcpFlags::SYN.and(TcpFlags::ACK));
        prop_assert_eq!(segment.window, 512);
        prop_assert_eq!(segment.options, SynOptions { mss: Some(1460), scale: Some(7) });
    }

    /// A frame with errors is refused by both parsers, or both read the same from it.
    #[test]
    fn damaged_segments_mean_the_same_to_both(
        ends in ends(),
        ports: (u16, u16),
        numbers: (u32, u32),
        payload in prop::collection::vec(any::<u8>(), 0..50),
        damage in prop::collection::vec((12usize..90, any::<u8>()), 1..4),
        cut in 0usize..100,
    ) {
        let mut frame = reference_segment(ends, ports, numbers, &payload);
        frame.truncate(frame.len() - cut.saturating_sub(50).min(frame.len()));
        for (at, byte) in damage {
            if let Some(old) = frame.get_mut(at) {
                *old = byte;
            }
        }
        if let Some(summary) = ours(&frame) {
            prop_assert_eq!(theirs(&frame), Some(summary));
        } else if let Some(summary) = theirs(&frame)
            && let Some(NetSlice::Ipv6(packet)) = SlicedPacket::from_ethernet(&frame).unwrap().net
        {
            // Tunnels, authentication, jumbograms and other extensions are not for a guest.
            let next = packet.header().next_header();
            prop_assert!(
                next != etherparse::ip_number::TCP || packet.header().payload_length() == 0,
                "{summary:?}",
            );
        }
    }

    #[test]
    fn segments_are_complete_to_the_reference(
        ends in ends(),
        ports: (u16, u16),
        numbers: (u32, u32),
        window: u16,
        payload in prop::collection::vec(any::<u8>(), 0..50),
    ) {
        let mut segment = TcpSegment::new(ports.0, ports.1, TcpFlags::SYN.and(TcpFlags::PSH));
        (segment.sequence, segment.acknowledgment) = numbers;
        segment.window = window;
        segment.options = SynOptions { mss: Some(1440), scale: Some(8) };
        segment.payload = payload.len();
        let mut head = ethernet(ends.0);
        head.push_ip(ends.0, ends.1, IpProtocol::TCP, segment.built_len() + payload.len(), None);
        let start = head.len();
        head.push_tcp(ends.0, ends.1, &segment);
        let mut frame = [head.bytes(), &payload].concat();
        // The receiver completes the sum.
        let sum = {
            let mut sum = sm_devices_net::wire::Checksum::new();
            sum.add(&frame[start..]);
            sum.complement()
        };
        frame[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());

        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = packet.transport else {
            panic!("it is a segment");
        };
        prop_assert_eq!(theirs(&frame), Some((ports, numbers, payload.len())));
        let header: TcpHeader = tcp.to_header();
        prop_assert!(header.syn && header.psh && !header.ack && !header.fin && !header.rst);
        prop_assert_eq!(header.window_size, window);
        let options: Vec<_> = header.options_iterator().map(Result::unwrap).collect();
        prop_assert_eq!(options, [
            TcpOptionElement::MaximumSegmentSize(1440),
            TcpOptionElement::Noop,
            TcpOptionElement::WindowScale(8),
        ]);
        let expected = match packet.net {
            Some(NetSlice::Ipv4(ip)) => {
                let header = ip.header().to_header();
                prop_assert_eq!(header.calc_header_checksum(), header.header_checksum);
                tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()).unwrap()
            }
            Some(NetSlice::Ipv6(ip)) => {
                tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()).unwrap()
            }
            _ => panic!("it is a packet"),
        };
        prop_assert_eq!(tcp.checksum(), expected);
    }

    #[test]
    fn datagrams_have_the_checksum_of_the_reference(
        ends in ends(),
        ports: (u16, u16),
        payload in prop::collection::vec(any::<u8>(), 0..50),
    ) {
        let mut frame = Vec::new();
        reference(ends, 1).udp(ports.0, ports.1).write(&mut frame, &payload).unwrap();
        let (packet, transport) = parse(&frame).unwrap();
        prop_assert_eq!((packet.protocol, packet.hops), (IpProtocol::UDP, 1));
        let (header, len) = UdpHeader::parse(transport, packet.len).unwrap();
        prop_assert_eq!(len, payload.len());
        let mut built = UdpHeader::new((ends.0, ports.0), (ends.1, ports.1), len);
        built.complete(&payload);
        prop_assert_eq!(built, header);
    }

    #[test]
    fn echoes_are_those_of_the_reference(
        ends in ends(),
        numbers: (u16, u16),
        payload in prop::collection::vec(any::<u8>(), 0..50),
    ) {
        let (mut request, mut reply) = (Vec::new(), Vec::new());
        let back = reference((ends.1, ends.0), 64);
        let protocol = match ends.0 {
            IpAddr::V4(_) => {
                let there = reference(ends, 64).icmpv4_echo_request(numbers.0, numbers.1);
                there.write(&mut request, &payload).unwrap();
                let back = back.icmpv4_echo_reply(numbers.0, numbers.1);
                back.write(&mut reply, &payload).unwrap();
                IpProtocol::ICMP
            }
            IpAddr::V6(_) => {
                let there = reference(ends, 64).icmpv6_echo_request(numbers.0, numbers.1);
                there.write(&mut request, &payload).unwrap();
                let back = back.icmpv6_echo_reply(numbers.0, numbers.1);
                back.write(&mut reply, &payload).unwrap();
                IpProtocol::ICMPV6
            }
        };
        let (packet, transport) = parse(&request).unwrap();
        prop_assert_eq!(packet.protocol, protocol);
        let echo = IcmpEcho::parse(packet.protocol, transport, packet.len).unwrap();
        prop_assert_eq!((echo.id, echo.sequence, echo.payload), (numbers.0, numbers.1, payload.len()));
        if ends.0.is_ipv4() {
            prop_assert_eq!(&echo.request(false, &payload)[..], &transport[..IcmpEcho::LEN]);
        }
        let header = echo.reply(ends.1, ends.0, &payload);
        let (packet, transport) = parse(&reply).unwrap();
        prop_assert_eq!(&header[..], &transport[..IcmpEcho::LEN]);
        prop_assert_eq!(IcmpEcho::parse(packet.protocol, transport, packet.len), None);
    }
}

#[test]
fn errors_have_the_meaning_of_the_reference() {
    use etherparse::icmpv4::DestUnreachableHeader as V4;
    use etherparse::icmpv6::{DestUnreachableCode as V6, TimeExceededCode};
    use etherparse::{Icmpv4Type, Icmpv6Type, icmpv4};

    let v4 = |error| Icmpv4Type::DestinationUnreachable(error);
    let v6 = |error| Icmpv6Type::DestinationUnreachable(error);
    let next_hop_mtu = 1280;
    let ttl = Icmpv4Type::TimeExceeded(icmpv4::TimeExceededCode::TtlExceededInTransit);
    let hops = Icmpv6Type::TimeExceeded(TimeExceededCode::HopLimitExceeded);
    for (error, expected_v4, expected_v6) in [
        (IcmpUnreachable::Network, v4(V4::Network), v6(V6::NoRoute)),
        (IcmpUnreachable::Host, v4(V4::Host), v6(V6::Address)),
        (IcmpUnreachable::Port, v4(V4::Port), v6(V6::Port)),
        (
            IcmpUnreachable::Prohibited,
            v4(V4::FilterProhibited),
            v6(V6::Prohibited),
        ),
        (
            IcmpUnreachable::TooBig(1280),
            v4(V4::FragmentationNeeded { next_hop_mtu }),
            Icmpv6Type::PacketTooBig { mtu: 1280 },
        ),
        (IcmpUnreachable::HopLimit, ttl, hops),
    ] {
        let quoted = [0x45; 28];
        for address in [IpAddr::from([100, 96, 0, 1]), Ipv6Addr::LOCALHOST.into()] {
            let mut head = ethernet(address);
            error.push(&mut head, address, address, &quoted);
            match SlicedPacket::from_ethernet(head.bytes()).unwrap().transport {
                Some(TransportSlice::Icmpv4(icmp)) => {
                    assert_eq!(icmp.icmp_type(), expected_v4);
                    assert_eq!(icmp.payload(), quoted);
                }
                Some(TransportSlice::Icmpv6(icmp)) => {
                    assert_eq!(icmp.icmp_type(), expected_v6);
                    assert_eq!(icmp.payload(), quoted);
                }
                other => panic!("an ICMP message: {other:?}"),
            }
        }
    }
}
