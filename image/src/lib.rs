//! OCI and Docker images, from any transport, turned into EROFS disks in a crash-safe content store.
#![warn(missing_docs)]
