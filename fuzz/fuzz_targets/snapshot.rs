//! Arbitrary bytes as the files of a snapshot: accepted or refused, and never accepted if
//! a checksum is wrong.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use sm_snapshot::manifest::Manifest;
use sm_snapshot::state_file::{Section, StateFile};

fuzz_target!(|data: &[u8]| {
    let path = Path::new("fuzzed");
    let _ = Manifest::decode(path, data);
    let _ = StateFile::decode(path, data, "");
    let [place, change, contents @ ..] = data else {
        return;
    };
    let sections = contents
        .chunks(97)
        .enumerate()
        .map(|(number, payload)| Section {
            name: format!("section {number}"),
            version: u32::from(*place),
            payload: payload.to_vec(),
        });
    let file = StateFile {
        sections: sections.collect(),
    };
    let (mut bytes, digest) = file.encode();
    assert_eq!(StateFile::decode(path, &bytes, &digest).ok(), Some(file));
    let at = usize::from(*place) * bytes.len() / 256;
    bytes[at] ^= change | 1;
    assert!(StateFile::decode(path, &bytes, &digest).is_err());
});
