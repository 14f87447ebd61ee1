//! A FUSE server that shares directories of the host.
//!
//! [`Server`] turns requests of the FUSE protocol (7.31 to 7.38) into system calls below the
//! directories of its [`FsConfig`]. A transport passes each request as [`Buffers`]: a
//! virtio-fs device those of its ring, `dev_fuse` those of Linux' `/dev/fuse`. Contents of
//! files move between file and buffers without a copy.
//!
//! | module | idea |
//! |---|---|
//! | `request` | bytes of a driver, which are not trusted, as operations |
//! | `server` | the operations, one file for each kind |
//! | `nodes` | inodes that the guest knows, without descriptors |
//! | `directories` | descriptors of directories, and how they are opened again |
//! | `saved` | the state of a session |
//! | `job` | the part of reads, writes and flushes that any thread may perform |
//! | `dev_fuse` | the transport on `/dev/fuse` (feature `dev-fuse`) |
//! | `testing` | requests of a driver (feature `testing`) |
//!
//! # Security
//!
//! The guest is hostile, and another user of the host may change the shared directories at
//! any time. Every operation is relative to a descriptor of a directory, follows no symbolic
//! link, and names one entry of it. Directories are opened from the root of their share by
//! `openat2` with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS`, and are
//! used only if they are the inode that the guest has seen. Only regular files and
//! directories are opened; devices and sockets cannot be created. `read_only` is enforced
//! here, for each operation.
//!
//! Linux 5.8 or later.
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod abi;
mod buffers;
mod config;
#[cfg(any(test, feature = "dev-fuse"))]
pub mod dev_fuse;
mod directories;
mod handles;
mod inode;
mod job;
mod names;
mod nodes;
mod reply;
mod request;
mod saved;
mod server;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod umask;
mod watches;

pub use buffers::{Buffers, SliceBuffers, WritePosition};
pub use config::{
    CacheMode, ChownPolicy, FsConfig, MAX_SHARES, Share, ShareError, ShareOptions, ShareOwner,
};
pub use job::Job;
pub use saved::{FsStateError, FsStateV1, HandleStateV1, NodeStateV1, ShareStateV1};
pub use server::{FsCounts, Served, Server};
pub use umask::own_umask;
pub use watches::{HostChange, MAX_WATCHES, TOUCH, Watches};

/// Length of the longest request with a reply that a driver may send, in bytes: a WRITE of 1
/// MiB with its header.
pub const MAX_REQUEST: usize = (1 << 20) + 4096;
