//! The messages between clients of a virtual machine and its process: the interface for
//! clients other than the `sm` command, such as SDKs, containerd shims and routers.
//!
//! | module | contents |
//! |---|---|
//! | [`Control`], [`Endpoint`], [`ControlError`] | calls on a VM's control socket |
//! | [`session`] | a stream to and from a command in the guest |
//! | [`launch`] | the messages: launch request, reports, calls and their answers |
//! | [`event`] | events in the life of VMs, images and snapshots |
//! | [`config`], [`exit`] | the configuration that a VM was started with, in all its forms, and its exit record |
//! | [`workload`], [`publish`], [`signal`], [`id`] | parts of these, and parsers for their textual forms |
//! | [`timings`] | completion times of the phases of a start |
//! | [`fdpass`], [`timed`] | unix sockets with descriptors, and with deadlines |
//!
//! All messages are JSON in the frames of [`sm_guest_proto::frame`] on unix sockets of
//! one user. Launcher and VMM have the same [`VERSION`]. A client of another version gets
//! an error for a call that the VMM does not know, and skips reports that it does not
//! know itself. The crate depends on no hypervisor, device, image or snapshot code.
//!
//! In this example a client asks the process of a VM for its status. A thread plays the
//! role of that process.
//!
//! ```
//! use std::io::{Read as _, Write as _};
//! use std::os::unix::net::UnixListener;
//!
//! use sm_control::launch::{ControlAnswer, ControlCall, Stage, Status};
//! use sm_control::{Control, ControlError, Endpoint};
//! use sm_guest_proto::frame::{self, FrameDecoder, FrameType};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let directory = tempfile::tempdir()?;
//! let endpoint = Endpoint::new(directory.path().join("control.sock"), "web");
//! let error = Control::connect(&endpoint).unwrap_err();
//! assert!(matches!(error, ControlError::NotRunning(name) if name == "web"));
//!
//! let listener = UnixListener::bind(&endpoint.socket)?;
//! let process = std::thread::spawn(move || -> std::io::Result<ControlCall> {
//!     let (mut client, _) = listener.accept()?;
//!     let (mut decoder, mut buffer) = (FrameDecoder::new(), [0; 512]);
//!     let call = loop {
//!         let count = client.read(&mut buffer)?;
//!         decoder.push(&buffer[..count]);
//!         if let Some(frame) = decoder.next_frame().map_err(std::io::Error::other)? {
//!             break serde_json::from_slice(frame.payload)?;
//!         }
//!     };
//!     let answer = ControlAnswer::Status(Status {
//!         stage: Stage::Running,
//!         paused: false,
//!         lacks_space: false,
//!         vmm_pid: std::process::id(),
//!         epoch: String::new(),
//!         started_ns: 1,
//!         clients: 0,
//!         published: Vec::new(),
//!         restarting: false,
//!         restarts: 0,
//!         health: None,
//!         balloon: None,
//!     });
//!     let mut bytes = Vec::new();
//!     frame::encode(FrameType::Control, &serde_json::to_vec(&answer)?, &mut bytes)
//!         .map_err(std::io::Error::other)?;
//!     client.write_all(&bytes)?;
//!     Ok(call)
//! });
//!
//! let answer = Control::connect(&endpoint)?.call(&ControlCall::Status)?;
//! let ControlAnswer::Status(status) = answer else {
//!     return Err("it answered another call".into());
//! };
//! assert_eq!(status.stage, Stage::Running);
//! assert_eq!(process.join().expect("it does not panic")?, ControlCall::Status);
//! # Ok(())
//! # }
//! ```
//!
//! Architecture invariants: every call has a deadline except [`Control::call_and_wait`];
//! a signal never waits behind input that a command does not read.
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod causes;
pub mod config;
mod control;
mod endpoint;
mod error;
pub mod event;
pub mod exit;
pub mod fdpass;
mod health;
pub mod id;
pub mod launch;
pub mod network;
mod paging;
pub mod privileges;
pub mod publish;
pub mod session;
pub mod signal;
pub mod timed;
pub mod timings;
pub mod workload;

pub use causes::with_causes;
pub use control::{Control, MAX_ANSWER};
pub use endpoint::Endpoint;
pub use error::ControlError;

/// Version of this crate, which is that of the `sm` command it is built for.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
