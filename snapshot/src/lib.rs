//! The snapshot format on disk, layered diffs, restore modes and clone identity.
#![warn(missing_docs)]
