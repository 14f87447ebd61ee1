//! Arbitrary bytes as the index of a layer in the store.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| sm_image::fuzzing::layer_index(data));
