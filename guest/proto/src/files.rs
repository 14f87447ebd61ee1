//! The files protocol: one operation on the files of a container per connection to guest
//! port [`crate::port::EXEC`].
//!
//! The client sends CONTROL ([`crate::exec::Hello`]) and, instead of a REQUEST, CONTROL
//! `{"files": ...}` ([`FileRequest`]). The agent answers like for a command: CONTROL
//! (`started`), the result in STDOUT frames, and EXIT. If the operation fails, STDERR
//! frames have the reason (a sentence), and EXIT has the error number of Linux, 1 to 122;
//! if it cannot be started, ERROR precedes EXIT with status 125. Input of an operation is
//! in STDIN frames, which an empty one ends.
//!
//! Paths are resolved in the root of the container, as its processes resolve them, but
//! links of `/proc` to other objects are not followed. Operations are performed as root,
//! while the container's processes run.

use serde::{Deserialize, Serialize};

use crate::base64_bytes;
use crate::container::ContainerId;

/// Maximum length of a line of a result in bytes.
pub const MAX_LINE: usize = 16 << 10;

/// An operation on the files of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRequest {
    /// The container.
    pub container: ContainerId,
    /// The operation.
    pub operation: FileOperation,
}

/// The operations on files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileOperation {
    /// Describe a file. The result is a line with a [`FileStat`] as JSON.
    Stat {
        /// The file.
        path: PathBytes,
        /// Follow a symbolic link at the end of the path.
        follow: bool,
    },
    /// List a directory. The result is a line with a [`FileStat`] as JSON for each entry,
    /// in no order.
    List {
        /// The directory.
        path: PathBytes,
    },
    /// Read a regular file. The result is its contents.
    Read {
        /// The file.
        path: PathBytes,
        /// Offset of the first byte.
        offset: u64,
        /// Maximum number of bytes; all if absent.
        len: Option<u64>,
    },
    /// Write the input to a regular file.
    Write(WriteFile),
    /// Create a directory.
    MakeDirectory {
        /// The directory.
        path: PathBytes,
        /// Permission bits.
        mode: u32,
        /// Create missing parents as well, and accept an existing directory.
        parents: bool,
    },
    /// Remove a file or an empty directory.
    Remove {
        /// The file.
        path: PathBytes,
        /// Remove a directory with all files in it.
        recursive: bool,
    },
    /// Rename a file, which replaces an existing one.
    Rename {
        /// The file.
        from: PathBytes,
        /// Its new path.
        to: PathBytes,
    },
    /// Archive a file or a directory. The result is a tar archive.
    Pack {
        /// The file.
        path: PathBytes,
        /// Name of the file in the archive; `.` for the contents of a directory.
        name: PathBytes,
        /// Follow a symbolic link at the end of the path.
        follow: bool,
    },
    /// Extract a tar archive, the input, in a directory.
    Unpack {
        /// The directory, which must exist.
        path: PathBytes,
        /// Set owners, groups and extended attributes; otherwise files belong to root.
        owners: bool,
    },
    /// Compare the root with the container's image. The result is a line with a
    /// [`FileChange`] as JSON for each difference, sorted by path.
    Changes,
    /// Archive the root without the file systems that are mounted in it. The result is a
    /// tar archive.
    Export,
    /// Archive the differences between the root and the container's image as a layer of an
    /// image (OCI image-spec layer.md). The result is a tar archive.
    Layer {
        /// Freeze the processes of the container meanwhile.
        pause: bool,
    },
}

/// Parameters of [`FileOperation::Write`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteFile {
    /// The file.
    pub path: PathBytes,
    /// Permission bits of a new file.
    pub mode: u32,
    /// Fail if the file exists.
    pub create_new: bool,
    /// Write behind the existing contents instead of replacing them.
    pub append: bool,
}

/// A path, which may have any bytes but zero. Its JSON form is base64.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PathBytes(#[serde(with = "base64_bytes")] pub Vec<u8>);

impl From<&[u8]> for PathBytes {
    fn from(path: &[u8]) -> Self {
        Self(path.to_vec())
    }
}

/// Type of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FileType {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A socket.
    Socket,
}

/// Description of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStat {
    /// Answer to [`FileOperation::Stat`]: the path without symbolic links. Entry of a
    /// directory: the name.
    pub path: PathBytes,
    /// Type of the file.
    pub kind: FileType,
    /// Permission bits, and the set-user-ID, set-group-ID and sticky bits.
    pub mode: u32,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Time of the last modification: seconds since the Unix epoch, and nanoseconds.
    pub mtime: (i64, u32),
    /// Target, if it is a symbolic link.
    pub target: Option<PathBytes>,
}

/// A difference between a container's root and its image.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileChange {
    /// Absolute path.
    pub path: PathBytes,
    /// The difference.
    pub kind: ChangeKind,
}

/// The kinds of differences between a container's root and its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ChangeKind {
    /// The attributes or contents of the file are different, or a file in the directory is.
    Changed,
    /// The image does not have the file.
    Added,
    /// Only the image has the file.
    Deleted,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_a_stable_json_form() {
        let request = FileRequest {
            container: ContainerId::default(),
            operation: FileOperation::Pack {
                path: PathBytes::from(&b"/a"[..]),
                name: PathBytes::from(&b"\xff"[..]),
                follow: true,
            },
        };
        let json = serde_json::to_string(&request).unwrap();
        assert_eq!(
            json,
            r#"{"container":"main","operation":{"pack":{"path":"L2E=","name":"/w==","follow":true}}}"#
        );
        assert_eq!(serde_json::from_str::<FileRequest>(&json).unwrap(), request);
        let json = serde_json::to_string(&FileOperation::Changes).unwrap();
        assert_eq!(json, r#""changes""#);
    }

    #[test]
    fn the_longest_description_fits_a_line() {
        let stat = FileStat {
            path: PathBytes(vec![0xff; 4095]),
            kind: FileType::BlockDevice,
            mode: u32::MAX,
            uid: u32::MAX,
            gid: u32::MAX,
            size: u64::MAX,
            mtime: (i64::MIN, u32::MAX),
            target: Some(PathBytes(vec![0xff; 4095])),
        };
        assert!(serde_json::to_vec(&stat).unwrap().len() < MAX_LINE);
    }
}
