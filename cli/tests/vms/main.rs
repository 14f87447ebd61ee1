//! Commands on VMs, with records that the test creates and VMMs that it plays.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

#[path = "../common/mod.rs"]
mod common;
mod fake;
mod life;
mod listing;
mod lists;
mod sessions;
mod small;
mod statuses;
