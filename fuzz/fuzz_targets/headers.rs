//! Any bytes as the headers that registries answer with: challenges, pauses, ranges,
//! locations.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| sm_image::fuzzing::headers(data));
