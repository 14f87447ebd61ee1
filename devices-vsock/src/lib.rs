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
