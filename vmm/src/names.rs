//! Names and labels of cached snapshots and those of forks.

/// Label with the image of a snapshot's root file system.
pub const IMAGE_LABEL: &str = "image";
/// Label of an ephemeral snapshot, which the last VM that uses it removes.
pub(crate) const EPHEMERAL_LABEL: &str = "ephemeral";
/// Returns true for the name of an automatic snapshot of `sm run`.
pub(crate) fn is_automatic(name: &str) -> bool {
    name.starts_with("base-") || name.starts_with("image-")
}

/// Returns true for the name of a snapshot of `sm fork`.
pub(crate) fn is_of_fork(name: &str) -> bool {
    name.starts_with("fork-")
}
