//! Wire types shared by the host and the guest agent.
//!
//! The agent serves three vsock ports ([`port`]). The exec and control ports carry frames
//! of `[u8 type][u32 BE length][payload]` ([`frame`]): exec one command per connection
//! ([`exec`]) or one operation on files ([`files`]), control one JSON request and one JSON reply at a time ([`control`]). The
//! forward port takes one header of fixed size and becomes a raw byte stream
//! ([`forward`]).
//!
//! Requests name the container that they concern ([`container`]), except those that
//! concern the whole guest.
//!
//! A peer never sees a message that it does not know: an unknown type of frame or message
//! is a decoding error. Requests and types of frames are exhaustive enums, so that a
//! receiver does not compile before it handles a new one. Answers and errors are
//! `non_exhaustive`: a caller treats those that it does not expect as a failure.
//!
//! This crate does no I/O: it encodes to and decodes from byte buffers, so that the
//! blocking agent and the host's event loop share the code.
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod base64_bytes;
pub mod container;
pub mod control;
pub mod exec;
pub mod files;
pub mod forward;
pub mod frame;
pub mod privileges;

/// Version of the exec and control protocols that this build implements.
///
/// The two sides exchange it in a HELLO before any other message. A peer answers an
/// unknown version with an error message, never by closing the connection silently.
pub const PROTOCOL_VERSION: u32 = 3;

/// Ports and context identifiers of the vsock address space.
pub mod port {
    /// Guest port of the exec server (one command per connection).
    pub const EXEC: u32 = 1028;
    /// Guest port of the TCP port forwarder.
    pub const FORWARD: u32 = 1029;
    /// Guest port of the control server. The agent also *dials* this port on the host
    /// once it is ready after a cold boot; that stream then carries control requests like
    /// an accepted one.
    pub const CONTROL: u32 = 1030;
    /// Context identifier of the host (virtio 1.3 section 5.10.4).
    pub const HOST_CID: u32 = 2;
    /// Context identifier of every guest. Each guest has a muxer of its own, so the value
    /// need not be unique on the host.
    pub const GUEST_CID: u32 = 3;
}
