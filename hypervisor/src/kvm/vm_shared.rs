//! State that a VM shares with its vCPUs.

use std::sync::{Mutex, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_enable_cap,
    kvm_irqchip,
};
use kvm_ioctls::{Cap, VmFd};

use super::precreate::PrecreatedVm;
use super::slots::SlotTable;
use super::tsc::TscOffset;
use super::{Kvm, os};
use crate::{Error, VmIdentity, VmParameters};

/// Three pages below 4 GiB for KVM's own use on processors without unrestricted guests; no
/// RAM or device may overlap them.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// State that a VM shares with its vCPUs.
#[derive(Debug)]
pub(super) struct VmShared {
    pub(super) kvm: Kvm,
    pub(super) fd: VmFd,
    /// Carried by the tokens of a restore.
    pub(super) identity: VmIdentity,
    /// Number of vCPUs.
    pub(super) vcpus: u32,
    /// Size of a vCPU's XSAVE area in bytes.
    pub(super) xsave_len: usize,
    tsc_deadline: OnceLock<bool>,
    /// True if the kernel reports a pending triple fault as part of a vCPU's events.
    pub(super) triple_faults: bool,
    /// The MSRs that could be read from the first vCPU that was saved.
    pub(super) readable_msrs: OnceLock<Vec<u32>>,
    pub(super) tsc_offset: TscOffset,
    pub(super) slots: SlotTable,
    /// True once the interrupt controllers exist.
    controllers: Mutex<bool>,
}

impl VmShared {
    /// Creates a VM without memory, devices and vCPUs.
    pub(super) fn create(kvm: Kvm, config: &VmParameters) -> Result<Self, Error> {
        let fd = PrecreatedVm::take(&kvm.shared).map_err(os("create a VM"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(os("set the TSS address"))?;
        let events = kvm_enable_cap {
            cap: KVM_CAP_X86_TRIPLE_FAULT_EVENT,
            args: [1, 0, 0, 0],
            ..kvm_enable_cap::default()
        };
        // Kernels before 6.1 cannot report triple faults.
        let triple_faults = fd.enable_cap(&events).is_ok();
        // Older kernels have no larger area than the structure's 4 KiB.
        let xsave_len = usize::try_from(fd.check_extension_int(Cap::Xsave2))
            .unwrap_or(0)
            .max(4096);
        Ok(Self {
            kvm,
            fd,
            identity: VmIdentity::new(),
            vcpus: config.vcpus.max(1),
            xsave_len,
            tsc_deadline: OnceLock::new(),
            triple_faults,
            readable_msrs: OnceLock::new(),
            tsc_offset: TscOffset::default(),
            slots: SlotTable::default(),
            controllers: Mutex::new(false),
        })
    }

    /// Creates the interrupt controllers unless they exist: before the first vCPU, as KVM
    /// requires, but after the memory of a machine that maps it first.
    ///
    /// Once they exist, changing the memory map takes 7 ms instead of 0.1 (Linux 6.18):
    /// presumably it waits for the grace period of the structures that they replace.
    pub(super) fn ensure_controllers(&self) -> Result<(), Error> {
        let mut there = self
            .controllers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if !*there {
            self.fd
                .create_irq_chip()
                .map_err(os("create interrupt controllers"))?;
            *there = true;
        }
        Ok(())
    }

    /// Returns true if the local APIC's timer has the TSC-deadline mode.
    pub(super) fn tsc_deadline(&self) -> bool {
        *self
            .tsc_deadline
            .get_or_init(|| self.fd.check_extension(Cap::TscDeadlineTimer))
    }

    /// Masks the 8259 pair that KVM creates with the IOAPIC, and that the machine does not
    /// have: the local APIC passes its interrupts on after a reset, and a guest whose ACPI
    /// tables have no 8259 does not mask it.
    pub(super) fn mask_legacy_controllers(&self) -> Result<(), Error> {
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..kvm_irqchip::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(os("read an interrupt controller"))?;
            chip.chip.pic.imr = 0xff;
            self.fd
                .set_irqchip(&chip)
                .map_err(os("write an interrupt controller"))?;
        }
        Ok(())
    }
}
