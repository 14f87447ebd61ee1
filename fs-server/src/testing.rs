//! Requests of a driver, for tests of servers and transports.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::abi::{self, InHeader, InitIn, OUT_HEADER_LEN, OutHeader, init, linux};
use crate::{Served, Server, SliceBuffers};

/// Defines numbers of operations.
macro_rules! opcodes {
    ($($name:ident)*) => {
        /// Numbers of operations (`enum fuse_opcode`).
        pub mod opcode {
            $(
                #[doc = concat!("`FUSE_", stringify!($name), "`.")]
                pub const $name: u32 = crate::abi::opcode::$name;
            )*
        }
    };
}

opcodes! {
    LOOKUP FORGET GETATTR SETATTR READLINK SYMLINK MKNOD MKDIR UNLINK RMDIR RENAME LINK OPEN
    READ WRITE STATFS RELEASE FSYNC SETXATTR GETXATTR LISTXATTR REMOVEXATTR FLUSH INIT OPENDIR
    READDIR RELEASEDIR FSYNCDIR ACCESS CREATE DESTROY IOCTL BATCH_FORGET FALLOCATE READDIRPLUS
    RENAME2 LSEEK COPY_FILE_RANGE SYNCFS
}

/// Number of the root of all shares.
pub const ROOT: u64 = abi::ROOT_ID;

/// Returns the bytes of a request of user 0.
#[must_use]
pub fn request(opcode: u32, unique: u64, nodeid: u64, body: &[&[u8]]) -> Vec<u8> {
    request_of(opcode, unique, nodeid, (0, 0), body)
}

fn request_of(
    opcode: u32,
    unique: u64,
    nodeid: u64,
    (uid, gid): (u32, u32),
    body: &[&[u8]],
) -> Vec<u8> {
    let body = body.concat();
    let header = InHeader {
        // Tests send no request of 4 GiB.
        len: u32::try_from(size_of::<InHeader>() + body.len()).unwrap_or(u32::MAX),
        opcode,
        unique,
        nodeid,
        uid,
        gid,
        ..InHeader::default()
    };
    [header.as_bytes(), &body].concat()
}

/// Returns the body of an INIT request of a Linux 6.1.
#[must_use]
pub fn init_body() -> Vec<u8> {
    let mut body = InitIn {
        major: abi::MAJOR,
        minor: abi::MINOR,
        max_readahead: 1 << 17,
        flags: u32::try_from(
            init::BIG_WRITES
                | init::DO_READDIRPLUS
                | init::MAX_PAGES
                | init::WRITEBACK_CACHE
                | init::SUBMOUNTS
                | init::INIT_EXT,
        )
        .unwrap_or(0),
    }
    .as_bytes()
    .to_vec();
    body.resize(64, 0);
    body
}

/// An entry, as a guest knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FuseEntry {
    /// Number of the node.
    pub node: u64,
    /// Number of the inode.
    pub ino: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Length in bytes.
    pub size: u64,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of links.
    pub nlink: u32,
    /// Validity of the name in seconds.
    pub valid: u64,
}

impl FuseEntry {
    fn new(node: u64, valid: u64, attr: &abi::Attr) -> Self {
        Self {
            node,
            ino: attr.ino,
            mode: attr.mode,
            size: attr.size,
            uid: attr.uid,
            gid: attr.gid,
            nlink: attr.nlink,
            valid,
        }
    }
}

/// A driver that performs one operation after the other, with its jobs. Errors are positive
/// numbers of `errno`.
#[derive(Debug)]
pub struct FuseDriver {
    /// The server.
    pub server: Server,
    /// User and group of the next requests.
    pub ids: (u32, u32),
    unique: u64,
    space: Vec<u8>,
}

impl FuseDriver {
    /// Creates a driver that has negotiated nothing.
    #[must_use]
    pub fn new(server: Server) -> Self {
        Self {
            server,
            ids: (0, 0),
            unique: 0,
            space: vec![0; crate::MAX_REQUEST],
        }
    }

    /// Creates a driver that has performed INIT.
    ///
    /// # Panics
    /// If the server refuses it.
    #[must_use]
    pub fn started(server: Server) -> Self {
        let mut driver = Self::new(server);
        let reply = driver.call(opcode::INIT, 0, &[&init_body()]);
        assert!(reply.is_ok(), "INIT failed: {reply:?}");
        driver
    }

    /// Sends bytes with `space` for the reply; returns its bytes, if there is one.
    pub fn raw(&mut self, request: &[u8], space: usize) -> Option<Vec<u8>> {
        let space = self.space.get_mut(..space)?;
        let mut buffers = SliceBuffers::new(request, space);
        let len = match self.server.serve(&mut buffers) {
            Served::Reply(len) => len,
            Served::NoReply => return None,
            Served::Job(job) => job.run(&mut buffers),
        };
        Some(space[..len].to_vec())
    }

    /// Performs an operation; returns the body of the reply.
    ///
    /// # Errors
    /// The number of the server's error.
    ///
    /// # Panics
    /// If the reply is not one to this request.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> Result<Vec<u8>, i32> {
        self.unique += 1;
        let request = request_of(opcode, self.unique, node, self.ids, body);
        let space = self.space.len();
        let Some(reply) = self.raw(&request, space) else {
            return Ok(Vec::new());
        };
        let (header, body) = match OutHeader::read_from_prefix(&reply) {
            Ok(parts) => parts,
            Err(_) => panic!("a reply without a header"),
        };
        assert_eq!(
            header.unique, self.unique,
            "the reply is to another request"
        );
        assert_eq!(usize::try_from(header.len), Ok(reply.len()));
        if header.error == 0 {
            return Ok(body.to_vec());
        }
        assert_eq!(reply.len(), OUT_HEADER_LEN, "an error has a body");
        Err(-header.error)
    }

    fn structure<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> T {
        match T::read_from_prefix(bytes) {
            Ok((value, _)) => value,
            Err(_) => panic!("a reply of {} bytes is too short", bytes.len()),
        }
    }

    fn entry(bytes: &[u8]) -> FuseEntry {
        let entry: abi::EntryOut = Self::structure(bytes);
        FuseEntry::new(entry.nodeid, entry.entry_valid, &entry.attr)
    }

    /// Performs LOOKUP of an entry.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<FuseEntry, i32> {
        let reply = self.call(opcode::LOOKUP, parent, &[name.as_bytes(), b"\0"])?;
        Ok(Self::entry(&reply))
    }

    /// Performs LOOKUP of each part of a path from the root of all shares on.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn walk(&mut self, path: &str) -> Result<FuseEntry, i32> {
        let mut parts = path.split('/');
        let first = parts.next().unwrap_or_default();
        let mut entry = self.lookup(ROOT, first)?;
        for part in parts {
            entry = self.lookup(entry.node, part)?;
        }
        Ok(entry)
    }

    /// Performs FORGET.
    pub fn forget(&mut self, node: u64, count: u64) {
        let _ = self.call(opcode::FORGET, node, &[&count.to_le_bytes()]);
    }

    /// Performs GETATTR.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn getattr(&mut self, node: u64) -> Result<FuseEntry, i32> {
        let reply = self.call(opcode::GETATTR, node, &[&[0; 16]])?;
        let reply: abi::AttrOut = Self::structure(&reply);
        Ok(FuseEntry::new(node, reply.attr_valid, &reply.attr))
    }

    /// Performs SETATTR of the mode.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn chmod(&mut self, node: u64, mode: u32) -> Result<FuseEntry, i32> {
        self.setattr(
            node,
            &abi::SetattrIn {
                valid: abi::fattr::MODE,
                mode,
                ..abi::SetattrIn::default()
            },
        )
    }

    /// Performs SETATTR of user and group.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn chown(&mut self, node: u64, uid: u32, gid: u32) -> Result<FuseEntry, i32> {
        self.setattr(
            node,
            &abi::SetattrIn {
                valid: abi::fattr::UID | abi::fattr::GID,
                uid,
                gid,
                ..abi::SetattrIn::default()
            },
        )
    }

    /// Performs SETATTR of the length.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn truncate(&mut self, node: u64, size: u64) -> Result<FuseEntry, i32> {
        self.setattr(
            node,
            &abi::SetattrIn {
                valid: abi::fattr::SIZE,
                size,
                ..abi::SetattrIn::default()
            },
        )
    }

    fn setattr(&mut self, node: u64, args: &abi::SetattrIn) -> Result<FuseEntry, i32> {
        let reply = self.call(opcode::SETATTR, node, &[args.as_bytes()])?;
        let reply: abi::AttrOut = Self::structure(&reply);
        Ok(FuseEntry::new(node, reply.attr_valid, &reply.attr))
    }

    /// Performs MKDIR.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn mkdir(&mut self, parent: u64, name: &str, mode: u32) -> Result<FuseEntry, i32> {
        let args = abi::MkdirIn { mode, umask: 0 };
        let body = [args.as_bytes(), name.as_bytes(), b"\0"];
        Ok(Self::entry(&self.call(opcode::MKDIR, parent, &body)?))
    }

    /// Performs MKNOD.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn mknod(&mut self, parent: u64, name: &str, mode: u32) -> Result<FuseEntry, i32> {
        let args = abi::MknodIn {
            mode,
            rdev: 0x103,
            ..abi::MknodIn::default()
        };
        let body = [args.as_bytes(), name.as_bytes(), b"\0"];
        Ok(Self::entry(&self.call(opcode::MKNOD, parent, &body)?))
    }

    /// Performs SYMLINK.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Result<FuseEntry, i32> {
        let body = [name.as_bytes(), b"\0", target.as_bytes(), b"\0"];
        Ok(Self::entry(&self.call(opcode::SYMLINK, parent, &body)?))
    }

    /// Performs LINK: `name` in `parent` for `node`.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn link(&mut self, node: u64, parent: u64, name: &str) -> Result<FuseEntry, i32> {
        let body = [&node.to_le_bytes()[..], name.as_bytes(), b"\0"];
        Ok(Self::entry(&self.call(opcode::LINK, parent, &body)?))
    }

    /// Performs RENAME2 with `flags` of renameat2(2).
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn rename(&mut self, from: (u64, &str), to: (u64, &str), flags: u32) -> Result<(), i32> {
        let args = abi::Rename2In {
            newdir: to.0,
            flags,
            padding: 0,
        };
        let names = [from.1.as_bytes(), b"\0", to.1.as_bytes(), b"\0"].concat();
        let body = [args.as_bytes(), &names];
        self.call(opcode::RENAME2, from.0, &body).map(drop)
    }

    /// Performs UNLINK.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn unlink(&mut self, parent: u64, name: &str) -> Result<(), i32> {
        let body = [name.as_bytes(), b"\0"];
        self.call(opcode::UNLINK, parent, &body).map(drop)
    }

    /// Performs RMDIR.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn rmdir(&mut self, parent: u64, name: &str) -> Result<(), i32> {
        let body = [name.as_bytes(), b"\0"];
        self.call(opcode::RMDIR, parent, &body).map(drop)
    }

    /// Performs OPEN for reading and, if `write` is set, writing; returns the handle.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn open(&mut self, node: u64, write: bool) -> Result<u64, i32> {
        let args = abi::OpenIn {
            flags: if write {
                linux::O_RDWR
            } else {
                linux::O_RDONLY
            },
            open_flags: 0,
        };
        let reply = self.call(opcode::OPEN, node, &[args.as_bytes()])?;
        Ok(Self::structure::<abi::OpenOut>(&reply).fh)
    }

    /// Performs CREATE for reading and writing; returns entry and handle.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(FuseEntry, u64), i32> {
        let args = abi::CreateIn {
            flags: linux::O_RDWR,
            mode,
            ..abi::CreateIn::default()
        };
        let body = [args.as_bytes(), name.as_bytes(), b"\0"];
        let reply = self.call(opcode::CREATE, parent, &body)?;
        let open: abi::OpenOut = Self::structure(&reply[size_of::<abi::EntryOut>()..]);
        Ok((Self::entry(&reply), open.fh))
    }

    /// Performs RELEASE.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn release(&mut self, node: u64, handle: u64) -> Result<(), i32> {
        let args = abi::ReleaseIn {
            fh: handle,
            ..abi::ReleaseIn::default()
        };
        self.call(opcode::RELEASE, node, &[args.as_bytes()])
            .map(drop)
    }

    /// Performs READ.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn read(&mut self, node: u64, handle: u64, at: u64, len: u32) -> Result<Vec<u8>, i32> {
        let args = abi::ReadIn {
            fh: handle,
            offset: at,
            size: len,
            ..abi::ReadIn::default()
        };
        self.call(opcode::READ, node, &[args.as_bytes()])
    }

    /// Performs WRITE, with `O_APPEND` if `append` is set; returns the number of bytes.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn write(
        &mut self,
        node: u64,
        handle: u64,
        at: u64,
        bytes: &[u8],
        append: bool,
    ) -> Result<u32, i32> {
        let args = abi::WriteIn {
            fh: handle,
            offset: at,
            size: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            flags: if append { linux::O_APPEND } else { 0 },
            ..abi::WriteIn::default()
        };
        let reply = self.call(opcode::WRITE, node, &[args.as_bytes(), bytes])?;
        Ok(Self::structure::<abi::WriteOut>(&reply).size)
    }

    /// Lists a directory by READDIRPLUS with `size` bytes for each reply; returns names and
    /// nodes, which are 0 for entries that could not be examined.
    ///
    /// # Errors
    /// As for [`Self::call`].
    pub fn list(&mut self, node: u64, size: u32) -> Result<Vec<(String, u64)>, i32> {
        let reply = self.call(opcode::OPENDIR, node, &[&[0; 8]])?;
        let handle = Self::structure::<abi::OpenOut>(&reply).fh;
        let mut entries = Vec::new();
        let mut offset = 0;
        loop {
            let args = abi::ReadIn {
                fh: handle,
                offset,
                size,
                ..abi::ReadIn::default()
            };
            let reply = self.call(opcode::READDIRPLUS, node, &[args.as_bytes()])?;
            let mut rest = reply.as_slice();
            while !rest.is_empty() {
                let entry: abi::EntryOut = Self::structure(rest);
                let dirent: abi::Dirent = Self::structure(&rest[size_of_val(&entry)..]);
                let start = size_of_val(&entry) + size_of_val(&dirent);
                let end = start + dirent.namelen as usize;
                let name = String::from_utf8_lossy(&rest[start..end]).into_owned();
                entries.push((name, entry.nodeid));
                offset = dirent.off;
                rest = &rest[end.next_multiple_of(8)..];
            }
            if reply.is_empty() {
                break;
            }
        }
        let args = abi::ReleaseIn {
            fh: handle,
            ..abi::ReleaseIn::default()
        };
        self.call(opcode::RELEASEDIR, node, &[args.as_bytes()])?;
        Ok(entries)
    }
}
