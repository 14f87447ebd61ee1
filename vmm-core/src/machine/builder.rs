//! Builder of [`Machine`]: everything but vCPUs first, then the vCPUs.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sm_hypervisor::{
    Hypervisor, IrqTrigger, MemoryRegion, RestoredVcpu, VirtualMachine, VmParameters,
};

use super::error::hypervisor;
use super::{Machine, MachineError, Phases};
use crate::bus::{BusBuilder, MachineBus};
use crate::devices::{DeviceConfig, Devices};
use crate::exit::ExitLatch;
use crate::layout::{COM1_GSI, COM1_PORT, GED_GSI};
use crate::memory::MachineMemory;
use crate::power;
use crate::serial::{Console, Uart};
use crate::vcpu_thread::{VcpuStart, VcpuThread};
use crate::vmgenid::GenerationId;
use sm_event_loop::EventLoopHandle;

/// Measures consecutive steps.
pub(super) struct Stopwatch(Instant);

impl Stopwatch {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    pub(super) fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now))
    }
}

/// A machine without vCPUs.
pub(super) struct MachineBuilder<H: Hypervisor> {
    pub(super) vm: H::Vm,
    pub(super) memory: MachineMemory,
    pub(super) bus: Arc<MachineBus>,
    pub(super) devices: Devices,
    pub(super) uart: Arc<Uart>,
    pub(super) console: Console,
    pub(super) exit: Arc<ExitLatch>,
    pub(super) generation: GenerationId,
    pub(super) phases: Phases,
}

/// The vCPU threads of a machine, and the tokens of the restored ones.
pub(super) type Started<A> = (Vec<VcpuThread<A>>, Vec<RestoredVcpu>);

impl<H: Hypervisor> MachineBuilder<H> {
    pub(super) fn build(
        host: &H,
        memory: MachineMemory,
        vcpus: u32,
        console: File,
        devices: Vec<DeviceConfig>,
        event_loop: &EventLoopHandle,
    ) -> Result<Self, MachineError> {
        let mut watch = Stopwatch::start();
        let vm = host
            .create_vm(&VmParameters { vcpus })
            .map_err(hypervisor("create the virtual machine"))?;
        let hypervisor_objects = watch.lap();
        map_memory(&vm, &memory)?;
        let memory_map = watch.lap();

        let line = |gsi| {
            vm.irq_line(gsi, IrqTrigger::Edge)
                .map_err(hypervisor("open an interrupt line"))
        };
        let exit = Arc::new(ExitLatch::new().map_err(|source| MachineError::Io {
            operation: "create an event descriptor",
            source,
        })?);
        let console = Console::new(console);
        let uart = Arc::new(Uart::new(line(COM1_GSI)?, console.clone()));
        let generation = GenerationId::new(memory.guest.clone(), line(GED_GSI)?);
        let mut bus = BusBuilder::default();
        bus.pio(COM1_PORT, 8, uart.clone())?;
        power::attach(&mut bus, &exit)?;
        let hypervisor_objects = hypervisor_objects + watch.lap();
        let devices = Devices::attach(devices, &vm, &mut bus, &memory.guest, event_loop)?;
        let bus = Arc::new(bus.build());
        Ok(Self {
            vm,
            memory,
            bus,
            devices,
            uart,
            console,
            exit,
            generation,
            phases: Phases {
                hypervisor_objects,
                devices: watch.lap(),
                memory_map,
                ..Phases::default()
            },
        })
    }

    /// Starts all vCPU threads, parked, and waits until each is bound.
    pub(super) fn start(
        &self,
        starts: impl Iterator<Item = VcpuStart<H::Arch>>,
    ) -> Result<Started<H::Arch>, MachineError> {
        let mut threads = Vec::new();
        let mut answers = Vec::new();
        for (index, start) in (0u32..).zip(starts) {
            let seed = self
                .vm
                .create_vcpu(index)
                .map_err(hypervisor("create a vCPU"))?;
            let (thread, bound) =
                VcpuThread::spawn(seed, start, self.bus.clone(), self.exit.clone())?;
            threads.push(thread);
            answers.push(bound);
        }
        let mut proofs = Vec::new();
        for answer in answers {
            proofs.extend(answer.wait_ok()?);
        }
        self.exit
            .set_kickers(threads.iter().map(VcpuThread::kicker).collect());
        Ok((threads, proofs))
    }

    pub(super) fn finish(self, threads: Vec<VcpuThread<H::Arch>>) -> Machine<H> {
        Machine {
            threads,
            devices: self.devices,
            uart: self.uart,
            console: self.console,
            exit: self.exit,
            generation: self.generation,
            vm: self.vm,
            memory: self.memory,
            running: false,
            phases: self.phases,
        }
    }
}

#[expect(
    unsafe_code,
    reason = "hands guest memory to the hypervisor, which needs it to stay mapped"
)]
fn map_memory<V: VirtualMachine>(vm: &V, memory: &MachineMemory) -> Result<(), MachineError> {
    for region in &memory.regions {
        let host_address = memory.host_address(region).ok_or(MachineError::State {
            reason: "a memory region is not mapped".into(),
        })?;
        // SAFETY: the machine owns `memory` until the VM and all vCPUs are dropped (see the
        // order of its fields), and all other code accesses it through volatile accessors.
        unsafe {
            vm.map_memory(MemoryRegion {
                guest_address: region.guest_address,
                host_address,
                len: region.len,
            })
        }
        .map_err(hypervisor("map guest memory into the virtual machine"))?;
    }
    Ok(())
}
