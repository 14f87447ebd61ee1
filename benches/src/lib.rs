//! What the benches of this workspace share: samples and reports.
#![warn(missing_docs)]

pub mod report;
pub mod samples;
