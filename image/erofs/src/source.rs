//! A tree of files, as the writer sees it.

use std::io;

/// Number of an inode in its tree; smaller than [`FileTree::inode_count`].
pub type InodeId = u32;

/// The root directory's inode.
pub const ROOT: InodeId = 0;

/// Owner, mode and time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permission bits, those for set-user-ID, set-group-ID and sticky included.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of modification: seconds since the epoch and nanoseconds.
    pub mtime: (i64, u32),
}

/// Location of a file's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// In the image. The writer reads them with [`FileTree::read_at`].
    Image,
    /// Behind the image on the disk, at this offset in bytes from the image's end: a
    /// multiple of [`BLOCK`](crate::BLOCK). The caller of [`write`](crate::write) puts
    /// them there.
    Behind(u64),
}

/// Type of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// A tree of files that an image is made of.
///
/// The writer asks for everything several times and expects the same answers. A tree
/// that contradicts itself gives an image that contradicts itself, never a panic.
pub trait FileTree {
    /// Inode numbers are smaller than this. Inodes without a name are left out of the
    /// image.
    fn inode_count(&self) -> usize;

    /// Type of the inode. [`ROOT`] is a directory.
    fn kind(&self, id: InodeId) -> Kind<'_>;

    /// Owner, mode and time of the inode.
    fn meta(&self, id: InodeId) -> Meta;

    /// The directory that contains this directory; the root contains itself.
    fn parent(&self, directory: InodeId) -> InodeId;

    /// Appends the names in a directory and their inodes to `children`, in any order.
    ///
    /// Names are unique, have 1 to 255 bytes, no slash and no zero byte, and are
    /// neither `.` nor `..`. A directory has one name; other inodes may have several.
    fn children<'t>(&'t self, directory: InodeId, children: &mut Vec<(&'t [u8], InodeId)>);

    /// Number of the inode's set of extended attributes: below
    /// [`Self::xattr_sets`]. Inodes with equal attributes best have the same set.
    fn xattr_set(&self, id: InodeId) -> u32;

    /// Number of sets of extended attributes.
    fn xattr_sets(&self) -> usize;

    /// Appends names and values of a set to `attributes`. Names outside the
    /// namespaces that EROFS knows (`user.`, `trusted.`, `security.`, and POSIX access
    /// control lists) are left out of the image.
    fn xattrs<'t>(&'t self, set: u32, attributes: &mut Vec<(&'t [u8], &'t [u8])>);

    /// Fills `buffer` from the contents of a file whose data is [`Data::Image`];
    /// `offset` and the buffer lie within its size.
    ///
    /// # Errors
    /// The contents cannot be read.
    fn read_at(&self, file: InodeId, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}
