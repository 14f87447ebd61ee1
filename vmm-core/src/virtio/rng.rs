//! The entropy device (virtio 1.3 section 5.4): the host's `getrandom`.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::Bytes as _;

use super::device::{ActivateError, Activation, DevicePayload, Interrupt, VirtioDevice};
use super::queue::{Chain, Queue, QueueError};
use crate::GuestMemory;
use crate::event_loop::{Readiness, Registry};

const QUEUE_SIZES: [u16; 1] = [64];
/// Most bytes given for one request; the driver asks again for more.
const MAX_BYTES: usize = 256;

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
}

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    active: Option<Active>,
    queues: Vec<Queue>,
    chain: Chain,
}

impl Rng {
    /// A device that no driver uses yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn process(&mut self) {
        let (Some(active), Some(queue)) = (&self.active, self.queues.first_mut()) else {
            return;
        };
        match serve(active, queue, &mut self.chain) {
            Ok(true) => active.interrupt.used_buffers(),
            Ok(false) => {}
            Err(error) => {
                active.interrupt.needs_reset(&error.to_string());
                self.active = None;
            }
        }
    }
}

fn serve(active: &Active, queue: &mut Queue, chain: &mut Chain) -> Result<bool, QueueError> {
    while queue.pop(&active.memory, chain)? {
        let mut bytes = [0; MAX_BYTES];
        let flags = rustix::rand::GetRandomFlags::empty();
        let filled = rustix::rand::getrandom(&mut bytes[..], flags).unwrap_or(0);
        let mut written = 0;
        for span in &chain.writable {
            let rest = &bytes[written..filled];
            let len = rest.len().min(span.len as usize);
            active
                .memory
                .write_slice(&rest[..len], span.address)
                .map_err(|_| QueueError::Buffer)?;
            written += len;
        }
        let written = u32::try_from(written).unwrap_or(0);
        queue.push_used(&active.memory, chain.head(), written)?;
    }
    queue.publish(&active.memory)
}

impl VirtioDevice for Rng {
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
        self.queues = activation.queues;
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn started(&mut self, _registry: &mut Registry<'_>) {
        self.process();
    }

    fn queue_notified(&mut self, _index: usize, _registry: &mut Registry<'_>) {
        self.process();
    }

    fn host_ready(&mut self, _token: u64, _readiness: Readiness, _registry: &mut Registry<'_>) {}

    fn reset(&mut self, _registry: Option<&mut Registry<'_>>) {
        self.active = None;
        self.queues.clear();
    }

    fn quiesce(&mut self, _registry: &mut Registry<'_>) {}

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn save(&self) -> DevicePayload {
        DevicePayload {
            kind: "rng".to_owned(),
            version: 1,
            bytes: Vec::new(),
        }
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        payload.expect("rng", 1)
    }
}
