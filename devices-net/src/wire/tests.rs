use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

const GATEWAY: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const GUEST: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);

/// Reference: sums words one by one, and folds after each.
fn slow_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for word in bytes.chunks(2) {
        let low = word.get(1).copied().unwrap_or(0);
        sum += u32::from(u16::from_be_bytes([word[0], low]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

fn addresses() -> impl Strategy<Value = (IpAddr, IpAddr)> {
    prop_oneof![
        any::<([u8; 4], [u8; 4])>()
            .prop_map(|(a, b)| (Ipv4Addr::from(a).into(), Ipv4Addr::from(b).into())),
        any::<([u8; 16], [u8; 16])>()
            .prop_map(|(a, b)| (Ipv6Addr::from(a).into(), Ipv6Addr::from(b).into())),
    ]
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

fn parse(frame: &[u8], len: usize) -> Result<Option<IpPacket>, MalformedFrame> {
    let (ethernet, _) = EthernetHeader::parse(frame)?;
    let head = &frame[..frame.len().min(HEAD)];
    IpPacket::parse(ethernet.ether_type, head, len)
}

proptest! {
    #[test]
    fn a_checksum_does_not_depend_on_the_parts(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8),
    ) {
        let mut sum = Checksum::new();
        parts.iter().for_each(|part| sum.add(part));
        prop_assert_eq!(sum.complement(), slow_sum(&parts.concat()));
    }

    /// A packet that is accepted lies inside its frame.
    #[test]
    fn arbitrary_frames_stay_inside(
        ether_type in prop_oneof![Just(EtherType::IPV4), Just(EtherType::IPV6)],
        version in any::<u8>(),
        next in prop_oneof![Just(0u8), Just(43), Just(44), Just(60), Just(6), any::<u8>()],
        mut bytes in prop::collection::vec(any::<u8>(), 15..300),
        beyond in 0usize..2000,
    ) {
        bytes[12..14].copy_from_slice(&ether_type.0.get().to_be_bytes());
        bytes[14] = version;
        if let Some(byte) = bytes.get_mut(20) {
            *byte = next;
        }
        if let Some(len) = bytes.get_mut(18..20) {
            len[0] = 0;
        }
        let len = bytes.len() + beyond;
        if let Ok(Some(packet)) = parse(&bytes, len) {
            prop_assert!(packet.offset + packet.len <= len);
            let transport = bytes.get(packet.offset..).unwrap_or_default();
            if let Ok(segment) = TcpSegment::parse(transport, packet.len) {
                prop_assert_eq!(segment.header_len + segment.payload, packet.len);
            }
            if let Ok((_, payload)) = UdpHeader::parse(transport, packet.len) {
                prop_assert!(UdpHeader::LEN + payload <= packet.len);
            }
            let _ = NeighbourSolicitation::parse(&packet, transport);
            let _ = IcmpEcho::parse(packet.protocol, transport, packet.len);
        }
        let _ = ArpRequest::parse(&bytes[14..]);
    }

    #[test]
    fn a_built_segment_is_parsed(
        (source, destination) in addresses(),
        ports in any::<(u16, u16)>(),
        numbers in any::<(u32, u32)>(),
        window in any::<u16>(),
        mss in any::<Option<u16>>(),
        scale in prop::option::of(0u8..=14),
        payload in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut segment = TcpSegment::new(ports.0, ports.1, TcpFlags::SYN.and(TcpFlags::ACK));
        (segment.sequence, segment.acknowledgment) = numbers;
        segment.window = window;
        segment.options = SynOptions { mss, scale };
        segment.payload = payload.len();
        segment.header_len = segment.built_len();
        let mut head = ethernet(source);
        head.push_ip(source, destination, IpProtocol::TCP, segment.header_len + payload.len(), None);
        let start = head.len();
        head.push_tcp(source, destination, &segment);
        let frame = [head.bytes(), &payload].concat();
        let packet = parse(&frame, frame.len()).unwrap().unwrap();
        prop_assert_eq!(packet.offset, start);
        prop_assert_eq!((packet.source, packet.destination), (source, destination));
        prop_assert_eq!(TcpSegment::parse(&frame[start..], packet.len), Ok(segment));
        if source.is_ipv4() {
            prop_assert_eq!(slow_sum(&frame[14..34]), 0);
        }
        // The receiver completes the sum of the pseudo header by that of the segment; the
        // result is what the whole segment has when the field is zero.
        let partial = slow_sum(&frame[start..]);
        let mut whole = frame[start..].to_vec();
        whole[16..18].fill(0);
        let len = u32::try_from(whole.len()).unwrap();
        let mut sum = Checksum::pseudo(source, destination, IpProtocol::TCP, len);
        sum.add(&whole);
        prop_assert_eq!(partial, sum.complement());
    }

    #[test]
    fn options_of_a_segment_end(bytes in prop::collection::vec(any::<u8>(), 40)) {
        let mut segment = TcpSegment::new(1, 2, TcpFlags::SYN);
        segment.options = SynOptions::default();
        let mut head = Head::new();
        let (a, b) = (Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into());
        head.push_tcp(a, b, &segment);
        let mut header = [head.bytes(), &bytes].concat();
        header[12] = 15 << 4;
        let parsed = TcpSegment::parse(&header, 60).unwrap();
        prop_assert!(parsed.options.scale.is_none_or(|scale| scale <= 14));
    }

    #[test]
    fn fragments_are_parsed_as_they_were_built(
        (source, destination) in addresses(),
        id in 0u32..65536,
        units in 0u16..8192,
        more in any::<bool>(),
    ) {
        let fragment = Fragment { id, offset: units << 3, more };
        let mut head = ethernet(source);
        head.push_ip(source, destination, IpProtocol::UDP, 64, Some(fragment));
        let frame = [head.bytes(), &[0; 64]].concat();
        let packet = parse(&frame, frame.len()).unwrap().unwrap();
        let whole = !more && units == 0;
        prop_assert_eq!(packet.fragment, (!whole).then_some(fragment));
        prop_assert_eq!((packet.protocol, packet.len), (IpProtocol::UDP, 64));
        prop_assert_eq!(packet.offset + 64, frame.len());
    }

    #[test]
    fn complete_datagrams_have_valid_checksums(
        (source, destination) in addresses(),
        ports in any::<(u16, u16)>(),
        payload in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let mut header = UdpHeader::new((source, ports.0), (destination, ports.1), payload.len());
        header.complete(&payload);
        let mut head = Head::new();
        head.push(&header);
        let len = u32::try_from(payload.len() + UdpHeader::LEN).unwrap();
        let mut sum = Checksum::pseudo(source, destination, IpProtocol::UDP, len);
        sum.add(head.bytes());
        sum.add(&payload);
        prop_assert_eq!(sum.complement(), 0);
        prop_assert_eq!(UdpHeader::parse(head.bytes(), 108), Ok((header, payload.len())));
    }

    #[test]
    fn echoes_and_errors_have_valid_checksums(
        (source, destination) in addresses(),
        id in any::<u16>(),
        payload in prop::collection::vec(any::<u8>(), 28..100),
    ) {
        let pseudo = |len: usize| match source {
            IpAddr::V4(_) => Checksum::new(),
            IpAddr::V6(_) => {
                let len = u32::try_from(len).unwrap();
                Checksum::pseudo(source, destination, IpProtocol::ICMPV6, len)
            }
        };
        let echo = IcmpEcho { id, sequence: 7, payload: payload.len() };
        let header = echo.reply(source, destination, &payload);
        let mut sum = pseudo(payload.len() + 8);
        sum.add(&header);
        sum.add(&payload);
        prop_assert_eq!(sum.complement(), 0);
        let message = [&header[..], &payload].concat();
        let reply = IcmpEcho::parse_reply(source.is_ipv6(), &message);
        prop_assert_eq!(reply, Some((echo, &payload[..])));

        let mut head = ethernet(source);
        IcmpUnreachable::TooBig(1280).push(&mut head, source, destination, &payload);
        let packet = parse(head.bytes(), head.len()).unwrap().unwrap();
        let content = &head.bytes()[packet.offset..];
        prop_assert_eq!(content.len(), packet.len);
        let mut sum = pseudo(content.len());
        sum.add(content);
        prop_assert_eq!(sum.complement(), 0);
        prop_assert_eq!(&content[8..], &payload[..]);
    }
}

#[test]
fn neighbours_are_answered() {
    let target: Ipv6Addr = "fd73:6d00::1".parse().unwrap();
    let guest: Ipv6Addr = "fd73:6d00::2".parse().unwrap();
    let head = neighbour_advertisement(GATEWAY, target, GUEST, guest);
    let packet = parse(head.bytes(), head.len()).unwrap().unwrap();
    assert_eq!((packet.hops, packet.len), (255, 32));
    let content = &head.bytes()[packet.offset..];
    let mut sum = Checksum::pseudo(packet.source, packet.destination, packet.protocol, 32);
    sum.add(content);
    assert_eq!(sum.complement(), 0);
    assert_eq!(content[26..], GATEWAY.0);
    // A solicitation differs by its type.
    let mut solicitation = content.to_vec();
    solicitation[0] = 135;
    let parsed = NeighbourSolicitation::parse(&packet, &solicitation).unwrap();
    assert_eq!(parsed, Some(NeighbourSolicitation { target }));
    assert!(NeighbourSolicitation::parse(&packet, &solicitation[..20]).is_err());
    assert_eq!(NeighbourSolicitation::parse(&packet, content), Ok(None));
}

#[test]
fn the_owner_of_an_address_is_named() {
    let request = ArpRequest {
        sender: GUEST,
        sender_ip: Ipv4Addr::new(100, 96, 0, 2),
        target_ip: Ipv4Addr::new(100, 96, 0, 1),
    };
    let reply = request.reply(GATEWAY);
    assert_eq!(reply.len(), 42);
    let mut question = reply.bytes()[14..].to_vec();
    assert_eq!(ArpRequest::parse(&question), Ok(None), "a reply");
    question[7] = 1;
    let parsed = ArpRequest::parse(&question).unwrap().unwrap();
    assert_eq!(
        (parsed.sender, parsed.target_ip),
        (GATEWAY, request.sender_ip)
    );
    assert!(ArpRequest::parse(&question[..27]).is_err());
}

#[test]
fn a_routing_header_of_the_guest_is_refused() {
    let (a, b) = (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
    for (left, accepted) in [(0, true), (1, false)] {
        let mut head = ethernet(a);
        head.push_ip(a, b, IpProtocol(43), 28, None);
        let mut frame = [head.bytes(), &[0; 28]].concat();
        frame[54..58].copy_from_slice(&[6, 0, 0, left]);
        let packet = parse(&frame, frame.len());
        assert_eq!(packet.is_ok(), accepted);
    }
}
