//! Snapshots: on-disk format, diffs, restore and clone identity.
//!
//! A snapshot is a directory with `manifest.json` ([`manifest`]), `state.bin`
//! ([`state_file`]) and `memory.bin` ([`memory_file`]). A *diff* stores only the pages
//! that changed since its parent ([`extents`], [`chain`]). Reading and verifying a
//! snapshot needs no VMM ([`store`], [`verify`]).
#![warn(missing_docs)]

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod capture;
pub mod chain;
pub mod contents;
pub mod cpu;
mod error;
pub mod extents;
pub mod flat;
pub mod machine;
pub mod manifest;
pub mod memory_file;
pub mod pagemap;
pub mod restore;
pub mod runs;
pub mod state_file;
pub mod store;
pub mod userfault;
pub mod verify;
pub mod working_set;

pub use error::Error;
