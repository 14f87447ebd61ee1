//! Arbitrary frames: what a parser returns lies inside the frame.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sm_devices_net::wire::{
    ArpRequest, EtherType, EthernetHeader, HEAD, IcmpEcho, IpPacket, NeighbourSolicitation,
    TcpSegment, UdpHeader,
};

fuzz_target!(|data: &[u8]| {
    // Bytes of the frame that follow those of the input.
    let [a, b, frame @ ..] = data else { return };
    let len = frame.len() + usize::from(u16::from_le_bytes([*a, *b]));
    let head = &frame[..frame.len().min(HEAD)];
    let Ok((ethernet, content)) = EthernetHeader::parse(head) else {
        return;
    };
    if ethernet.ether_type == EtherType::ARP
        && let Ok(Some(request)) = ArpRequest::parse(content)
    {
        assert_eq!(request.reply(ethernet.source).len(), 42);
    }
    let Ok(Some(packet)) = IpPacket::parse(ethernet.ether_type, head, len) else {
        return;
    };
    assert!(packet.offset + packet.len <= len);
    assert_eq!(packet.source.is_ipv4(), packet.destination.is_ipv4());
    let transport = head.get(packet.offset..).unwrap_or_default();
    if let Ok(segment) = TcpSegment::parse(transport, packet.len) {
        assert_eq!(segment.header_len + segment.payload, packet.len);
        assert!(segment.options.scale.is_none_or(|scale| scale <= 14));
    }
    if let Ok((_, payload)) = UdpHeader::parse(transport, packet.len) {
        assert!(UdpHeader::LEN + payload <= packet.len);
    }
    if let Some(echo) = IcmpEcho::parse(packet.protocol, transport, packet.len) {
        assert_eq!(IcmpEcho::LEN + echo.payload, packet.len);
    }
    let _ = NeighbourSolicitation::parse(&packet, transport);
    let _ = IcmpEcho::parse_reply(packet.destination.is_ipv6(), transport);
});
