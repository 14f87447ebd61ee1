//! A virtio-net device (virtio 1.3 section 5.1) over a backend of the embedder's choice.
//!
//! [`Net`] is the device behind a transport. Frames of the guest go to its [`NetBackend`],
//! as descriptor chains in guest memory, and the backend fills the guest's receive buffers
//! in place. A device without a backend has no link: it discards what the guest transmits,
//! takes none of its receive buffers, and costs nothing.
//!
//! | module | idea |
//! |---|---|
//! | `device` | the device behind its transport |
//! | `backend` | the interface between device and network |
//! | `receive` | frames for the guest, in its receive buffers |
//! | `header` | the header of each frame |
//! | `engine` | the network of a process: a gateway to the host's sockets |
//! | `dns` | messages of name servers |
//! | `hello` | the name in a TLS ClientHello |
//! | `policy` | rules about what a guest may reach |
//! | `wire` | headers of Ethernet, ARP, IP, ICMP, UDP and TCP |
//! | `counters` | counters that any thread reads |
//! | `saved` | the bytes of the saved state |
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod backend;
mod counters;
mod device;
pub mod dns;
pub mod engine;
mod header;
pub mod hello;
pub mod policy;
mod receive;
mod saved;
pub mod wire;

pub use backend::{BACKEND_TOKENS, NetBackend, NetFrame};
pub use counters::{NetCounters, NetCounts};
pub use device::{Net, NetConfig, STATE_VERSION};
pub use header::{GsoType, HEADER_LEN, MAX_FRAME, NetHeader};
pub use receive::{ReceiveBuffers, ReceiveRing, ReserveError};
