//! The saved state of a session: numbers that a guest knows, and what they stand for.
//!
//! Inodes are saved as names and identities, never as contents or rights: whoever restores a
//! session supplies the directories of its shares again, and a file that is not there any
//! more is `ESTALE` for the guest.

use thiserror::Error;

/// State of a session, version 1. Its fields do not change; another state is another type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FsStateV1 {
    /// Negotiated flags of INIT.
    pub flags: u64,
    /// The shares, in the order of their numbers.
    pub shares: Vec<ShareStateV1>,
    /// Inodes that the guest knows, beside the shares.
    pub nodes: Vec<NodeStateV1>,
    /// Files and directories that the guest has open.
    pub handles: Vec<HandleStateV1>,
}

/// A share of a [`FsStateV1`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShareStateV1 {
    /// Name of the share.
    pub name: Vec<u8>,
    /// Device number of its root: that of nodes on the same file system is replaced by the
    /// device number of the root at the time of the restore.
    pub device: u64,
}

/// An inode of a [`FsStateV1`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeStateV1 {
    /// Number of the node.
    pub id: u64,
    /// Index of its share.
    pub share: u16,
    /// Number of the directory in which it was seen last; 0 if it is not known.
    pub parent: u64,
    /// Name in that directory.
    pub name: Vec<u8>,
    /// Device number of its file system.
    pub device: u64,
    /// Number of the inode.
    pub inode: u64,
    /// Time of its creation in nanoseconds, truncated; 0 if it is not known.
    pub born: u64,
    /// File type, as in `mode`.
    pub kind: u32,
    /// References of the guest.
    pub lookups: u64,
}

/// An open file or directory of a [`FsStateV1`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HandleStateV1 {
    /// Number of the handle.
    pub number: u64,
    /// Number of its node.
    pub node: u64,
    /// Flags with which a file is opened again: access mode and `O_SYNC`, `O_DSYNC`; absent
    /// for a directory.
    pub flags: Option<u32>,
}

/// Reason why a session cannot be restored.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FsStateError {
    /// A share of the session was not supplied, or one that it does not have was.
    #[error("its shared directories are {saved}, and those of the machine are {own}")]
    Shares {
        /// Names of the shares of the session.
        saved: String,
        /// Names of the shares of the server.
        own: String,
    },
    /// There are more nodes or handles than the server may have.
    #[error("it has {count} {objects}, more than {most}")]
    TooMany {
        /// `nodes` or `handles`.
        objects: &'static str,
        /// Number of objects.
        count: usize,
        /// Maximum number.
        most: usize,
    },
    /// A node or a handle contradicts others.
    #[error("{object} {number:#x} is malformed")]
    Malformed {
        /// `node` or `handle`.
        object: &'static str,
        /// Its number.
        number: u64,
    },
}
