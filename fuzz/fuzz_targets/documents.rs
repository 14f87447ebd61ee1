//! Arbitrary bytes as a manifest or index and a configuration.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| sm_image::fuzzing::documents(data));
