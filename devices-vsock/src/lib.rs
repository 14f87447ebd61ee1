//! A virtio-vsock device (virtio 1.3 section 5.10) whose muxer moves bytes
//! between host sockets and guest buffers.
//!
//! Bytes from the host are received straight into the guest's receive buffers,
//! bytes from the guest sent straight out of its transmit buffers. Only what a host
//! socket does not take at once is kept, within the credit window that the guest was
//! granted, so that a slow reader stalls its own connection and nothing else.
//!
//! Host code reaches the guest through a [`MuxerHandle`]: it hands over one end
//! of a stream socket and forgets about it.
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
mod ready;
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
pub use profile::{Profiler, Stage, StageReport};
pub use stats::Stats;
