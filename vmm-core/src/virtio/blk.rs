//! The block device (virtio 1.3 section 5.2).
//!
//! Reads that the page cache can serve, which for images are nearly all of them, are served
//! on the event loop: passing them to a thread would cost more than the copy. Requests that
//! would wait for a device go to threads of the disk (`worker`), so a cold read or a flush
//! blocks neither the machine's other devices nor other requests. Pausing the machine waits
//! for them ([`VirtioDevice::quiesce`]).
//!
//! An invalid request fails with an error status; only a malformed ring, or a chain without
//! room for a status, makes the device need a reset.

mod request;
mod worker;

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::request::{Operation, Outcome, Status, answer, parse};
use self::worker::{FinishedRequest, Job, Workers};
use super::disk::{Disk, SECTOR};
use super::layered::LayeredDisk;
use sm_event_loop::{Interest, Readiness, Registered, Registry, drain};
use sm_virtio::GuestMemory;
use sm_virtio::queue::{DescriptorChain, Queue, QueueError};
use sm_virtio::{ActivateError, Activation, CannotSave, DevicePayload, Interrupt, VirtioDevice};

/// Kind of the device in saved state.
const KIND: &str = "blk";
/// Version of its saved state, which is empty.
pub const STATE_VERSION: u32 = 1;
const QUEUE_SIZES: [u16; 1] = [256];
/// Length of the identification string in bytes.
const ID_LEN: usize = 20;
/// The page size, and EROFS's block size.
const PAGE: u32 = 4096;
/// Limits of ranges in one discard or write-zeroes request, and of sectors in a range: 32
/// MiB, because the zeroes may have to be written.
const MAX_RANGES: u32 = 16;
const MAX_RANGE_SECTORS: u32 = 1 << 16;
const CONFIG_LEN: usize = 60;

/// Bytes copied on the event loop before the driver is notified, and before other handlers
/// have their turn; a request counts for at least [`REQUEST_COST`].
const PUBLISH_BYTES: u32 = 256 << 10;
const SLICE_BYTES: u32 = 4 << 20;
const REQUEST_COST: u32 = 4 << 10;

/// A thread has finished requests.
const TOKEN_DONE: u64 = 0;
/// The slice was used up.
const TOKEN_CONTINUE: u64 = 1;

/// Access mode of a device; fixed when the device is created, because features are
/// negotiated before a backing may be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// The driver sees a read-only disk of 4 KiB blocks.
    ReadOnly,
    /// The driver may write, in sectors; a read-only backing fails writes with errors.
    ReadWrite,
}

/// The disk of a device has no layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the disk has no layers")]
pub struct NotLayered;

/// State between activation and reset.
struct ActiveBlock {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    /// The ring is malformed: no further chain is taken from it.
    failed: bool,
    workers: Option<(Workers, Registered<Arc<OwnedFd>>)>,
    /// Requests for which the host had no space.
    held: Vec<Job>,
    /// Chains for reuse, so a request causes no allocation.
    chains: Vec<DescriptorChain>,
    done: Vec<FinishedRequest>,
}

/// The block device.
pub struct Block {
    disk: Arc<Disk>,
    access: Access,
    id: [u8; ID_LEN],
    active: Option<ActiveBlock>,
    queues: Vec<Queue>,
    queue_sizes: [u16; 1],
    no_space: Option<NoSpaceCallback>,
    ignores_flushes: bool,
    has_doorbells: bool,
}

/// Called on the event loop when a request is held.
type NoSpaceCallback = Box<dyn Fn() + Send>;

impl Block {
    /// Creates a block device over `disk`. The driver reads `id`, cut to 20 bytes, as its
    /// serial number.
    #[must_use]
    pub fn new(disk: Disk, access: Access, id: &str) -> Self {
        let mut bytes = [0; ID_LEN];
        for (to, from) in bytes.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            disk: Arc::new(disk),
            access,
            id: bytes,
            active: None,
            queues: Vec::new(),
            queue_sizes: QUEUE_SIZES,
            no_space: None,
            ignores_flushes: false,
            has_doorbells: true,
        }
    }

    /// Leaves out the doorbell, for a drive that stays empty. One that gets a disk nevertheless
    /// is notified by the vCPU's thread.
    #[must_use]
    pub fn without_doorbells(mut self) -> Self {
        self.has_doorbells = false;
        self
    }

    /// Sets the size of the queue, a power of two from 8 to 256, the default. Linux allocates
    /// some 600 bytes for each entry, also without a disk.
    #[must_use]
    pub fn queue_size(mut self, size: u16) -> Self {
        self.queue_sizes = [size.next_power_of_two().clamp(8, QUEUE_SIZES[0])];
        self
    }

    /// Holds requests for which the host has no space, instead of answering them with an
    /// error, and calls `notify` on the event loop for the first of them. They are executed
    /// again after a pause of the machine.
    #[must_use]
    pub fn hold_without_space(mut self, notify: impl Fn() + Send + 'static) -> Self {
        self.no_space = Some(Box::new(notify));
        self
    }

    /// Sets whether flushes do nothing: for a disk that nobody uses after the machine. A crash
    /// of the host may lose any part of it.
    #[must_use]
    pub fn ignore_flushes(mut self, ignore: bool) -> Self {
        self.ignores_flushes = ignore;
        self
    }

    /// Replaces the device's backing; a configuration change notifies the driver of the new
    /// capacity. Any thread may call it. Requests that were already taken finish on the
    /// earlier backing.
    pub fn set_disk(&mut self, disk: Disk) {
        self.disk = Arc::new(disk);
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
    }

    /// Replaces the layers of a quiesced device, without a notification: the driver sees
    /// the same disk.
    ///
    /// # Errors
    /// The device has no disk of layers, or `replace` failed; nothing is changed then.
    pub fn replace_layers<E: From<NotLayered>>(
        &mut self,
        replace: impl FnOnce(&LayeredDisk) -> Result<LayeredDisk, E>,
    ) -> Result<(), E> {
        let layers = self.disk.layers().ok_or(NotLayered)?;
        self.disk = Arc::new(Disk::layered(replace(layers)?));
        Ok(())
    }

    /// Returns the backing.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Returns the capacity in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.disk.len()
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &(self.disk.len() / SECTOR).to_le_bytes());
        let [size] = self.queue_sizes;
        // A header and a status are in each chain, too.
        put(12, &u32::from(size - 2).to_le_bytes());
        match self.access {
            Access::ReadOnly => put(20, &PAGE.to_le_bytes()),
            Access::ReadWrite => {
                put(20, &512u32.to_le_bytes());
                // Sectors in a physical block, as a power of two.
                put(24, &[3]);
                put(36, &MAX_RANGE_SECTORS.to_le_bytes());
                put(40, &MAX_RANGES.to_le_bytes());
                put(44, &(PAGE / 512).to_le_bytes());
                put(48, &MAX_RANGE_SECTORS.to_le_bytes());
                put(52, &MAX_RANGES.to_le_bytes());
                put(56, &[1]);
            }
        }
        config
    }

    /// Runs `work` on the queue, then publishes the finished requests.
    fn with_queue(&mut self, work: impl FnOnce(&mut Service<'_>) -> Result<(), QueueError>) {
        let (Some(active), Some(queue)) = (&mut self.active, self.queues.first_mut()) else {
            return;
        };
        if active.failed {
            return;
        }
        let mut service = Service {
            disk: &self.disk,
            id: &self.id,
            no_space: self.no_space.as_deref(),
            ignores_flushes: self.ignores_flushes,
            active,
            queue,
        };
        let result = work(&mut service).and_then(|()| service.publish());
        if let Err(error) = result {
            // Out of service until the driver resets it.
            active.failed = true;
            active.interrupt.needs_reset(&error.to_string());
        }
    }
}

/// The parts of an active device.
struct Service<'a> {
    disk: &'a Arc<Disk>,
    id: &'a [u8; ID_LEN],
    no_space: Option<&'a (dyn Fn() + Send)>,
    ignores_flushes: bool,
    active: &'a mut ActiveBlock,
    queue: &'a mut Queue,
}

impl Service<'_> {
    /// Takes requests until none is left, or a slice is used up.
    fn take_requests(&mut self, registry: &mut dyn Registry) -> Result<(), QueueError> {
        let mut chain = self.active.chains.pop().unwrap_or_default();
        let mut unpublished = 0u32;
        let mut slice = SLICE_BYTES;
        while self.queue.pop(&self.active.memory, &mut chain)? {
            let memory = &self.active.memory;
            let outcome = match parse(memory, &chain) {
                Ok(Operation::Flush) if self.ignores_flushes => Ok(0),
                Ok(operation) => match operation.try_now(memory, self.disk, self.id, &chain) {
                    Some(outcome) => outcome,
                    None => {
                        let next = self.active.chains.pop().unwrap_or_default();
                        let job = Job {
                            chain: std::mem::replace(&mut chain, next),
                            operation,
                            disk: Arc::clone(self.disk),
                        };
                        self.submit_to_worker(job, registry)?;
                        continue;
                    }
                },
                Err(status) => Err(status),
            };
            let cost = self.finish(&chain, outcome)?.max(REQUEST_COST);
            unpublished = cost.saturating_add(unpublished);
            if unpublished >= PUBLISH_BYTES {
                unpublished = 0;
                self.publish()?;
            }
            slice = slice.saturating_sub(cost);
            if slice == 0 {
                registry.call_again(TOKEN_CONTINUE);
                break;
            }
        }
        self.active.chains.push(chain);
        Ok(())
    }

    fn submit_to_worker(
        &mut self,
        job: Job,
        registry: &mut dyn Registry,
    ) -> Result<(), QueueError> {
        if self.active.workers.is_none() {
            let workers = Workers::new(self.active.memory.clone());
            self.active.workers = workers
                .and_then(|workers| {
                    let finished = Arc::clone(workers.finished());
                    let finished = registry.add(finished, TOKEN_DONE, Interest::READ)?;
                    Ok((workers, finished))
                })
                .inspect_err(|error| tracing::warn!(%error, "no threads for block requests"))
                .ok();
        }
        if let Some((workers, _)) = &mut self.active.workers {
            workers.submit(job);
            return Ok(());
        }
        let outcome = job
            .operation
            .execute(&self.active.memory, &job.disk, &job.chain);
        self.finish_job(job, outcome)
    }

    /// Finishes a request that was not executed at once, or holds it.
    fn finish_job(&mut self, job: Job, outcome: Outcome) -> Result<(), QueueError> {
        if let (Err(Status::NoSpace), Some(notify)) = (outcome, self.no_space) {
            self.active.held.push(job);
            if self.active.held.len() == 1 {
                notify();
            }
            return Ok(());
        }
        self.finish(&job.chain, outcome)?;
        self.active.chains.push(job.chain);
        Ok(())
    }

    /// Executes the requests that are held.
    fn execute_held(&mut self, registry: &mut dyn Registry) -> Result<(), QueueError> {
        let held = std::mem::take(&mut self.active.held);
        held.into_iter()
            .try_for_each(|job| self.submit_to_worker(job, registry))
    }

    /// Returns the requests that the threads have finished.
    fn take_finished(&mut self) -> Result<(), QueueError> {
        let Some((workers, _)) = &self.active.workers else {
            return Ok(());
        };
        let mut all = std::mem::take(&mut self.active.done);
        workers.take_finished(&mut all);
        for FinishedRequest { job, outcome } in all.drain(..) {
            self.finish_job(job, outcome)?;
        }
        self.active.done = all;
        Ok(())
    }

    fn finish(&mut self, chain: &DescriptorChain, outcome: Outcome) -> Result<u32, QueueError> {
        let written = answer(&self.active.memory, chain, outcome)?;
        let memory = &self.active.memory;
        self.queue.push_used(memory, chain.head(), written)?;
        Ok(written)
    }

    fn publish(&mut self) -> Result<(), QueueError> {
        if self.queue.publish(&self.active.memory)? {
            self.active.interrupt.used_buffers();
        }
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE;
        features |= match self.access {
            Access::ReadOnly => 1 << VIRTIO_BLK_F_RO,
            Access::ReadWrite => {
                1 << VIRTIO_BLK_F_FLUSH
                    | 1 << VIRTIO_BLK_F_TOPOLOGY
                    | 1 << VIRTIO_BLK_F_DISCARD
                    | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            }
        };
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn has_doorbells(&self) -> bool {
        self.has_doorbells
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (to, from) in data.iter_mut().zip(config.iter().skip(start)) {
            *to = *from;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if !activation.queues.first().is_some_and(|queue| queue.ready) {
            return Err(ActivateError::QueueMissing { index: 0 });
        }
        self.queues = activation.queues;
        self.active = Some(ActiveBlock {
            memory: activation.memory,
            interrupt: activation.interrupt,
            failed: false,
            workers: None,
            held: Vec::new(),
            chains: Vec::new(),
            done: Vec::new(),
        });
        Ok(())
    }

    fn started(&mut self, registry: &mut dyn Registry) {
        self.with_queue(|service| {
            service.execute_held(registry)?;
            service.take_requests(registry)
        });
    }

    fn queue_notified(&mut self, _index: usize, registry: &mut dyn Registry) {
        self.with_queue(|service| service.take_requests(registry));
    }

    fn host_ready(&mut self, token: u64, _readiness: Readiness, registry: &mut dyn Registry) {
        if token == TOKEN_DONE
            && let Some(ActiveBlock {
                workers: Some((_, finished)),
                ..
            }) = &self.active
        {
            // Before the finished requests are taken, so that none is missed.
            let _ = drain(finished.as_fd());
            self.with_queue(|service| service.take_finished());
        } else if token == TOKEN_CONTINUE {
            self.with_queue(|service| service.take_requests(registry));
        }
    }

    fn reset(&mut self, registry: Option<&mut dyn Registry>) {
        if let Some(active) = self.active.take()
            && let Some((workers, finished)) = active.workers
        {
            if let Some(registry) = registry {
                registry.remove(finished);
            }
            // Waits for requests that write to guest memory.
            drop(workers);
        }
        self.queues.clear();
    }

    fn quiesce(&mut self, _registry: &mut dyn Registry) {
        if let Some(active) = &self.active
            && let Some((workers, _)) = &active.workers
        {
            workers.drain();
            let _ = drain(workers.finished().as_fd());
        }
        self.with_queue(|service| service.take_finished());
    }

    fn queues(&self) -> &[Queue] {
        &self.queues
    }

    fn save(&self) -> Result<DevicePayload, CannotSave> {
        if self.active.as_ref().is_some_and(|it| !it.held.is_empty()) {
            return Err(CannotSave {
                kind: KIND,
                reason: "the host has no space for what was written to it".to_owned(),
            });
        }
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
