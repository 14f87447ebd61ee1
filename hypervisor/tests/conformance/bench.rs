//! A machine for a tiny guest: memory with page tables and descriptors, a recording bus,
//! and a timeout for guests that hang.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sm_hypervisor::state::x86_64::{BootRegisters, Segment, Table, VcpuState};
use sm_hypervisor::{
    Bus, Exit, Hypervisor, Kicker, MemoryRegion, RestoredVcpu, RestoringVcpu, Vcpu, VcpuSeed,
    VirtualMachine, VmParameters, VmSavedState, X86_64,
};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

/// RAM at 0 that every guest has.
pub(crate) const MEMORY_LEN: usize = 0x2_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const TSS: u64 = 0x4800;
/// Words shared by guest and test.
pub(crate) const SHARED: u64 = 0x5000;
/// Interrupt descriptor table; a gate has 16 bytes.
pub(crate) const IDT: u64 = 0x5800;
/// Values that the guest loads into vector registers.
pub(crate) const VECTORS: u64 = 0x6000;
/// The vector of an invalid instruction.
const INVALID_OPCODE: u64 = 6;
const STACK: u64 = 0x8000;
pub(crate) const CODE: u64 = 0x8000;
/// Start address of secondary processors (start-up vector 9).
pub(crate) const TRAMPOLINE: u64 = 0x9000;
const HIGH_PD: u64 = 0xa000;
/// A list of model-specific registers for the guest.
pub(crate) const MSR_LIST: u64 = 0xb000;
/// Handler of vector 0x40.
pub(crate) const IRQ_HANDLER: u64 = 0xc000;
/// Handler of invalid instructions.
pub(crate) const INVALID_HANDLER: u64 = 0xd000;
/// Destination of the guest's results.
pub(crate) const DUMP: u64 = 0x1_0000;

/// A guest writes here at its end: all vCPUs are kicked.
pub(crate) const STOP_PORT: u16 = 0x80;
/// Timeout of a guest on the slowest host.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A backend whose guests are those of `guests.rs`.
pub(crate) trait Backend: Hypervisor<Arch = X86_64> {}

impl<H: Hypervisor<Arch = X86_64>> Backend for H {}

/// A vCPU of a backend.
pub(crate) type VcpuOf<H> = <<<H as Hypervisor>::Vm as VirtualMachine>::Seed as VcpuSeed>::Vcpu;
/// A vCPU between the phases of a restore.
type RestoringOf<H> = <VcpuOf<H> as Vcpu>::Restoring;

/// A device access seen by the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

type Reaction = Box<dyn Fn() + Send + Sync>;

/// Bus that records accesses; reads answer 0xa0, 0xa1 and so on.
#[derive(Default)]
pub(crate) struct Recorder {
    log: Mutex<Vec<Access>>,
    kickers: Mutex<Vec<Arc<dyn Kicker>>>,
    reactions: Mutex<BTreeMap<u16, Reaction>>,
    late: AtomicBool,
}

impl Recorder {
    /// Calls `reaction` on a write to `port`.
    pub(crate) fn on(&self, port: u16, reaction: impl Fn() + Send + Sync + 'static) {
        let mut reactions = self.reactions.lock().unwrap();
        reactions.insert(port, Box::new(reaction));
    }

    /// Kicks `kicker` as well when the guest has finished.
    pub(crate) fn stops(&self, kicker: Arc<dyn Kicker>) {
        self.kickers.lock().unwrap().push(kicker);
    }

    pub(crate) fn take(&self) -> Vec<Access> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    /// Returns the first byte of each write to `port`, in order.
    pub(crate) fn written(&self, port: u16) -> Vec<u8> {
        let log = self.log.lock().unwrap();
        log.iter()
            .filter_map(|access| match access {
                Access::Out(to, data) if *to == port => data.first().copied(),
                _ => None,
            })
            .collect()
    }

    pub(crate) fn stop(&self) {
        for kicker in self.kickers.lock().unwrap().iter() {
            kicker.kick();
        }
    }

    fn note(&self, access: Access) {
        self.log.lock().unwrap().push(access);
    }

    fn answer(data: &mut [u8]) {
        for (byte, value) in data.iter_mut().zip(0xa0..) {
            *byte = value;
        }
    }
}

impl Bus for Recorder {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.note(Access::Read(address, data.len()));
        Self::answer(data);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.note(Access::Write(address, data.to_vec()));
    }
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.note(Access::In(port, data.len()));
        Self::answer(data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.note(Access::Out(port, data.to_vec()));
        if let Some(reaction) = self.reactions.lock().unwrap().get(&port) {
            reaction();
        }
        if port == STOP_PORT {
            self.stop();
        }
    }
}

/// Runs until an exit returns; a guest that hangs fails the test.
pub(crate) fn run(vcpu: &mut impl Vcpu<Arch = X86_64>, bus: &Recorder) -> Exit {
    let exit = std::thread::scope(|scope| {
        let (running, ended) = channel::<()>();
        scope.spawn(move || {
            if ended.recv_timeout(TIMEOUT) == Err(RecvTimeoutError::Timeout) {
                bus.late.store(true, Ordering::SeqCst);
                bus.stop();
            }
        });
        let exit = vcpu.run(bus);
        drop(running);
        exit
    });
    assert!(!bus.late.load(Ordering::SeqCst), "the guest hangs");
    exit.unwrap()
}

/// Runs until the guest reports its end, or the vCPU is kicked.
pub(crate) fn run_to_stop(vcpu: &mut impl Vcpu<Arch = X86_64>, bus: &Recorder) {
    let exit = run(vcpu, bus);
    if exit != Exit::Cancelled {
        let at = vcpu
            .save()
            .map(|state| (state.general.rip, state.general.gpr));
        panic!("{exit:?} at {at:x?}");
    }
}

/// A VM with the memory that guests expect. The VM is dropped before the memory.
pub(crate) struct Bench<H: Backend> {
    pub(crate) vm: H::Vm,
    memory: GuestMemoryMmap,
}

impl<H: Backend> Bench<H> {
    /// Creates a VM for `code`.
    pub(crate) fn new(hypervisor: &H, vcpus: u32, code: &[u8]) -> Self {
        let bench = Self::with_ranges(hypervisor, vcpus, &[(0, MEMORY_LEN)]);
        bench.write_tables();
        bench.put(CODE, code);
        bench
    }

    /// Creates a VM whose RAM is a copy of `memory`.
    pub(crate) fn with_memory(hypervisor: &H, vcpus: u32, memory: &[u8]) -> Self {
        let bench = Self::with_ranges(hypervisor, vcpus, &[(0, MEMORY_LEN)]);
        bench.put(0, memory);
        bench
    }

    /// Creates a VM with separate RAM at each of `ranges`, the first of which is mapped.
    pub(crate) fn with_ranges(hypervisor: &H, vcpus: u32, ranges: &[(u64, usize)]) -> Self {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(address, len)| (GuestAddress(address), len))
            .collect();
        let bench = Self {
            vm: hypervisor.create_vm(&VmParameters { vcpus }).unwrap(),
            memory: GuestMemoryMmap::from_ranges(&ranges).unwrap(),
        };
        bench.map(ranges[0].0.0, ranges[0].1);
        bench
    }

    /// Maps existing RAM.
    pub(crate) fn map(&self, address: u64, len: usize) {
        let host = self.memory.get_host_address(GuestAddress(address)).unwrap();
        let region = MemoryRegion {
            guest_address: address,
            host_address: NonNull::new(host).unwrap(),
            len: len as u64,
        };
        #[expect(unsafe_code, reason = "the guest writes the memory")]
        // SAFETY: `self.memory` outlives `self.vm`, and vCPUs are locals of tests
        // that are dropped before the bench; access goes through volatile copies.
        unsafe { self.vm.map_memory(region) }.unwrap()
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        let address = GuestAddress(address);
        self.memory.write_slice(bytes, address).unwrap();
    }

    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let address = GuestAddress(address);
        self.memory.read_slice(&mut bytes, address).unwrap();
        bytes
    }

    pub(crate) fn word(&self, address: u64) -> u32 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// Boots vCPU 0 at the code; `bus` stops it.
    pub(crate) fn boot(&self, bus: &Recorder) -> VcpuOf<H> {
        let seed = self.vm.create_vcpu(0).unwrap();
        bus.stops(seed.kicker());
        seed.bind(Some(&boot_registers())).unwrap()
    }

    /// Restores vCPU 0 and the VM from saved state; `bus` stops the vCPU.
    pub(crate) fn restore(&self, bus: &Recorder, vcpu: &VcpuState, vm: &VmSavedState) -> VcpuOf<H> {
        let seed = self.vm.create_vcpu(0).unwrap();
        bus.stops(seed.kicker());
        let (restoring, proof) = seed.bind_restored(vcpu).unwrap();
        self.finish(restoring, proof, vm)
    }

    /// Resets the only vCPU and its VM in place to earlier state.
    pub(crate) fn reload(
        &self,
        vcpu: VcpuOf<H>,
        state: &VcpuState,
        vm: &VmSavedState,
    ) -> VcpuOf<H> {
        let (restoring, proof) = vcpu.reload(state).unwrap();
        self.finish(restoring, proof, vm)
    }

    fn finish(
        &self,
        restoring: RestoringOf<H>,
        proof: RestoredVcpu,
        vm: &VmSavedState,
    ) -> VcpuOf<H> {
        let mut finishes = self.vm.restore(vm, vec![proof]).unwrap();
        assert_eq!(finishes.len(), 1);
        restoring.finish_restore(finishes.remove(0)).unwrap()
    }

    /// Writes page tables for the first 4 MiB and the interrupt controllers; segments;
    /// gates for an interrupt and an exception.
    pub(crate) fn write_tables(&self) {
        let table = |address: u64, index: u64, value: u64| {
            self.put(address + index * 8, &value.to_le_bytes());
        };
        // Present, writable, for user mode too; 0x80 is a 2 MiB page, 0x10 is uncached.
        table(PML4, 0, PDPT | 7);
        table(PDPT, 0, PD | 7);
        table(PDPT, 3, HIGH_PD | 7);
        table(PD, 0, 0x87);
        table(PD, 1, 0x20_0087);
        table(HIGH_PD, 0x1f6, 0xfec0_0097);
        table(HIGH_PD, 0x1f7, 0xfee0_0097);
        let descriptors: [u64; 6] = [
            0,
            0x00af_9b00_0000_ffff, // 0x08: kernel code
            0x00cf_9300_0000_ffff, // 0x10: kernel data
            0x00cf_fb00_0000_ffff, // 0x18: user code, 32 bit
            0x00cf_f300_0000_ffff, // 0x20: user data
            0x00af_fb00_0000_ffff, // 0x28: user code, 64 bit
        ];
        for (index, descriptor) in (0..).zip(descriptors) {
            table(GDT, index, descriptor);
        }
        self.put(TSS + 4, &0x7000_u64.to_le_bytes());
        for (vector, handler) in [(0x40, IRQ_HANDLER), (INVALID_OPCODE, INVALID_HANDLER)] {
            let gate = handler & 0xffff | 0x08 << 16 | 0x8e00 << 32;
            table(IDT, vector * 2, gate);
        }
    }
}

/// 64-bit mode in ring 0 with SSE.
fn boot_registers() -> BootRegisters {
    let code = Segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x08,
        attributes: 0xa09b,
        unusable: false,
    };
    BootRegisters {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        cs: code,
        ds: Segment {
            selector: 0x10,
            attributes: 0xc093,
            ..code
        },
        tr: Segment {
            base: TSS,
            limit: 0x67,
            selector: 0,
            attributes: 0x008b,
            ..code
        },
        gdt: Table {
            base: GDT,
            limit: 6 * 8 - 1,
        },
        idt: Table {
            base: IDT,
            limit: 0x41 * 16 - 1,
        },
        cr0: 0x8000_0033,
        cr3: PML4,
        // PAE, OSFXSR, OSXMMEXCPT.
        cr4: 1 << 5 | 1 << 9 | 1 << 10,
        // LME, LMA.
        efer: 1 << 8 | 1 << 10,
        ..BootRegisters::default()
    }
}
