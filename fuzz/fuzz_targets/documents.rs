//! Any bytes as the documents and names that registries and images come with.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| sm_image::fuzzing::documents(data));
