//! Errors of options.

use std::path::PathBuf;

use thiserror::Error;

/// The cause of an [`Error::Option`](crate::Error::Option).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OptionError {
    /// A guest does not run with so little memory.
    #[error(
        "{} of memory is too little for a guest: give it at least {} MiB",
        mebibytes(*bytes),
        minimum >> 20
    )]
    Memory {
        /// The requested memory in bytes.
        bytes: u64,
        /// The minimum in bytes.
        minimum: u64,
    },
    /// A VM cannot get more memory than it was created with.
    #[error(
        "a VM with {} MiB of memory cannot get {} MiB: only a new one can have more",
        all >> 20,
        bytes >> 20
    )]
    MemoryBeyond {
        /// The requested memory in bytes.
        bytes: u64,
        /// The VM's memory in bytes.
        all: u64,
    },
    /// A guest has no vCPU.
    #[error("0 CPUs are too few for a guest: give it at least 1")]
    Cpus,
    /// No disk for changes to the root has this capacity.
    #[error(
        "no disk for the root has {bytes} bytes: give a multiple of 4096 from {} MiB to {} TiB",
        minimum >> 20,
        maximum >> 40
    )]
    RootDisk {
        /// The requested capacity in bytes.
        bytes: u64,
        /// The smallest one.
        minimum: u64,
        /// The largest one.
        maximum: u64,
    },
    /// Two mounts have the same target.
    #[error("two file systems cannot be mounted at \"{0}\"")]
    MountedTwice(String),
    /// A path of the host cannot be mounted.
    #[error("\"{}\" cannot be mounted: {reason}", path.display())]
    HostPath {
        /// The path.
        path: PathBuf,
        /// The cause.
        reason: String,
    },
    /// A snapshot has a directory or file of the host mounted, which was not supplied.
    #[error(
        "\"{}\" of the host was mounted at \"{target}\" when the snapshot was taken, and a snapshot is no right to it",
        path.display()
    )]
    MountMissing {
        /// Path of the mount in the guest.
        target: String,
        /// Path on the host when the snapshot was taken.
        path: PathBuf,
    },
    /// A snapshot has nothing of the host mounted at this path in the guest.
    #[error("nothing of the host is mounted at \"{0}\" in the snapshot")]
    MountUnknown(String),
    /// Several clones would write to a directory of the host.
    #[error("{count} clones would write to \"{}\" of the host at the same time", path.display())]
    ManyWriters {
        /// Number of clones.
        count: usize,
        /// Path on the host.
        path: PathBuf,
    },
    /// A clone cannot differ in this from its snapshot.
    #[error("{0} of a snapshot's VM cannot be changed")]
    Fixed(FixedOption),
    /// The name of a snapshot has a prefix of internal snapshots.
    #[error(
        "\"{name}\" cannot be the name of a snapshot: names that begin with \"{prefix}\" are reserved"
    )]
    ReservedName {
        /// The name.
        name: String,
        /// The prefix.
        prefix: &'static str,
    },
    /// No packet of the network has this length.
    #[error("the MTU of a network is from {minimum} to {maximum}, and not {mtu}")]
    Mtu {
        /// The requested MTU in bytes.
        mtu: u16,
        /// The smallest one.
        minimum: u16,
        /// The largest one.
        maximum: u16,
    },
    /// A VM without a network has neither a rate nor frames to capture.
    #[error("a VM without a network has no rate to limit, and no packets to write to a file")]
    NoNetwork,
    /// The path of a file for captured frames is relative.
    #[error("the path of the file for packets, \"{}\", is not absolute", .0.display())]
    CapturePath(PathBuf),
    /// A search domain, or an option of the resolver, is none.
    #[error("\"{0}\" is no word of resolv.conf")]
    ResolverWord(String),
    /// A list of options is too long.
    #[error("{count} {what} are too many for a guest: give it at most {maximum}")]
    TooMany {
        /// The entries.
        what: &'static str,
        /// Their number.
        count: usize,
        /// The largest number.
        maximum: usize,
    },
    /// A VM that is removed at its exit cannot be started again.
    #[error("a VM that is removed at its exit cannot have a restart policy")]
    RestartOfRemoved,
    /// The name of an image is malformed.
    #[error("\"{name}\" is no name for an image: {reason}")]
    ImageName {
        /// The name.
        name: String,
        /// The cause.
        reason: String,
    },
}

/// A part of a VM's configuration that a snapshot determines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FixedOption {
    /// Command, environment, user, directory and streams.
    #[error("the command, its environment, user, directory and streams")]
    Workload,
    /// Size of guest memory.
    #[error("the memory")]
    Memory,
    /// Number of vCPUs.
    #[error("the number of CPUs")]
    Cpus,
    /// Kernel and its command line.
    #[error("the kernel")]
    Kernel,
    /// Size and mode of the root file system.
    #[error("the root file system")]
    Root,
    /// Volumes and other mounts.
    #[error("the list of mounts")]
    Mounts,
    /// Size of `/dev/shm`.
    #[error("the size of /dev/shm")]
    ShmSize,
}

fn mebibytes(bytes: u64) -> String {
    const MEBIBYTE: u64 = 1 << 20;
    if bytes.is_multiple_of(MEBIBYTE) {
        format!("{} MiB", bytes / MEBIBYTE)
    } else {
        format!("{bytes} bytes")
    }
}
