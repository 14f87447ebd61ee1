//! Device accesses, and the exit of a guest that faults.

use sm_hypervisor::Exit;

use crate::bench::{Access, Backend, Bench, Recorder, SHARED, STOP_PORT, run, run_to_stop};
use crate::guests;

fn played<H: Backend>(hypervisor: &H, code: &[u8]) -> (Vec<Access>, Bench<H>) {
    let bench = Bench::new(hypervisor, 1, code);
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    run_to_stop(&mut vcpu, &bus);
    let mut log = bus.take();
    assert!(matches!(log.pop(), Some(Access::Out(STOP_PORT, _))));
    drop(vcpu);
    (log, bench)
}

fn echo(value: u32) -> Access {
    Access::Out(0x12, value.to_le_bytes().to_vec())
}

pub(crate) fn ports_of_each_width<H: Backend>(hypervisor: &H) {
    let (log, _) = played(hypervisor, guests::ports());
    let expected = [
        Access::Out(0x10, vec![0x11]),
        Access::Out(0x10, vec![0x11, 0x22]),
        Access::Out(0x10, vec![0x11, 0x22, 0x33, 0x44]),
        Access::In(0x11, 1),
        echo(0xa0),
        Access::In(0x11, 2),
        echo(0xa1a0),
        Access::In(0x11, 4),
        echo(0xa3a2_a1a0),
    ];
    assert_eq!(log, expected);
}

pub(crate) fn memory_mapped_access_of_each_width<H: Backend>(hypervisor: &H) {
    let (log, _) = played(hypervisor, guests::device_memory());
    let base = 0x10_0000;
    let bytes = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88];
    let expected = [
        Access::Write(base, bytes[..1].to_vec()),
        Access::Write(base + 2, bytes[..2].to_vec()),
        Access::Write(base + 4, bytes[..4].to_vec()),
        Access::Write(base + 8, bytes.to_vec()),
        Access::Read(base, 1),
        echo(0xa0),
        Access::Read(base + 2, 2),
        echo(0xa1a0),
        Access::Read(base + 4, 4),
        echo(0xa3a2_a1a0),
        Access::Read(base + 8, 8),
        echo(0xa7a6_a5a4),
    ];
    assert_eq!(log, expected);
}

pub(crate) fn string_operations_are_split<H: Backend>(hypervisor: &H) {
    let (log, bench) = played(hypervisor, guests::strings());
    let mut expected: Vec<_> = b"hello"
        .iter()
        .map(|byte| Access::Out(0x10, vec![*byte]))
        .collect();
    expected.extend([
        Access::In(0x11, 2),
        Access::In(0x11, 2),
        Access::In(0x11, 2),
    ]);
    assert_eq!(log, expected);
    assert_eq!(bench.get(SHARED, 6), [0xa0, 0xa1, 0xa0, 0xa1, 0xa0, 0xa1]);
}

pub(crate) fn a_triple_fault_is_reported<H: Backend>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, guests::triple_fault());
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    assert_eq!(run(&mut vcpu, &bus), Exit::TripleFault);
}

pub(crate) fn a_prepared_vm_is_like_any_other<H: Backend>(hypervisor: &H) {
    let (expected, _) = played(hypervisor, guests::ports());
    hypervisor.prepare_vm();
    hypervisor.prepare_vm();
    // The prepared VM; it must not share state with the next one.
    let (log, first) = played(hypervisor, guests::ports());
    assert_eq!(log, expected);
    let (log, second) = played(hypervisor, guests::device_memory());
    assert_ne!(log, expected);
    drop((first, second));
    // A prepared VM that is never created.
    hypervisor.prepare_vm();
}
