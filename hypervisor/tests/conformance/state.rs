//! Saving a guest, and continuing it elsewhere.

use sm_hypervisor::state::x86_64::VcpuState;
use sm_hypervisor::{
    Bus, Error, Exit, RestoringVcpu as _, Vcpu as _, VcpuSeed as _, VirtualMachine as _,
    VmSavedState,
};

use crate::bench::{
    Backend, Bench, DUMP, IDT, INVALID_HANDLER, IRQ_HANDLER, MEMORY_LEN, MSR_LIST, Recorder,
    SHARED, VECTORS, VcpuOf, run_to_stop,
};
use crate::guests;

/// Values that the guest writes into model-specific registers.
const MSRS: [(u32, u64); 12] = [
    (0xc000_0081, 0x0018_0008_0000_0000), // STAR
    (0xc000_0082, 0x0000_7fff_1234_5000), // LSTAR
    (0xc000_0083, 0x0000_7fff_2345_6000), // CSTAR
    (0xc000_0084, 0x0004_7700),           // FMASK
    (0xc000_0100, 0x1_0900),              // FS_BASE: the guest reads through it
    (0xc000_0101, 0x1_0908),              // GS_BASE
    (0xc000_0102, 0x0000_7abc_def0_1000), // KERNEL_GS_BASE
    (0x174, 0x08),                        // SYSENTER_CS
    (0x175, 0x6666_1000),                 // SYSENTER_ESP: 32 bits on AMD
    (0x176, 0x5555_2000),                 // SYSENTER_EIP
    (0x277, 0x0007_0406_0007_0106),       // PAT
    (TSC_AUX, 0x1357),
];
const TSC_AUX: u32 = 0xc000_0103;
/// Length of the guest's results.
const DUMP_LEN: usize = 0x2000;
/// Processor features that extend the check.
const AVX: u32 = 1;
const AVX512: u32 = 2;

/// XCR0: x87, SSE, AVX; opmask and both parts of ZMM.
fn xcr0(features: u32) -> u64 {
    match features {
        0 => 0b11,
        AVX => 0b111,
        _ => 0b1110_0111,
    }
}

/// Returns the features that the guest's CPUID reports.
fn features(state: &VcpuState) -> u32 {
    let leaf = |function, index| {
        let mut leaves = state.cpuid.iter();
        leaves.find(|leaf| leaf.function == function && leaf.index == index)
    };
    let xsave = leaf(1, 0).is_some_and(|leaf| leaf.ecx & 1 << 26 != 0);
    let components = leaf(0xd, 0).map_or(0, |leaf| leaf.eax);
    let avx = xsave && components & 4 != 0 && leaf(1, 0).is_some_and(|l| l.ecx & 1 << 28 != 0);
    let avx512 =
        avx && components & 0xe0 == 0xe0 && leaf(7, 0).is_some_and(|l| l.ebx & 1 << 16 != 0);
    (u32::from(avx) * AVX) | (u32::from(avx512) * AVX512)
}

/// Returns a vector area in which no two consecutive bytes are equal.
fn vectors() -> Vec<u8> {
    (0..2048_u32).map(|i| (i * 37 + i / 256) as u8).collect()
}

struct Saved {
    vcpu: VcpuState,
    vm: VmSavedState,
    memory: Vec<u8>,
    features: u32,
    /// Values that the guest wrote into model-specific registers.
    msrs: Vec<(u32, u64)>,
}

/// Boots the guest, and stops it when all its state is set.
fn started<H: Backend>(hypervisor: &H, bus: &Recorder) -> (Bench<H>, VcpuOf<H>, Saved) {
    let bench = Bench::new(hypervisor, 1, guests::sets_state());
    bench.put(INVALID_HANDLER, guests::dumps_state());
    bench.put(VECTORS, &vectors());
    bench.put(DUMP + 0x900, b"fs found gs found");
    let mut vcpu = bench.boot(bus);
    // The host enables the extended state: a KVM without hardware virtualisation may not
    // emulate XSETBV.
    let mut state = vcpu.save().unwrap();
    let features = features(&state);
    if features != 0 {
        state.system.cr4 |= 1 << 18;
        state.xcrs = vec![(0, xcr0(features))];
        let vm = bench.vm.save().unwrap();
        vcpu = bench.reload(vcpu, &state, &vm);
    }
    bench.put(SHARED + 4, &features.to_le_bytes());
    // A KVM without hardware virtualisation may lack this register.
    let aux = state.msrs.iter().any(|(index, _)| *index == TSC_AUX);
    let msrs: Vec<_> = MSRS
        .into_iter()
        .filter(|(index, _)| aux || *index != TSC_AUX)
        .collect();
    bench.put(MSR_LIST, &(msrs.len() as u32).to_le_bytes());
    for (slot, (index, value)) in (1..).zip(&msrs) {
        bench.put(MSR_LIST + slot * 16, &index.to_le_bytes());
        bench.put(MSR_LIST + slot * 16 + 8, &value.to_le_bytes());
    }
    run_to_stop(&mut vcpu, bus);
    let saved = Saved {
        vcpu: vcpu.save().unwrap(),
        vm: bench.vm.save().unwrap(),
        memory: bench.get(0, MEMORY_LEN),
        features,
        msrs,
    };
    (bench, vcpu, saved)
}

/// Checks that the values were set: otherwise the comparison proves nothing.
fn check_reference(dump: &[u8], saved: &Saved) {
    let word = |offset: usize| u64::from_le_bytes(dump[offset..offset + 8].try_into().unwrap());
    assert_eq!(word(0), 0xa1a1_a1a1_a1a1_a1a1);
    assert_eq!(word(0x78), 0x1515_1515_1515_1515);
    assert_eq!(word(0x80) & 0x401, 0x401, "direction, carry");
    assert_eq!(dump[0xa0..0xa4], 0x1fa0_u32.to_le_bytes(), "MXCSR");
    assert_eq!(&dump[0xa8..0xb0], b"fs found");
    for (slot, (index, value)) in saved.msrs.iter().enumerate() {
        assert_eq!(word(0x100 + slot * 8), *value, "MSR {index:#x}");
    }
    assert_eq!(word(0x400), 0x1111_0000, "DR0");
    assert_eq!(word(0x430), 0x1234_5678_9000, "CR2");
    assert_eq!(word(0x448), 2, "CR8");
    let (registers, width) = match saved.features {
        0 => (16, 16),
        AVX => (16, 32),
        _ => (32, 64),
    };
    let input = vectors();
    for register in 0..registers {
        let range = register * 64..register * 64 + width;
        let found = &dump[0x1000 + range.start..0x1000 + range.end];
        assert_eq!(found, &input[range], "vector register {register}");
    }
}

/// Compares two dumps, and names the part that differs.
fn assert_same(reference: &[u8], found: &[u8]) {
    let different = reference.iter().zip(found).position(|(a, b)| a != b);
    if let Some(offset) = different {
        let line = offset & !7;
        panic!(
            "at {offset:#x} the guest found {:x?} instead of {:x?}",
            &found[line..line + 8],
            &reference[line..line + 8]
        );
    }
}

pub(crate) fn a_restored_guest_finds_everything<H: Backend>(hypervisor: &H) {
    let bus = Recorder::default();
    let (bench, mut vcpu, saved) = started(hypervisor, &bus);
    eprintln!(
        "features: AVX and AVX-512 are bits 0 and 1 of {}",
        saved.features
    );
    run_to_stop(&mut vcpu, &bus);
    let reference = bench.get(DUMP, DUMP_LEN);
    check_reference(&reference, &saved);
    drop((vcpu, bench));

    for _ in 0..2 {
        let bench = Bench::with_memory(hypervisor, 1, &saved.memory);
        let bus = Recorder::default();
        let mut vcpu = bench.restore(&bus, &saved.vcpu, &saved.vm);
        run_to_stop(&mut vcpu, &bus);
        assert_same(&reference, &bench.get(DUMP, DUMP_LEN));
    }
}

pub(crate) fn a_guest_reset_in_place_finds_everything<H: Backend>(hypervisor: &H) {
    let bus = Recorder::default();
    let (bench, mut vcpu, saved) = started(hypervisor, &bus);
    run_to_stop(&mut vcpu, &bus);
    let reference = bench.get(DUMP, DUMP_LEN);
    for _ in 0..2 {
        bench.put(0, &saved.memory);
        vcpu = bench.reload(vcpu, &saved.vcpu, &saved.vm);
        run_to_stop(&mut vcpu, &bus);
        assert_same(&reference, &bench.get(DUMP, DUMP_LEN));
    }
}

/// Also for a machine saved in its first second, when KVM treats a written counter as an
/// attempt to synchronise.
pub(crate) fn time_does_not_go_backwards<H: Backend>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, guests::reads_time());
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    run_to_stop(&mut vcpu, &bus);
    let saved = (vcpu.save().unwrap(), bench.vm.save().unwrap());
    let memory = bench.get(0, MEMORY_LEN);
    drop((vcpu, bench));

    let bench = Bench::with_memory(hypervisor, 1, &memory);
    let bus = Recorder::default();
    let mut vcpu = bench.restore(&bus, &saved.0, &saved.1);
    run_to_stop(&mut vcpu, &bus);
    let time = |offset| u64::from_le_bytes(bench.get(SHARED + offset, 8).try_into().unwrap());
    assert!(time(8) > time(0), "{} then {}", time(0), time(8));
}

/// A bus on which a read is the last access before a pause.
struct StopsOnReads<'a>(&'a Recorder);

impl Bus for StopsOnReads<'_> {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.0.mmio_read(address, data);
        self.0.stop();
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.0.mmio_write(address, data);
    }
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.0.pio_read(port, data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.0.pio_write(port, data);
    }
}

/// A vCPU that is stopped between the fault and its delivery: CR2 gets its value only on
/// delivery, or when the events are read.
pub(crate) fn a_pending_page_fault_keeps_its_address<H: Backend>(hypervisor: &H) {
    const ADDRESS: u64 = 0x4000_1230;
    let bench = Bench::new(hypervisor, 1, guests::faults_after_an_access());
    bench.put(IRQ_HANDLER, guests::notes_fault());
    let gate = IRQ_HANDLER | 0x08 << 16 | 0x8e00 << 32;
    bench.put(IDT + 14 * 16, &gate.to_le_bytes());
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    let exit = vcpu.run(&StopsOnReads(&bus)).unwrap();
    assert_eq!(exit, Exit::Cancelled);
    let saved = (vcpu.save().unwrap(), bench.vm.save().unwrap());
    let memory = bench.get(0, MEMORY_LEN);
    drop((vcpu, bench));

    let bench = Bench::with_memory(hypervisor, 1, &memory);
    let bus = Recorder::default();
    let mut vcpu = bench.restore(&bus, &saved.0, &saved.1);
    run_to_stop(&mut vcpu, &bus);
    let noted = u64::from_le_bytes(bench.get(SHARED, 8).try_into().unwrap());
    assert_eq!(noted, ADDRESS, "CR2 was saved as {:#x}", saved.0.system.cr2);
}

pub(crate) fn damaged_state_is_refused<H: Backend>(hypervisor: &H) {
    let bus = Recorder::default();
    let (_bench, _vcpu, saved) = started(hypervisor, &bus);
    let refused = |change: &dyn Fn(&mut VcpuState)| {
        let mut state = saved.vcpu.clone();
        change(&mut state);
        let bench = Bench::with_memory(hypervisor, 1, &saved.memory);
        let seed = bench.vm.create_vcpu(0).unwrap();
        match seed.bind_restored(&state) {
            Ok(_) => panic!("accepted"),
            Err(error) => error.to_string(),
        }
    };
    assert!(refused(&|s| s.index = 1).contains("vCPU 1"));
    assert!(refused(&|s| s.xsave.truncate(100)).contains("XSAVE"));
    assert!(refused(&|s| s.lapic.truncate(100)).contains("local APIC"));
    assert!(refused(&|s| s.events.backend = "whp".to_owned()).contains("whp"));
    assert!(refused(&|s| s.events.bytes.truncate(3)).contains("events"));
    assert!(refused(&|s| s.cpuid = vec![Default::default(); 1000]).contains("CPUID"));
    assert!(refused(&|s| s.xcrs = vec![(0, 3); 100]).contains("control registers"));
    // An EFER with reserved bits.
    assert!(refused(&|s| s.msrs.push((0xc000_0080, u64::MAX))).contains("0xc0000080"));
}

pub(crate) fn all_vcpus_must_be_restored<H: Backend>(hypervisor: &H) {
    let bench = Bench::new(hypervisor, 1, guests::ports());
    let state = bench.vm.save().unwrap();
    assert!(bench.vm.restore(&state, vec![]).is_err());
    let bus = Recorder::default();
    let mut vcpu = bench.boot(&bus);
    let vcpu_state = vcpu.save().unwrap();
    let vcpu = bench.reload(vcpu, &vcpu_state, &state);
    let mut other = state.clone();
    other.blob.version += 1;
    let (_restoring, proof) = vcpu.reload(&vcpu_state).unwrap();
    assert!(bench.vm.restore(&other, vec![proof]).is_err());
}

/// Neither a proof nor a permission of one VM is valid in another.
pub(crate) fn tokens_of_another_vm_are_refused<H: Backend>(hypervisor: &H) {
    let benches = [(); 2].map(|()| Bench::new(hypervisor, 1, guests::ports()));
    let bus = Recorder::default();
    let [one, two] = benches.each_ref().map(|bench| {
        let mut vcpu = bench.boot(&bus);
        let saved = vcpu.save().unwrap();
        (bench.vm.save().unwrap(), vcpu.reload(&saved).unwrap())
    });
    let ((vm_one, (_, proof_one)), (vm_two, (restoring_two, proof_two))) = (one, two);
    let refused = benches[0].vm.restore(&vm_one, vec![proof_two]);
    assert!(
        matches!(refused, Err(Error::ForeignToken { vcpu: 0 })),
        "{refused:?}"
    );
    let finish = benches[0].vm.restore(&vm_one, vec![proof_one]).unwrap();
    let refused = restoring_two.finish_restore(finish.into_iter().next().unwrap());
    assert!(matches!(refused, Err(Error::ForeignToken { vcpu: 0 })));
    assert!(benches[1].vm.restore(&vm_two, vec![]).is_err());
}
