//! Arbitrary bytes as a registries.conf; the first line is the name to look up.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| sm_image::fuzzing::registries(data));
