//! A scripted backend for tests: its vCPUs play a list of accesses and exits.
//!
//! It keeps the promises of the seam that callers rely on: kicks are sticky, a
//! kicked vCPU goes on with its next step, doorbells swallow the writes they
//! match, interrupts wake a vCPU that waits, and saved state goes on in another
//! VM at the step it was saved at.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::state::{Blob, BootRegisters, CpuidEntry, VcpuState, VmState};
use crate::{
    Bus, Capabilities, DirtyBitmap, DirtyModel, Doorbell, Error, Exit, Gsi, Hypervisor, IrqLine,
    IrqModel, IrqTrigger, Kicker, LinuxSupport, MemoryRegion, OpenError, RestoredVcpu, SlotId,
    Vcpu, VcpuSeed, Vm, VmConfig,
};

const BACKEND: &str = "fake";
const PAGE: u64 = 4096;

/// What a vCPU does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Reads so many bytes of device memory; the answer is an [`Event::Read`].
    MmioRead(u64, usize),
    /// Writes device memory, or rings a doorbell.
    MmioWrite(u64, Vec<u8>),
    /// Reads so many bytes from a port.
    PioRead(u16, usize),
    /// Writes to a port.
    PioWrite(u16, Vec<u8>),
    /// Halts until this interrupt has come once more.
    WaitIrq(Gsi),
    /// Leaves with this exit.
    Exit(Exit),
    /// Fails as if the hypervisor did.
    Fail,
}

/// What happened to a fake machine, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Memory was mapped.
    Mapped {
        /// The slot it got.
        slot: SlotId,
        /// Where.
        guest_address: u64,
        /// How much, in bytes.
        len: u64,
    },
    /// A slot was unmapped.
    Unmapped(SlotId),
    /// A vCPU was bound; the boot processor with registers.
    Bound(u32, Option<BootRegisters>),
    /// A vCPU got saved state.
    Restored(u32),
    /// A vCPU was told that it was paused.
    Paused(u32),
    /// An interrupt line was pulsed.
    Irq(Gsi),
    /// A doorbell was rung.
    Rung(Doorbell),
    /// A vCPU read these bytes.
    Read(u32, Vec<u8>),
}

/// The backend; clones share everything.
#[derive(Clone, Debug)]
pub struct FakeHypervisor {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    scripts: Vec<Vec<Step>>,
    linux: LinuxSupport,
    events: Mutex<Vec<Event>>,
    dirty: Mutex<BTreeMap<SlotId, Vec<u64>>>,
}

/// Tests that panic with a lock held fail anyway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeHypervisor {
    /// A backend whose vCPU n plays script n. One that has played its script, or
    /// has none, stays in the guest until kicked.
    #[must_use]
    pub fn new(scripts: Vec<Vec<Step>>) -> Self {
        Self::with_linux(scripts, LinuxSupport::Native)
    }

    /// As [`FakeHypervisor::new`], with this answer of the capability probe.
    #[must_use]
    pub fn with_linux(scripts: Vec<Vec<Step>>, linux: LinuxSupport) -> Self {
        Self {
            inner: Arc::new(Inner {
                scripts,
                linux,
                events: Mutex::default(),
                dirty: Mutex::default(),
            }),
        }
    }

    /// Everything that happened since the last call.
    #[must_use]
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut lock(&self.inner.events))
    }

    /// Marks a page (by number in its slot) as written by the guest.
    pub fn mark_dirty(&self, slot: SlotId, page: usize) {
        if let Some(words) = lock(&self.inner.dirty).get_mut(&slot)
            && let Some(word) = words.get_mut(page / 64)
        {
            *word |= 1 << (page % 64);
        }
    }
}

impl Inner {
    fn note(&self, event: Event) {
        lock(&self.events).push(event);
    }
}

impl Hypervisor for FakeHypervisor {
    type Vm = FakeVm;

    fn open() -> Result<Self, OpenError> {
        Ok(Self::new(Vec::new()))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            backend: BACKEND,
            irq_model: IrqModel::InHypervisor,
            dirty_model: DirtyModel::Bitmap,
            page_granule: PAGE,
            one_vm_per_process: false,
            thread_affine_vcpus: false,
            max_vcpus: 64,
            linux: self.inner.linux.clone(),
        }
    }

    fn guest_cpuid(&self) -> Result<Vec<CpuidEntry>, Error> {
        Ok(Vec::new())
    }

    fn create_vm(&self, config: &VmConfig) -> Result<FakeVm, Error> {
        Ok(FakeVm {
            inner: self.inner.clone(),
            vcpus: config.vcpus.max(1),
            slots: Mutex::default(),
            shared: Arc::default(),
        })
    }
}

/// A VM of the fake backend.
#[derive(Debug)]
pub struct FakeVm {
    inner: Arc<Inner>,
    vcpus: u32,
    slots: Mutex<Slots>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Slots {
    next: u32,
    mapped: BTreeMap<SlotId, (u64, u64)>,
}

/// What wakes vCPUs.
#[derive(Debug, Default)]
struct Shared {
    signals: Mutex<Signals>,
    changed: Condvar,
    doorbells: Mutex<Vec<(Doorbell, Bell)>>,
}

#[derive(Debug, Default)]
struct Signals {
    kicked: BTreeSet<u32>,
    /// Interrupts that no vCPU has taken.
    pending: BTreeMap<Gsi, u32>,
}

/// What a doorbell signals.
#[cfg(unix)]
type Bell = std::os::fd::OwnedFd;
#[cfg(not(unix))]
type Bell = ();

impl Shared {
    /// Signals the doorbell that a write matches.
    fn ring(&self, address: u64, data: &[u8]) -> Option<Doorbell> {
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

fn unknown(slot: SlotId) -> Error {
    Error::Unsupported {
        what: format!("memory slot {}, which is not mapped", slot.0),
    }
}

impl FakeVm {
    fn known(&self, slot: SlotId) -> Result<(u64, u64), Error> {
        let slots = lock(&self.slots);
        slots.mapped.get(&slot).copied().ok_or(unknown(slot))
    }
}

impl Vm for FakeVm {
    type Seed = FakeSeed;

    #[expect(unsafe_code, reason = "implements an unsafe method; touches no memory")]
    unsafe fn map_memory(&self, region: MemoryRegion) -> Result<SlotId, Error> {
        let (start, len) = (region.guest_address, region.len);
        let mut slots = lock(&self.slots);
        let overlaps = |&(other, other_len): &(u64, u64)| {
            start < other.saturating_add(other_len) && other < start.saturating_add(len)
        };
        if len == 0 || !(start | len).is_multiple_of(PAGE) || slots.mapped.values().any(overlaps) {
            return Err(Error::Unsupported {
                what: format!("a memory region of {len:#x} bytes at {start:#x}"),
            });
        }
        let slot = SlotId(slots.next);
        slots.next += 1;
        slots.mapped.insert(slot, (start, len));
        drop(slots);
        self.inner.note(Event::Mapped {
            slot,
            guest_address: start,
            len,
        });
        if region.track_dirty {
            self.set_dirty_tracking(slot, true)?;
        }
        Ok(slot)
    }

    fn unmap_memory(&self, slot: SlotId) -> Result<(), Error> {
        let removed = lock(&self.slots).mapped.remove(&slot);
        removed.ok_or(unknown(slot))?;
        lock(&self.inner.dirty).remove(&slot);
        self.inner.note(Event::Unmapped(slot));
        Ok(())
    }

    fn set_dirty_tracking(&self, slot: SlotId, on: bool) -> Result<(), Error> {
        let (_, len) = self.known(slot)?;
        let words = usize::try_from(len.div_ceil(PAGE * 64)).unwrap_or(usize::MAX);
        let mut dirty = lock(&self.inner.dirty);
        if on {
            dirty.entry(slot).or_insert_with(|| vec![0; words]);
        } else {
            dirty.remove(&slot);
        }
        Ok(())
    }

    fn take_dirty(&self, slot: SlotId) -> Result<DirtyBitmap, Error> {
        self.known(slot)?;
        let mut dirty = lock(&self.inner.dirty);
        let words = dirty.get_mut(&slot).ok_or(Error::Unsupported {
            what: format!("the dirty log of memory slot {}, which is not kept", slot.0),
        })?;
        let taken = words.clone();
        words.fill(0);
        Ok(DirtyBitmap { words: taken })
    }

    fn create_vcpu(&self, index: u32) -> Result<FakeSeed, Error> {
        if index >= self.vcpus {
            return Err(Error::Unsupported {
                what: format!("vCPU {index} of a VM with {}", self.vcpus),
            });
        }
        Ok(FakeSeed {
            inner: self.inner.clone(),
            shared: self.shared.clone(),
            index,
        })
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

struct FakeKicker {
    shared: Arc<Shared>,
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
pub struct FakeSeed {
    inner: Arc<Inner>,
    shared: Arc<Shared>,
    index: u32,
}

impl FakeSeed {
    fn into_vcpu(self) -> FakeVcpu {
        let index = usize::try_from(self.index).unwrap_or(usize::MAX);
        FakeVcpu {
            script: self.inner.scripts.get(index).cloned().unwrap_or_default(),
            inner: self.inner,
            shared: self.shared,
            index: self.index,
            position: 0,
            stays: PhantomData,
        }
    }
}

impl VcpuSeed for FakeSeed {
    type Vcpu = FakeVcpu;

    fn index(&self) -> u32 {
        self.index
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::new(FakeKicker {
            shared: self.shared.clone(),
            index: self.index,
        })
    }

    fn bind(self, boot: Option<&BootRegisters>) -> Result<FakeVcpu, Error> {
        let vcpu = self.into_vcpu();
        vcpu.inner.note(Event::Bound(vcpu.index, boot.cloned()));
        Ok(vcpu)
    }

    fn bind_restored(self, state: &VcpuState) -> Result<(FakeVcpu, RestoredVcpu), Error> {
        let mut vcpu = self.into_vcpu();
        let proof = vcpu.reload(state)?;
        Ok((vcpu, proof))
    }
}

/// A vCPU of the fake backend.
#[derive(Debug)]
pub struct FakeVcpu {
    inner: Arc<Inner>,
    shared: Arc<Shared>,
    index: u32,
    script: Vec<Step>,
    position: usize,
    /// Not `Send`, as the seam demands.
    stays: PhantomData<*const ()>,
}

impl FakeVcpu {
    /// Waits for an interrupt, or for a kick only. True when kicked.
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
        self.inner.note(Event::Read(self.index, data));
    }
}

impl Vcpu for FakeVcpu {
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
                    Some(doorbell) => self.inner.note(Event::Rung(doorbell)),
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

    fn save(&mut self) -> Result<VcpuState, Error> {
        let mut state = VcpuState {
            index: self.index,
            ..VcpuState::default()
        };
        state.general.rip = self.position as u64;
        state.events.backend = BACKEND.to_owned();
        Ok(state)
    }

    fn reload(&mut self, state: &VcpuState) -> Result<RestoredVcpu, Error> {
        if state.index != self.index || state.events.backend != BACKEND {
            return Err(Error::State {
                reason: format!(
                    "it is of vCPU {} of backend {:?}",
                    state.index, state.events.backend
                ),
            });
        }
        self.position = usize::try_from(state.general.rip).unwrap_or(usize::MAX);
        self.inner.note(Event::Restored(self.index));
        Ok(RestoredVcpu { index: self.index })
    }

    fn notify_paused(&mut self) {
        self.inner.note(Event::Paused(self.index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers reads with the low byte of the address.
    struct Echo;

    impl Bus for Echo {
        fn mmio_read(&self, address: u64, data: &mut [u8]) {
            data.fill(address.to_le_bytes()[0]);
        }
        fn mmio_write(&self, _: u64, _: &[u8]) {}
        fn pio_read(&self, port: u16, data: &mut [u8]) {
            data.fill(port.to_le_bytes()[0]);
        }
        fn pio_write(&self, _: u16, _: &[u8]) {}
    }

    #[test]
    fn a_script_is_played_and_kicks_stick() {
        let fake = FakeHypervisor::new(vec![vec![
            Step::PioRead(0x21, 2),
            Step::Exit(Exit::Reset),
            Step::MmioRead(0x33, 1),
            Step::Fail,
        ]]);
        let vm = fake.create_vm(&VmConfig { vcpus: 1 }).unwrap();
        let seed = vm.create_vcpu(0).unwrap();
        let kicker = seed.kicker();
        kicker.kick();
        kicker.kick();
        let mut vcpu = seed.bind(None).unwrap();
        assert_eq!(vcpu.run(&Echo).unwrap(), Exit::Cancelled);
        assert_eq!(vcpu.run(&Echo).unwrap(), Exit::Reset);
        assert!(vcpu.run(&Echo).is_err());
        let expected = [
            Event::Bound(0, None),
            Event::Read(0, vec![0x21, 0x21]),
            Event::Read(0, vec![0x33]),
        ];
        assert_eq!(fake.take_events(), expected);
        assert!(vm.create_vcpu(1).is_err());
    }

    #[test]
    fn saved_state_goes_on_in_another_vm() {
        let fake = FakeHypervisor::new(vec![vec![
            Step::Exit(Exit::Reset),
            Step::WaitIrq(5),
            Step::Exit(Exit::Shutdown),
        ]]);
        let vm = fake.create_vm(&VmConfig { vcpus: 1 }).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap().bind(None).unwrap();
        assert_eq!(vcpu.run(&Echo).unwrap(), Exit::Reset);
        vm.irq_line(5, IrqTrigger::Edge).unwrap().pulse().unwrap();
        let (vcpu_state, vm_state) = (vcpu.save().unwrap(), vm.save().unwrap());

        let other = fake.create_vm(&VmConfig { vcpus: 1 }).unwrap();
        let seed = other.create_vcpu(0).unwrap();
        let (mut vcpu, proof) = seed.bind_restored(&vcpu_state).unwrap();
        assert!(other.restore(&vm_state, Vec::new()).is_err());
        other.restore(&vm_state, vec![proof]).unwrap();
        // The interrupt that was pending wakes it.
        assert_eq!(vcpu.run(&Echo).unwrap(), Exit::Shutdown);
    }

    #[test]
    fn an_interrupt_or_a_kick_ends_waiting() {
        let fake = FakeHypervisor::new(vec![vec![Step::WaitIrq(9), Step::Exit(Exit::Halt)]]);
        let vm = fake.create_vm(&VmConfig { vcpus: 1 }).unwrap();
        let line = vm.irq_line(9, IrqTrigger::Edge).unwrap();
        let seed = vm.create_vcpu(0).unwrap();
        let kicker = seed.kicker();
        let (left, leaves) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut vcpu = seed.bind(None).unwrap();
                for _ in 0..2 {
                    left.send(vcpu.run(&Echo).unwrap()).unwrap();
                }
            });
            kicker.kick();
            assert_eq!(leaves.recv(), Ok(Exit::Cancelled));
            line.pulse().unwrap();
            assert_eq!(leaves.recv(), Ok(Exit::Halt));
        });
    }

    #[cfg(unix)]
    #[test]
    fn doorbells_take_the_writes_they_match() {
        use std::os::fd::AsFd as _;
        let write = |value: u32| Step::MmioWrite(0x50, value.to_le_bytes().to_vec());
        let end = Step::Exit(Exit::Halt);
        let fake = FakeHypervisor::new(vec![vec![write(1), write(2), end]]);
        let vm = fake.create_vm(&VmConfig { vcpus: 1 }).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let doorbell = Doorbell {
            address: 0x50,
            width: Some(4),
            value: Some(2),
        };
        assert!(vm.add_doorbell(doorbell, writer.as_fd()).unwrap());
        let mut vcpu = vm.create_vcpu(0).unwrap().bind(None).unwrap();
        vcpu.run(&Echo).unwrap();
        let events = fake.take_events();
        assert_eq!(events, [Event::Bound(0, None), Event::Rung(doorbell)]);
        let mut count = [0; 8];
        rustix::io::read(&reader, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
    }

    #[test]
    fn slots_are_kept_apart() {
        let fake = FakeHypervisor::open().unwrap();
        let vm = fake.create_vm(&VmConfig { vcpus: 1 }).unwrap();
        let region = |guest_address, len| MemoryRegion {
            guest_address,
            host_address: std::ptr::NonNull::dangling(),
            len,
            read_only: false,
            track_dirty: true,
        };
        #[expect(unsafe_code, reason = "the fake never touches the memory")]
        // SAFETY: nothing is dereferenced.
        let map = |guest_address, len| unsafe { vm.map_memory(region(guest_address, len)) };
        let slot = map(0, 0x10_0000).unwrap();
        assert!(map(0xf_f000, 0x1000).is_err(), "overlaps");
        assert!(map(0x20_0000, 0x800).is_err(), "half a page");
        fake.mark_dirty(slot, 65);
        fake.mark_dirty(slot, 10_000);
        assert_eq!(vm.take_dirty(slot).unwrap().words, [0, 2, 0, 0]);
        assert_eq!(vm.take_dirty(slot).unwrap().words, [0; 4]);
        vm.unmap_memory(slot).unwrap();
        assert!(vm.take_dirty(slot).is_err());
    }
}
