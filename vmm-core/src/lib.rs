//! The machine: memory map, boot protocols, ACPI, virtio-mmio devices, vCPU threads and the device event loop.
#![warn(missing_docs)]
