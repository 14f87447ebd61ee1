//! Memory slots and the dirty log.

use sm_hypervisor::{Hypervisor, SlotId, Vm as _};

use crate::bench::{Access, Bench, CODE, MEMORY_LEN, Recorder, run_to_stop};
use crate::guests;

const REGION: u64 = 0x20_0000;
const REGION_LEN: usize = 0x1_0000;

fn bench<H: Hypervisor>(hypervisor: &H) -> Bench<H> {
    let ranges = [(0, MEMORY_LEN), (REGION, REGION_LEN)];
    let bench = Bench::with_ranges(hypervisor, 1, &ranges);
    bench.write_tables();
    bench.put(CODE, guests::writes_pages());
    bench
}

fn pages<H: Hypervisor>(bench: &Bench<H>, slot: SlotId) -> Vec<u32> {
    let words = bench.vm.take_dirty(slot).unwrap().words;
    assert_eq!(words.len(), 1, "16 pages");
    (0..64).filter(|page| words[0] >> page & 1 != 0).collect()
}

pub(crate) fn written_pages_are_told_once<H: Hypervisor>(hypervisor: &H) {
    let bench = bench(hypervisor);
    let slot = bench.map(REGION, REGION_LEN, true);
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    run_to_stop(&mut vcpu, &bus);
    assert_eq!(pages(&bench, slot), [3, 5]);
    assert!(pages(&bench, slot).is_empty());
    run_to_stop(&mut vcpu, &bus);
    assert_eq!(pages(&bench, slot), [7]);
    bench.vm.set_dirty_tracking(slot, false).unwrap();
    assert!(bench.vm.take_dirty(slot).is_err());
    bench.vm.set_dirty_tracking(slot, true).unwrap();
    assert!(pages(&bench, slot).is_empty());
    run_to_stop(&mut vcpu, &bus);
    assert_eq!(pages(&bench, slot), [8]);
}

pub(crate) fn an_unmapped_region_is_the_bus<H: Hypervisor>(hypervisor: &H) {
    let bench = bench(hypervisor);
    let slot = bench.map(REGION, REGION_LEN, false);
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    for _ in 0..2 {
        run_to_stop(&mut vcpu, &bus);
    }
    bus.take();
    bench.vm.unmap_memory(slot).unwrap();
    run_to_stop(&mut vcpu, &bus);
    let expected = [
        Access::Write(REGION + 0x8000, vec![1]),
        Access::Read(REGION + 0x8000, 1),
        Access::Out(0x80, vec![0xa0]),
    ];
    assert_eq!(bus.take(), expected);
}

pub(crate) fn unknown_slots_are_errors<H: Hypervisor>(hypervisor: &H) {
    let bench = bench(hypervisor);
    let unknown = SlotId(77);
    assert!(bench.vm.unmap_memory(unknown).is_err());
    assert!(bench.vm.take_dirty(unknown).is_err());
    assert!(bench.vm.set_dirty_tracking(unknown, true).is_err());
}
