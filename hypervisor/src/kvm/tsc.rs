//! Restore of the time-stamp counters of a VM.
//!
//! KVM treats a write to the TSC's MSR heuristically: a value within a second of the one
//! that another vCPU (or the creation of this one) implies counts as an attempt to
//! synchronise, and is replaced. A machine saved in its first second would be restored with
//! a counter that has jumped backwards. Setting the offset to the host's counter is exact,
//! and the same offset on all vCPUs keeps them synchronised to the cycle (Linux
//! `Documentation/virt/kvm/devices/vcpu.rst` section 4.1).

#![expect(unsafe_code, reason = "one ioctl that kvm-ioctls has for arm64 only")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);

/// The offset that the vCPUs of one VM agree on during one restore.
#[derive(Debug, Default)]
pub(super) struct TscOffset(Mutex<Agreement>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Agreement {
    /// No vCPU has been restored yet.
    #[default]
    Open,
    /// The offset of the first vCPU.
    Offset(u64),
    /// This KVM has no such attribute, or the counter is scaled.
    Unavailable,
}

impl TscOffset {
    fn lock(&self) -> MutexGuard<'_, Agreement> {
        // The value is replaced whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Continues from `saved`, the counter of any vCPU of the machine: all were stopped
    /// before the first was saved, so none has seen a later value. Returns false if this
    /// KVM cannot; the caller then writes the MSR.
    pub(super) fn restore(&self, fd: &VcpuFd, saved: u64) -> bool {
        let mut agreement = self.lock();
        let offset = match *agreement {
            Agreement::Open => saved.wrapping_sub(host_tsc()),
            Agreement::Offset(offset) => offset,
            Agreement::Unavailable => return false,
        };
        let set = set_offset(fd, offset);
        *agreement = if set {
            Agreement::Offset(offset)
        } else {
            Agreement::Unavailable
        };
        set
    }

    /// Marks the counter as scaled: no offset describes a rate that is not the host's.
    pub(super) fn disable(&self) {
        *self.lock() = Agreement::Unavailable;
    }

    /// Ends a restore; the next one determines a new offset.
    pub(super) fn finish(&self) {
        let mut agreement = self.lock();
        if matches!(*agreement, Agreement::Offset(_)) {
            *agreement = Agreement::Open;
        }
    }
}

fn host_tsc() -> u64 {
    // SAFETY: every x86_64 processor has the instruction, and Linux lets processes use it
    // unless they disabled it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn set_offset(fd: &VcpuFd, offset: u64) -> bool {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: (&raw const offset) as u64,
        flags: 0,
    };
    // SAFETY: a valid vCPU descriptor; KVM reads eight bytes at `addr`, which
    // `offset` outlives.
    let result = unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) };
    result == 0
}
