//! A virtio-vsock device (virtio 1.3 section 5.10) whose muxer moves bytes between host
//! sockets and guest buffers.
//!
//! Bytes from the host are received directly into the guest's receive buffers, bytes from
//! the guest are sent directly from its transmit buffers. Only bytes that a host socket
//! does not accept immediately are stored, within the credit window that the guest was
//! granted, so a slow reader blocks its own connection and no other.
//!
//! Host code reaches the guest through a [`MuxerHandle`]: it passes one end of a stream
//! socket, and the device does the rest.
//!
//! | module | content |
//! |---|---|
//! | `device` | life of the device; turns of receiving and transmitting; transport reset |
//! | `connection` | one connection: protocol, states, shutdown, the event that it awaits |
//! | `muxer` | the table of connections, their listeners, and their deadlines (`timers`) |
//! | `credit`, `allowance`, `backlog` | arithmetic of credit, sizes of windows, stored bytes |
//! | `inbox`, `host`, `packet` | requests of other threads, host sockets, headers |
//! | `handle`, `group` | the interface for host code; limits on connections |
//! | `config`, `stats`, `profile`, `saved` | limits and timeouts, counters, profiling, saved state |
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod allowance;
mod backlog;
mod config;
mod connection;
mod credit;
mod device;
mod group;
mod handle;
mod host;
mod inbox;
mod muxer;
mod packet;
mod profile;
mod saved;
mod stats;
mod sync;
#[cfg(feature = "testing")]
pub mod testing;

pub use config::{SetUpError, VsockConfig};
pub use device::Vsock;
pub use group::{Full, Group, Limit, Member, Permit, Waker};
pub use handle::{
    Accepted, Acceptor, ConnectError, ConnectOptions, GuestStream, Listening, MuxerHandle,
    OnFailure, OnResult, SocketKind,
};
pub use profile::{ProfileStage, Profiler, StageReport};
pub use saved::STATE_VERSION;
pub use stats::Stats;
