//! Memory regions.

use crate::bench::{Access, Backend, Bench, CODE, MEMORY_LEN, Recorder, run_to_stop};
use crate::guests;

const REGION: u64 = 0x20_0000;
const REGION_LEN: usize = 0x1_0000;

fn bench<H: Backend>(hypervisor: &H) -> Bench<H> {
    let ranges = [(0, MEMORY_LEN), (REGION, REGION_LEN)];
    let bench = Bench::with_ranges(hypervisor, 1, &ranges);
    bench.write_tables();
    bench.put(CODE, guests::writes_pages());
    bench
}

pub(crate) fn memory_is_where_it_was_mapped<H: Backend>(hypervisor: &H) {
    let bench = bench(hypervisor);
    bench.map(REGION, REGION_LEN);
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    for _ in 0..3 {
        run_to_stop(&mut vcpu, &bus);
    }
    let written = [0x3000, 0x5fff, 0x7123, 0x8000];
    for (address, byte) in (0..).zip(bench.get(REGION, REGION_LEN)) {
        assert_eq!(byte, u8::from(written.contains(&address)), "{address:#x}");
    }
    let stops = |access: &Access| matches!(access, Access::Out(0x80, _));
    assert!(bus.take().iter().all(stops));
}

pub(crate) fn accesses_to_an_unmapped_region_reach_the_bus<H: Backend>(hypervisor: &H) {
    let bench = bench(hypervisor);
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    for _ in 0..2 {
        run_to_stop(&mut vcpu, &bus);
    }
    bus.take();
    run_to_stop(&mut vcpu, &bus);
    let expected = [
        Access::Write(REGION + 0x8000, vec![1]),
        Access::Read(REGION + 0x8000, 1),
        Access::Out(0x80, vec![0xa0]),
    ];
    assert_eq!(bus.take(), expected);
}
