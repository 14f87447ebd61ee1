//! Names and labels by which snapshots of the cache, and those of forks, are known.

/// Label with the image that a snapshot's root file system is of.
pub const IMAGE_LABEL: &str = "image";
/// Label of a snapshot that the last VM that uses it removes.
pub const EPHEMERAL_LABEL: &str = "ephemeral";
/// Whether `sm run` has made a snapshot of that name for itself.
pub fn is_automatic(name: &str) -> bool {
    name.starts_with("base-") || name.starts_with("image-")
}

/// Whether `sm fork` has made a snapshot of that name.
pub fn is_of_fork(name: &str) -> bool {
    name.starts_with("fork-")
}
