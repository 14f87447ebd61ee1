//! The device side of virtio 1.3: split virtqueues, vectored I/O straight on guest
//! memory, a trait for devices, and the MMIO transport.
//!
//! | module | idea |
//! |---|---|
//! | [`queue`] | the split virtqueue and its descriptor chains |
//! | [`iov`] | vectored I/O between host descriptors and guest memory |
//! | [`VirtioDevice`] | what a device is to its transport |
//! | [`mmio`] | the register transport and its saved state |
//! | `testing` | a driver's side of queues and transport (feature `testing`) |
//!
//! Everything in a ring is the driver's word. An index, address or length that makes no
//! sense is an error, after which the device asks for a reset; nothing that a driver
//! writes leads to a panic, an unbounded loop or an allocation of its choice.
//!
//! A device takes a chain, fills its buffers and hands it back. In this example the
//! driver's side comes from the feature `testing`; in a VMM it is the guest.
//!
//! ```
//! use sm_virtio::GuestMemory;
//! use sm_virtio::iov::Window;
//! use sm_virtio::queue::{Chain, Span};
//! use sm_virtio::testing::DriverQueue;
//! use vm_memory::{Bytes as _, GuestAddress};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
//! // The driver lays a queue of 8 out at 64 KiB and offers a buffer for the device
//! // to write.
//! let mut driver = DriverQueue::new(memory.clone(), 0x1_0000, 8);
//! let buffer = Span { address: GuestAddress(0x2000), len: 5 };
//! let head = driver.offer(&[], &[buffer]);
//!
//! let mut queue = driver.device_side(false);
//! let mut chain = Chain::new();
//! assert!(queue.pop(&memory, &mut chain)?);
//! let window = Window::new(&chain.writable, 0, chain.writable_len());
//! assert!(window.copy_in(&memory, b"hello"));
//! queue.push_used(&memory, chain.head(), 5)?;
//! let interrupt = queue.publish(&memory)?;
//! assert!(interrupt, "the driver did not ask for silence");
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

pub use device::{ActivateError, Activation, DevicePayload, Interrupt, VirtioDevice};

/// Guest physical memory, shared by every device and vCPU of a machine.
pub type GuestMemory = vm_memory::GuestMemoryMmap;
