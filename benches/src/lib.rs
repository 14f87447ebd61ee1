//! Common code of the benches: samples and reports.
#![warn(missing_docs)]

pub mod report;
pub mod samples;
