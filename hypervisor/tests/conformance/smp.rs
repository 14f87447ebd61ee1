//! Several processors.

use sm_hypervisor::{VcpuSeed as _, VirtualMachine as _};

use crate::bench::{Backend, Bench, Recorder, SHARED, TRAMPOLINE, run_to_stop};
use crate::guests;

pub(crate) fn secondary_processors_start<H: Backend>(hypervisor: &H) {
    for count in [2, 4] {
        let bench = Bench::new(hypervisor, count, guests::starts_others());
        bench.put(TRAMPOLINE, guests::secondary());
        bench.put(SHARED + 4, &(count - 1).to_le_bytes());
        assert!(bench.vm.create_vcpu(count).is_err(), "one too many");
        let bus = Recorder::default();
        let mut first = bench.boot(&bus);
        std::thread::scope(|scope| {
            for index in 1..count {
                let seed = bench.vm.create_vcpu(index).unwrap();
                bus.stops(seed.kicker());
                let bus = &bus;
                scope.spawn(move || {
                    let mut vcpu = seed.bind(None).unwrap();
                    run_to_stop(&mut vcpu, bus);
                });
            }
            run_to_stop(&mut first, &bus);
        });
        for port in [0x13, 0x14] {
            let mut ids = bus.written(port);
            ids.sort_unstable();
            assert!(ids.iter().copied().map(u32::from).eq(1..count), "{ids:?}");
        }
    }
}
