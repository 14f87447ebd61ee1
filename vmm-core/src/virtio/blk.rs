//! The block device (virtio 1.3 section 5.2).
//!
//! Requests are served on the event loop, synchronously. For images that is a
//! copy out of the page cache in nearly all cases, and a hand-over to a worker
//! thread would cost more than the copy; a cold read stalls the machine's other
//! devices for as long as the disk takes. It also means that there is never
//! work in flight when the machine is paused.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes as _, GuestAddress};

use super::device::{ActivateError, Activation, DevicePayload, Interrupt, VirtioDevice};
use super::disk::{Disk, SECTOR};
use super::queue::{Chain, Queue, QueueError, Span, slice_spans};
use crate::GuestMemory;
use crate::event_loop::{Readiness, Registry};

const QUEUE_SIZES: [u16; 1] = [256];
const HEADER_LEN: u32 = 16;
/// Bytes of the identification string.
const ID_LEN: usize = 20;
/// Data buffers in a request: the queue size less header and status.
const SEG_MAX: u32 = 254;
/// Block size told to the driver: the page size, and EROFS's block size.
const BLOCK: u32 = 4096;
/// Ranges in one discard or write-zeroes request, and sectors in a range.
const MAX_RANGES: u32 = 16;
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Bytes of one range: sector, number of sectors, flags.
const RANGE_LEN: u32 = 16;
const CONFIG_LEN: usize = 60;

/// What the driver cannot change; fixed when the device is made, since features
/// are negotiated before a backing may be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The driver sees a read-only disk.
    ReadOnly,
    /// The driver may write; a read-only backing answers with errors.
    ReadWrite,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
}

/// The block device.
pub struct Block {
    disk: Disk,
    access: Access,
    id: [u8; ID_LEN],
    active: Option<Active>,
    queues: Vec<Queue>,
    chain: Chain,
    scratch: Vec<Span>,
}

/// The outcome of a request: bytes written before the status, or a status.
type Outcome = Result<u32, u32>;

impl Block {
    /// A block device over `disk`. `id` is what the driver reads as its serial
    /// number, cut to 20 bytes.
    #[must_use]
    pub fn new(disk: Disk, access: Access, id: &str) -> Self {
        let mut bytes = [0; ID_LEN];
        for (to, from) in bytes.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            disk,
            access,
            id: bytes,
            active: None,
            queues: Vec::new(),
            chain: Chain::new(),
            scratch: Vec::new(),
        }
    }

    /// Replaces what is behind the device; the driver is told of the new
    /// capacity by a configuration change. Callable from any thread.
    pub fn set_disk(&mut self, disk: Disk) {
        self.disk = disk;
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
    }

    /// Capacity in bytes.
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
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &BLOCK.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(BLOCK / 512).to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn process(&mut self) {
        let Some(active) = self.active.take() else {
            return;
        };
        match self.serve(&active) {
            Ok(interrupt) => {
                if interrupt {
                    active.interrupt.used_buffers();
                }
                self.active = Some(active);
            }
            // The device stays out of service until the driver resets it.
            Err(error) => active.interrupt.needs_reset(&error.to_string()),
        }
    }

    fn serve(&mut self, active: &Active) -> Result<bool, QueueError> {
        let mut chain = std::mem::take(&mut self.chain);
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.serve_all(active, &mut chain, &mut scratch);
        self.chain = chain;
        self.scratch = scratch;
        result
    }

    fn serve_all(
        &mut self,
        active: &Active,
        chain: &mut Chain,
        scratch: &mut Vec<Span>,
    ) -> Result<bool, QueueError> {
        let Some(mut queue) = self.queues.pop() else {
            return Ok(false);
        };
        let result = (|| {
            while queue.pop(&active.memory, chain)? {
                let written = self.request(&active.memory, chain, scratch)?;
                queue.push_used(&active.memory, chain.head(), written)?;
            }
            queue.publish(&active.memory)
        })();
        self.queues.push(queue);
        result
    }

    /// Serves one request; returns the number of bytes written to the chain.
    fn request(
        &self,
        memory: &GuestMemory,
        chain: &Chain,
        scratch: &mut Vec<Span>,
    ) -> Result<u32, QueueError> {
        let writable = chain.writable_len();
        // Without room for a status there is nothing to answer.
        let Some(data_len) = writable.checked_sub(1) else {
            return Err(QueueError::Buffer);
        };
        let mut header = [0; HEADER_LEN as usize];
        let outcome = if copy_in(memory, &chain.readable, 0, &mut header) {
            self.execute(memory, chain, &header, data_len, scratch)
        } else {
            Err(VIRTIO_BLK_S_IOERR)
        };
        let (written, status) = match outcome {
            Ok(written) => (written, VIRTIO_BLK_S_OK),
            Err(status) => (0, status),
        };
        slice_spans(&chain.writable, data_len, 1, scratch);
        let place = scratch.first().ok_or(QueueError::Buffer)?;
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        memory
            .write_obj(status, place.address)
            .map_err(|_| QueueError::Buffer)?;
        Ok(written + 1)
    }

    fn execute(
        &self,
        memory: &GuestMemory,
        chain: &Chain,
        header: &[u8; HEADER_LEN as usize],
        data_len: u32,
        scratch: &mut Vec<Span>,
    ) -> Outcome {
        let [a, b, c, d, _, _, _, _, sector @ ..] = *header;
        let offset = u64::from_le_bytes(sector).checked_mul(SECTOR);
        let offset = offset.ok_or(VIRTIO_BLK_S_IOERR)?;
        match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => {
                slice_spans(&chain.writable, 0, data_len, scratch);
                whole_sectors(data_len)?;
                self.disk
                    .read(memory, scratch, offset)
                    .map_err(|error| failed("read", offset, &error))?;
                Ok(data_len)
            }
            VIRTIO_BLK_T_OUT => {
                let len = chain.readable_len().saturating_sub(HEADER_LEN);
                slice_spans(&chain.readable, HEADER_LEN, len, scratch);
                whole_sectors(len)?;
                self.disk
                    .write(memory, scratch, offset)
                    .map_err(|error| failed("write", offset, &error))?;
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                let flushed = self.disk.flush();
                flushed.map_err(|error| failed("flush", 0, &error))?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => {
                let len = slice_spans(&chain.writable, 0, data_len.min(20), scratch);
                let mut id = self.id.as_slice();
                for span in scratch.iter() {
                    let (now, rest) = id.split_at(id.len().min(span.len as usize));
                    let written = memory.write_slice(now, span.address);
                    written.map_err(|_| VIRTIO_BLK_S_IOERR)?;
                    id = rest;
                }
                Ok(len)
            }
            VIRTIO_BLK_T_DISCARD => self.ranges(memory, chain, Disk::discard),
            VIRTIO_BLK_T_WRITE_ZEROES => self.ranges(memory, chain, Disk::write_zeroes),
            _ => Err(VIRTIO_BLK_S_UNSUPP),
        }
    }

    /// Applies `action` to each range of a discard or write-zeroes request.
    fn ranges(
        &self,
        memory: &GuestMemory,
        chain: &Chain,
        action: fn(&Disk, u64, u64) -> io::Result<()>,
    ) -> Outcome {
        let len = chain.readable_len().saturating_sub(HEADER_LEN);
        if len == 0 || !len.is_multiple_of(RANGE_LEN) || len / RANGE_LEN > MAX_RANGES {
            return Err(VIRTIO_BLK_S_IOERR);
        }
        for index in 0..len / RANGE_LEN {
            let mut range = [0; RANGE_LEN as usize];
            if !copy_in(
                memory,
                &chain.readable,
                HEADER_LEN + index * RANGE_LEN,
                &mut range,
            ) {
                return Err(VIRTIO_BLK_S_IOERR);
            }
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, ..] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            let offset = sector.checked_mul(SECTOR).ok_or(VIRTIO_BLK_S_IOERR)?;
            if count > MAX_RANGE_SECTORS {
                return Err(VIRTIO_BLK_S_IOERR);
            }
            action(&self.disk, offset, u64::from(count) * SECTOR).map_err(|error| {
                if error.kind() == io::ErrorKind::Unsupported {
                    VIRTIO_BLK_S_UNSUPP
                } else {
                    failed("discard", offset, &error)
                }
            })?;
        }
        Ok(0)
    }
}

fn whole_sectors(len: u32) -> Result<(), u32> {
    if u64::from(len).is_multiple_of(SECTOR) {
        Ok(())
    } else {
        Err(VIRTIO_BLK_S_IOERR)
    }
}

fn failed(operation: &'static str, offset: u64, error: &io::Error) -> u32 {
    tracing::debug!(operation, offset, %error, "a block request failed");
    VIRTIO_BLK_S_IOERR
}

/// Copies `bytes.len()` bytes from position `skip` of a chain; `false` when it
/// is shorter.
fn copy_in(memory: &GuestMemory, spans: &[Span], skip: u32, bytes: &mut [u8]) -> bool {
    let mut skip = skip;
    let mut rest = bytes;
    for span in spans {
        if skip >= span.len {
            skip -= span.len;
            continue;
        }
        let len = rest.len().min((span.len - skip) as usize);
        let (now, later) = rest.split_at_mut(len);
        let address = GuestAddress(span.address.0 + u64::from(skip));
        if memory.read_slice(now, address).is_err() {
            return false;
        }
        rest = later;
        skip = 0;
        if rest.is_empty() {
            break;
        }
    }
    rest.is_empty()
}

impl VirtioDevice for Block {
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
                1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            }
        };
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
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
            kind: "blk".to_owned(),
            version: 1,
            bytes: Vec::new(),
        }
    }

    fn restore(&mut self, payload: &DevicePayload) -> Result<(), ActivateError> {
        payload.expect("blk", 1)
    }
}
