//! Receiver of a vCPU's device accesses.

/// Receives the port and memory-mapped accesses of all vCPUs of a machine.
///
/// Called on vCPU threads, several at once. A read that no device answers returns all ones,
/// and such a write is ignored; an implementation never panics, whatever the guest does.
/// `data` is 1, 2, 4 or 8 bytes long (port I/O: 1, 2 or 4; string operations are split).
pub trait Bus: Sync {
    /// Reads `data.len()` bytes at guest physical address `address`.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// Writes `data` at guest physical address `address`.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// Reads from an x86 I/O port.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// Writes to an x86 I/O port.
    fn pio_write(&self, port: u16, data: &[u8]);
}
