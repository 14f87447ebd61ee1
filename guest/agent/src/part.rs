//! Parts of tokens of [`crate::reactor::Class::Container`] and
//! [`crate::reactor::Class::Containers`].

/// The channel to a container's init.
pub(crate) const CHANNEL: u8 = 0;
/// `cgroup.events`, while a request waits for a change.
pub(crate) const CGROUP: u8 = 1;
/// Deadline of a freeze.
pub(crate) const FREEZE: u8 = 2;
/// Deadline of attaching a root.
pub(crate) const ATTACH: u8 = 3;
/// Deadline of writing data back.
pub(crate) const PREPARE: u8 = 4;
/// Deadline of reading the workload's files.
pub(crate) const REPORT: u8 = 5;
/// Deadline of mounting file systems.
pub(crate) const MOUNT: u8 = 6;
