//! The backend of hosts that have none.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::{
    Arch, Bus, Capabilities, Doorbell, Error, Exit, Finish, Gsi, Hypervisor, IrqLine, IrqTrigger,
    Kicker, MemoryRegion, OpenError, OpenErrorKind, RestoredVcpu, RestoringVcpu, Vcpu, VcpuSeed,
    VirtualMachine, VmParameters, VmSavedState, Wake,
};

/// A backend that cannot be opened. No value of the type exists, so its methods are never
/// called; it lets code for [`Native`](crate::Native) compile on every host.
#[derive(Clone, Debug)]
pub struct NoBackend<A: Arch> {
    uninhabited: Infallible,
    arch: PhantomData<fn() -> A>,
}

impl<A: Arch> Hypervisor for NoBackend<A> {
    type Arch = A;
    type Vm = Self;

    fn open() -> Result<Self, OpenError> {
        Err(OpenError::new(
            "none",
            OpenErrorKind::Missing,
            format!(
                "there is no hypervisor backend for {} hosts that run {} guests",
                std::env::consts::OS,
                A::NAME
            ),
        ))
    }

    fn capabilities(&self) -> Capabilities {
        match self.uninhabited {}
    }

    fn guest_features(&self) -> Result<A::Features, Error> {
        match self.uninhabited {}
    }

    fn create_vm(&self, _: &VmParameters) -> Result<Self, Error> {
        match self.uninhabited {}
    }
}

impl<A: Arch> VirtualMachine for NoBackend<A> {
    type Arch = A;
    type Seed = Self;

    #[expect(
        unsafe_code,
        reason = "implements an unsafe method that is never called"
    )]
    unsafe fn map_memory(&self, _: MemoryRegion) -> Result<(), Error> {
        match self.uninhabited {}
    }

    fn create_vcpu(&self, _: u32) -> Result<Self, Error> {
        match self.uninhabited {}
    }

    fn irq_line(&self, _: Gsi, _: IrqTrigger) -> Result<Arc<dyn IrqLine>, Error> {
        match self.uninhabited {}
    }

    fn add_doorbell(&self, _: Doorbell, _: Wake<'_>) -> Result<bool, Error> {
        match self.uninhabited {}
    }

    fn save(&self) -> Result<VmSavedState, Error> {
        match self.uninhabited {}
    }

    fn restore(&self, _: &VmSavedState, _: Vec<RestoredVcpu>) -> Result<Vec<Finish>, Error> {
        match self.uninhabited {}
    }
}

impl<A: Arch> VcpuSeed for NoBackend<A> {
    type Arch = A;
    type Vcpu = Self;

    fn index(&self) -> u32 {
        match self.uninhabited {}
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        match self.uninhabited {}
    }

    fn bind(self, _: Option<&A::Boot>) -> Result<Self, Error> {
        match self.uninhabited {}
    }

    fn bind_restored(self, _: &A::Vcpu) -> Result<(Self, RestoredVcpu), Error> {
        match self.uninhabited {}
    }
}

impl<A: Arch> Vcpu for NoBackend<A> {
    type Arch = A;
    type Restoring = Self;

    fn run(&mut self, _: &dyn Bus) -> Result<Exit, Error> {
        match self.uninhabited {}
    }

    fn save(&mut self) -> Result<A::Vcpu, Error> {
        match self.uninhabited {}
    }

    fn reload(self, _: &A::Vcpu) -> Result<(Self, RestoredVcpu), Error> {
        match self.uninhabited {}
    }

    fn notify_paused(&mut self) {
        match self.uninhabited {}
    }
}

impl<A: Arch> RestoringVcpu for NoBackend<A> {
    type Vcpu = Self;

    fn finish_restore(self, _: Finish) -> Result<Self, Error> {
        match self.uninhabited {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Aarch64, X86_64};

    #[test]
    fn opening_fails_without_a_backend() {
        let errors = [
            NoBackend::<X86_64>::open().unwrap_err(),
            NoBackend::<Aarch64>::open().unwrap_err(),
        ];
        for (error, guest) in errors.iter().zip(["x86_64", "aarch64"]) {
            assert_eq!(error.kind(), OpenErrorKind::Missing);
            assert!(error.to_string().contains(guest), "{error}");
        }
    }
}
