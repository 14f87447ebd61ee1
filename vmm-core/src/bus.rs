//! Dispatch of all vCPUs' device accesses: fixed ranges, found without locks.

use std::fmt;
use std::sync::Arc;

use sm_hypervisor::Bus;
use thiserror::Error;

/// A device behind a window of guest physical addresses or I/O ports.
///
/// Called on vCPU threads, several at once. `offset` is relative to the start of the
/// device's window and `offset + data.len()` stays within it. `data` is 1, 2, 4 or 8 bytes
/// long. An implementation never panics, whatever the guest does; it leaves `data` of
/// unanswered reads unchanged (all ones).
pub trait MmioDevice: Send + Sync {
    /// Fills `data` from the register at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the register at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Reason why a set of windows is invalid.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BusError {
    /// A window without length, or past the end of the address space.
    #[error("device window at {start:#x} of {len:#x} bytes is not valid")]
    Invalid {
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Two windows share an address.
    #[error("device windows at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Start of the lower window.
        first: u64,
        /// Start of the higher window.
        second: u64,
    },
}

/// One window.
struct Window {
    start: u64,
    len: u64,
    device: Arc<dyn MmioDevice>,
}

/// Windows of one address space, sorted.
#[derive(Default)]
struct Space {
    windows: Vec<Window>,
}

impl Space {
    fn add(&mut self, start: u64, len: u64, device: Arc<dyn MmioDevice>) -> Result<(), BusError> {
        if len == 0 || start.checked_add(len - 1).is_none() {
            return Err(BusError::Invalid { start, len });
        }
        let at = self.windows.partition_point(|w| w.start < start);
        let lower = at.checked_sub(1).and_then(|i| self.windows.get(i));
        if let Some(lower) = lower.filter(|w| start - w.start < w.len) {
            return Err(BusError::Overlap {
                first: lower.start,
                second: start,
            });
        }
        if let Some(upper) = self.windows.get(at).filter(|w| w.start - start < len) {
            return Err(BusError::Overlap {
                first: start,
                second: upper.start,
            });
        }
        self.windows.insert(at, Window { start, len, device });
        Ok(())
    }

    /// Returns the device whose window contains all of `address .. address + len`, and the
    /// offset in its window.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn MmioDevice, u64)> {
        let at = self.windows.partition_point(|w| w.start <= address);
        let window = self.windows.get(at.checked_sub(1)?)?;
        let offset = address - window.start;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= window.len).then_some((&*window.device, offset))
    }
}

/// Collects the devices of a machine; [`Self::build`] creates the bus.
#[derive(Default)]
pub struct BusBuilder {
    mmio: Space,
    pio: Space,
}

impl BusBuilder {
    /// Adds `device` at guest physical addresses `start .. start + len`.
    ///
    /// # Errors
    /// An empty window, or one that overlaps another.
    pub fn mmio(
        &mut self,
        start: u64,
        len: u64,
        device: Arc<dyn MmioDevice>,
    ) -> Result<(), BusError> {
        self.mmio.add(start, len, device)
    }

    /// Adds `device` at I/O ports `start .. start + len`.
    ///
    /// # Errors
    /// An empty window, or one that overlaps another.
    pub fn pio(
        &mut self,
        start: u16,
        len: u16,
        device: Arc<dyn MmioDevice>,
    ) -> Result<(), BusError> {
        self.pio.add(start.into(), len.into(), device)
    }

    /// Returns the finished bus.
    #[must_use]
    pub fn build(self) -> MachineBus {
        MachineBus {
            mmio: self.mmio,
            pio: self.pio,
        }
    }
}

impl fmt::Debug for BusBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BusBuilder")
            .field("mmio", &self.mmio.windows.len())
            .field("pio", &self.pio.windows.len())
            .finish()
    }
}

/// The bus of a machine. It never changes once vCPUs run, so a lookup takes no lock.
pub struct MachineBus {
    mmio: Space,
    pio: Space,
}

impl fmt::Debug for MachineBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineBus")
            .field("mmio", &self.mmio.windows.len())
            .field("pio", &self.pio.windows.len())
            .finish()
    }
}

impl Bus for MachineBus {
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.mmio.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.mmio.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.pio.find(port.into(), data.len()) {
            device.read(offset, data);
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        if let Some((device, offset)) = self.pio.find(port.into(), data.len()) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Echo {
        tag: u8,
        writes: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl MmioDevice for Echo {
        fn read(&self, _offset: u64, data: &mut [u8]) {
            data.fill(self.tag);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.writes.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn echo(tag: u8) -> Arc<Echo> {
        Arc::new(Echo {
            tag,
            ..Echo::default()
        })
    }

    #[test]
    fn unknown_addresses_read_as_ones() {
        let mut builder = BusBuilder::default();
        builder.mmio(0x1000, 0x10, echo(1)).unwrap();
        let bus = builder.build();
        let mut data = [0u8; 4];
        for (address, expected) in [
            (0xfff, 0xff), // starts before
            (0x1000, 1),
            (0x100c, 1),
            (0x100d, 0xff), // ends after
            (0x1010, 0xff),
            (u64::MAX, 0xff),
        ] {
            bus.mmio_read(address, &mut data);
            assert_eq!(data, [expected; 4], "{address:#x}");
        }
        bus.pio_read(0x1000, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn writes_arrive_with_their_offset() {
        let device = echo(0);
        let mut builder = BusBuilder::default();
        builder.pio(0x3f8, 8, device.clone()).unwrap();
        let bus = builder.build();
        bus.pio_write(0x3f9, &[7]);
        bus.pio_write(0x3f7, &[8]);
        bus.pio_write(0x3ff, &[8, 9]);
        assert_eq!(*device.writes.lock().unwrap(), vec![(1, vec![7])]);
    }

    #[test]
    fn overlapping_and_invalid_windows_are_refused() {
        let mut builder = BusBuilder::default();
        builder.mmio(0x1000, 0x1000, echo(0)).unwrap();
        builder.mmio(0x2000, 0x1000, echo(0)).unwrap();
        for (start, len) in [(0x1fff, 1), (0xfff, 2), (0x1000, 1), (0, u64::MAX)] {
            assert!(matches!(
                builder.mmio(start, len, echo(0)),
                Err(BusError::Overlap { .. })
            ));
        }
        for (start, len) in [(0x5000, 0), (u64::MAX, 2)] {
            assert_eq!(
                builder.mmio(start, len, echo(0)),
                Err(BusError::Invalid { start, len })
            );
        }
    }

    proptest! {
        #[test]
        fn lookup_agrees_with_a_linear_search(
            windows in proptest::collection::vec((0u64..64, 1u64..8), 0..10),
            address in 0u64..80,
            len in 1usize..9,
        ) {
            let mut space = Space::default();
            let mut kept: Vec<(u64, u64, u8)> = Vec::new();
            for (tag, (start, size)) in (0u8..).zip(windows) {
                let clash = kept.iter().any(|&(s, l, _)| start < s + l && s < start + size);
                prop_assert_eq!(space.add(start, size, echo(tag)).is_err(), clash);
                if !clash {
                    kept.push((start, size, tag));
                }
            }
            let expected = kept
                .iter()
                .find(|&&(s, l, _)| s <= address && address + len as u64 <= s + l)
                .map(|&(s, _, tag)| (tag, address - s));
            let found = space.find(address, len).map(|(device, offset)| {
                let mut data = [0];
                device.read(offset, &mut data);
                (data[0], offset)
            });
            prop_assert_eq!(found, expected);
        }
    }
}
