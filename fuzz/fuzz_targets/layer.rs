//! Arbitrary bytes as a layer: an index and a disk, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| sm_image::fuzzing::layer(data));
