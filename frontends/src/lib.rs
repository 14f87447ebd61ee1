//! Host-side listeners (unix, exec, ...) on top of the vsock muxer.
#![warn(missing_docs)]
