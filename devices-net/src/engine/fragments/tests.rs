use std::net::Ipv4Addr;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::wire::{EtherType, EthernetHeader, Fragment, HEAD, Head, MacAddress};

fn frame(id: u32, offset: usize, more: bool, bytes: &[u8]) -> Vec<u8> {
    let mut head = Head::new();
    head.push(&EthernetHeader {
        destination: MacAddress([2; 6]),
        source: MacAddress([4; 6]),
        ether_type: EtherType::IPV4,
    });
    let (a, b) = (Ipv4Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.into());
    let offset = u16::try_from(offset).unwrap();
    let fragment = Fragment { id, offset, more };
    head.push_ip(a, b, IpProtocol::UDP, bytes.len(), Some(fragment));
    [head.bytes(), bytes].concat()
}

fn add(fragments: &mut Fragments, frame: &[u8], now: Instant) -> Result<Option<Vec<u8>>, Dropped> {
    let head = &frame[..frame.len().min(HEAD)];
    let packet = IpPacket::parse(EtherType::IPV4, head, frame.len());
    let packet = packet.unwrap().unwrap();
    let whole = fragments.add(&packet, &frame, now)?;
    Ok(whole.map(|whole| {
        assert_eq!(
            (whole.packet.offset, whole.packet.len),
            (0, whole.bytes.len())
        );
        let bytes = whole.bytes.clone();
        fragments.recycle(whole);
        bytes
    }))
}

fn mix(numbers: [usize; 2]) -> u8 {
    u8::try_from(numbers[0] ^ numbers[1]).unwrap()
}

proptest! {
    /// Fragments of several packets in any order give these packets.
    #[test]
    fn packets_are_put_together(
        sizes in prop::collection::vec(400usize..9000, 1..4),
        keys in prop::collection::vec(any::<u32>(), 60),
        pieces in 2usize..16,
    ) {
        let now = Instant::now();
        let mut fragments = Fragments::new(EngineLimits::default());
        let mut frames = Vec::new();
        let mut wanted = Vec::new();
        for (id, &size) in (0u32..).zip(&sizes) {
            let content: Vec<u8> = (0..size).map(|n| [(n % 251), id as usize]).map(mix).collect();
            let unit = (size / pieces).next_multiple_of(8);
            for (index, part) in content.chunks(unit).enumerate() {
                frames.push(frame(id, index * unit, (index + 1) * unit < size, part));
            }
            wanted.push(content);
        }
        // Shuffled by the keys.
        let mut order: Vec<_> = keys.iter().cycle().zip(frames).enumerate().collect();
        order.sort_by_key(|(index, (key, _))| (**key, *index));
        let mut whole: Vec<_> = order
            .iter()
            .filter_map(|(_, (_, frame))| add(&mut fragments, frame, now).unwrap())
            .collect();
        whole.sort();
        wanted.sort();
        prop_assert_eq!(whole, wanted);
        prop_assert_eq!(fragments.stored, 0);
        prop_assert!(fragments.partial.is_empty());
    }

    /// Any fragments of any guest keep the limits.
    #[test]
    fn limits_hold(
        steps in prop::collection::vec((0u32..100, 0usize..8191, any::<bool>(), 1usize..1500), 1..300),
    ) {
        let limits = EngineLimits {
            reassembled: 4,
            reassembled_bytes: 100_000,
            ..EngineLimits::default()
        };
        let now = Instant::now();
        let mut fragments = Fragments::new(limits);
        for (id, offset, more, len) in steps {
            if offset == 0 && !more {
                continue;
            }
            let _ = add(&mut fragments, &frame(id, offset * 8, more, &vec![7; len]), now);
            prop_assert!(fragments.partial.len() <= 4);
            let stored: usize = fragments.partial.iter().map(|it| it.bytes.len()).sum();
            prop_assert_eq!(fragments.stored, stored);
            prop_assert!(stored <= 100_000);
            prop_assert!(fragments.partial.iter().all(|it| it.parts.len() <= MAX_PARTS));
        }
        fragments.clear();
        prop_assert_eq!(fragments.stored, 0);
    }
}

#[test]
fn overlaps_and_contradictions_end_a_packet() {
    let now = Instant::now();
    for (first, second) in [
        (frame(1, 0, true, &[0; 16]), frame(1, 8, true, &[0; 16])),
        (frame(1, 16, true, &[0; 16]), frame(1, 8, true, &[0; 16])),
        (frame(1, 16, false, &[0; 5]), frame(1, 24, true, &[0; 8])),
        (frame(1, 16, false, &[0; 5]), frame(1, 8, false, &[0; 8])),
        (frame(1, 24, true, &[0; 8]), frame(1, 8, false, &[0; 8])),
        (frame(1, 0, true, &[0; 8]), frame(1, 8, true, &[0; 7])),
        (frame(1, 0, true, &[0; 8]), frame(1, 65528, false, &[0; 9])),
    ] {
        let mut fragments = Fragments::new(EngineLimits::default());
        assert_eq!(add(&mut fragments, &first, now), Ok(None));
        assert_eq!(add(&mut fragments, &second, now), Err(Dropped));
        assert!(fragments.partial.is_empty());
    }
}

#[test]
fn what_is_incomplete_is_forgotten() {
    let start = Instant::now();
    let mut fragments = Fragments::new(EngineLimits::default());
    assert_eq!(
        add(&mut fragments, &frame(1, 0, true, &[0; 8]), start),
        Ok(None)
    );
    let later = start + Duration::from_secs(4);
    assert_eq!(
        add(&mut fragments, &frame(2, 0, true, &[0; 8]), later),
        Ok(None)
    );
    assert_eq!(
        fragments.expire(later),
        Some(start + Duration::from_secs(10))
    );
    let due = start + Duration::from_secs(10);
    assert_eq!(fragments.expire(due), Some(later + Duration::from_secs(10)));
    assert_eq!(fragments.partial.len(), 1);
    assert_eq!(fragments.expire(due + Duration::from_secs(5)), None);
    assert_eq!(fragments.stored, 0);
}
