//! The KVM backend for x86_64.
//!
//! | file | idea |
//! |---|---|
//! | `mod.rs` | opening `/dev/kvm`, its capabilities |
//! | `precreate.rs` | a VM that is created before it is needed |
//! | `vm.rs` | the VM: interrupt lines, doorbells, interrupt controllers and clock |
//! | `slots.rs` | the table of memory slots |
//! | `vcpu.rs` | binding and running a vCPU |
//! | `kick.rs` | making a vCPU leave the guest |
//! | `fault.rs` | explaining why a vCPU cannot continue |
//! | `cpuid.rs` | CPUID of the guest |
//! | `convert.rs` | plain-data state to KVM's structures and back |
//! | `state.rs` | saving and restoring a vCPU, in order |
//! | `msrs.rs`, `tsc.rs` | model-specific registers; the time-stamp counter |
//! | `probe.rs` | a tiny guest that proves that Linux guests run |
//! | `creation.rs` | advice where creating VMs is slow |
//! | `compare.rs` | comparison after a restore, in debug builds |
//!
//! # Saved state
//!
//! | element | where | note |
//! |---|---|---|
//! | general, segment, table, control registers | [`VcpuState`](crate::state::x86_64::VcpuState) | also the interrupt being delivered |
//! | debug registers, XCR0 | `VcpuState` | |
//! | XSAVE area | `VcpuState` | `KVM_GET_XSAVE2` where it exists: x87, SSE, AVX, AVX-512, PKRU |
//! | MSRs | `VcpuState` | all that KVM lists and that can be read, except the host's microcode revision, performance counters and Hyper-V |
//! | local APIC, MP state | `VcpuState` | |
//! | events | its `events` blob | exceptions, interrupts, NMI, SMI, triple fault |
//! | CPUID, TSC frequency | `VcpuState` | the guest keeps the processor it booted on |
//! | PIC, IOAPIC, kvmclock | [`VmSavedState`](crate::VmSavedState) | there is no PIT: Linux does not need one |
//!
//! kvmclock continues from its saved value, as the time-stamp counter does: the guest's
//! monotonic time does not jump, however long the machine was stopped. Its wall clock is
//! then behind; the guest agent sets it.
//!
//! An interrupt that an eventfd raised a moment earlier is injected from a kernel thread,
//! and the save can miss it: a device with an unacknowledged interrupt raises its line
//! again after a restore.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[cfg(any(debug_assertions, test))]
mod compare;
mod convert;
mod cpuid;
mod creation;
mod fault;
mod kick;
mod msrs;
mod precreate;
mod probe;
mod slots;
mod state;
mod tsc;
mod vcpu;
mod vm;
mod vm_shared;
mod vm_state;

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, OnceLock};

use kvm_bindings::CpuId;
use kvm_ioctls::Cap;

use precreate::PrecreatedVm;
pub use vcpu::{KvmRestoring, KvmSeed, KvmVcpu};
pub use vm::KvmVm;

use crate::state::x86_64::Features;
use crate::{
    Capabilities, Error, Hypervisor, LinuxSupport, OpenError, OpenErrorKind, VmParameters, X86_64,
};

/// Name of this backend in saved state.
const BACKEND: &str = "kvm";
/// Largest number of CPUID entries asked for.
const MAX_CPUID_ENTRIES: usize = kvm_bindings::KVM_MAX_CPUID_ENTRIES;

/// The host's KVM, opened.
#[derive(Debug, Clone)]
pub struct Kvm {
    shared: Arc<KvmShared>,
}

/// Results of queries to `/dev/kvm`, each made once.
#[derive(Debug)]
struct KvmShared {
    kvm: kvm_ioctls::Kvm,
    supported_cpuid: OnceLock<CpuId>,
    msr_indices: OnceLock<Vec<u32>>,
    linux: OnceLock<LinuxSupport>,
    precreated: PrecreatedVm,
}

/// Converts an error of a KVM ioctl.
fn os(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |error| Error::Os {
        operation,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

impl Kvm {
    /// Returns the processor features that KVM supports for guests.
    fn supported_cpuid(&self) -> Result<&CpuId, Error> {
        if let Some(cpuid) = self.shared.supported_cpuid.get() {
            return Ok(cpuid);
        }
        let cpuid = self
            .shared
            .kvm
            .get_supported_cpuid(MAX_CPUID_ENTRIES)
            .map_err(os("get the supported CPUID"))?;
        Ok(self.shared.supported_cpuid.get_or_init(|| cpuid))
    }

    /// Returns the MSRs that KVM lists and that are worth saving.
    fn msr_indices(&self) -> Result<&[u32], Error> {
        if let Some(indices) = self.shared.msr_indices.get() {
            return Ok(indices);
        }
        let list = self
            .shared
            .kvm
            .get_msr_index_list()
            .map_err(os("list the MSRs to save"))?;
        Ok(self
            .shared
            .msr_indices
            .get_or_init(|| msrs::to_save(list.as_slice())))
    }
}

impl Hypervisor for Kvm {
    type Arch = X86_64;
    type Vm = KvmVm;

    const STATE_VERSIONS: &'static [u32] = &[vm_state::STATE_VERSION, state::EVENTS_VERSION];

    fn open() -> Result<Self, OpenError> {
        let kvm = kvm_ioctls::Kvm::new().map_err(|error| open_error(error.errno()))?;
        let version = kvm.get_api_version();
        // The only version since Linux 2.6.22.
        if version != 12 {
            return Err(unsupported(&format!(
                "it has API version {version} instead of 12"
            )));
        }
        let needed = [
            (Cap::Irqchip, "in-kernel interrupt controllers"),
            (Cap::Irqfd, "interrupts by eventfd"),
            (Cap::Ioeventfd, "doorbells by eventfd"),
            (Cap::UserMemory, "user memory regions"),
            (Cap::SetTssAddr, "a TSS address"),
            (Cap::ImmediateExit, "immediate exits"),
            (Cap::Xsave, "XSAVE state"),
            (Cap::Xcrs, "extended control registers"),
            (Cap::VcpuEvents, "vCPU events"),
            (Cap::AdjustClock, "an adjustable clock"),
        ];
        if let Some((_, what)) = needed.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(unsupported(&format!("it lacks {what}")));
        }
        Ok(Self {
            shared: Arc::new(KvmShared {
                kvm,
                supported_cpuid: OnceLock::new(),
                msr_indices: OnceLock::new(),
                linux: OnceLock::new(),
                precreated: PrecreatedVm::default(),
            }),
        })
    }

    fn capabilities(&self) -> Capabilities {
        let linux = self
            .shared
            .linux
            .get_or_init(|| probe::linux_support(self))
            .clone();
        Capabilities {
            backend: BACKEND,
            max_vcpus: u32::try_from(self.shared.kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            linux,
        }
    }

    fn guest_features(&self) -> Result<Features, Error> {
        let deadline = self.shared.kvm.check_extension(Cap::TscDeadlineTimer);
        let offered = cpuid::offered(self.supported_cpuid()?, deadline)?;
        let cpuid = offered.iter().map(convert::from_cpuid).collect();
        Ok(Features { cpuid })
    }

    fn creation_advice(&self) -> Option<String> {
        creation::advice()
    }

    fn prepare_vm(&self) {
        PrecreatedVm::start(&self.shared);
    }

    fn create_vm(&self, config: &VmParameters) -> Result<KvmVm, Error> {
        KvmVm::create(self.clone(), config)
    }
}

/// Explains a failure to open `/dev/kvm`, with the remedy.
fn open_error(errno: i32) -> OpenError {
    match errno {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => OpenError::new(
            BACKEND,
            OpenErrorKind::Missing,
            "there is no /dev/kvm on this host",
        )
        .with_remedy("load the kvm_intel or kvm_amd module, or enable (nested) virtualisation"),
        libc::EACCES | libc::EPERM => {
            let group = std::fs::metadata("/dev/kvm")
                .map_or_else(|_| "kvm".to_owned(), |meta| group_name(meta.gid()));
            OpenError::new(
                BACKEND,
                OpenErrorKind::Permission,
                "no permission to open /dev/kvm",
            )
            .with_remedy(format!("add this user to the group that owns it ({group})"))
        }
        errno => OpenError::new(BACKEND, OpenErrorKind::Io, "cannot open /dev/kvm")
            .with_source(io::Error::from_raw_os_error(errno)),
    }
}

/// Returns the error for a `/dev/kvm` that lacks something or is another device.
fn unsupported(reason: &str) -> OpenError {
    OpenError::new(
        BACKEND,
        OpenErrorKind::Unsupported,
        format!("/dev/kvm cannot be used: {reason}"),
    )
}

/// Returns the name of a group, or its number if it has no name.
fn group_name(gid: u32) -> String {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    groups
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.get(2).is_some_and(|field| field.parse() == Ok(gid)))
        .and_then(|fields| fields.first().map(|name| (*name).to_owned()))
        .unwrap_or_else(|| gid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_opening_say_what_to_do() {
        let missing = open_error(libc::ENOENT);
        assert_eq!(
            missing.to_string(),
            "there is no /dev/kvm on this host: load the kvm_intel or kvm_amd module, \
             or enable (nested) virtualisation"
        );
        let denied = open_error(libc::EACCES);
        assert_eq!(denied.kind(), OpenErrorKind::Permission);
        let remedy = denied.remedy().unwrap();
        assert!(remedy.contains("the group that owns it"), "{remedy}");
        let failed = open_error(libc::EMFILE);
        assert_eq!(
            (failed.backend(), failed.kind()),
            ("kvm", OpenErrorKind::Io)
        );
        assert!(std::error::Error::source(&failed).is_some());
        let other = unsupported("it lacks a clock").to_string();
        assert_eq!(other, "/dev/kvm cannot be used: it lacks a clock");
    }
}
