//! The trait of file trees that an image can be written from.

use std::io;

/// Number of an inode in its tree; less than [`FileTree::inode_count`].
pub type InodeId = u32;

/// The root directory's inode.
pub const ROOT: InodeId = 0;

/// Owner, mode and time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits, including set-user-ID, set-group-ID and sticky.
    pub mode: u16,
    /// User ID of the owner.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// Time of modification: seconds since the Unix epoch, and nanoseconds.
    pub mtime: (i64, u32),
}

/// Location of a file's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Data {
    /// The contents are in the image. The writer reads them with [`FileTree::read_at`].
    Image,
    /// The contents follow the image on the disk, at this offset in bytes from the
    /// image's end, a multiple of [`BLOCK`](crate::BLOCK). The caller of
    /// [`write`](crate::write) stores them there.
    Behind(u64),
}

/// Type of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind<'t> {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Location of its contents.
        data: Data,
        /// Its length in bytes.
        size: u64,
    },
    /// A symbolic link to this target.
    Symlink(&'t [u8]),
    /// A character device: major number (12 bits) and minor number (20 bits).
    CharDevice(u32, u32),
    /// A block device: major number (12 bits) and minor number (20 bits).
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// A tree of files from which an image is written.
///
/// The writer calls each method several times and expects consistent results.
/// Inconsistent results cause an inconsistent image, never a panic.
pub trait FileTree {
    /// Returns the number of inodes, which all inode numbers are less than. Inodes
    /// without a name are left out of the image.
    fn inode_count(&self) -> usize;

    /// Returns the type of an inode. [`ROOT`] is a directory.
    fn kind(&self, id: InodeId) -> Kind<'_>;

    /// Returns owner, mode and time of an inode.
    fn meta(&self, id: InodeId) -> Meta;

    /// Returns the parent of a directory. The root is its own parent.
    fn parent(&self, directory: InodeId) -> InodeId;

    /// Appends the names in a directory and their inodes to `children`, in any order.
    ///
    /// Names are unique, are 1 to 255 bytes long, contain no slash and no zero byte, and
    /// are neither `.` nor `..`. A directory has one name; other inodes may have several.
    fn children<'t>(&'t self, directory: InodeId, children: &mut Vec<(&'t [u8], InodeId)>);

    /// Returns the number of the inode's set of extended attributes, less than
    /// [`Self::xattr_sets`]. Inodes with equal attributes should have the same set.
    fn xattr_set(&self, id: InodeId) -> u32;

    /// Returns the number of sets of extended attributes.
    fn xattr_sets(&self) -> usize;

    /// Appends the names and values of a set to `attributes`. Names outside the
    /// namespaces that EROFS supports (`user.`, `trusted.`, `security.`, and POSIX access
    /// control lists) are left out of the image.
    fn xattrs<'t>(&'t self, set: u32, attributes: &mut Vec<(&'t [u8], &'t [u8])>);

    /// Fills `buffer` from the contents of a file with [`Data::Image`]. `offset` and the
    /// buffer are within its size.
    ///
    /// # Errors
    /// The contents cannot be read.
    fn read_at(&self, file: InodeId, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}
