//! Arbitrary bytes as the header of a connection to a published port, in any pieces: one
//! status byte for any complete header, and none for less.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sm_guest_agent::fuzzing::forward;
use sm_guest_proto::forward::{ForwardHeader, ForwardStatus, HEADER_LEN};

fuzz_target!(|data: &[u8]| {
    let [size, bytes @ ..] = data else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if let Some(header) = bytes.first_chunk_mut::<HEADER_LEN>()
        && let Ok(decoded) = ForwardHeader::decode(*header)
    {
        let again = ForwardHeader::decode(decoded.encode());
        assert_eq!(again, Ok(decoded));
        // No process listens on this port, and the forwarder does not wait for one.
        *header = ForwardHeader {
            port: 1,
            wait_ms: 0,
        }
        .encode();
    }
    let header = bytes.first_chunk::<HEADER_LEN>();
    let expected = header.map(|header| ForwardHeader::decode(*header));
    let pieces: Vec<&[u8]> = bytes.chunks(usize::from(*size).max(1)).collect();
    let answer = forward(&pieces);
    match expected {
        None => assert!(answer.is_empty(), "{answer:?}"),
        Some(Err(_)) => assert_eq!(answer, [ForwardStatus::BadHeader as u8]),
        Some(Ok(_)) => assert_eq!(answer, [ForwardStatus::NoListener as u8]),
    }
});
