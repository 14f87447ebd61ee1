//! The guest physical address map and interrupt lines of the x86_64 machine.
//!
//! Snapshots depend on these values: a change of one requires a new `MACHINE_VERSION`.
//!
//! # Adding a device
//!
//! 1. A type that implements [`sm_virtio::VirtioDevice`], in [`crate::virtio`] or in a crate
//!    of its own. It saves a payload with its kind and a version.
//! 2. A slot in this module. Window, interrupt line, doorbells and ACPI device follow from
//!    it. A device that is in every machine needs a new [`MACHINE_VERSION`], too: a snapshot
//!    is restored only to a machine with the same devices, and existing ones lack it. One
//!    that only some machines have does not need it.
//! 3. An entry of the list of [`DeviceConfig`](crate::devices::DeviceConfig) in
//!    `vmm/src/machine.rs`; its sections in snapshots follow from slot and kind. The version
//!    of its payload, in `versions` of `vmm/src/saved.rs`, so that snapshots in the cache
//!    have other names when it changes.
//! 4. The driver in `guest/kernel/guest.config`, and among the modules of distributions'
//!    kernels that `runtime/src/kernel.rs` selects.

/// Version of everything in this module, recorded in snapshots.
pub const MACHINE_VERSION: u32 = 4;

/// First address of the hole below 4 GiB (3 GiB): devices, no RAM.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole: RAM beyond 3 GiB continues here.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// First register window of the virtio-mmio devices.
pub const VIRTIO_WINDOW: u64 = 0xd000_0000;
/// Length of a register window in bytes.
pub const VIRTIO_WINDOW_SIZE: u64 = 0x1000;
/// Number of device slots; slot `n` has its window at `VIRTIO_WINDOW + n *
/// VIRTIO_WINDOW_SIZE` and its interrupt on GSI `VIRTIO_GSI_BASE + n`.
pub const VIRTIO_SLOTS: u32 = 14;
/// GSI of the first device slot. The last one is 23, the IOAPIC's last input.
pub const VIRTIO_GSI_BASE: u32 = 10;

/// Slot of the vsock device.
pub const SLOT_VSOCK: u32 = 0;
/// Slot of the entropy device.
pub const SLOT_RNG: u32 = 1;
/// Slot of the read-only root disk (`/dev/vda`).
pub const SLOT_ROOT_DISK: u32 = 2;
/// Slot of the disk for changes to the root (`/dev/vdb`); without one, its capacity is 0.
pub const SLOT_DATA_DISK: u32 = 3;
/// Slot of the network device; without a network, it has no link.
pub const SLOT_NET: u32 = 4;
/// Slot of the balloon.
pub const SLOT_BALLOON: u32 = 5;
/// Slot of the device for shared directories; without any, it has none to offer.
pub const SLOT_FS: u32 = 6;
/// Slots of the disks of volumes, from `/dev/vdc` on; without one, a capacity is 0.
pub const SLOTS_VOLUMES: std::ops::RangeInclusive<u32> = 7..=13;

/// GSI of the console UART (COM1).
pub const COM1_GSI: u32 = 4;
/// First I/O port of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// GSI of the ACPI generic event device (VM generation ID).
pub const GED_GSI: u32 = 5;

/// Returns the first guest physical address of the register window of `slot`.
#[must_use]
pub fn virtio_window(slot: u32) -> u64 {
    VIRTIO_WINDOW + u64::from(slot) * VIRTIO_WINDOW_SIZE
}

/// Returns the GSI of the device in `slot`.
#[must_use]
pub fn virtio_gsi(slot: u32) -> u32 {
    VIRTIO_GSI_BASE + slot
}
