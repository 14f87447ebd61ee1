//! The entropy device (virtio 1.3 section 5.4): the host's `getrandom`.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use sm_event_loop::{Readiness, Registry};
use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;
use sm_virtio::queue::{DescriptorChain, Queue, QueueError};
use sm_virtio::{ActivateError, Activation, CannotSave, DevicePayload, Interrupt, VirtioDevice};

/// Kind of the device in saved state.
const KIND: &str = "rng";
/// Version of its saved state, which is empty.
pub const STATE_VERSION: u32 = 1;
const QUEUE_SIZES: [u16; 1] = [64];
/// Maximum number of bytes for one request; the driver requests again for more.
const MAX_BYTES: usize = 256;
/// Requests served before other handlers have their turn.
const SLICE: usize = 64;
/// The slice was used up.
const TOKEN_CONTINUE: u64 = 0;

struct ActiveRng {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
}

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    active: Option<ActiveRng>,
    queues: Vec<Queue>,
    chain: DescriptorChain,
}

impl Rng {
    /// Creates a device that no driver uses yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn process(&mut self, registry: &mut dyn Registry) {
        let (Some(active), Some(queue)) = (&self.active, self.queues.first_mut()) else {
            return;
        };
        let served = serve(active, queue, &mut self.chain).and_then(|more| {
            if more {
                registry.call_again(TOKEN_CONTINUE);
            }
            queue.publish(&active.memory)
        });
        match served {
            Ok(true) => active.interrupt.used_buffers(),
            Ok(false) => {}
            Err(error) => {
                // Out of service until the driver resets it.
                active.interrupt.needs_reset(&error.to_string());
                self.active = None;
            }
        }
    }
}

/// Serves requests; returns true if there may be more of them.
fn serve(
    active: &ActiveRng,
    queue: &mut Queue,
    chain: &mut DescriptorChain,
) -> Result<bool, QueueError> {
    for _ in 0..SLICE {
        if !queue.pop(&active.memory, chain)? {
            return Ok(false);
        }
        let mut bytes = [0; MAX_BYTES];
        let len = bytes.len().min(chain.writable_len() as usize);
        let flags = rustix::rand::GetRandomFlags::empty();
        // Up to 256 bytes arrive at once; without any, the driver requests again.
        let filled = rustix::rand::getrandom(&mut bytes[..len], flags).unwrap_or(0);
        let window = Window::new(&chain.writable, 0, u32::MAX);
        if !window.copy_in(&active.memory, &bytes[..filled]) {
            return Err(QueueError::Buffer);
        }
        // At most 256.
        let written = u32::try_from(filled).unwrap_or(0);
        queue.push_used(&active.memory, chain.head(), written)?;
    }
    Ok(true)
}

impl VirtioDevice for Rng {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !activation.queues.first().is_some_and(|queue| queue.ready) {
            return Err(ActivateError::QueueMissing { index: 0 });
        }
        self.queues = activation.queues;
        self.active = Some(ActiveRng {
            memory: activation.memory,
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn started(&mut self, registry: &mut dyn Registry) {
        self.process(registry);
    }

    fn queue_notified(&mut self, _index: usize, registry: &mut dyn Registry) {
        self.process(registry);
    }

    fn host_ready(&mut self, _token: u64, _readiness: Readiness, registry: &mut dyn Registry) {
        self.process(registry);
    }

    fn reset(&mut self, _registry: Option<&mut dyn Registry>) {
        self.active = None;
        self.queues.clear();
    }

    fn quiesce(&mut self, _registry: &mut dyn Registry) {}

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn save(&self) -> Result<DevicePayload, CannotSave> {
        Ok(DevicePayload {
            kind: KIND.to_owned(),
            version: STATE_VERSION,
            bytes: Vec::new(),
        })
    }

    fn check(&self, payload: &DevicePayload) -> Result<(), ActivateError> {
        payload.expect(KIND, STATE_VERSION)?;
        payload.expect_empty()
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        self.check(payload)
    }
}
