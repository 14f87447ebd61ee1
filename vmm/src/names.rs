//! Names and labels by which snapshots of the cache, and those of forks, are known.

/// Label of a snapshot, with the image that its root file system is of.
pub const IMAGE_LABEL: &str = "image";
/// Label of a snapshot that the last VM that uses it removes.
pub(crate) const EPHEMERAL_LABEL: &str = "ephemeral";
/// Whether `sm run` has made a snapshot of that name for itself.
pub(crate) fn is_automatic(name: &str) -> bool {
    name.starts_with("base-") || name.starts_with("image-")
}

/// Whether `sm fork` has made a snapshot of that name.
pub(crate) fn is_of_fork(name: &str) -> bool {
    name.starts_with("fork-")
}
