//! vCPUs of the fake backend, which play their scripts.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::sync::{Arc, PoisonError};

use super::vm::FakeShared;
use super::{BACKEND, FakeArch, FakeEvent, Inner, Step, lock};
use crate::{Bus, Error, Exit, Finish, Gsi, Kicker, RestoredVcpu, RestoringVcpu, Vcpu, VcpuSeed};

struct FakeKicker {
    shared: Arc<FakeShared>,
    index: u32,
}

impl fmt::Debug for FakeKicker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FakeKicker({})", self.index)
    }
}

impl Kicker for FakeKicker {
    fn kick(&self) {
        lock(&self.shared.signals).kicked.insert(self.index);
        self.shared.changed.notify_all();
    }
}

/// A vCPU of the fake backend before it is bound.
#[derive(Debug)]
pub struct FakeSeed<A: FakeArch> {
    inner: Arc<Inner<A>>,
    shared: Arc<FakeShared>,
    index: u32,
}

impl<A: FakeArch> FakeSeed<A> {
    pub(super) fn new(inner: Arc<Inner<A>>, shared: Arc<FakeShared>, index: u32) -> Self {
        Self {
            inner,
            shared,
            index,
        }
    }

    fn into_vcpu(self) -> FakeVcpu<A> {
        let index = usize::try_from(self.index).unwrap_or(usize::MAX);
        FakeVcpu {
            script: self.inner.scripts.get(index).cloned().unwrap_or_default(),
            inner: self.inner,
            shared: self.shared,
            index: self.index,
            position: 0,
            not_send: PhantomData,
        }
    }
}

impl<A: FakeArch> VcpuSeed for FakeSeed<A> {
    type Arch = A;
    type Vcpu = FakeVcpu<A>;

    fn index(&self) -> u32 {
        self.index
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::new(FakeKicker {
            shared: self.shared.clone(),
            index: self.index,
        })
    }

    fn bind(self, boot: Option<&A::Boot>) -> Result<FakeVcpu<A>, Error> {
        let vcpu = self.into_vcpu();
        vcpu.inner.note(FakeEvent::Bound(vcpu.index, boot.cloned()));
        Ok(vcpu)
    }

    fn bind_restored(self, state: &A::Vcpu) -> Result<(FakeRestoring<A>, RestoredVcpu), Error> {
        self.into_vcpu().reload(state)
    }
}

/// A vCPU of the fake backend.
#[derive(Debug)]
pub struct FakeVcpu<A: FakeArch> {
    inner: Arc<Inner<A>>,
    shared: Arc<FakeShared>,
    index: u32,
    script: Vec<Step>,
    position: usize,
    /// Prevents `Send`, as the interface requires.
    not_send: PhantomData<*const ()>,
}

impl<A: FakeArch> FakeVcpu<A> {
    /// Waits for this interrupt or a kick; without an interrupt, for a kick only. Returns
    /// true if kicked.
    fn wait(&self, gsi: Option<Gsi>) -> bool {
        let mut signals = lock(&self.shared.signals);
        loop {
            if signals.kicked.remove(&self.index) {
                return true;
            }
            if gsi.is_some_and(|gsi| signals.pending.remove(&gsi).is_some()) {
                return false;
            }
            signals = self
                .shared
                .changed
                .wait(signals)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn read(&self, len: usize, read: impl FnOnce(&mut [u8])) {
        let mut data = vec![0xff; len];
        read(&mut data);
        self.inner.note(FakeEvent::Read(self.index, data));
    }
}

/// A vCPU of the fake backend whose state has been restored.
#[derive(Debug)]
pub struct FakeRestoring<A: FakeArch>(FakeVcpu<A>);

impl<A: FakeArch> RestoringVcpu for FakeRestoring<A> {
    type Vcpu = FakeVcpu<A>;

    fn finish_restore(self, finish: Finish) -> Result<FakeVcpu<A>, Error> {
        let Self(vcpu) = self;
        vcpu.shared.identity.redeem(vcpu.index, finish)?;
        vcpu.inner.note(FakeEvent::Finished(vcpu.index));
        Ok(vcpu)
    }
}

impl<A: FakeArch> Vcpu for FakeVcpu<A> {
    type Arch = A;
    type Restoring = FakeRestoring<A>;

    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, Error> {
        loop {
            if lock(&self.shared.signals).kicked.remove(&self.index) {
                return Ok(Exit::Cancelled);
            }
            let Some(step) = self.script.get(self.position) else {
                self.wait(None);
                return Ok(Exit::Cancelled);
            };
            match step {
                Step::MmioRead(address, len) => {
                    self.read(*len, |data| bus.mmio_read(*address, data));
                }
                Step::MmioWrite(address, data) => match self.shared.ring(*address, data) {
                    Some(doorbell) => self.inner.note(FakeEvent::Rung(doorbell)),
                    None => bus.mmio_write(*address, data),
                },
                Step::PioRead(port, len) => self.read(*len, |data| bus.pio_read(*port, data)),
                Step::PioWrite(port, data) => bus.pio_write(*port, data),
                Step::WaitIrq(gsi) => {
                    if self.wait(Some(*gsi)) {
                        return Ok(Exit::Cancelled);
                    }
                }
                Step::Exit(exit) => {
                    let exit = exit.clone();
                    self.position += 1;
                    return Ok(exit);
                }
                Step::Fail => {
                    return Err(Error::Os {
                        operation: "run a vCPU",
                        source: io::ErrorKind::Other.into(),
                    });
                }
            }
            self.position += 1;
        }
    }

    fn save(&mut self) -> Result<A::Vcpu, Error> {
        Ok(A::state(self.index, self.position as u64))
    }

    fn reload(mut self, state: &A::Vcpu) -> Result<(FakeRestoring<A>, RestoredVcpu), Error> {
        let (backend, index, position) = A::read(state);
        if index != self.index || backend != BACKEND {
            return Err(Error::State {
                reason: format!("it is of vCPU {index} of backend {backend:?}"),
            });
        }
        self.position = usize::try_from(position).unwrap_or(usize::MAX);
        self.inner.note(FakeEvent::Restored(self.index));
        let proof = RestoredVcpu::new(&self.shared.identity, self.index);
        Ok((FakeRestoring(self), proof))
    }

    fn notify_paused(&mut self) {
        self.inner.note(FakeEvent::Paused(self.index));
    }
}
