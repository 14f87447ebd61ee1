//! One block request: decoding and execution (virtio 1.3 section 5.2.6).

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::{ID_LEN, MAX_RANGE_SECTORS, MAX_RANGES};
use crate::virtio::disk::{Disk, SECTOR};
use sm_virtio::GuestMemory;
use sm_virtio::iov::Window;
use sm_virtio::queue::{DescriptorChain, QueueError};

const HEADER_LEN: u32 = 16;
/// Length of one range in bytes: sector, number of sectors, flags.
const RANGE_LEN: u32 = 16;
/// Longest read that is executed on the event loop, in bytes. Linux's own requests are at
/// most about as long; a chain can have up to 4 GiB.
const MAX_INLINE_READ: u32 = 1 << 20;
/// The only flag of a range.
const UNMAP: u32 = 1;

/// The outcome of a request: bytes written before the status, or a status.
pub(super) type Outcome = Result<u32, Status>;

/// Failure of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// The request is invalid for this disk, or the disk failed.
    IoError,
    /// The device does not support the request.
    Unsupported,
    /// The host has no space for what is written. The driver is not answered: the request is
    /// executed again later.
    NoSpace,
}

impl Status {
    fn of(operation: Operation, error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::Unsupported {
            return Self::Unsupported;
        }
        if matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ) {
            return Self::NoSpace;
        }
        tracing::debug!(?operation, %error, "a block request failed");
        Self::IoError
    }
}

/// A decoded request; offsets in bytes from the start of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    Identify,
    Discard,
    WriteZeroes,
}

/// Returns the length of the device-writable part for data: all but the status.
fn writable_data_len(chain: &DescriptorChain) -> u32 {
    chain.writable_len().saturating_sub(1)
}

fn payload(chain: &DescriptorChain) -> Window<'_> {
    Window::new(&chain.readable, HEADER_LEN, u32::MAX)
}

/// Decodes the request in `chain`.
pub(super) fn parse(memory: &GuestMemory, chain: &DescriptorChain) -> Result<Operation, Status> {
    let mut header = [0; HEADER_LEN as usize];
    if !Window::new(&chain.readable, 0, HEADER_LEN).copy_out(memory, &mut header) {
        return Err(Status::IoError);
    }
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let offset = u64::from_le_bytes(sector).checked_mul(SECTOR);
    let offset = || offset.ok_or(Status::IoError);
    Ok(match u32::from_le_bytes([k0, k1, k2, k3]) {
        VIRTIO_BLK_T_IN => Operation::Read { offset: offset()? },
        VIRTIO_BLK_T_OUT => Operation::Write { offset: offset()? },
        VIRTIO_BLK_T_FLUSH => Operation::Flush,
        VIRTIO_BLK_T_GET_ID => Operation::Identify,
        VIRTIO_BLK_T_DISCARD => Operation::Discard,
        VIRTIO_BLK_T_WRITE_ZEROES => Operation::WriteZeroes,
        _ => return Err(Status::Unsupported),
    })
}

impl Operation {
    /// Executes the request if that is possible without waiting for a device; otherwise
    /// returns `None`.
    pub(super) fn try_now(
        self,
        memory: &GuestMemory,
        disk: &Disk,
        id: &[u8; ID_LEN],
        chain: &DescriptorChain,
    ) -> Option<Outcome> {
        match self {
            Self::Read { offset } => {
                let window = match read_window(chain) {
                    Ok(window) => window,
                    Err(status) => return Some(Err(status)),
                };
                if window.len() > MAX_INLINE_READ {
                    return None;
                }
                match disk.read_cached(memory, window, offset) {
                    Ok(true) => Some(Ok(window.len())),
                    Ok(false) => None,
                    Err(error) => Some(Err(Status::of(self, &error))),
                }
            }
            Self::Identify => {
                let window = Window::new(&chain.writable, 0, writable_data_len(chain));
                let len = id.len().min(window.len() as usize);
                let copied = window.copy_in(memory, &id[..len]);
                // At most 20.
                let len = u32::try_from(len).unwrap_or(0);
                Some(if copied {
                    Ok(len)
                } else {
                    Err(Status::IoError)
                })
            }
            Self::Flush if disk.is_read_only() => Some(Ok(0)),
            Self::Write { .. } | Self::Discard | Self::WriteZeroes if disk.is_read_only() => {
                Some(Err(Status::IoError))
            }
            _ => None,
        }
    }

    /// Executes the request; may wait for a device.
    pub(super) fn execute(
        self,
        memory: &GuestMemory,
        disk: &Disk,
        chain: &DescriptorChain,
    ) -> Outcome {
        let failed = |error| Status::of(self, &error);
        match self {
            Self::Read { offset } => {
                let window = read_window(chain)?;
                disk.read(memory, window, offset).map_err(failed)?;
                Ok(window.len())
            }
            Self::Write { offset } => {
                let window = payload(chain);
                whole_sectors(window.len())?;
                disk.write(memory, window, offset).map_err(failed)?;
                Ok(0)
            }
            Self::Flush => disk.flush().map(|()| 0).map_err(failed),
            Self::Discard | Self::WriteZeroes => self.ranges(memory, disk, chain),
            // Needs the device's name, and never waits: `try_now` executes it.
            Self::Identify => Err(Status::IoError),
        }
    }

    /// Applies a discard or write-zeroes request to each of its ranges.
    fn ranges(self, memory: &GuestMemory, disk: &Disk, chain: &DescriptorChain) -> Outcome {
        let mut window = payload(chain);
        let len = window.len();
        if len == 0 || !len.is_multiple_of(RANGE_LEN) || len / RANGE_LEN > MAX_RANGES {
            return Err(Status::IoError);
        }
        while !window.is_empty() {
            let mut range = [0; RANGE_LEN as usize];
            if !window.take(RANGE_LEN).copy_out(memory, &mut range) {
                return Err(Status::IoError);
            }
            window.advance(RANGE_LEN);
            let [s @ .., n0, n1, n2, n3, f0, f1, f2, f3] = range;
            let sector = u64::from_le_bytes(s);
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            let unmap = flags & UNMAP != 0;
            // Section 5.2.6.2: unknown flags, and `UNMAP` for a discard.
            if flags & !UNMAP != 0 || (unmap && self == Self::Discard) {
                return Err(Status::Unsupported);
            }
            let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
            if count > MAX_RANGE_SECTORS {
                return Err(Status::IoError);
            }
            let len = u64::from(count) * SECTOR;
            match self {
                Self::Discard => disk.discard(offset, len),
                _ => disk.write_zeroes(offset, len, unmap),
            }
            .map_err(|error| Status::of(self, &error))?;
        }
        Ok(0)
    }
}

fn read_window(chain: &DescriptorChain) -> Result<Window<'_>, Status> {
    let window = Window::new(&chain.writable, 0, writable_data_len(chain));
    whole_sectors(window.len())?;
    Ok(window)
}

fn whole_sectors(len: u32) -> Result<(), Status> {
    if u64::from(len).is_multiple_of(SECTOR) {
        Ok(())
    } else {
        Err(Status::IoError)
    }
}

/// Writes the status into the last byte of `chain`; returns the number of bytes written in
/// all.
pub(super) fn answer(
    memory: &GuestMemory,
    chain: &DescriptorChain,
    outcome: Outcome,
) -> Result<u32, QueueError> {
    let (written, status) = match outcome {
        Ok(written) => (written, VIRTIO_BLK_S_OK),
        Err(Status::IoError | Status::NoSpace) => (0, VIRTIO_BLK_S_IOERR),
        Err(Status::Unsupported) => (0, VIRTIO_BLK_S_UNSUPP),
    };
    let status = u8::try_from(status).unwrap_or(u8::MAX);
    // A chain without room for a status cannot be answered.
    if Window::new(&chain.writable, writable_data_len(chain), 1).copy_in(memory, &[status]) {
        Ok(written + 1)
    } else {
        Err(QueueError::Buffer)
    }
}
