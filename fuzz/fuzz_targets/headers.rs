//! Arbitrary bytes as headers in answers of registries: challenges, retry delays, ranges,
//! locations.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| sm_image::fuzzing::headers(data));
