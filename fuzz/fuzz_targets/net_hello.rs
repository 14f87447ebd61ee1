//! Arbitrary first bytes of a connection: the verdict about a part of them is that about all.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sm_devices_net::hello::{ClientHello, MAX_HELLO, read_client_hello};

fuzz_target!(|data: &[u8]| {
    let whole = read_client_hello(data);
    if let ClientHello::Named(name) = &whole {
        assert!((1..=253).contains(&name.len()) && name.is_ascii());
        assert!(!name.contains('\0') && !name.contains(|it: char| it.is_ascii_uppercase()));
    }
    assert!(whole != ClientHello::Incomplete || data.len() < MAX_HELLO);
    let step = data.len().div_ceil(16).max(1);
    for len in (0..data.len()).step_by(step) {
        let part = read_client_hello(&data[..len]);
        assert!(part == ClientHello::Incomplete || part == whole);
    }
});
