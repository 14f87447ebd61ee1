//! Arbitrary responses of name servers: what is stored and changed keeps its length, and has no
//! keys for an encrypted ClientHello.
#![no_main]

use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use sm_devices_net::dns::{
    DnsCache, addresses, age, answers, largest_response, lifetime, strip_ech,
};

fuzz_target!(|data: &[u8]| {
    let mut response = data.to_vec();
    let before = addresses(data, |_| {});
    let seconds = lifetime(data);
    strip_ech(&mut response);
    age(&mut response, 7);
    assert_eq!(response.len(), data.len());
    // Neither changes how the records are read.
    assert_eq!(addresses(&response, |_| {}).is_ok(), before.is_ok());
    let mut question = data.to_vec();
    if let Some(flags) = question.get_mut(2) {
        *flags &= 0x7f;
    }
    assert!(largest_response(&question) >= 512);
    let mut cache = DnsCache::new(4, 1 << 20);
    let (now, mut out) = (Instant::now(), Vec::new());
    cache.insert(&question, data, now);
    if answers(&question, data) && cache.get(&question, now, &mut out) {
        assert!(seconds.is_some());
        assert_eq!(out.len(), data.len());
    }
});
