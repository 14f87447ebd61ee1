//! The machine: memory map, boot protocols, ACPI, virtio-mmio devices and vCPU
//! threads, generic over a [`sm_hypervisor::Hypervisor`].
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
pub mod power;
pub mod serial;
pub mod state;
pub mod vcpu_thread;
pub mod virtio;
mod vmgenid;
