//! The balloon (virtio 1.3 section 5.5): memory that a guest returns to the host.
//!
//! A guest reports pages that are free (free page reporting), and gives up pages for as long
//! as the balloon has to have a size. Both are offers of the guest, and none of them is a
//! limit: a guest that offers nothing keeps its memory, which a limit of the host's has to
//! bound. The device offers no page poisoning, so a driver whose free pages must keep a
//! pattern does not report them.
//!
//! Without memory to manage, the device completes requests and returns nothing to the host.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddress;

use sm_event_loop::{Readiness, Registry};
use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;
use sm_virtio::queue::{DescriptorChain, Queue, QueueError};
use sm_virtio::{ActivateError, Activation, CannotSave, DevicePayload, Interrupt, VirtioDevice};

use crate::memory::MachineMemory;
use crate::pagemap::Pagemap;

/// Kind of the device in saved state.
const KIND: &str = "balloon";
/// Version of its saved state: the pages that the balloon has to have, and those that the
/// driver says it has, in 32 bits each.
pub const STATE_VERSION: u32 = 1;
/// VIRTIO_BALLOON_F_REPORTING (section 5.5.3), which `virtio-bindings` does not have.
const F_REPORTING: u32 = 5;
/// Numbers of the queues, without those of features that are not offered: Linux numbers the
/// queues that exist.
const INFLATE: usize = 0;
const REPORTING: usize = 2;
/// Linux has one request in flight in each queue, and reports up to 32 buffers in one.
const QUEUE_SIZES: [u16; 3] = [16, 16, 32];
/// Length of the configuration: `num_pages` and `actual`.
const CONFIG_LEN: usize = 8;
/// Size of a page of the balloon in bytes, on any architecture.
const PAGE: u64 = 1 << 12;
/// Page numbers that are read at a time.
const NUMBERS: usize = 256;
/// Bytes of a reported buffer that are returned at a time.
const PIECE: u32 = 4 << 20;
/// Bytes, and calls of the host's kernel, before other handlers have their turn.
const BYTES: u64 = 16 << 20;
const CALLS: usize = 64;
/// The budget was used up.
const TOKEN_CONTINUE: u64 = 0;

/// The sizes of a balloon, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BalloonSizes {
    /// The size that the guest was asked for.
    pub target: u64,
    /// The size according to the guest, which may be any.
    pub actual: u64,
    /// All memory that was returned to the host since the device was created, some of which
    /// the guest may use again.
    pub returned: u64,
}

struct ActiveBalloon {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
}

/// A request of which a part is done.
#[derive(Default)]
struct Request {
    chain: DescriptorChain,
    /// Bytes that are done; `None` if there is no request.
    done: Option<u32>,
}

/// The balloon of a machine.
#[derive(Default)]
pub struct Balloon {
    managed: Option<ManagedMemory>,
    active: Option<ActiveBalloon>,
    queues: Vec<Queue>,
    requests: [Request; QUEUE_SIZES.len()],
    target: u32,
    actual: u32,
    returned: u64,
}

/// The memory that is returned to the host.
struct ManagedMemory {
    memory: MachineMemory,
    pagemap: Pagemap,
}

/// Work in one turn.
struct Budget {
    bytes: u64,
    calls: usize,
}

impl Budget {
    fn is_used_up(&self) -> bool {
        self.bytes == 0 || self.calls == 0
    }
}

impl ManagedMemory {
    /// Returns memory to the host; the number of bytes.
    fn discard(&self, address: u64, len: u64, budget: &mut Budget) -> u64 {
        budget.bytes = budget.bytes.saturating_sub(len);
        budget.calls = budget.calls.saturating_sub(1);
        let discarded = self.memory.discard(&self.pagemap, address, len);
        discarded.unwrap_or_else(|error| {
            // The guest keeps the pages, so only memory is lost.
            tracing::warn!(%error, source = ?std::error::Error::source(&error), "guest memory is not returned");
            0
        })
    }
}

impl Balloon {
    /// Creates a balloon that no driver uses yet, without memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the memory of the machine, from which pages are returned to the host.
    ///
    /// # Errors
    /// The page map of this process cannot be opened.
    pub fn manage(&mut self, memory: MachineMemory) -> std::io::Result<()> {
        let pagemap = Pagemap::open()?;
        self.managed = Some(ManagedMemory { memory, pagemap });
        Ok(())
    }

    /// Asks the guest for a balloon of `bytes` bytes, rounded down to pages of 4 KiB and at
    /// most 16 TiB. Any thread may call it. The guest follows as far, and as fast, as it can.
    pub fn set_target(&mut self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        if pages != self.target {
            self.target = pages;
            if let Some(active) = &self.active {
                active.interrupt.config_changed();
            }
        }
    }

    /// Returns the sizes of the balloon.
    #[must_use]
    pub fn sizes(&self) -> BalloonSizes {
        BalloonSizes {
            target: u64::from(self.target) * PAGE,
            actual: u64::from(self.actual) * PAGE,
            returned: self.returned,
        }
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        config[..4].copy_from_slice(&self.target.to_le_bytes());
        config[4..].copy_from_slice(&self.actual.to_le_bytes());
        config
    }

    fn process(&mut self, registry: &mut dyn Registry) {
        let Some(active) = self.active.take() else {
            return;
        };
        let served = self.serve(&active).and_then(|more| {
            if more {
                registry.call_again(TOKEN_CONTINUE);
            }
            self.publish(&active)
        });
        match served {
            Ok(()) => self.active = Some(active),
            // Out of service until the driver resets it.
            Err(error) => active.interrupt.needs_reset(&error.to_string()),
        }
    }

    fn publish(&mut self, active: &ActiveBalloon) -> Result<(), QueueError> {
        let mut interrupt = false;
        for queue in self.queues.iter_mut().filter(|queue| queue.ready) {
            interrupt |= queue.publish(&active.memory)?;
        }
        if interrupt {
            active.interrupt.used_buffers();
        }
        Ok(())
    }

    /// Serves requests; returns true if there may be more of them.
    fn serve(&mut self, active: &ActiveBalloon) -> Result<bool, QueueError> {
        let mut budget = Budget {
            bytes: BYTES,
            calls: CALLS,
        };
        let queues = self.queues.iter_mut().zip(&mut self.requests);
        for (index, (queue, request)) in queues.enumerate() {
            while queue.ready {
                if request.done.is_none() {
                    if !queue.pop(&active.memory, &mut request.chain)? {
                        break;
                    }
                    request.done = Some(0);
                    budget.calls = budget.calls.saturating_sub(1);
                }
                let managed = self.managed.as_ref();
                let (complete, returned) = match index {
                    INFLATE => inflate(request, &active.memory, managed, &mut budget),
                    REPORTING => report(request, managed, &mut budget),
                    // The guest has its pages back when it accesses them.
                    _ => (true, 0),
                };
                self.returned = self.returned.saturating_add(returned);
                if complete {
                    queue.push_used(&active.memory, request.chain.head(), 0)?;
                    request.done = None;
                }
                if budget.is_used_up() {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Completes requests of which a part is done: the rest stays in the guest's memory.
    fn complete(&mut self, active: &ActiveBalloon) -> Result<(), QueueError> {
        for (queue, request) in self.queues.iter_mut().zip(&mut self.requests) {
            if request.done.take().is_some() {
                queue.push_used(&active.memory, request.chain.head(), 0)?;
            }
        }
        self.publish(active)
    }
}

/// Takes page numbers of a request; returns true if these were the last ones, and the number
/// of bytes that were returned to the host.
fn inflate(
    request: &mut Request,
    memory: &GuestMemory,
    managed: Option<&ManagedMemory>,
    budget: &mut Budget,
) -> (bool, u64) {
    let done = request.done.unwrap_or(0);
    let window = Window::new(&request.chain.readable, done, u32::MAX);
    let count = NUMBERS.min(window.len() as usize / 4);
    let mut bytes = [0; NUMBERS * 4];
    let bytes = &mut bytes[..count * 4];
    let Some(managed) = managed.filter(|_| window.copy_out(memory, bytes)) else {
        return (true, 0);
    };
    let numbers = bytes.chunks_exact(4).map(|number| {
        let number = number.try_into().map_or(u32::MAX, u32::from_le_bytes);
        u64::from(number)
    });
    let mut numbers: Vec<u64> = numbers.collect();
    // Linux allocates pages one by one, in any order.
    numbers.sort_unstable();
    numbers.dedup();
    let runs = numbers.chunk_by(|page, next| page + 1 == *next);
    let returned = runs
        .filter_map(|run| {
            let (&first, len) = (run.first()?, run.len() as u64 * PAGE);
            Some(managed.discard(first * PAGE, len, budget))
        })
        .sum();
    // At most 1 KiB.
    let taken = u32::try_from(bytes.len()).unwrap_or(0);
    request.done = Some(done.saturating_add(taken));
    (window.len() - taken < 4, returned)
}

/// Takes a part of the buffers of a request; returns true if it was the last one, and the
/// number of bytes that were returned to the host.
fn report(
    request: &mut Request,
    managed: Option<&ManagedMemory>,
    budget: &mut Budget,
) -> (bool, u64) {
    let done = request.done.unwrap_or(0);
    let window = Window::new(&request.chain.writable, done, u32::MAX);
    let (Some(span), Some(managed)) = (window.spans().next(), managed) else {
        return (true, 0);
    };
    let len = span.len.min(PIECE);
    let GuestAddress(address) = span.address;
    let returned = managed.discard(address, u64::from(len), budget);
    request.done = Some(done.saturating_add(len));
    (len == window.len(), returned)
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << F_REPORTING | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn has_doorbells(&self) -> bool {
        // Linux waits for each request.
        false
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = config.get(start..).unwrap_or_default();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = rest.get(index).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut config = self.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        // `num_pages` is read-only.
        for (index, byte) in data.iter().enumerate() {
            let at = start.saturating_add(index);
            if let Some(to) = config.get_mut(at).filter(|_| at >= 4) {
                *to = *byte;
            }
        }
        let [.., a, b, c, d] = config;
        self.actual = u32::from_le_bytes([a, b, c, d]);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        // A driver that does not report pages has no queue for it.
        for index in INFLATE..REPORTING {
            if !activation
                .queues
                .get(index)
                .is_some_and(|queue| queue.ready)
            {
                return Err(ActivateError::QueueMissing { index });
            }
        }
        self.queues = activation.queues;
        self.active = Some(ActiveBalloon {
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
        self.requests = <[Request; QUEUE_SIZES.len()]>::default();
        // The driver has returned all pages to its kernel.
        self.actual = 0;
    }

    fn quiesce(&mut self, _registry: &mut dyn Registry) {
        let Some(active) = self.active.take() else {
            return;
        };
        match self.complete(&active) {
            Ok(()) => self.active = Some(active),
            Err(error) => active.interrupt.needs_reset(&error.to_string()),
        }
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn save(&self) -> Result<DevicePayload, CannotSave> {
        Ok(DevicePayload {
            kind: KIND.to_owned(),
            version: STATE_VERSION,
            bytes: self.config().to_vec(),
        })
    }

    fn check(&self, payload: &DevicePayload) -> Result<(), ActivateError> {
        decode(payload).map(|_| ())
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        (self.target, self.actual) = decode(payload)?;
        Ok(())
    }
}

/// Decodes the target and the actual size, in pages.
fn decode(payload: &DevicePayload) -> Result<(u32, u32), ActivateError> {
    payload.expect(KIND, STATE_VERSION)?;
    let Ok([a, b, c, d, e, f, g, h]) = <[u8; CONFIG_LEN]>::try_from(&*payload.bytes) else {
        return Err(ActivateError::Payload {
            kind: KIND.to_owned(),
            reason: format!("it has {} bytes, not {CONFIG_LEN}", payload.bytes.len()),
        });
    };
    let pages = |bytes| u32::from_le_bytes(bytes);
    Ok((pages([a, b, c, d]), pages([e, f, g, h])))
}

#[cfg(test)]
mod tests;
