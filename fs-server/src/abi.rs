//! The FUSE protocol in bytes: `include/uapi/linux/fuse.h` of Linux, protocol 7.38.
//!
//! Integers have the byte order of the guest, which is that of the host: both are
//! little-endian.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Major version of the protocol.
pub(crate) const MAJOR: u32 = 7;
/// Latest minor version that this server knows.
pub(crate) const MINOR: u32 = 38;
/// Oldest minor version that is served: the first one with virtio-fs.
pub(crate) const OLDEST_MINOR: u32 = 31;

/// Node number of the root.
pub(crate) const ROOT_ID: u64 = 1;

/// Defines structures of the protocol.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(crate) struct $name {
            $(pub(crate) $field: $type,)*
        }
    )*};
}

wire! {
    /// Start of each request.
    InHeader {
        len: u32,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        total_extlen: u16,
        padding: u16,
    }
    /// Start of each reply. `error` is 0 or a negative errno.
    OutHeader {
        len: u32,
        error: i32,
        unique: u64,
    }
    /// Attributes of an inode.
    Attr {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        rdev: u32,
        blksize: u32,
        flags: u32,
    }
    EntryOut {
        nodeid: u64,
        generation: u64,
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }
    AttrOut {
        attr_valid: u64,
        attr_valid_nsec: u32,
        dummy: u32,
        attr: Attr,
    }
    ForgetIn {
        nlookup: u64,
    }
    ForgetOne {
        nodeid: u64,
        nlookup: u64,
    }
    BatchForgetIn {
        count: u32,
        dummy: u32,
    }
    GetattrIn {
        flags: u32,
        dummy: u32,
        fh: u64,
    }
    SetattrIn {
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }
    MknodIn {
        mode: u32,
        rdev: u32,
        umask: u32,
        padding: u32,
    }
    MkdirIn {
        mode: u32,
        umask: u32,
    }
    RenameIn {
        newdir: u64,
    }
    Rename2In {
        newdir: u64,
        flags: u32,
        padding: u32,
    }
    LinkIn {
        oldnodeid: u64,
    }
    OpenIn {
        flags: u32,
        open_flags: u32,
    }
    CreateIn {
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    }
    OpenOut {
        fh: u64,
        open_flags: u32,
        padding: u32,
    }
    ReleaseIn {
        fh: u64,
        flags: u32,
        release_flags: u32,
        lock_owner: u64,
    }
    FlushIn {
        fh: u64,
        unused: u32,
        padding: u32,
        lock_owner: u64,
    }
    ReadIn {
        fh: u64,
        offset: u64,
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    WriteIn {
        fh: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }
    WriteOut {
        size: u32,
        padding: u32,
    }
    StatfsOut {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }
    FsyncIn {
        fh: u64,
        fsync_flags: u32,
        padding: u32,
    }
    /// With SETXATTR_EXT; without it, the first two members.
    SetxattrIn {
        size: u32,
        flags: u32,
        setxattr_flags: u32,
        padding: u32,
    }
    SetxattrCompatIn {
        size: u32,
        flags: u32,
    }
    GetxattrIn {
        size: u32,
        padding: u32,
    }
    GetxattrOut {
        size: u32,
        padding: u32,
    }
    AccessIn {
        mask: u32,
        padding: u32,
    }
    /// As far as every version has it.
    InitIn {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
    }
    InitOut {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        max_background: u16,
        congestion_threshold: u16,
        max_write: u32,
        time_gran: u32,
        max_pages: u16,
        map_alignment: u16,
        flags2: u32,
        unused: [u32; 7],
    }
    FallocateIn {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
        padding: u32,
    }
    LseekIn {
        fh: u64,
        offset: u64,
        whence: u32,
        padding: u32,
    }
    LseekOut {
        offset: u64,
    }
    CopyFileRangeIn {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    }
    /// Start of an entry of a directory; the name follows, padded to 8 bytes.
    Dirent {
        ino: u64,
        off: u64,
        namelen: u32,
        kind: u32,
    }
}

/// Length of a request's header in bytes.
pub(crate) const IN_HEADER_LEN: usize = size_of::<InHeader>();
/// Length of a reply's header in bytes.
pub(crate) const OUT_HEADER_LEN: usize = size_of::<OutHeader>();

/// Numbers of the operations.
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const ACCESS: u32 = 34;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
}

/// Flags of INIT; those from bit 32 on are in `flags2`.
pub(crate) mod init {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const WRITEBACK_CACHE: u64 = 1 << 16;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(crate) const SUBMOUNTS: u64 = 1 << 27;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
}

/// Members of [`SetattrIn`] that are set.
pub(crate) mod fattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// Flags of single operations.
pub(crate) mod flag {
    /// `Attr::flags`: the root of a file system of its own.
    pub(crate) const ATTR_SUBMOUNT: u32 = 1 << 0;
    /// `GetattrIn::flags`: `fh` is set.
    pub(crate) const GETATTR_FH: u32 = 1 << 0;
    /// `OpenOut::open_flags`: cached data remain valid.
    pub(crate) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
    /// `OpenOut::open_flags`: entries of the directory may be cached.
    pub(crate) const FOPEN_CACHE_DIR: u32 = 1 << 3;
    /// `OpenOut::open_flags`: no FLUSH when the file is closed.
    pub(crate) const FOPEN_NOFLUSH: u32 = 1 << 5;
    /// `OpenIn::open_flags`: clear set-user-ID and set-group-ID bits.
    pub(crate) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
    /// `WriteIn::write_flags`: from the page cache; the flags of the file are a guess.
    pub(crate) const WRITE_CACHE: u32 = 1 << 0;
    /// `WriteIn::write_flags`: clear set-user-ID and set-group-ID bits.
    pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
    /// `FsyncIn::fsync_flags`: data only.
    pub(crate) const FSYNC_FDATASYNC: u32 = 1 << 0;
}

/// File types in `mode`, and flags of open(2), as guests use them: those of Linux on
/// architectures that share them (x86, arm64 differ only in flags that are not used here).
pub(crate) mod linux {
    pub(crate) const S_IFMT: u32 = 0o170_000;
    pub(crate) const S_IFIFO: u32 = 0o010_000;
    pub(crate) const S_IFDIR: u32 = 0o040_000;
    pub(crate) const S_IFREG: u32 = 0o100_000;
    pub(crate) const S_IFLNK: u32 = 0o120_000;
    pub(crate) const S_ISUID: u32 = 0o4000;
    pub(crate) const S_ISGID: u32 = 0o2000;
    pub(crate) const S_IXGRP: u32 = 0o0010;

    pub(crate) const O_ACCMODE: u32 = 0o3;
    pub(crate) const O_RDONLY: u32 = 0o0;
    pub(crate) const O_WRONLY: u32 = 0o1;
    #[cfg(any(test, feature = "testing"))]
    pub(crate) const O_RDWR: u32 = 0o2;
    pub(crate) const O_EXCL: u32 = 0o200;
    pub(crate) const O_TRUNC: u32 = 0o1000;
    pub(crate) const O_APPEND: u32 = 0o2000;
    pub(crate) const O_DSYNC: u32 = 0o10_000;
    /// With the bit of `O_DSYNC`.
    pub(crate) const O_SYNC: u32 = 0o4_010_000;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes of the structures in Linux' header.
    #[test]
    fn structures_have_the_sizes_of_the_protocol() {
        let sizes = [
            (size_of::<InHeader>(), 40),
            (size_of::<OutHeader>(), 16),
            (size_of::<Attr>(), 88),
            (size_of::<EntryOut>(), 128),
            (size_of::<AttrOut>(), 104),
            (size_of::<SetattrIn>(), 88),
            (size_of::<ReadIn>(), 40),
            (size_of::<WriteIn>(), 40),
            (size_of::<StatfsOut>(), 80),
            (size_of::<InitIn>(), 16),
            (size_of::<InitOut>(), 64),
            (size_of::<CopyFileRangeIn>(), 56),
            (size_of::<FallocateIn>(), 32),
            (size_of::<Dirent>(), 24),
        ];
        for (index, (ours, theirs)) in sizes.into_iter().enumerate() {
            assert_eq!(ours, theirs, "entry {index}");
        }
    }
}
