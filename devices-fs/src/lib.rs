//! A virtio-fs device (virtio 1.3 section 5.11) that serves directories of the host.
//!
//! [`Fs`] connects the queues of a driver with the FUSE server of `sm-fs-server`. Requests
//! are served on a thread of the device, never on the event loop, because a system call on a
//! shared directory may wait for a disk or a network. Contents of files move between the
//! page cache of the host and guest memory without a copy.
//!
//! | module | idea |
//! |---|---|
//! | `device` | the device behind its transport |
//! | `saved` | the bytes of its saved state |
//! | `service` | the thread that takes requests from the queues |
//! | `worker` | threads for requests that take long |
//! | `buffers` | a descriptor chain as the buffers of a request |
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod buffers;
mod device;
mod saved;
mod service;
mod worker;

pub use device::{Fs, STATE_VERSION, SetSharesError, TAG};
pub use sm_fs_server::{
    CacheMode, ChownPolicy, FsConfig, FsCounts, HostChange, Share, ShareError, ShareOptions,
    ShareOwner, TOUCH, Watches,
};
