//! The driver side of the register transport.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::DriverQueue;
use crate::GuestMemory;
use crate::VirtioDevice;
use crate::mmio::{InterruptLine, MmioTransport};
use sm_event_loop::EventLoopHandle;

/// Timeout of a device in a test.
const TIMEOUT: Duration = Duration::from_secs(60);

/// An interrupt line that counts its pulses.
#[derive(Debug, Default)]
pub struct TestLine {
    pulses: Mutex<u64>,
    pulsed: Condvar,
    event: OnceLock<OwnedFd>,
}

impl TestLine {
    /// Returns the number of pulses.
    #[must_use]
    pub fn pulses(&self) -> u64 {
        *self.pulses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the line has been pulsed more than `seen` times; returns the count.
    ///
    /// # Panics
    /// If that takes a minute: the interrupt was lost.
    pub fn wait_for_pulse_after(&self, seen: u64) -> u64 {
        let pulses = self.pulses.lock().unwrap_or_else(PoisonError::into_inner);
        let (pulses, timeout) = self
            .pulsed
            .wait_timeout_while(pulses, TIMEOUT, |pulses| *pulses <= seen)
            .expect("nothing panics with the lock held");
        assert!(!timeout.timed_out(), "no interrupt arrived");
        *pulses
    }

    /// Returns an eventfd that counts pulses from now on.
    ///
    /// # Panics
    /// If no descriptors are left.
    pub fn event(&self) -> BorrowedFd<'_> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = self
            .event
            // For tests: they cannot continue without a descriptor.
            .get_or_init(|| eventfd(0, flags).expect("there are descriptors"));
        event.as_fd()
    }
}

impl InterruptLine for TestLine {
    fn pulse(&self) -> std::io::Result<()> {
        *self.pulses.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.pulsed.notify_all();
        if let Some(event) = self.event.get() {
            let _ = rustix::io::write(event, &1u64.to_ne_bytes());
        }
        Ok(())
    }
}

/// A driver that accesses a device through its registers.
#[derive(Clone)]
pub struct Driver {
    /// The registers.
    pub transport: Arc<MmioTransport>,
    /// The device's interrupt line.
    pub line: Arc<TestLine>,
    memory: GuestMemory,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl Driver {
    /// Creates a transport for `device` on `event_loop`.
    ///
    /// # Panics
    /// If no descriptors are available.
    #[must_use]
    pub fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: &GuestMemory,
        event_loop: EventLoopHandle,
    ) -> Self {
        let line = Arc::new(TestLine::default());
        let transport = MmioTransport::new(0, device, memory.clone(), line.clone(), event_loop)
            .expect("descriptors are available");
        Self {
            transport,
            line,
            memory: memory.clone(),
        }
    }

    /// Reads a register.
    #[must_use]
    pub fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0xff; 4];
        self.transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes a register.
    pub fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Reads configuration space.
    pub fn config(&self, offset: u64, bytes: &mut [u8]) {
        self.transport.read(0x100 + offset, bytes);
    }

    /// Returns the status register.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.read(0x70)
    }

    /// Adds bits to the status register; returns its value afterwards.
    pub fn add_status(&self, bits: u32) -> u32 {
        self.write(0x70, self.status() | bits);
        self.status()
    }

    /// Resets the device.
    pub fn reset(&self) {
        self.write(0x70, 0);
    }

    /// Returns the features that the device offers.
    #[must_use]
    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.write(0x14, select);
            u64::from(self.read(0x10))
        };
        half(0) | half(1) << 32
    }

    /// Acknowledges the device and negotiates features.
    ///
    /// # Panics
    /// If the device refuses them.
    pub fn negotiate(&self, features: u64) {
        self.add_status(VIRTIO_CONFIG_S_ACKNOWLEDGE);
        self.add_status(VIRTIO_CONFIG_S_DRIVER);
        for select in 0..2 {
            self.write(0x24, select);
            let half = features >> (32 * select) & 0xffff_ffff;
            self.write(0x20, u32::try_from(half).expect("32 bits"));
        }
        let status = self.add_status(VIRTIO_CONFIG_S_FEATURES_OK);
        assert_ne!(
            status & VIRTIO_CONFIG_S_FEATURES_OK,
            0,
            "the features were refused"
        );
    }

    /// Sets up and enables a queue of the device.
    pub fn enable_queue(&self, index: u32, queue: &DriverQueue) {
        self.write(0x30, index);
        self.write(0x38, queue.size().into());
        for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(queue.addresses()) {
            let [low, high] = halves(address);
            self.write(register, low);
            self.write(register + 4, high);
        }
        self.write(0x44, 1);
    }

    /// Initialises the device like a driver: with all the features that it offers, and
    /// queues of the given sizes, one after the other from `base`.
    ///
    /// # Panics
    /// If the device refuses.
    pub fn start(&self, base: u64, sizes: &[u16]) -> Vec<DriverQueue> {
        self.start_with(self.offered(), base, sizes)
    }

    /// Like [`Self::start`], with these features only.
    ///
    /// # Panics
    /// If the device refuses.
    pub fn start_with(&self, features: u64, base: u64, sizes: &[u16]) -> Vec<DriverQueue> {
        self.negotiate(features | 1 << VIRTIO_F_VERSION_1);
        let mut at = base;
        let queues: Vec<DriverQueue> = (0..)
            .zip(sizes)
            .map(|(index, &size)| {
                let mut queue = DriverQueue::new(self.memory.clone(), at, size);
                queue.clear();
                at += DriverQueue::footprint(size).next_multiple_of(4096);
                self.enable_queue(index, &queue);
                if features & 1 << VIRTIO_RING_F_EVENT_IDX != 0 {
                    queue.set_used_event();
                }
                queue
            })
            .collect();
        let status = self.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
        assert_ne!(status & VIRTIO_CONFIG_S_DRIVER_OK, 0, "status {status:#x}");
        queues
    }

    /// Notifies the device of queue `index`.
    pub fn notify(&self, index: u32) {
        self.write(0x50, index);
    }

    /// Reads and acknowledges the causes of interrupts so far.
    pub fn acknowledge(&self) -> u32 {
        let causes = self.read(0x60);
        self.write(0x64, causes);
        causes
    }

    /// Waits until the device has returned a chain of `queue`; requests an interrupt and
    /// sleeps until it arrives.
    ///
    /// # Panics
    /// If that takes a minute.
    pub fn wait_used(&self, queue: &mut DriverQueue) -> (u16, u32) {
        loop {
            let seen = self.line.pulses();
            queue.set_used_event();
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            if let Some(used) = queue.take_used() {
                return used;
            }
            self.line.wait_for_pulse_after(seen);
            self.acknowledge();
        }
    }
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}
