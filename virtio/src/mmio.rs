//! The virtio-mmio register transport, version 2 (virtio 1.3 section 4.2.2).
//!
//! vCPU threads access registers; the event loop serves queues; the threads that control a
//! machine quiesce, save and restore. The registers are behind a mutex that vCPU threads and
//! control threads lock. The device is behind a mutex that all of them lock. The interrupt is
//! made of atomics.
//!
//! A thread that locks both locks the registers first. With the registers locked it may wait
//! for the event loop, which locks only the device; with the device locked it waits for no
//! other thread.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::GuestMemory;
use crate::device::{ActivateError, Activation, CannotSave, Interrupt as _, VirtioDevice};
use crate::queue::Queue;
use sm_event_loop::{
    EventHandler, EventLoopHandle, HandlerId, Interest, Readiness, Registered, Registry, drain,
    new_eventfd, signal,
};

mod interrupt;
mod state;

pub use self::interrupt::InterruptLine;
use self::interrupt::MmioInterrupt;
pub use self::state::{MmioTransportStateV1, TransportState};

/// Offset of the register that a doorbell replaces.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Offset of the device's configuration space.
const CONFIG_SPACE: u64 = 0x100;
/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VENDOR: u32 = 0x534d; // "SM"

/// Tokens of the transport's own descriptors; a device's tokens are below.
const TOKEN_ACTIVATED: u64 = u64::MAX;
const TOKEN_QUEUE: u64 = 1 << 63;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Device code does not panic on guest input; if it did, the report of that panic is
    // more useful than a second one here.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Registers that the driver writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<Queue>,
}

/// A device behind a register window.
pub struct MmioTransport {
    slot: u32,
    device: Arc<Mutex<dyn VirtioDevice>>,
    memory: GuestMemory,
    interrupt: Arc<MmioInterrupt>,
    registers: Mutex<Registers>,
    features: u64,
    device_type: u32,
    doorbells: Vec<Arc<OwnedFd>>,
    activated: Arc<OwnedFd>,
    quiesced: Arc<AtomicBool>,
    event_loop: EventLoopHandle,
    handler: HandlerId,
}

/// The transport's part on the event loop.
struct LoopSide {
    device: Arc<Mutex<dyn VirtioDevice>>,
    doorbells: Vec<Arc<OwnedFd>>,
    activated: Arc<OwnedFd>,
    registered: Vec<Registered<Arc<OwnedFd>>>,
    /// Set while guest memory must not change: events that arrive meanwhile are processed
    /// when the device resumes.
    quiesced: Arc<AtomicBool>,
}

impl EventHandler for LoopSide {
    fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
        let activated = Arc::clone(&self.activated);
        let activated = registry.add(activated, TOKEN_ACTIVATED, Interest::READ)?;
        self.registered.push(activated);
        // Edge-triggered: each signal is reported once, and the counter, which no driver
        // can make overflow, need not be read.
        let edge = Interest::READ.edge_triggered();
        for (index, fd) in (0..).zip(&self.doorbells) {
            let doorbell = registry.add(Arc::clone(fd), TOKEN_QUEUE | index, edge)?;
            self.registered.push(doorbell);
        }
        lock(&self.device).attached(registry);
        Ok(())
    }

    fn ready(&mut self, token: u64, readiness: Readiness, registry: &mut dyn Registry) {
        if token == TOKEN_ACTIVATED {
            let _ = drain(self.activated.as_fd());
        }
        if self.quiesced.load(Ordering::SeqCst) {
            // The device checks all queues and descriptors when it resumes.
            return;
        }
        let mut device = lock(&self.device);
        if token == TOKEN_ACTIVATED {
            device.started(registry);
        } else if token & TOKEN_QUEUE != 0 {
            let index = usize::try_from(token & !TOKEN_QUEUE).unwrap_or(usize::MAX);
            device.queue_notified(index, registry);
        } else {
            device.host_ready(token, readiness, registry);
        }
    }
}

impl MmioTransport {
    /// Creates the transport of `device` in `slot`: a number of the caller's choice, which
    /// names the device in logs and at [`Self::slot`].
    ///
    /// # Errors
    /// No descriptors are available, or the loop has stopped.
    pub fn new(
        slot: u32,
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: GuestMemory,
        line: Arc<dyn InterruptLine>,
        event_loop: EventLoopHandle,
    ) -> io::Result<Arc<Self>> {
        let (sizes, features, device_type) = {
            let device = lock(&device);
            (
                device.queue_sizes().to_vec(),
                device.features() | 1 << VIRTIO_F_VERSION_1,
                device.device_type(),
            )
        };
        let doorbells = sizes
            .iter()
            .map(|_| new_eventfd().map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        let activated = Arc::new(new_eventfd()?);
        let quiesced = Arc::new(AtomicBool::new(false));
        let handler = event_loop.add_handler(Arc::new(Mutex::new(LoopSide {
            device: Arc::clone(&device),
            doorbells: doorbells.clone(),
            activated: Arc::clone(&activated),
            registered: Vec::new(),
            quiesced: Arc::clone(&quiesced),
        })))?;
        Ok(Arc::new(Self {
            slot,
            device,
            memory,
            interrupt: Arc::new(MmioInterrupt {
                status: AtomicU32::new(0),
                generation: AtomicU32::new(0),
                needs_reset: AtomicBool::new(false),
                line,
                slot,
            }),
            registers: Mutex::new(Registers {
                queues: sizes.into_iter().map(Queue::new).collect(),
                ..Registers::default()
            }),
            features,
            device_type,
            doorbells,
            activated,
            quiesced,
            event_loop,
            handler,
        }))
    }

    /// The slot of the device.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Returns the kind of the device, see [`VirtioDevice::kind`].
    #[must_use]
    pub fn kind(&self) -> &'static str {
        lock(&self.device).kind()
    }

    /// Returns true if the device has doorbells, see [`VirtioDevice::has_doorbells`].
    #[must_use]
    pub fn has_doorbells(&self) -> bool {
        lock(&self.device).has_doorbells()
    }

    /// Returns the queues' eventfds with their numbers: the driver's writes to
    /// [`QUEUE_NOTIFY`] signal them.
    pub fn doorbells(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        (0..).zip(self.doorbells.iter().map(|fd| fd.as_fd()))
    }

    /// Completes the device's work in flight; until [`Self::unquiesce`] it touches neither
    /// guest memory nor host sockets. All vCPUs must be paused.
    ///
    /// # Errors
    /// The loop has stopped.
    pub fn quiesce(&self) -> io::Result<()> {
        let device = Arc::clone(&self.device);
        let queues = self.doorbells.len();
        let quiesced = Arc::clone(&self.quiesced);
        self.event_loop.call(self.handler, move |registry| {
            quiesced.store(true, Ordering::SeqCst);
            let mut device = lock(&device);
            // Serve the driver's earlier requests first.
            for index in 0..queues {
                device.queue_notified(index, registry);
            }
            device.quiesce(registry);
        })
    }

    /// Lets the device resume after [`Self::quiesce`]: it checks all its queues and
    /// descriptors again.
    pub fn unquiesce(&self) {
        self.quiesced.store(false, Ordering::SeqCst);
        if lock(&self.registers).status & DRIVER_OK != 0 {
            signal(self.activated.as_fd());
        }
    }

    /// Waits until a device that was restored, or resumes, has been started on the event
    /// loop. Without it, the start may be later than the first instructions of the guest. Has
    /// no effect on an inactive device.
    ///
    /// # Errors
    /// The loop has stopped.
    pub fn complete_start(&self) -> io::Result<()> {
        if lock(&self.registers).status & DRIVER_OK == 0 {
            return Ok(());
        }
        let device = Arc::clone(&self.device);
        let activated = Arc::clone(&self.activated);
        let quiesced = Arc::clone(&self.quiesced);
        self.event_loop.call(self.handler, move |registry| {
            if !quiesced.load(Ordering::SeqCst) {
                // The event that this replaces.
                let _ = drain(activated.as_fd());
                lock(&device).started(registry);
            }
        })
    }

    /// Saves the state of the transport and the device, which must be quiesced.
    ///
    /// # Errors
    /// The device cannot be saved.
    pub fn save(&self) -> Result<TransportState, CannotSave> {
        let registers = lock(&self.registers);
        let device = lock(&self.device);
        // Those of an active device have moved on since it was activated.
        let live = device.queues();
        let queues = if live.len() == registers.queues.len() {
            live
        } else {
            &registers.queues
        };
        let transport = MmioTransportStateV1 {
            device_type: self.device_type,
            status: registers.status,
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            queues: queues.iter().map(Queue::save).collect(),
            interrupt_status: self.interrupt.status.load(Ordering::SeqCst),
            config_generation: self.interrupt.generation.load(Ordering::SeqCst),
            needs_reset: self.interrupt.needs_reset.load(Ordering::SeqCst),
        };
        Ok(TransportState {
            transport,
            device: device.save()?,
        })
    }

    /// Restores state that [`Self::save`] saved, before vCPUs run; also in place, on a
    /// transport in use. State that is refused changes nothing, unless the device refuses its
    /// activation: it is then inactive, until the driver resets it.
    ///
    /// # Errors
    /// State of another device, or state that the device refuses.
    pub fn restore(&self, state: &TransportState) -> Result<(), ActivateError> {
        let TransportState {
            transport: state,
            device: payload,
        } = state;
        let unfit = |reason: String| ActivateError::Payload {
            kind: payload.kind.clone(),
            reason,
        };
        if state.device_type != self.device_type {
            return Err(unfit("it is of another device type".to_owned()));
        }
        let mut registers = lock(&self.registers);
        let restored = registers.restored(state, self.features).map_err(unfit)?;
        let is_active = restored.status & DRIVER_OK != 0 && !state.needs_reset;
        if is_active && !self.queues_are_valid(&restored) {
            return Err(unfit("its queues lie outside guest memory".to_owned()));
        }
        lock(&self.device).check(payload)?;
        if registers.status & DRIVER_OK != 0 {
            self.reset_device();
        }
        *registers = restored;
        let interrupt = &self.interrupt;
        interrupt
            .status
            .store(state.interrupt_status, Ordering::SeqCst);
        interrupt
            .generation
            .store(state.config_generation, Ordering::SeqCst);
        interrupt
            .needs_reset
            .store(state.needs_reset, Ordering::SeqCst);
        lock(&self.device).restore(payload)?;
        if !is_active {
            return Ok(());
        }
        self.activate(&registers)?;
        // KVM delivers interrupts to the IOAPIC from a work queue, so one raised just
        // before the save may be missing in the saved state. A spurious one is harmless:
        // the driver finds nothing new.
        if state.interrupt_status != 0
            && let Err(error) = interrupt.line.pulse()
        {
            tracing::error!(slot = self.slot, %error, "an interrupt was lost");
        }
        signal(self.activated.as_fd());
        Ok(())
    }

    fn queues_are_valid(&self, registers: &Registers) -> bool {
        registers
            .queues
            .iter()
            .all(|queue| !queue.ready || queue.is_valid(&self.memory))
    }

    fn activate(&self, registers: &Registers) -> Result<(), ActivateError> {
        let event_idx = registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues = registers
            .queues
            .iter()
            .cloned()
            .map(|mut queue| {
                queue.event_idx = event_idx;
                queue
            })
            .collect();
        lock(&self.device).activate(Activation {
            memory: self.memory.clone(),
            features: registers.driver_features,
            queues,
            interrupt: self.interrupt.clone(),
        })
    }

    /// Resets the device. Runs on the event loop if that still runs; the calling thread
    /// waits for it.
    fn reset_device(&self) {
        let device = Arc::clone(&self.device);
        let done = self.event_loop.call(self.handler, move |registry| {
            lock(&device).reset(Some(registry));
        });
        if done.is_err() {
            lock(&self.device).reset(None);
        }
    }

    fn reset(&self, registers: &mut Registers) {
        if registers.status & DRIVER_OK != 0 {
            self.reset_device();
        }
        let queues = registers.queues.iter().map(|q| Queue::new(q.max_size));
        *registers = Registers {
            queues: queues.collect(),
            ..Registers::default()
        };
        self.interrupt.status.store(0, Ordering::SeqCst);
        self.interrupt.needs_reset.store(false, Ordering::SeqCst);
    }

    /// Handles a write to the status register (section 2.1): bits are only added, and in
    /// their order (section 3.1.1); the driver reads a refused bit as zero.
    fn set_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            self.reset(registers);
            return;
        }
        let old = registers.status;
        let mut new = old | value & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        let in_order = [
            (ACKNOWLEDGE, DRIVER),
            (DRIVER, FEATURES_OK),
            (FEATURES_OK, DRIVER_OK),
        ];
        for (before, after) in in_order {
            // VERSION_1 is required (section 6.1).
            let refused = after == FEATURES_OK
                && old & FEATURES_OK == 0
                && (registers.driver_features & !self.features != 0
                    || registers.driver_features & 1 << VIRTIO_F_VERSION_1 == 0);
            if new & before == 0 || refused {
                new &= !after;
            }
        }
        if new & FAILED != 0 && old & DRIVER_OK == 0 {
            new &= !DRIVER_OK;
        }
        if new & !old & DRIVER_OK != 0 {
            if !self.queues_are_valid(registers) {
                self.interrupt
                    .needs_reset("a queue was set up outside guest memory");
            } else {
                match self.activate(registers) {
                    Ok(()) => signal(self.activated.as_fd()),
                    Err(error) => self.interrupt.needs_reset(&error.to_string()),
                }
            }
        }
        registers.status = new;
    }

    fn read_register(&self, offset: u64) -> u32 {
        let registers = lock(&self.registers);
        let queue = usize::try_from(registers.queue_select)
            .ok()
            .and_then(|index| registers.queues.get(index));
        let half = |value: u64, select: u32| match select {
            0 => low(value),
            1 => high(value),
            _ => 0,
        };
        match offset {
            0x00 => MAGIC,
            0x04 => 2,
            0x08 => self.device_type,
            0x0c => VENDOR,
            0x10 => half(self.features, registers.device_features_select),
            0x34 => queue.map_or(0, |queue| u32::from(queue.max_size)),
            0x44 => queue.map_or(0, |queue| u32::from(queue.ready)),
            0x60 => self.interrupt.status.load(Ordering::SeqCst),
            0x70 => {
                let needs_reset = self.interrupt.needs_reset.load(Ordering::SeqCst);
                registers.status | if needs_reset { NEEDS_RESET } else { 0 }
            }
            // Length and base of shared memory regions: none exists (section 4.2.2).
            0xb0..=0xbc => u32::MAX,
            0xfc => self.interrupt.generation.load(Ordering::SeqCst),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            QUEUE_NOTIFY => {
                let index = usize::try_from(value).unwrap_or(usize::MAX);
                if let Some(fd) = self.doorbells.get(index) {
                    signal(fd.as_fd());
                }
                return;
            }
            0x64 => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
                return;
            }
            _ => {}
        }
        let mut registers = lock(&self.registers);
        let registers = &mut *registers;
        match offset {
            0x14 => registers.device_features_select = value,
            0x24 => registers.driver_features_select = value,
            0x30 => registers.queue_select = value,
            0x70 => self.set_status(registers, value),
            0x20 if registers.status & FEATURES_OK == 0 => {
                let features = &mut registers.driver_features;
                match registers.driver_features_select {
                    0 => set_low(features, value),
                    1 => set_high(features, value),
                    _ => {}
                }
            }
            _ if registers.status & DRIVER_OK == 0 => write_queue(registers, offset, value),
            _ => {}
        }
    }
}

/// Writes a queue set-up register, until DRIVER_OK.
fn write_queue(registers: &mut Registers, offset: u64, value: u32) {
    let queue = usize::try_from(registers.queue_select)
        .ok()
        .and_then(|index| registers.queues.get_mut(index));
    let Some(queue) = queue else {
        return;
    };
    match offset {
        // An invalid size is detected when the device is activated.
        0x38 => queue.size = u16::try_from(value).unwrap_or(0),
        0x44 => queue.ready = value == 1,
        0x80 => set_low(&mut queue.descriptors, value),
        0x84 => set_high(&mut queue.descriptors, value),
        0x90 => set_low(&mut queue.available, value),
        0x94 => set_high(&mut queue.available, value),
        0xa0 => set_low(&mut queue.used, value),
        0xa4 => set_high(&mut queue.used, value),
        _ => {}
    }
}

fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

fn high(value: u64) -> u32 {
    low(value >> 32)
}

fn set_low(target: &mut u64, value: u32) {
    *target = *target & !0xffff_ffff | u64::from(value);
}

fn set_high(target: &mut u64, value: u32) {
    *target = *target & 0xffff_ffff | u64::from(value) << 32;
}

impl MmioTransport {
    /// Fills `data` from the register at `offset` of the window. A register that does not
    /// exist reads as zero; an access to registers that is not of 4 aligned bytes leaves
    /// `data` unchanged. vCPU threads may call it concurrently.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            lock(&self.device).read_config(offset, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    /// Writes `data` to the register at `offset` of the window; does nothing if there is no
    /// such register. vCPU threads may call it concurrently.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            lock(&self.device).write_config(offset, data);
        } else if let Ok(bytes) = data.try_into()
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        // Fails if the loop has stopped; it then calls no handler any more.
        let _ = self.event_loop.remove_handler(self.handler);
    }
}
