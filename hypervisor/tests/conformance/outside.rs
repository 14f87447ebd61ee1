//! A backend outside the crate: it wraps another, but has types, tokens and a VM identity
//! of its own, created through the public interface.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use sm_hypervisor::{
    Arch, Bus, Capabilities, Doorbell, Error, Exit, Finish, Gsi, Hypervisor, IrqLine, IrqTrigger,
    Kicker, MemoryRegion, OpenError, RestoredVcpu, RestoringVcpu, Vcpu, VcpuSeed, VirtualMachine,
    VmIdentity, VmParameters, VmSavedState, Wake,
};

#[derive(Debug)]
pub(crate) struct Outside<H>(pub(crate) H);

impl<H: Hypervisor> Hypervisor for Outside<H> {
    type Arch = H::Arch;
    type Vm = OutsideVm<H::Vm>;

    const STATE_VERSIONS: &'static [u32] = H::STATE_VERSIONS;

    fn open() -> Result<Self, OpenError> {
        H::open().map(Self).map_err(|error| {
            OpenError::new(
                "outside",
                error.kind(),
                "the backend inside cannot be opened",
            )
            .with_remedy(error.to_string())
        })
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            backend: "outside",
            ..self.0.capabilities()
        }
    }

    fn guest_features(&self) -> Result<<H::Arch as Arch>::Features, Error> {
        self.0.guest_features()
    }

    fn prepare_vm(&self) {
        self.0.prepare_vm();
    }

    fn create_vm(&self, config: &VmParameters) -> Result<OutsideVm<H::Vm>, Error> {
        Ok(OutsideVm {
            vm: self.0.create_vm(config)?,
            vcpus: config.vcpus,
            shared: Arc::default(),
        })
    }
}

/// State that a VM shares with its vCPUs: its identity, and tokens of the VM inside.
#[derive(Debug, Default)]
struct Shared {
    identity: VmIdentity,
    proofs: Mutex<Vec<RestoredVcpu>>,
    finishes: Mutex<BTreeMap<u32, Finish>>,
}

#[derive(Debug)]
pub(crate) struct OutsideVm<V> {
    vm: V,
    vcpus: u32,
    shared: Arc<Shared>,
}

impl<V: VirtualMachine> VirtualMachine for OutsideVm<V> {
    type Arch = V::Arch;
    type Seed = OutsideSeed<V::Seed>;

    #[expect(unsafe_code, reason = "implements an unsafe method")]
    unsafe fn map_memory(&self, region: MemoryRegion) -> Result<(), Error> {
        // SAFETY: the caller guarantees the same.
        unsafe { self.vm.map_memory(region) }
    }

    fn create_vcpu(&self, index: u32) -> Result<Self::Seed, Error> {
        Ok(OutsideSeed {
            seed: self.vm.create_vcpu(index)?,
            shared: self.shared.clone(),
        })
    }

    fn irq_line(&self, gsi: Gsi, trigger: IrqTrigger) -> Result<Arc<dyn IrqLine>, Error> {
        Ok(Arc::new(OutsideLine(self.vm.irq_line(gsi, trigger)?)))
    }

    fn add_doorbell(&self, doorbell: Doorbell, wake: Wake<'_>) -> Result<bool, Error> {
        self.vm.add_doorbell(doorbell, wake)
    }

    fn save(&self) -> Result<VmSavedState, Error> {
        self.vm.save()
    }

    fn restore(
        &self,
        state: &VmSavedState,
        vcpus: Vec<RestoredVcpu>,
    ) -> Result<Vec<Finish>, Error> {
        let finishes = self.shared.identity.accept(self.vcpus, vcpus)?;
        let proofs = std::mem::take(&mut *self.shared.proofs.lock().unwrap());
        let inner = self.vm.restore(state, proofs)?;
        let inner = inner.into_iter().map(|finish| (finish.index(), finish));
        *self.shared.finishes.lock().unwrap() = inner.collect();
        Ok(finishes)
    }
}

#[derive(Debug)]
struct OutsideLine(Arc<dyn IrqLine>);

impl IrqLine for OutsideLine {
    fn pulse(&self) -> Result<(), Error> {
        self.0.pulse()
    }
}

#[derive(Debug)]
struct OutsideKicker(Arc<dyn Kicker>);

impl Kicker for OutsideKicker {
    fn kick(&self) {
        self.0.kick();
    }
}

#[derive(Debug)]
pub(crate) struct OutsideSeed<S> {
    seed: S,
    shared: Arc<Shared>,
}

impl<S: VcpuSeed> VcpuSeed for OutsideSeed<S> {
    type Arch = S::Arch;
    type Vcpu = OutsideVcpu<S::Vcpu>;

    fn index(&self) -> u32 {
        self.seed.index()
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::new(OutsideKicker(self.seed.kicker()))
    }

    fn bind(self, boot: Option<&<S::Arch as Arch>::Boot>) -> Result<Self::Vcpu, Error> {
        Ok(OutsideVcpu {
            vcpu: self.seed.bind(boot)?,
            shared: self.shared,
        })
    }

    fn bind_restored(
        self,
        state: &<S::Arch as Arch>::Vcpu,
    ) -> Result<(<Self::Vcpu as Vcpu>::Restoring, RestoredVcpu), Error> {
        let (restoring, proof) = self.seed.bind_restored(state)?;
        Ok(OutsideRestoring::new(restoring, proof, self.shared))
    }
}

#[derive(Debug)]
pub(crate) struct OutsideVcpu<V> {
    vcpu: V,
    shared: Arc<Shared>,
}

impl<V: Vcpu> Vcpu for OutsideVcpu<V> {
    type Arch = V::Arch;
    type Restoring = OutsideRestoring<V::Restoring>;

    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, Error> {
        self.vcpu.run(bus)
    }

    fn save(&mut self) -> Result<<V::Arch as Arch>::Vcpu, Error> {
        self.vcpu.save()
    }

    fn reload(
        self,
        state: &<V::Arch as Arch>::Vcpu,
    ) -> Result<(Self::Restoring, RestoredVcpu), Error> {
        let (restoring, proof) = self.vcpu.reload(state)?;
        Ok(OutsideRestoring::new(restoring, proof, self.shared))
    }

    fn notify_paused(&mut self) {
        self.vcpu.notify_paused();
    }
}

#[derive(Debug)]
pub(crate) struct OutsideRestoring<R> {
    restoring: R,
    index: u32,
    shared: Arc<Shared>,
}

impl<R> OutsideRestoring<R> {
    /// Stores the proof of the wrapped backend, and creates one of this backend.
    fn new(restoring: R, proof: RestoredVcpu, shared: Arc<Shared>) -> (Self, RestoredVcpu) {
        let index = proof.index();
        let own = RestoredVcpu::new(&shared.identity, index);
        shared.proofs.lock().unwrap().push(proof);
        let this = Self {
            restoring,
            index,
            shared,
        };
        (this, own)
    }
}

impl<R: RestoringVcpu> RestoringVcpu for OutsideRestoring<R> {
    type Vcpu = OutsideVcpu<R::Vcpu>;

    fn finish_restore(self, finish: Finish) -> Result<Self::Vcpu, Error> {
        self.shared.identity.redeem(self.index, finish)?;
        let inner = self.shared.finishes.lock().unwrap().remove(&self.index);
        Ok(OutsideVcpu {
            vcpu: self.restoring.finish_restore(inner.unwrap())?,
            shared: self.shared,
        })
    }
}
