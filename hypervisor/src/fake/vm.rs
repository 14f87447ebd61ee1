//! The VM: memory slots, interrupt lines, doorbells.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex};

use super::{BACKEND, Event, FakeSeed, Inner, PAGE, lock};
use crate::state::{Blob, VmState};
use crate::{Doorbell, Error, Gsi, IrqLine, IrqTrigger, MemoryRegion, RestoredVcpu, Vm};

/// A VM of the fake backend.
#[derive(Debug)]
pub struct FakeVm {
    inner: Arc<Inner>,
    vcpus: u32,
    /// First address and length of each mapped region.
    regions: Mutex<Vec<(u64, u64)>>,
    shared: Arc<Shared>,
}

/// What wakes vCPUs.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) signals: Mutex<Signals>,
    pub(super) changed: Condvar,
    doorbells: Mutex<Vec<(Doorbell, Bell)>>,
}

#[derive(Debug, Default)]
pub(super) struct Signals {
    pub(super) kicked: BTreeSet<u32>,
    /// Interrupts that no vCPU has taken.
    pub(super) pending: BTreeMap<Gsi, u32>,
}

/// What a doorbell signals.
#[cfg(unix)]
type Bell = std::os::fd::OwnedFd;
#[cfg(not(unix))]
type Bell = ();

impl Shared {
    /// Signals the doorbell that a write matches.
    pub(super) fn ring(&self, address: u64, data: &[u8]) -> Option<Doorbell> {
        let mut bytes = [0; 8];
        bytes.get_mut(..data.len())?.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let doorbells = lock(&self.doorbells);
        let (doorbell, bell) = doorbells.iter().find(|(doorbell, _)| {
            doorbell.address == address
                && doorbell
                    .width
                    .is_none_or(|width| usize::from(width) == data.len())
                && doorbell.value.is_none_or(|wanted| wanted == value)
        })?;
        #[cfg(unix)]
        // A full eventfd counter is still a signal.
        let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
        #[cfg(not(unix))]
        let () = *bell;
        Some(*doorbell)
    }
}

impl FakeVm {
    pub(super) fn new(inner: Arc<Inner>, vcpus: u32) -> Self {
        Self {
            inner,
            vcpus,
            regions: Mutex::default(),
            shared: Arc::default(),
        }
    }
}

impl Vm for FakeVm {
    type Seed = FakeSeed;

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
        self.inner.note(Event::Mapped {
            guest_address: start,
            len,
        });
        Ok(())
    }

    fn create_vcpu(&self, index: u32) -> Result<FakeSeed, Error> {
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

    #[cfg(unix)]
    fn add_doorbell(
        &self,
        doorbell: Doorbell,
        fd: std::os::fd::BorrowedFd<'_>,
    ) -> Result<bool, Error> {
        let bell = fd.try_clone_to_owned().map_err(|source| Error::Os {
            operation: "duplicate an eventfd",
            source,
        })?;
        lock(&self.shared.doorbells).push((doorbell, bell));
        Ok(true)
    }

    fn save(&self) -> Result<VmState, Error> {
        let pending = &lock(&self.shared.signals).pending;
        let bytes = postcard::to_stdvec(pending).map_err(|e| Error::State {
            reason: format!("interrupts cannot be encoded: {e}"),
        })?;
        Ok(VmState {
            blob: Blob {
                backend: BACKEND.to_owned(),
                version: 1,
                bytes,
            },
        })
    }

    fn restore(&self, state: &VmState, vcpus: Vec<RestoredVcpu>) -> Result<(), Error> {
        let mut restored: Vec<u32> = vcpus.iter().map(RestoredVcpu::index).collect();
        restored.sort_unstable();
        if !restored.iter().copied().eq(0..self.vcpus) || state.blob.backend != BACKEND {
            return Err(Error::State {
                reason: format!(
                    "saved by {}, vCPUs {restored:?} of {} restored",
                    state.blob.backend, self.vcpus
                ),
            });
        }
        let pending = postcard::from_bytes(&state.blob.bytes).map_err(|e| Error::State {
            reason: format!("interrupts cannot be decoded: {e}"),
        })?;
        lock(&self.shared.signals).pending = pending;
        self.shared.changed.notify_all();
        Ok(())
    }
}

#[derive(Debug)]
struct FakeLine {
    inner: Arc<Inner>,
    shared: Arc<Shared>,
    gsi: Gsi,
}

impl IrqLine for FakeLine {
    fn pulse(&self) -> Result<(), Error> {
        self.inner.note(Event::Irq(self.gsi));
        // Edges that nobody has taken become one.
        lock(&self.shared.signals).pending.insert(self.gsi, 1);
        self.shared.changed.notify_all();
        Ok(())
    }
}
