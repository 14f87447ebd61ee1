//! Host-side listeners on top of the vsock muxer.
//!
//! | frontend | clients | target |
//! |---|---|---|
//! | [`UnixFrontend`] | of this user, on a private unix socket | a port of the guest, or its exec server |
//! | [`TcpFrontend`] | on a TCP port | a port of the guest |
//! | [`TlsFrontend`] | on a TCP port, with TLS | the same, decrypted |
//! | [`HandoffFrontend`] | routers that have accepted connections | a port of the guest |
//! | [`HybridFrontend`] | of Firecracker's vsock protocol | any vsock port, in both directions |
//!
//! | module | content |
//! |---|---|
//! | `acceptor` | a listener that accepts as many connections as the limit of descriptors allows |
//! | `listening` | the event handler of frontends that forward connections unchanged |
//! | `service`, `handle` | the muxer, limits and counters of a frontend; its handle |
//! | `socket_path`, `peer` | paths of unix sockets; permitted peers |
//!
//! A frontend accepts connections on the machine's event loop and passes each of them to
//! the muxer, which forwards its bytes. It has no thread, and no buffer except for TLS,
//! which has to decrypt. Its [`FrontendHandle`] has its address and counters; dropping it
//! closes the listener and unlinks its socket, [`FrontendHandle::stop`] also waits for
//! its connections.
//!
//! Clients are not trusted: the bytes and the time that each may use before its
//! connection is forwarded are bounded. Frontends of a process share a [`Limit`] of
//! descriptors; connections beyond it wait in the kernel's backlog.
#![warn(missing_docs)]

#[cfg(all(doctest, feature = "tls"))]
#[doc = include_str!("../README.md")]
struct Readme;

mod acceptor;
mod address;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod handle;
mod handoff;
mod hybrid;
mod listening;
mod peer;
mod service;
mod shortage;
mod socket_path;
mod stats;
mod target;
mod tcp;
#[cfg(feature = "tls")]
mod tls;
mod token;
mod unix;

pub use address::LocalAddress;
pub use error::Error;
pub use handle::FrontendHandle;
pub use handoff::{HandoffFrontend, HandoffSender, MAX_PAYLOAD};
pub use hybrid::HybridFrontend;
pub use peer::is_trusted_peer;
pub use sm_devices_vsock::Limit;
pub use stats::FrontendStats;
pub use target::ForwardTarget;
pub use tcp::TcpFrontend;
#[cfg(feature = "tls")]
pub use tls::{TlsFrontend, TlsIdentity};
pub use unix::UnixFrontend;
