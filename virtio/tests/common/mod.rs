//! A device for tests of the transport.

use std::sync::Arc;

use sm_event_loop::{Readiness, Registry};
use sm_virtio::iov::Window;
use sm_virtio::queue::{DescriptorChain, Queue, QueueError};
use sm_virtio::{
    ActivateError, Activation, CannotSave, DevicePayload, GuestMemory, Interrupt, VirtioDevice,
};

const QUEUE_SIZES: [u16; 1] = [64];
/// `VIRTIO_F_INDIRECT_DESC` and `VIRTIO_F_EVENT_IDX`.
const FEATURES: u64 = 1 << 28 | 1 << 29;
/// Maximum number of bytes for one request.
const MAX_BYTES: usize = 256;

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
}

/// Fills each buffer with bytes that no other buffer of the device has.
pub(crate) struct Filler {
    device_type: u32,
    active: Option<Active>,
    queues: Vec<Queue>,
    chain: DescriptorChain,
    filled: u8,
    /// It cannot be saved.
    pub(crate) busy: bool,
}

impl Filler {
    pub(crate) fn new(device_type: u32) -> Self {
        Self {
            device_type,
            active: None,
            queues: Vec::new(),
            chain: DescriptorChain::new(),
            filled: 0,
            busy: false,
        }
    }

    fn process(&mut self) {
        let (Some(active), Some(queue)) = (&self.active, self.queues.first_mut()) else {
            return;
        };
        let served = serve(active, queue, &mut self.chain, &mut self.filled)
            .and_then(|()| queue.publish(&active.memory));
        match served {
            Ok(true) => active.interrupt.used_buffers(),
            Ok(false) => {}
            Err(error) => {
                active.interrupt.needs_reset(&error.to_string());
                self.active = None;
            }
        }
    }
}

fn serve(
    active: &Active,
    queue: &mut Queue,
    chain: &mut DescriptorChain,
    filled: &mut u8,
) -> Result<(), QueueError> {
    while queue.pop(&active.memory, chain)? {
        *filled = filled.wrapping_add(1);
        let bytes = [*filled; MAX_BYTES];
        let room = MAX_BYTES.min(chain.writable_len() as usize);
        let window = Window::new(&chain.writable, 0, u32::MAX);
        if !window.copy_in(&active.memory, &bytes[..room]) {
            return Err(QueueError::Buffer);
        }
        let written = u32::try_from(room).unwrap_or(0);
        queue.push_used(&active.memory, chain.head(), written)?;
    }
    Ok(())
}

impl VirtioDevice for Filler {
    fn kind(&self) -> &'static str {
        "filler"
    }

    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn features(&self) -> u64 {
        FEATURES
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
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn started(&mut self, _registry: &mut dyn Registry) {
        self.process();
    }

    fn queue_notified(&mut self, _index: usize, _registry: &mut dyn Registry) {
        self.process();
    }

    fn host_ready(&mut self, _token: u64, _readiness: Readiness, _registry: &mut dyn Registry) {}

    fn reset(&mut self, _registry: Option<&mut dyn Registry>) {
        self.active = None;
        self.queues.clear();
    }

    fn quiesce(&mut self, _registry: &mut dyn Registry) {}

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn save(&self) -> Result<DevicePayload, CannotSave> {
        if self.busy {
            return Err(CannotSave {
                kind: self.kind(),
                reason: "it is busy".to_owned(),
            });
        }
        Ok(DevicePayload {
            kind: self.kind().to_owned(),
            version: 1,
            bytes: vec![self.filled],
        })
    }

    fn check(&self, payload: &DevicePayload) -> Result<(), ActivateError> {
        payload.expect(self.kind(), 1)
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        self.check(payload)?;
        self.filled = payload.bytes.first().copied().unwrap_or(0);
        Ok(())
    }
}
