use proptest::prelude::*;

use super::super::message::addresses;
use super::*;

/// A question for `a.example`, with a type.
fn question(kind: u16, options: bool) -> Vec<u8> {
    let mut bytes = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(options)];
    bytes.extend(b"\x01a\x07example\x00");
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0, 1]);
    if options {
        bytes.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    }
    bytes
}

/// A response with answers and records of the authority.
fn response(code: u8, answers: &[(u16, u32, &[u8])], authority: &[(u16, u32, &[u8])]) -> Vec<u8> {
    let mut bytes = question(1, false);
    bytes[2] = 0x81;
    bytes[3] = 0x80 | code;
    bytes[7] = u8::try_from(answers.len()).unwrap();
    bytes[9] = u8::try_from(authority.len()).unwrap();
    for (kind, ttl, data) in answers.iter().chain(authority) {
        bytes.extend([0xc0, 12]);
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0, 1]);
        bytes.extend(ttl.to_be_bytes());
        bytes.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(*data);
    }
    bytes
}

/// The data of an SOA record, with its last field.
fn soa(minimum: u32) -> Vec<u8> {
    [&[0, 0][..], &[9; 16], &minimum.to_be_bytes()].concat()
}

#[test]
fn lifetimes_are_those_of_the_records() {
    let address = [198, 51, 100, 7];
    let both = [(1, 300, &address[..]), (1, 60, &address[..])];
    assert_eq!(lifetime(&response(0, &both, &[])), Some(60));
    // Options have flags in the place of a time.
    let options = [(1, 300, &address[..]), (41, 0, &[][..])];
    assert_eq!(lifetime(&response(0, &options, &[])), Some(300));
    assert_eq!(lifetime(&response(0, &[(1, 0, &address)], &[])), None);
    assert_eq!(
        lifetime(&response(0, &[(1, u32::MAX, &address)], &[])),
        Some(MAX_TTL)
    );
    let there_is_none = soa(900);
    for code in [0, 3] {
        let negative = response(code, &[], &[(TYPE_SOA, 3600, &there_is_none)]);
        assert_eq!(lifetime(&negative), Some(900));
        let negative = response(code, &[], &[(TYPE_SOA, 30, &there_is_none)]);
        assert_eq!(lifetime(&negative), Some(30));
        // Without the record nobody knows for how long.
        assert_eq!(lifetime(&response(code, &[], &[])), None);
    }
    assert_eq!(
        lifetime(&response(2, &[], &[(TYPE_SOA, 3600, &there_is_none)])),
        None
    );
    let mut truncated = response(0, &both, &[]);
    truncated[2] |= TRUNCATED;
    assert!(is_truncated(&truncated));
    assert_eq!(lifetime(&truncated), None);
}

#[test]
fn times_to_live_decrease() {
    let address = [198, 51, 100, 7];
    let records = [
        (1, 300, &address[..]),
        (41, 0x8000, &[][..]),
        (1, 60, &address[..]),
    ];
    let mut message = response(0, &records, &[]);
    age(&mut message, 100);
    let mut times = Vec::new();
    super::records(&message, |record| {
        times.push(record.ttl);
        Ok(())
    })
    .unwrap();
    assert_eq!(times, [200, 0x8000, 0]);
}

#[test]
fn keys_for_an_encrypted_hello_are_ignored_and_hints_are_kept() {
    let parameters: [&[u8]; 3] = [
        &[0, 1, 0, 3, 2, b'h', b'2'],
        &[0, 5, 0, 4, 0xfe, 0x0d, 1, 2],
        &[
            0, 6, 0, 16, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
        ],
    ];
    let data = [&[0, 1, 0][..], &parameters.concat()].concat();
    let address = [198, 51, 100, 7];
    let mut message = response(0, &[(TYPE_HTTPS, 300, &data), (1, 300, &address)], &[]);
    let before = message.clone();
    strip_ech(&mut message);
    assert_eq!(message.len(), before.len());
    let ignored = [0xff, 0xfe, 0, 4, 0, 0, 0, 0];
    let expected = [&[0, 1, 0][..], parameters[0], parameters[2], &ignored].concat();
    let found = message.windows(expected.len()).any(|it| it == expected);
    assert!(found, "{message:?}");
    let mut addresses_found = Vec::new();
    addresses(&message, |it| addresses_found.push(it.address.to_string())).unwrap();
    assert_eq!(addresses_found, ["2001:db8::1", "198.51.100.7"]);
    // Once more changes nothing.
    let stripped = message.clone();
    strip_ech(&mut message);
    assert_eq!(message, stripped);
}

#[test]
fn the_size_of_answers_is_that_of_the_options() {
    assert_eq!(largest_response(&question(1, false)), 512);
    assert_eq!(largest_response(&question(1, true)), 1232);
    assert_eq!(largest_response(&[]), 512);
}

proptest! {
    #[test]
    fn any_response_keeps_its_length(bytes: Vec<u8>, counts: [u8; 3], seconds: u32) {
        let mut message = question(1, false);
        message[2] = 0x81;
        (message[7], message[9], message[11]) = (counts[0], counts[1], counts[2]);
        message.extend(&bytes);
        let len = message.len();
        let _ = lifetime(&message);
        strip_ech(&mut message);
        age(&mut message, seconds);
        prop_assert_eq!(message.len(), len);
        let _ = lifetime(&bytes);
        let _ = largest_response(&bytes);
    }

    #[test]
    fn any_service_has_no_keys_afterwards(keys: Vec<(u16, u8)>) {
        let mut data = vec![0, 1, 0];
        let mut sorted: Vec<_> = keys.iter().map(|(key, len)| (key % 9, len % 20)).collect();
        sorted.sort_unstable();
        sorted.dedup_by_key(|it| it.0);
        for (key, len) in &sorted {
            data.extend(key.to_be_bytes());
            data.extend([0, *len]);
            data.extend(vec![7; usize::from(*len)]);
        }
        prop_assert_eq!(strip_service(&mut data), Ok(()));
        let (mut at, mut last) = (3, None);
        while at < data.len() {
            let key = read_u16(&data, at).unwrap();
            prop_assert!(key != ECH && Some(key) > last);
            last = Some(key);
            at += 4 + usize::from(read_u16(&data, at + 2).unwrap());
        }
        prop_assert_eq!(at, data.len());
    }
}
