//! The VM: memory slots, interrupt lines, doorbells, irqchip and clock.

use std::os::fd::{FromRawFd as _, IntoRawFd as _};
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::slots::Slot;
use super::vcpu::KvmSeed;
use super::vm_shared::VmShared;
use super::vm_state::{KvmVmStateV1, STATE_VERSION};
use super::{BACKEND, Kvm, os};
use crate::state::{Blob, VmSavedState};
use crate::{
    Doorbell, Error, Finish, Gsi, IrqLine, IrqTrigger, MemoryRegion, RestoredVcpu, VirtualMachine,
    VmParameters, Wake, X86_64,
};

const PAGE: u64 = 4096;

/// A VM of KVM.
#[derive(Debug)]
pub struct KvmVm {
    shared: Arc<VmShared>,
}

impl KvmVm {
    pub(super) fn create(kvm: Kvm, config: &VmParameters) -> Result<Self, Error> {
        let shared = Arc::new(VmShared::create(kvm, config)?);
        Ok(Self { shared })
    }

    fn fd(&self) -> &VmFd {
        &self.shared.fd
    }

    fn set_region(&self, slot: u32, region: Slot) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.guest_address,
            memory_size: region.len,
            userspace_addr: region.host_address,
        };
        #[expect(unsafe_code, reason = "hands host memory to the guest")]
        // SAFETY: the caller of `map_memory` guarantees the memory's validity.
        unsafe { self.fd().set_user_memory_region(region) }.map_err(os("set a memory region"))
    }

    fn irqchip(&self, chip_id: u32) -> Result<Vec<u8>, Error> {
        let mut chip = kvm_irqchip {
            chip_id,
            ..kvm_irqchip::default()
        };
        self.fd()
            .get_irqchip(&mut chip)
            .map_err(os("read an interrupt controller"))?;
        #[expect(unsafe_code, reason = "reads a union as plain bytes")]
        // SAFETY: the member is an array of bytes as long as the union, which was
        // initialised by `default()` and by KVM.
        let bytes = unsafe { chip.chip.dummy };
        Ok(bytes.iter().map(|byte| byte.cast_unsigned()).collect())
    }

    fn set_irqchip(&self, chip_id: u32, bytes: &[u8]) -> Result<(), Error> {
        let mut chip = kvm_irqchip {
            chip_id,
            ..kvm_irqchip::default()
        };
        let mut dummy = [0; 512];
        if bytes.len() != dummy.len() {
            return Err(Error::State {
                reason: "an interrupt controller has another size".to_owned(),
            });
        }
        for (to, from) in dummy.iter_mut().zip(bytes) {
            *to = from.cast_signed();
        }
        chip.chip.dummy = dummy;
        self.fd()
            .set_irqchip(&chip)
            .map_err(os("write an interrupt controller"))
    }
}

/// Converts the value of a doorbell to its width.
fn narrow<T: TryFrom<u64>>(value: u64) -> Result<T, Error> {
    T::try_from(value).map_err(|_| Error::Unsupported {
        what: format!("a doorbell value of {value:#x}, which is wider than the write"),
    })
}

/// An IOAPIC input with an eventfd: one system call for each pulse, and none between the
/// eventfd and the guest.
#[derive(Debug)]
struct IrqfdLine {
    fd: EventFd,
}

impl IrqLine for IrqfdLine {
    fn pulse(&self) -> Result<(), Error> {
        self.fd.write(1).map_err(|source| Error::Os {
            operation: "raise an interrupt",
            source,
        })
    }
}

impl VirtualMachine for KvmVm {
    type Arch = X86_64;
    type Seed = KvmSeed;

    // No state of an x86 vCPU has to follow KVM's interrupt controllers.
    const FINISH_IS_EMPTY: bool = true;

    #[expect(unsafe_code, reason = "implements an unsafe method")]
    unsafe fn map_memory(&self, region: MemoryRegion) -> Result<(), Error> {
        if region.len == 0 || !(region.guest_address | region.len).is_multiple_of(PAGE) {
            return Err(Error::Unsupported {
                what: "a memory region that is not made of whole pages".to_owned(),
            });
        }
        let region = Slot {
            guest_address: region.guest_address,
            host_address: region.host_address.as_ptr() as u64,
            len: region.len,
        };
        let mut slots = self.shared.slots.lock();
        let number = slots.next().ok_or_else(|| Error::Unsupported {
            what: "more memory regions".to_owned(),
        })?;
        self.set_region(number, region)?;
        slots.push(region);
        Ok(())
    }

    fn create_vcpu(&self, index: u32) -> Result<KvmSeed, Error> {
        if index >= self.shared.vcpus {
            return Err(Error::Unsupported {
                what: format!("vCPU {index} of a VM with {}", self.shared.vcpus),
            });
        }
        self.shared.ensure_controllers()?;
        let fd = self
            .fd()
            .create_vcpu(u64::from(index))
            .map_err(os("create a vCPU"))?;
        Ok(KvmSeed::new(self.shared.clone(), fd, index))
    }

    fn irq_line(&self, gsi: Gsi, trigger: IrqTrigger) -> Result<Arc<dyn IrqLine>, Error> {
        if trigger == IrqTrigger::Level {
            return Err(Error::Unsupported {
                what: "level-triggered interrupt lines".to_owned(),
            });
        }
        self.shared.ensure_controllers()?;
        let fd = EventFd::new(EFD_NONBLOCK).map_err(|source| Error::Os {
            operation: "create an eventfd",
            source,
        })?;
        self.fd()
            .register_irqfd(&fd, gsi)
            .map_err(os("attach an interrupt line"))?;
        Ok(Arc::new(IrqfdLine { fd }))
    }

    fn add_doorbell(&self, doorbell: Doorbell, wake: Wake<'_>) -> Result<bool, Error> {
        let duplicate = wake.try_clone_to_owned().map_err(|source| Error::Os {
            operation: "duplicate an eventfd",
            source,
        })?;
        #[expect(unsafe_code, reason = "wraps a descriptor in another type")]
        // SAFETY: the descriptor was just created and has no other owner.
        let fd = unsafe { EventFd::from_raw_fd(duplicate.into_raw_fd()) };
        let address = IoEventAddress::Mmio(doorbell.address);
        let vm = self.fd();
        let result = match (doorbell.width, doorbell.value) {
            (Some(1), Some(value)) => vm.register_ioevent(&fd, &address, narrow::<u8>(value)?),
            (Some(2), Some(value)) => vm.register_ioevent(&fd, &address, narrow::<u16>(value)?),
            (Some(4), Some(value)) => vm.register_ioevent(&fd, &address, narrow::<u32>(value)?),
            (Some(8), Some(value)) => vm.register_ioevent(&fd, &address, value),
            (None, None) => vm.register_ioevent(&fd, &address, NoDatamatch),
            (width, value) => {
                return Err(Error::Unsupported {
                    what: format!("a doorbell of width {width:?} and value {value:?}"),
                });
            }
        };
        result.map_err(os("attach a doorbell"))?;
        Ok(true)
    }

    fn save(&self) -> Result<VmSavedState, Error> {
        self.shared.ensure_controllers()?;
        let clock = self.fd().get_clock().map_err(os("read the clock"))?;
        let state = KvmVmStateV1 {
            pic_master: self.irqchip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: self.irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: self.irqchip(KVM_IRQCHIP_IOAPIC)?,
            clock_ns: clock.clock,
        };
        let bytes = postcard::to_stdvec(&state).map_err(|e| Error::State {
            reason: format!("interrupt controllers cannot be encoded: {e}"),
        })?;
        Ok(VmSavedState {
            blob: Blob {
                backend: BACKEND.to_owned(),
                version: STATE_VERSION,
                bytes,
            },
        })
    }

    fn restore(
        &self,
        state: &VmSavedState,
        vcpus: Vec<RestoredVcpu>,
    ) -> Result<Vec<Finish>, Error> {
        let finishes = self.shared.identity.accept(self.shared.vcpus, vcpus)?;
        let blob = &state.blob;
        if blob.backend != BACKEND || blob.version != STATE_VERSION {
            return Err(Error::State {
                reason: format!("it was saved by {} version {}", blob.backend, blob.version),
            });
        }
        let state = KvmVmStateV1::decode(&blob.bytes)?;
        self.set_irqchip(KVM_IRQCHIP_PIC_MASTER, &state.pic_master)?;
        self.set_irqchip(KVM_IRQCHIP_PIC_SLAVE, &state.pic_slave)?;
        self.set_irqchip(KVM_IRQCHIP_IOAPIC, &state.ioapic)?;
        // Without KVM_CLOCK_REALTIME the guest's monotonic clock continues from the saved
        // value; the guest agent sets the wall clock.
        let clock = kvm_clock_data {
            clock: state.clock_ns,
            flags: 0,
            ..kvm_clock_data::default()
        };
        self.fd().set_clock(&clock).map_err(os("write the clock"))?;
        self.shared.tsc_offset.finish();
        Ok(finishes)
    }
}
