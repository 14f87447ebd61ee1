//! Host-side listeners on top of the vsock muxer.
//!
//! A frontend accepts connections on the machine's event loop and hands each one
//! to the muxer, which moves its bytes; no thread and no buffer of its own is
//! involved. Its handle says where it listens and what it did; dropping the
//! handle closes the listener and unlinks its socket.
#![warn(missing_docs)]

mod error;
mod handoff;
mod hybrid;
mod listening;
mod target;
mod tcp;
#[cfg(feature = "tls")]
mod tls;
mod unix;

pub use error::Error;
pub use handoff::{HandoffFrontend, HandoffFrontendHandle, HandoffSender, MAX_PAYLOAD};
pub use hybrid::{HybridFrontend, HybridFrontendHandle};
pub use target::Target;
pub use tcp::{TcpFrontend, TcpFrontendHandle};
#[cfg(feature = "tls")]
pub use tls::{TlsFrontend, TlsFrontendHandle, TlsIdentity};
pub use unix::{UnixFrontend, UnixFrontendHandle};
