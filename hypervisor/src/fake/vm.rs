//! The VM of the fake backend: memory slots, interrupt lines, doorbells.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex};

use super::{BACKEND, FakeArch, FakeEvent, FakeSeed, Inner, PAGE, lock};
use crate::state::{Blob, VmSavedState};
use crate::sys::Waker;
use crate::{
    Doorbell, Error, Finish, Gsi, IrqLine, IrqTrigger, MemoryRegion, RestoredVcpu, VirtualMachine,
    VmIdentity, Wake,
};

/// A VM of the fake backend.
#[derive(Debug)]
pub struct FakeVm<A: FakeArch> {
    inner: Arc<Inner<A>>,
    vcpus: u32,
    /// First address and length of each mapped region.
    regions: Mutex<Vec<(u64, u64)>>,
    shared: Arc<FakeShared>,
}

/// State that a VM shares with its vCPUs: their wake-up conditions.
#[derive(Debug, Default)]
pub(super) struct FakeShared {
    /// Carried by the tokens of a restore.
    pub(super) identity: VmIdentity,
    pub(super) signals: Mutex<Signals>,
    pub(super) changed: Condvar,
    doorbells: Mutex<Vec<(Doorbell, Waker)>>,
}

#[derive(Debug, Default)]
pub(super) struct Signals {
    pub(super) kicked: BTreeSet<u32>,
    /// Interrupts that no vCPU has taken.
    pub(super) pending: BTreeMap<Gsi, u32>,
}

impl FakeShared {
    /// Signals the doorbell that a write matches.
    pub(super) fn ring(&self, address: u64, data: &[u8]) -> Option<Doorbell> {
        let mut bytes = [0; 8];
        bytes.get_mut(..data.len())?.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let doorbells = lock(&self.doorbells);
        let (doorbell, waker) = doorbells.iter().find(|(doorbell, _)| {
            doorbell.address == address
                && doorbell
                    .width
                    .is_none_or(|width| usize::from(width) == data.len())
                && doorbell.value.is_none_or(|wanted| wanted == value)
        })?;
        waker.signal();
        Some(*doorbell)
    }
}

impl<A: FakeArch> FakeVm<A> {
    pub(super) fn new(inner: Arc<Inner<A>>, vcpus: u32) -> Self {
        Self {
            inner,
            vcpus,
            regions: Mutex::default(),
            shared: Arc::default(),
        }
    }
}

impl<A: FakeArch> VirtualMachine for FakeVm<A> {
    type Arch = A;
    type Seed = FakeSeed<A>;

    #[expect(unsafe_code, reason = "implements an unsafe method; touches no memory")]
    unsafe fn map_memory(&self, region: MemoryRegion) -> Result<(), Error> {
        let (start, len) = (region.guest_address, region.len);
        let mut regions = lock(&self.regions);
        let overlaps = |&(other, other_len): &(u64, u64)| {
            start < other.saturating_add(other_len) && other < start.saturating_add(len)
        };
        if len == 0 || !(start | len).is_multiple_of(PAGE) || regions.iter().any(overlaps) {
            return Err(Error::Unsupported {
                what: format!("a memory region of {len:#x} bytes at {start:#x}"),
            });
        }
        regions.push((start, len));
        drop(regions);
        self.inner.note(FakeEvent::Mapped {
            guest_address: start,
            len,
        });
        Ok(())
    }

    fn create_vcpu(&self, index: u32) -> Result<FakeSeed<A>, Error> {
        if index >= self.vcpus {
            return Err(Error::Unsupported {
                what: format!("vCPU {index} of a VM with {}", self.vcpus),
            });
        }
        Ok(FakeSeed::new(
            self.inner.clone(),
            self.shared.clone(),
            index,
        ))
    }

    fn irq_line(&self, gsi: Gsi, trigger: IrqTrigger) -> Result<Arc<dyn IrqLine>, Error> {
        if trigger == IrqTrigger::Level {
            return Err(Error::Unsupported {
                what: "level-triggered interrupt lines".to_owned(),
            });
        }
        Ok(Arc::new(FakeLine {
            inner: self.inner.clone(),
            shared: self.shared.clone(),
            gsi,
        }))
    }

    fn add_doorbell(&self, doorbell: Doorbell, wake: Wake<'_>) -> Result<bool, Error> {
        let waker = Waker::of(wake).map_err(|source| Error::Os {
            operation: "duplicate the target of a doorbell",
            source,
        })?;
        let Some(waker) = waker else {
            return Ok(false);
        };
        lock(&self.shared.doorbells).push((doorbell, waker));
        Ok(true)
    }

    fn save(&self) -> Result<VmSavedState, Error> {
        let pending = &lock(&self.shared.signals).pending;
        let bytes = postcard::to_stdvec(pending).map_err(|e| Error::State {
            reason: format!("interrupts cannot be encoded: {e}"),
        })?;
        Ok(VmSavedState {
            blob: Blob {
                backend: BACKEND.to_owned(),
                version: 1,
                bytes,
            },
        })
    }

    fn restore(
        &self,
        state: &VmSavedState,
        vcpus: Vec<RestoredVcpu>,
    ) -> Result<Vec<Finish>, Error> {
        let finishes = self.shared.identity.accept(self.vcpus, vcpus)?;
        if state.blob.backend != BACKEND {
            return Err(Error::State {
                reason: format!("it was saved by {}", state.blob.backend),
            });
        }
        let unfit = |fault: String| Error::State {
            reason: format!("interrupts cannot be decoded: {fault}"),
        };
        let (pending, rest) = postcard::take_from_bytes(&state.blob.bytes)
            .map_err(|error| unfit(error.to_string()))?;
        if !rest.is_empty() {
            return Err(unfit(format!("{} bytes follow them", rest.len())));
        }
        lock(&self.shared.signals).pending = pending;
        self.shared.changed.notify_all();
        self.inner.note(FakeEvent::VmRestored);
        Ok(finishes)
    }
}

#[derive(Debug)]
struct FakeLine<A: FakeArch> {
    inner: Arc<Inner<A>>,
    shared: Arc<FakeShared>,
    gsi: Gsi,
}

impl<A: FakeArch> IrqLine for FakeLine<A> {
    fn pulse(&self) -> Result<(), Error> {
        self.inner.note(FakeEvent::Irq(self.gsi));
        // Edges that no vCPU has taken merge into one.
        lock(&self.shared.signals).pending.insert(self.gsi, 1);
        self.shared.changed.notify_all();
        Ok(())
    }
}
