//! vCPUs: binding to a thread, and running.

#![expect(
    unsafe_code,
    reason = "the page shared with KVM is read and written through pointers"
)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::kick::KickState;
use super::vm_shared::VmShared;
use super::{convert, cpuid, fault, os, state};
use crate::state::x86_64::{BootRegisters, CpuidEntry, VcpuState};
use crate::{
    Bus, Error, Exit, Finish, Kicker, RestoredVcpu, RestoringVcpu, Vcpu, VcpuSeed, X86_64,
};

/// IA32_MTRR_DEF_TYPE: variable ranges on, everything write-back.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);
/// IA32_MISC_ENABLE: fast string operations.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);

/// A vCPU that no thread runs yet.
#[derive(Debug)]
pub struct KvmSeed {
    vm: Arc<VmShared>,
    fd: VcpuFd,
    index: u32,
    kick: Arc<KickState>,
}

impl KvmSeed {
    pub(super) fn new(vm: Arc<VmShared>, fd: VcpuFd, index: u32) -> Self {
        Self {
            vm,
            fd,
            index,
            kick: Arc::new(KickState::new()),
        }
    }

    /// Registers the calling thread as the one to kick.
    fn into_vcpu(mut self, cpuid: Vec<CpuidEntry>) -> KvmVcpu {
        let immediate_exit = (&raw mut self.fd.get_kvm_run().immediate_exit).cast::<AtomicU8>();
        // SAFETY: the mapping lives as long as `fd`, which the vCPU keeps until
        // after it has unbound itself; it cannot leave this thread.
        unsafe { self.kick.bind(immediate_exit) };
        KvmVcpu {
            vm: self.vm,
            fd: self.fd,
            index: self.index,
            cpuid,
            immediate_exit,
            kick: self.kick,
        }
    }
}

impl VcpuSeed for KvmSeed {
    type Arch = X86_64;
    type Vcpu = KvmVcpu;

    fn index(&self) -> u32 {
        self.index
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        self.kick.clone()
    }

    fn bind(self, boot: Option<&BootRegisters>) -> Result<KvmVcpu, Error> {
        let supported = self.vm.kvm.supported_cpuid()?;
        let deadline = self.vm.tsc_deadline();
        let cpuid = cpuid::for_vcpu(supported, self.index, self.vm.vcpus, deadline)?;
        self.fd.set_cpuid2(&cpuid).map_err(os("write CPUID"))?;
        set_firmware_msrs(&self.fd);
        if let Some(boot) = boot {
            self.vm.mask_legacy_controllers()?;
            set_boot_registers(&self.fd, boot)?;
        }
        let entries = cpuid.as_slice().iter().map(convert::from_cpuid).collect();
        Ok(self.into_vcpu(entries))
    }

    fn bind_restored(self, state: &VcpuState) -> Result<(KvmRestoring, RestoredVcpu), Error> {
        if state.index != self.index {
            return Err(Error::State {
                reason: format!("it is of vCPU {}, not {}", state.index, self.index),
            });
        }
        self.into_vcpu(state.cpuid.clone()).apply(state, true)
    }
}

/// Sets the MSRs that firmware sets on every processor. A KVM that refuses one of them does
/// not emulate it; then no guest depends on it.
fn set_firmware_msrs(fd: &VcpuFd) {
    let entries = [MTRR_DEF_TYPE, MISC_ENABLE].map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    });
    if let Ok(msrs) = Msrs::from_entries(&entries) {
        let _ = fd.set_msrs(&msrs);
    }
}

fn set_boot_registers(fd: &VcpuFd, boot: &BootRegisters) -> Result<(), Error> {
    let mut sregs = fd.get_sregs().map_err(os("read system registers"))?;
    sregs.cs = convert::to_segment(boot.cs);
    let data = convert::to_segment(boot.ds);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = convert::to_segment(boot.tr);
    sregs.gdt = convert::to_table(boot.gdt);
    sregs.idt = convert::to_table(boot.idt);
    sregs.cr0 = boot.cr0;
    sregs.cr3 = boot.cr3;
    sregs.cr4 = boot.cr4;
    sregs.efer = boot.efer;
    fd.set_sregs(&sregs).map_err(os("write system registers"))?;
    let regs = kvm_bindings::kvm_regs {
        rip: boot.rip,
        rbx: boot.rbx,
        rsi: boot.rsi,
        rsp: boot.rsp,
        rflags: boot.rflags | 2,
        ..kvm_bindings::kvm_regs::default()
    };
    fd.set_regs(&regs).map_err(os("write registers"))
}

/// A vCPU on its thread.
#[derive(Debug)]
pub struct KvmVcpu {
    vm: Arc<VmShared>,
    fd: VcpuFd,
    index: u32,
    /// CPUID that the vCPU was given. Not every KVM returns it unchanged: one without
    /// hardware virtualisation reports the host's processor.
    cpuid: Vec<CpuidEntry>,
    /// The pointer also prevents `Send`.
    immediate_exit: *const AtomicU8,
    kick: Arc<KickState>,
}

/// Result of one entry into the guest.
enum EntryOutcome {
    /// A device access was served; KVM has to be entered to complete it.
    Access,
    /// Interrupted.
    Interrupted,
    /// An exit that the machine handles.
    Exit(Exit),
}

impl KvmVcpu {
    fn set_immediate_exit(&self, value: u8) {
        // SAFETY: points into the mapping that `self.fd` owns.
        unsafe { &*self.immediate_exit }.store(value, Ordering::SeqCst);
    }

    /// Enters the guest once.
    fn enter(&mut self, bus: &dyn Bus) -> Result<EntryOutcome, Error> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(EntryOutcome::Interrupted);
            }
            Err(error) => {
                return Err(Error::Os {
                    operation: "run a vCPU",
                    source: io::Error::from_raw_os_error(error.errno()),
                });
            }
        };
        let reason = match exit {
            VcpuExit::IoIn(port, data) => {
                let data: *mut [u8] = data;
                let width = self.port_width();
                // SAFETY: the data lie behind the structure that `port_width` read, in the
                // same mapping, and nothing else refers to them.
                for item in unsafe { &mut *data }.chunks_exact_mut(width) {
                    item.fill(0xff);
                    bus.pio_read(port, item);
                }
                return Ok(EntryOutcome::Access);
            }
            VcpuExit::IoOut(port, data) => {
                let data: *const [u8] = data;
                let width = self.port_width();
                // SAFETY: as above.
                for item in unsafe { &*data }.chunks_exact(width) {
                    bus.pio_write(port, item);
                }
                return Ok(EntryOutcome::Access);
            }
            VcpuExit::MmioRead(address, data) => {
                data.fill(0xff);
                bus.mmio_read(address, data);
                return Ok(EntryOutcome::Access);
            }
            VcpuExit::MmioWrite(address, data) => {
                bus.mmio_write(address, data);
                return Ok(EntryOutcome::Access);
            }
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => return Ok(EntryOutcome::Interrupted),
            VcpuExit::Hlt => return Ok(EntryOutcome::Exit(Exit::Halt)),
            VcpuExit::Shutdown => return Ok(EntryOutcome::Exit(Exit::TripleFault)),
            VcpuExit::SystemEvent(kind, _) => match kind {
                kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => {
                    return Ok(EntryOutcome::Exit(Exit::Shutdown));
                }
                kvm_bindings::KVM_SYSTEM_EVENT_RESET => return Ok(EntryOutcome::Exit(Exit::Reset)),
                kind => format!("system event {kind}"),
            },
            VcpuExit::FailEntry(reason, cpu) => {
                format!("hardware refused to enter the guest on CPU {cpu}: {reason:#x}")
            }
            VcpuExit::InternalError => fault::internal_error(&mut self.fd),
            other => format!("unexpected exit {other:?}"),
        };
        let info = fault::locate(&mut self.fd, &self.vm.slots, reason);
        Ok(EntryOutcome::Exit(Exit::Fault(info)))
    }

    /// Width in bytes of the port access that KVM just reported; a string
    /// operation reports several items at once.
    fn port_width(&mut self) -> usize {
        // SAFETY: the exit reason is KVM_EXIT_IO, for which KVM fills this member
        // of the union.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        usize::from(io.size).max(1)
    }

    /// Lets KVM complete an access that was served, without running the guest:
    /// afterwards registers and instruction pointer are consistent.
    fn complete_access(&mut self, bus: &dyn Bus) -> Result<Option<Exit>, Error> {
        loop {
            self.set_immediate_exit(1);
            match self.enter(bus)? {
                // The next part of a split access.
                EntryOutcome::Access => {}
                EntryOutcome::Interrupted => return Ok(None),
                EntryOutcome::Exit(exit) => return Ok(Some(exit)),
            }
        }
    }

    fn apply(self, state: &VcpuState, fresh: bool) -> Result<(KvmRestoring, RestoredVcpu), Error> {
        state::restore(&self.fd, state, fresh, &self.vm)?;
        // Notifies a guest that uses kvmclock that it was paused; KVM refuses if the guest
        // does not use it, which is fine.
        let _ = self.fd.kvmclock_ctrl();
        #[cfg(debug_assertions)]
        self.compare(state)?;
        let proof = RestoredVcpu::new(&self.vm.identity, self.index);
        Ok((KvmRestoring(self), proof))
    }

    fn save_state(&self, msrs: &[u32]) -> Result<VcpuState, Error> {
        let (cpuid, xsave_len) = (self.cpuid.clone(), self.vm.xsave_len);
        state::save(&self.fd, self.index, cpuid, xsave_len, msrs)
    }

    /// Reads all state back and compares it, except for values that change by themselves.
    #[cfg(debug_assertions)]
    fn compare(&self, wanted: &VcpuState) -> Result<(), Error> {
        let indices: Vec<u32> = wanted.msrs.iter().map(|(index, _)| *index).collect();
        let found = self.save_state(&indices)?;
        super::compare::check_equal(wanted, &found)
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.unbind();
    }
}

/// A vCPU whose state has been restored.
#[derive(Debug)]
pub struct KvmRestoring(KvmVcpu);

impl RestoringVcpu for KvmRestoring {
    type Vcpu = KvmVcpu;

    fn finish_restore(self, finish: Finish) -> Result<KvmVcpu, Error> {
        self.0.vm.identity.redeem(self.0.index, finish)?;
        Ok(self.0)
    }
}

impl Vcpu for KvmVcpu {
    type Arch = X86_64;
    type Restoring = KvmRestoring;

    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, Error> {
        let mut access = false;
        loop {
            if self.kick.take() {
                let exit = if access {
                    self.complete_access(bus)?
                } else {
                    None
                };
                self.set_immediate_exit(0);
                return Ok(exit.unwrap_or(Exit::Cancelled));
            }
            access = match self.enter(bus)? {
                EntryOutcome::Access => true,
                EntryOutcome::Interrupted => {
                    self.set_immediate_exit(0);
                    false
                }
                EntryOutcome::Exit(exit) => return Ok(exit),
            };
        }
    }

    fn save(&mut self) -> Result<VcpuState, Error> {
        let readable = &self.vm.readable_msrs;
        let indices = match readable.get() {
            Some(indices) => indices,
            None => self.vm.kvm.msr_indices()?,
        };
        let state = self.save_state(indices)?;
        // The other vCPUs have the same features.
        readable.get_or_init(|| state.msrs.iter().map(|(index, _)| *index).collect());
        Ok(state)
    }

    fn reload(self, state: &VcpuState) -> Result<(KvmRestoring, RestoredVcpu), Error> {
        self.apply(state, false)
    }

    fn notify_paused(&mut self) {
        // KVM refuses if the guest does not use kvmclock; there is nothing to notify then.
        let _ = self.fd.kvmclock_ctrl();
    }
}
