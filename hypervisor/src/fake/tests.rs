use super::*;
use crate::{
    Aarch64, Bus, IrqTrigger, MemoryRegion, RestoringVcpu as _, Vcpu as _, VcpuSeed as _,
    VirtualMachine as _,
};

/// Answers reads with the low byte of the address.
struct Echo;

impl Bus for Echo {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(address.to_le_bytes()[0]);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port.to_le_bytes()[0]);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {}
}

#[test]
fn a_script_is_played_and_kicks_stick() {
    let fake = FakeHypervisor::new(vec![vec![
        Step::PioRead(0x21, 2),
        Step::Exit(Exit::Reset),
        Step::MmioRead(0x33, 1),
        Step::Fail,
    ]]);
    let vm = fake.create_vm(&VmParameters { vcpus: 1 }).unwrap();
    let seed = vm.create_vcpu(0).unwrap();
    let kicker = seed.kicker();
    kicker.kick();
    kicker.kick();
    let mut vcpu = seed.bind(None).unwrap();
    assert_eq!(vcpu.run(&Echo).unwrap(), Exit::Cancelled);
    assert_eq!(vcpu.run(&Echo).unwrap(), Exit::Reset);
    assert!(vcpu.run(&Echo).is_err());
    let expected = [
        FakeEvent::Bound(0, None),
        FakeEvent::Read(0, vec![0x21, 0x21]),
        FakeEvent::Read(0, vec![0x33]),
    ];
    assert_eq!(fake.take_events(), expected);
    assert!(vm.create_vcpu(1).is_err());
}

#[test]
fn saved_state_goes_on_in_another_vm() {
    goes_on_in_another_vm::<X86_64>();
    goes_on_in_another_vm::<Aarch64>();
}

fn goes_on_in_another_vm<A: FakeArch>() {
    let fake = FakeHypervisor::<A>::of_arch(vec![vec![
        Step::Exit(Exit::Reset),
        Step::WaitIrq(5),
        Step::Exit(Exit::Shutdown),
    ]]);
    let vm = fake.create_vm(&VmParameters { vcpus: 1 }).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap().bind(None).unwrap();
    assert_eq!(vcpu.run(&Echo).unwrap(), Exit::Reset);
    vm.irq_line(5, IrqTrigger::Edge).unwrap().pulse().unwrap();
    let (vcpu_state, vm_state) = (vcpu.save().unwrap(), vm.save().unwrap());

    let other = fake.create_vm(&VmParameters { vcpus: 1 }).unwrap();
    let seed = other.create_vcpu(0).unwrap();
    let (restoring, proof) = seed.bind_restored(&vcpu_state).unwrap();
    assert!(other.restore(&vm_state, Vec::new()).is_err());
    let _ = fake.take_events();
    let finish = other.restore(&vm_state, vec![proof]).unwrap().remove(0);
    let mut vcpu = restoring.finish_restore(finish).unwrap();
    let expected = [FakeEvent::VmRestored, FakeEvent::Finished(0)];
    assert_eq!(fake.take_events(), expected);
    // The interrupt that was pending wakes the vCPU.
    assert_eq!(vcpu.run(&Echo).unwrap(), Exit::Shutdown);
}

#[test]
fn an_interrupt_or_a_kick_ends_waiting() {
    let fake = FakeHypervisor::new(vec![vec![Step::WaitIrq(9), Step::Exit(Exit::Halt)]]);
    let vm = fake.create_vm(&VmParameters { vcpus: 1 }).unwrap();
    let line = vm.irq_line(9, IrqTrigger::Edge).unwrap();
    let seed = vm.create_vcpu(0).unwrap();
    let kicker = seed.kicker();
    let (left, leaves) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut vcpu = seed.bind(None).unwrap();
            for _ in 0..2 {
                left.send(vcpu.run(&Echo).unwrap()).unwrap();
            }
        });
        kicker.kick();
        assert_eq!(leaves.recv(), Ok(Exit::Cancelled));
        line.pulse().unwrap();
        assert_eq!(leaves.recv(), Ok(Exit::Halt));
    });
}

#[test]
fn regions_are_whole_pages_and_apart() {
    let fake = FakeHypervisor::new(Vec::new());
    let vm = fake.create_vm(&VmParameters { vcpus: 1 }).unwrap();
    let region = |guest_address, len| MemoryRegion {
        guest_address,
        host_address: std::ptr::NonNull::dangling(),
        len,
    };
    #[expect(unsafe_code, reason = "the fake never touches the memory")]
    // SAFETY: nothing is dereferenced.
    let map = |guest_address, len| unsafe { vm.map_memory(region(guest_address, len)) };
    map(0, 0x10_0000).unwrap();
    assert!(map(0xf_f000, 0x1000).is_err(), "overlaps");
    assert!(map(0x20_0000, 0x800).is_err(), "half a page");
}
