//! The floor: the time of the KVM calls that restore the same kind of machine.
//!
//! One thread makes the calls of such a VMM in the cheapest order: no devices, no checks,
//! and state as KVM's own structures in memory.

#![expect(
    unsafe_code,
    reason = "hands memory to KVM, and an XSAVE area as KVM gave it"
)]

use std::fs::File;
use std::hint::black_box;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::vmm::{LapTimer, MAP_MEMORY, evict};

/// `mov dx, 0x600; mov al, 0x34; out dx, al; hlt` in real mode.
const CODE: [u8; 7] = [0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4];
const CODE_AT: u64 = 0x1000;
/// Start of the hole for devices in our machines.
const HOLE: u64 = 3 << 30;
const ABOVE: u64 = 4 << 30;
const TSS: usize = 0xfffb_d000;
/// Capabilities that a VMM needs.
const NEEDED: [Cap; 10] = [
    Cap::Irqchip,
    Cap::Irqfd,
    Cap::Ioeventfd,
    Cap::UserMemory,
    Cap::SetTssAddr,
    Cap::ImmediateExit,
    Cap::Xsave,
    Cap::Xcrs,
    Cap::VcpuEvents,
    Cap::AdjustClock,
];
/// Interrupt lines of a serial port, of power management and of one device, and the
/// device's doorbell.
const LINES: [u32; 3] = [4, 5, 6];
const DOORBELL: u64 = 0xd000_0050;

/// The complete state of one vCPU in KVM.
struct FloorVcpuState {
    cpuid: CpuId,
    sregs: kvm_sregs,
    regs: kvm_regs,
    xcrs: kvm_xcrs,
    xsave: Box<kvm_xsave>,
    debug: kvm_debugregs,
    msrs: Msrs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp: kvm_mp_state,
}

pub(crate) struct Floor {
    _directory: tempfile::TempDir,
    memory: std::path::PathBuf,
    len: u64,
    vcpus: Vec<FloorVcpuState>,
    chips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

/// Guest memory mapped from a file, unmapped when dropped.
struct Mapping(*mut std::ffi::c_void, usize);

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and the VM that used it was dropped before.
        let _ = unsafe { munmap(self.0, self.1) };
    }
}

fn map(file: &File, len: u64) -> Result<Mapping> {
    let len = usize::try_from(len)?;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let address = unsafe {
        mmap(
            std::ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
            file,
            0,
        )?
    };
    Ok(Mapping(address, len))
}

fn create(kvm: &Kvm) -> Result<VmFd> {
    let vm = kvm.create_vm().context("cannot create a VM")?;
    vm.set_tss_address(TSS)?;
    Ok(vm)
}

fn give_memory(vm: &VmFd, mapping: &Mapping, len: u64) -> Result<()> {
    let host = mapping.0 as u64;
    let low = len.min(HOLE);
    for (slot, guest, offset, len) in [(0, 0, 0, low), (1, ABOVE, low, len - low)] {
        if len == 0 {
            continue;
        }
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: host + offset,
        };
        // SAFETY: the mapping outlives the VM, and nothing else refers to it.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    Ok(())
}

fn save(kvm: &Kvm, fd: &VcpuFd) -> Result<FloorVcpuState> {
    let list = kvm.get_msr_index_list()?;
    let mut entries = Vec::new();
    // MSRs that cannot be read are not emulated on this host.
    for &index in list.as_slice() {
        let mut one = Msrs::from_entries(&[kvm_msr_entry {
            index,
            ..kvm_msr_entry::default()
        }])?;
        if fd.get_msrs(&mut one)? == 1 {
            let entry = one.as_slice().first().copied().unwrap_or_default();
            // MSRs that cannot be written are not restored.
            if fd.set_msrs(&one)? == 1 {
                entries.push(entry);
            }
        }
    }
    Ok(FloorVcpuState {
        cpuid: kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?,
        sregs: fd.get_sregs()?,
        regs: fd.get_regs()?,
        xcrs: fd.get_xcrs()?,
        xsave: Box::new(fd.get_xsave()?),
        debug: fd.get_debug_regs()?,
        msrs: Msrs::from_entries(&entries)?,
        lapic: fd.get_lapic()?,
        events: fd.get_vcpu_events()?,
        mp: fd.get_mp_state()?,
    })
}

impl Floor {
    pub(crate) fn new(len: u64, vcpus: u32) -> Result<Self> {
        let directory = tempfile::tempdir_in(".").context("cannot make a directory here")?;
        let memory = directory.path().join("memory");
        let mut file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(&memory)?;
        file.set_len(len)?;
        file.seek(SeekFrom::Start(CODE_AT))?;
        file.write_all(&CODE)?;

        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let vm = create(&kvm)?;
        vm.create_irq_chip()?;
        let mut states = Vec::new();
        for index in 0..vcpus {
            let fd = vm.create_vcpu(index.into())?;
            fd.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
            if index == 0 {
                let mut sregs = fd.get_sregs()?;
                sregs.cs.base = 0;
                sregs.cs.selector = 0;
                fd.set_sregs(&sregs)?;
                fd.set_regs(&kvm_regs {
                    rip: CODE_AT,
                    rflags: 2,
                    ..kvm_regs::default()
                })?;
            }
            states.push(save(&kvm, &fd)?);
        }
        let chip = |chip_id| -> Result<kvm_irqchip> {
            let mut chip = kvm_irqchip {
                chip_id,
                ..kvm_irqchip::default()
            };
            vm.get_irqchip(&mut chip)?;
            Ok(chip)
        };
        let chips = (0..3).map(chip).collect::<Result<_>>()?;
        let clock = kvm_clock_data {
            clock: vm.get_clock()?.clock,
            ..kvm_clock_data::default()
        };
        Ok(Self {
            _directory: directory,
            memory,
            len,
            vcpus: states,
            chips,
            clock,
        })
    }

    pub(crate) fn evict(&self) -> Result<()> {
        evict(&self.memory)
    }

    pub(crate) fn restore(&self) -> Result<Vec<(&'static str, Duration)>> {
        let mut watch = LapTimer::start();
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        if !NEEDED.iter().all(|cap| kvm.check_extension(*cap)) {
            bail!("this KVM cannot do what a VMM needs");
        }
        let opened = watch.lap();
        // The guest's CPUID must be supported.
        let offered = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        black_box(&offered);
        let checked = watch.lap();
        let mapping = map(&File::open(&self.memory)?, self.len)?;
        let mapped = watch.lap();
        let vm = create(&kvm)?;
        let created = watch.lap();
        // The call precedes the interrupt controllers: after them, it takes milliseconds.
        give_memory(&vm, &mapping, self.len)?;
        let registered = watch.lap();
        vm.create_irq_chip()?;
        let events: Vec<EventFd> = (0..=LINES.len())
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<std::io::Result<_>>()?;
        for (event, line) in events.iter().zip(LINES) {
            vm.register_irqfd(event, line)?;
        }
        let doorbell = IoEventAddress::Mmio(DOORBELL);
        vm.register_ioevent(&events[LINES.len()], &doorbell, NoDatamatch)?;
        let vcpus = (0..self.vcpus.len() as u64)
            .map(|index| vm.create_vcpu(index))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let objects = created + watch.lap();
        for (fd, state) in vcpus.iter().zip(&self.vcpus) {
            fd.set_cpuid2(&state.cpuid)?;
            fd.set_sregs(&state.sregs)?;
            fd.set_regs(&state.regs)?;
            fd.set_xcrs(&state.xcrs)?;
            // SAFETY: KVM filled it for a vCPU with the same features, of which
            // none needs more than this structure.
            unsafe { fd.set_xsave(&state.xsave) }?;
            fd.set_debug_regs(&state.debug)?;
            fd.set_msrs(&state.msrs)?;
            fd.set_lapic(&state.lapic)?;
            fd.set_vcpu_events(&state.events)?;
            fd.set_mp_state(state.mp)?;
        }
        for chip in &self.chips {
            vm.set_irqchip(chip)?;
        }
        vm.set_clock(&self.clock)?;
        let loaded = watch.lap();
        let mut vcpus = vcpus;
        let Some(first) = vcpus.first_mut() else {
            bail!("a machine without a vCPU");
        };
        match first.run()? {
            VcpuExit::IoOut(0x600, _) => {}
            other => bail!("the guest of the floor ended with {other:?}"),
        }
        let ran = watch.lap();
        drop(vcpus);
        drop(vm);
        Ok(vec![
            ("open KVM", opened),
            ("ask for features", checked),
            (MAP_MEMORY, mapped + registered),
            ("KVM objects", objects),
            ("load state", loaded),
            ("resume to first exit", ran),
        ])
    }
}
