//! The device side of virtio 1.3: split virtqueues, vectored I/O directly on guest memory,
//! a trait for devices, and the MMIO transport.
//!
//! | module | idea |
//! |---|---|
//! | [`queue`] | the split virtqueue and its descriptor chains |
//! | [`iov`] | vectored I/O between host descriptors and guest memory |
//! | [`VirtioDevice`] | the interface between a device and its transport |
//! | [`mmio`] | the register transport and its saved state |
//! | `testing` | the driver side of queues and transport (feature `testing`) |
//!
//! All contents of a ring come from the driver and are not trusted. An invalid index,
//! address or length is an error, after which the device requests a reset; no value that a
//! driver writes causes a panic, an unbounded loop or an allocation of a size that the
//! driver chooses.
//!
//! A device takes a chain, fills its buffers and returns it. In this example the driver
//! side comes from the feature `testing`; in a VMM it is the guest.
//!
//! ```
//! use sm_virtio::GuestMemory;
//! use sm_virtio::iov::Window;
//! use sm_virtio::queue::{DescriptorChain, Span};
//! use sm_virtio::testing::DriverQueue;
//! use vm_memory::{Bytes as _, GuestAddress};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
//! // The driver sets up a queue of 8 at 64 KiB and offers a buffer that the device
//! // writes.
//! let mut driver = DriverQueue::new(memory.clone(), 0x1_0000, 8);
//! let buffer = Span { address: GuestAddress(0x2000), len: 5 };
//! let head = driver.offer(&[], &[buffer]);
//!
//! let mut queue = driver.device_side(false);
//! let mut chain = DescriptorChain::new();
//! assert!(queue.pop(&memory, &mut chain)?);
//! let window = Window::new(&chain.writable, 0, chain.writable_len());
//! assert!(window.copy_in(&memory, b"hello"));
//! queue.push_used(&memory, chain.head(), 5)?;
//! let interrupt = queue.publish(&memory)?;
//! assert!(interrupt, "the driver did not suppress interrupts");
//!
//! assert_eq!(driver.take_used(), head.map(|head| (head, 5)));
//! let mut bytes = [0; 5];
//! memory.read_slice(&mut bytes, buffer.address)?;
//! assert_eq!(&bytes, b"hello");
//! # Ok(())
//! # }
//! ```
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod device;
pub mod iov;
pub mod mmio;
pub mod queue;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use device::{ActivateError, Activation, CannotSave, DevicePayload, Interrupt, VirtioDevice};

/// Guest physical memory, shared by every device and vCPU of a machine.
pub type GuestMemory = vm_memory::GuestMemoryMmap;
