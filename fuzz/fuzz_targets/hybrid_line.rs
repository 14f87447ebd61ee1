//! Arbitrary bytes as a request of the hybrid vsock protocol: accepted at its last byte,
//! or refused, independent of the bytes that follow.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sm_frontends::fuzzing::hybrid_line;

fuzz_target!(|data: &[u8]| {
    let mut before = Ok(None);
    for end in 0..=data.len().min(64) {
        let now = hybrid_line(&data[..end]);
        match before {
            // A decision does not change with more bytes.
            Ok(Some(_)) | Err(()) => assert_eq!(now, before),
            Ok(None) => {
                if let Ok(Some((port, len))) = now {
                    assert_eq!((len, data[len - 1]), (end, b'\n'));
                    let line = String::from_utf8_lossy(&data[..len]).to_lowercase();
                    let words: Vec<_> = line.split_ascii_whitespace().collect();
                    let digits = words[1].trim_start_matches('0');
                    assert_eq!(words[0], "connect");
                    assert!(digits == port.to_string() || digits.is_empty() && port == 0);
                }
            }
        }
        before = now;
    }
    // Lines up to the maximum length may be undecided, and no longer ones.
    assert!(data.len() < 32 || before != Ok(None));
});
