//! Commands on VMs, against records that the test makes and VMMs that it plays.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod fake;
mod listing;
mod sessions;
mod small;
mod statuses;
