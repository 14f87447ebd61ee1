//! Arbitrary bytes as the sections of a machine's state: refused, or a state that is encoded
//! and decoded again. A device with such a transport is refused, or can be used and reset.
#![no_main]

use std::sync::{Arc, LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use sm_event_loop::EventLoop;
use sm_virtio::GuestMemory;
use sm_virtio::testing::Driver;
use sm_vmm_core::state::MachineState;
use sm_vmm_core::virtio::rng::Rng;
use vm_memory::GuestAddress;

static LOOP: LazyLock<EventLoop> =
    LazyLock::new(|| EventLoop::spawn("fuzz").expect("a thread can be had"));

/// Sections that make a machine together with those of the input.
const NAMES: [&str; 6] = [
    "machine",
    "interrupts/0",
    "vcpu-x86_64/0",
    "uart/0",
    "virtio-mmio/1",
    "rng/1",
];

/// Splits the input into payloads, each after its length in two bytes.
fn payloads(mut data: &[u8]) -> Vec<&[u8]> {
    let mut payloads = Vec::new();
    while let Some((len, rest)) = data.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes(*len)).min(rest.len());
        let (payload, rest) = rest.split_at(len);
        payloads.push(payload);
        data = rest;
    }
    payloads
}

fuzz_target!(|data: &[u8]| {
    let _ = MachineState::decode([("machine", 1, data)]);
    let payloads = payloads(data);
    let versions = [2, 1, 1, 1, 1, 1];
    let sections = NAMES.iter().zip(versions).zip(payloads);
    let sections = sections.map(|((name, version), payload)| (*name, version, payload));
    let Ok(state) = MachineState::decode(sections) else {
        return;
    };
    let encoded = state.encode().expect("a decoded state can be encoded");
    let parts = encoded.iter();
    let again = MachineState::decode(parts.map(|s| (&*s.name, s.version, &*s.payload)));
    assert_eq!(again.expect("an encoded state"), state);
    let Some(slot) = state.devices.first() else {
        return;
    };
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 16)]).expect("64 KiB");
    let driver = Driver::new(Arc::new(Mutex::new(Rng::new())), &memory, LOOP.handle());
    let restored = driver.transport.restore(&slot.transport);
    driver.transport.quiesce().expect("the loop runs");
    let saved = driver.transport.save().expect("it can be saved");
    if restored.is_ok() {
        assert_eq!(saved.device, slot.transport.device);
    }
    driver.transport.unquiesce();
    driver.reset();
});
