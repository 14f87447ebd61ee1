//! The machine: memory map, boot protocols, ACPI, virtio-mmio devices and vCPU
//! threads, generic over a [`sm_hypervisor::Hypervisor`].
//!
//! | module | content |
//! |---|---|
//! | [`machine`] | a machine: boot or restore, run, pause, save, end |
//! | [`layout`] | address map, interrupt lines, slots of devices; the steps to add a device |
//! | [`devices`], [`bus`] | devices in their slots; dispatch of register accesses |
//! | [`virtio`] | the block device, the entropy device and the balloon |
//! | [`memory`], [`pagemap`] | guest memory; the pages of it that this process has changed |
//! | [`loader`], [`acpi`] | kernels and boot protocols; ACPI tables |
//! | [`vcpu_thread`], [`exit`], [`power`] | vCPU threads, and the reasons for their end |
//! | [`serial`] | the console |
//! | [`state`] | saved state, without memory |
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod acpi;
pub mod bus;
pub mod devices;
pub mod exit;
pub mod layout;
pub mod loader;
pub mod machine;
pub mod memory;
pub mod pagemap;
pub mod power;
pub mod serial;
pub mod state;
pub mod vcpu_thread;
pub mod virtio;
mod vmgenid;
