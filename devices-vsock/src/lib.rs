//! A virtio-vsock device whose muxer moves bytes between host sockets and guest buffers.
#![warn(missing_docs)]
