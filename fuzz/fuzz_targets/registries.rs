//! Any bytes as a registries.conf; its first line names what is looked up in it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| sm_image::fuzzing::registries(data));
