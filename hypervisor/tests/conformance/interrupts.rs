//! Interrupt lines and doorbells.

use std::os::fd::AsFd as _;

use sm_hypervisor::{Doorbell, IrqTrigger, VirtualMachine as _};

use crate::bench::{Access, Backend, Bench, IRQ_HANDLER, Recorder, SHARED, run_to_stop};
use crate::guests;

pub(crate) fn a_line_wakes_a_halted_guest<H: Backend>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, guests::halts());
    bench.put(IRQ_HANDLER, guests::count_interrupt());
    let line = bench.vm.irq_line(5, IrqTrigger::Edge).unwrap();
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    // The guest is about to halt with interrupts disabled: they arrive once it enables
    // them.
    bus.on(0x12, move || line.pulse().unwrap());
    run_to_stop(&mut vcpu, &bus);
    assert_eq!(bench.word(SHARED), 3);
    assert_eq!(bus.written(0x12).len(), 3);
}

pub(crate) fn doorbells_match_their_value<H: Backend>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, guests::rings());
    let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
    let doorbell = Doorbell {
        address: 0x10_0050,
        width: Some(4),
        value: Some(1),
    };
    let fast = bench.vm.add_doorbell(doorbell, fd.as_fd()).unwrap();
    let too_wide = Doorbell {
        width: Some(1),
        value: Some(256),
        ..doorbell
    };
    assert!(!fast || bench.vm.add_doorbell(too_wide, fd.as_fd()).is_err());
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    run_to_stop(&mut vcpu, &bus);
    let writes: Vec<u8> = bus
        .take()
        .into_iter()
        .filter_map(|access| match access {
            Access::Write(0x10_0050, data) => Some(data[0]),
            _ => None,
        })
        .collect();
    if fast {
        assert_eq!(writes, [2], "other values arrive on the bus");
        let mut count = [0; 8];
        rustix::io::read(&fd, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 2);
    } else {
        assert_eq!(writes, [1, 2, 1]);
    }
}
