//! End-to-end tests that drive the built sm and the runtime API.
#![warn(missing_docs)]
