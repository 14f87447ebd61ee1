//! Tokens that keep the phases of a restore in order.
//!
//! | phase | call | thread | yields |
//! |---|---|---|---|
//! | 1 | [`VcpuSeed::bind_restored`] or [`Vcpu::reload`] | the vCPU's | a [`RestoringVcpu`], which cannot run, and a [`RestoredVcpu`] |
//! | 2 | [`VirtualMachine::restore`] with the [`RestoredVcpu`] of every vCPU | any | a [`Finish`] for each vCPU |
//! | 3 | [`RestoringVcpu::finish_restore`] with its [`Finish`] | the vCPU's | a [`Vcpu`], which can run |
//!
//! Backends create the tokens. A token carries the [`VmIdentity`] of its VM, which the
//! backend does not expose, so that code above the interface can neither create a token nor
//! use that of another VM.
//!
//! [`VcpuSeed::bind_restored`]: crate::VcpuSeed::bind_restored
//! [`Vcpu::reload`]: crate::Vcpu::reload
//! [`Vcpu`]: crate::Vcpu
//! [`RestoringVcpu`]: crate::RestoringVcpu
//! [`RestoringVcpu::finish_restore`]: crate::RestoringVcpu::finish_restore
//! [`VirtualMachine::restore`]: crate::VirtualMachine::restore

use std::fmt;
use std::sync::Arc;

use crate::Error;

/// Identity of a virtual machine. Clones are equal; two separately created ones are not.
#[derive(Clone, Default)]
pub struct VmIdentity(Arc<()>);

impl VmIdentity {
    /// Creates an identity that differs from all others of this process.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts phase 2: checks that `proofs` cover every vCPU of this VM, which has `vcpus`,
    /// and returns their [`Finish`] tokens by ascending index.
    ///
    /// # Errors
    /// [`Error::ForeignToken`] for a proof of another VM, [`Error::State`] for a vCPU that
    /// is missing or proved twice.
    pub fn accept(&self, vcpus: u32, proofs: Vec<RestoredVcpu>) -> Result<Vec<Finish>, Error> {
        if let Some(foreign) = proofs.iter().find(|proof| proof.vm != *self) {
            return Err(Error::ForeignToken {
                vcpu: foreign.index,
            });
        }
        let mut restored: Vec<u32> = proofs.iter().map(RestoredVcpu::index).collect();
        restored.sort_unstable();
        if !restored.iter().copied().eq(0..vcpus) {
            return Err(Error::State {
                reason: format!("vCPUs {restored:?} of {vcpus} were restored"),
            });
        }
        let finishes = restored.into_iter().map(|index| Finish::new(self, index));
        Ok(finishes.collect())
    }

    /// Starts phase 3: checks that `finish` is for vCPU `index` of this VM.
    ///
    /// # Errors
    /// [`Error::ForeignToken`] for a token of another VM, [`Error::State`] for that of
    /// another vCPU.
    pub fn redeem(&self, index: u32, finish: Finish) -> Result<(), Error> {
        if finish.vm != *self {
            return Err(Error::ForeignToken { vcpu: finish.index });
        }
        if finish.index != index {
            return Err(Error::State {
                reason: format!("vCPU {index} cannot finish for vCPU {}", finish.index),
            });
        }
        Ok(())
    }
}

impl PartialEq for VmIdentity {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for VmIdentity {}

impl fmt::Debug for VmIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmIdentity({:p})", Arc::as_ptr(&self.0))
    }
}

/// Proof that the state of a vCPU has been restored.
#[derive(Debug)]
#[must_use = "`VirtualMachine::restore` needs it"]
pub struct RestoredVcpu {
    vm: VmIdentity,
    index: u32,
}

impl RestoredVcpu {
    /// Creates the proof for vCPU `index` of a VM. Only backends call it.
    pub fn new(vm: &VmIdentity, index: u32) -> Self {
        Self {
            vm: vm.clone(),
            index,
        }
    }

    /// Returns the index of the vCPU that was restored.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }
}

/// Permission for one vCPU to finish its restore: its VM has been restored.
#[derive(Debug)]
#[must_use = "`RestoringVcpu::finish_restore` needs it"]
pub struct Finish {
    vm: VmIdentity,
    index: u32,
}

impl Finish {
    /// Creates the permission for vCPU `index` of a VM. Only backends call it.
    pub fn new(vm: &VmIdentity, index: u32) -> Self {
        Self {
            vm: vm.clone(),
            index,
        }
    }

    /// Returns the index of the vCPU that may finish.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proofs(vm: &VmIdentity, indices: &[u32]) -> Vec<RestoredVcpu> {
        let proof = |index: &u32| RestoredVcpu::new(vm, *index);
        indices.iter().map(proof).collect()
    }

    #[test]
    fn every_vcpu_is_proved_once() {
        let vm = VmIdentity::new();
        let finishes = vm.accept(3, proofs(&vm, &[2, 0, 1])).unwrap();
        assert!(finishes.iter().map(Finish::index).eq(0..3));
        for incomplete in [&[][..], &[0, 1], &[0, 1, 1], &[0, 1, 3], &[0, 1, 2, 2]] {
            let refused = vm.accept(3, proofs(&vm, incomplete));
            assert!(matches!(refused, Err(Error::State { .. })), "{refused:?}");
        }
    }

    #[test]
    fn tokens_of_another_vm_are_refused() {
        let (vm, other) = (VmIdentity::new(), VmIdentity::new());
        assert_eq!(vm, vm.clone());
        assert_ne!(vm, other);
        let mut mixed = proofs(&vm, &[0]);
        mixed.extend(proofs(&other, &[1]));
        let refused = vm.accept(2, mixed);
        assert!(matches!(refused, Err(Error::ForeignToken { vcpu: 1 })));
        let finish = Finish::new(&other, 0);
        let refused = vm.redeem(0, finish);
        assert!(matches!(refused, Err(Error::ForeignToken { vcpu: 0 })));
    }

    #[test]
    fn a_vcpu_finishes_with_its_own_token() {
        let vm = VmIdentity::new();
        vm.redeem(1, Finish::new(&vm, 1)).unwrap();
        let refused = vm.redeem(1, Finish::new(&vm, 0));
        assert!(matches!(refused, Err(Error::State { .. })));
    }
}
