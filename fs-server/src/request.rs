//! Requests: from bytes of a driver, which are not trusted, to operations.

use std::ffi::CStr;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes as _, KnownLayout};

use crate::abi::{self, IN_HEADER_LEN, InHeader, flag, init, opcode};
use crate::buffers::Buffers;
use crate::names::{MAX_NAME, Name};

/// Maximum length of a request's body that is copied: an extended attribute of 64 KiB with
/// its name. Contents of files and lists of forgotten nodes are not part of it.
const MAX_BODY: usize = (64 << 10) + 1024;
/// Maximum length of a symbolic link's target in bytes.
const MAX_TARGET: usize = 4095;

/// Reason why a request is not an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestError {
    /// There is no header to which a reply could refer, or the request has no reply.
    Unanswerable,
    /// The body is not that of the operation.
    Body {
        /// Number of the request.
        unique: u64,
        /// Number of the error in the reply.
        errno: Errno,
    },
}

/// Members of the header that operations use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// A request's operation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation<'a> {
    Lookup {
        name: Name<'a>,
    },
    Forget {
        count: u64,
    },
    /// `count` pairs of node and count follow in the request at [`FORGETS_AT`].
    BatchForget {
        count: usize,
    },
    Getattr {
        handle: Option<u64>,
    },
    Setattr(abi::SetattrIn),
    Readlink,
    Symlink {
        name: Name<'a>,
        target: &'a CStr,
    },
    Mknod {
        name: Name<'a>,
        mode: u32,
    },
    Mkdir {
        name: Name<'a>,
        mode: u32,
    },
    Unlink {
        name: Name<'a>,
    },
    Rmdir {
        name: Name<'a>,
    },
    Rename {
        name: Name<'a>,
        new_parent: u64,
        new_name: Name<'a>,
        flags: u32,
    },
    Link {
        node: u64,
        name: Name<'a>,
    },
    Open(abi::OpenIn),
    Read(abi::ReadIn),
    /// The contents follow in the request at [`CONTENTS_AT`].
    Write(abi::WriteIn),
    Statfs,
    Release {
        handle: u64,
    },
    Fsync {
        handle: u64,
        data_only: bool,
    },
    Setxattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: u32,
    },
    Getxattr {
        name: &'a CStr,
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: &'a CStr,
    },
    Flush {
        handle: u64,
    },
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Opendir,
    Readdir {
        args: abi::ReadIn,
        plus: bool,
    },
    Releasedir {
        handle: u64,
    },
    Fsyncdir {
        handle: u64,
        data_only: bool,
    },
    Access {
        mask: u32,
    },
    Create {
        name: Name<'a>,
        args: abi::CreateIn,
    },
    Destroy,
    Ioctl,
    Fallocate(abi::FallocateIn),
    Lseek(abi::LseekIn),
    CopyFileRange(abi::CopyFileRangeIn),
    Syncfs,
    /// An operation that this server does not have.
    Unknown,
}

/// Position of the contents in a WRITE request.
pub(crate) const CONTENTS_AT: usize = IN_HEADER_LEN + size_of::<abi::WriteIn>();
/// Position of the list in a BATCH_FORGET request.
pub(crate) const FORGETS_AT: usize = IN_HEADER_LEN + size_of::<abi::BatchForgetIn>();

/// Parses the request in `buffers`, whose body is copied to `scratch`. `setxattr_ext` is set
/// if SETXATTR_EXT was negotiated.
///
/// # Errors
/// A request that is not an operation of the protocol.
pub(crate) fn parse<'a>(
    buffers: &impl Buffers,
    scratch: &'a mut Vec<u8>,
    setxattr_ext: bool,
) -> Result<(Caller, Operation<'a>), RequestError> {
    let mut header = InHeader::default();
    if !buffers.read_request(0, header.as_mut_bytes()) {
        return Err(RequestError::Unanswerable);
    }
    let caller = Caller {
        unique: header.unique,
        node: header.nodeid,
        uid: header.uid,
        gid: header.gid,
    };
    let refused = |errno| {
        if matches!(header.opcode, opcode::FORGET | opcode::BATCH_FORGET) {
            return RequestError::Unanswerable;
        }
        RequestError::Body {
            unique: header.unique,
            errno,
        }
    };
    let len = buffers.request_len();
    if usize::try_from(header.len) != Ok(len) {
        return Err(refused(Errno::INVAL));
    }
    let copied = match header.opcode {
        opcode::WRITE => CONTENTS_AT.min(len),
        opcode::BATCH_FORGET => FORGETS_AT.min(len),
        _ if len - IN_HEADER_LEN <= MAX_BODY => len,
        _ => return Err(refused(Errno::TOOBIG)),
    };
    scratch.clear();
    scratch.resize(copied - IN_HEADER_LEN, 0);
    if !buffers.read_request(IN_HEADER_LEN, scratch) {
        return Err(refused(Errno::INVAL));
    }
    let body = Body { bytes: scratch };
    let operation = body
        .operation(header.opcode, len, setxattr_ext)
        .map_err(refused)?;
    Ok((caller, operation))
}

/// The part of a body that is not parsed yet.
struct Body<'a> {
    bytes: &'a [u8],
}

impl<'a> Body<'a> {
    fn operation(
        mut self,
        opcode: u32,
        len: usize,
        setxattr_ext: bool,
    ) -> Result<Operation<'a>, Errno> {
        let operation = match opcode {
            opcode::LOOKUP => Operation::Lookup {
                name: self.last_name()?,
            },
            opcode::FORGET => Operation::Forget {
                count: self.take::<abi::ForgetIn>()?.nlookup,
            },
            opcode::BATCH_FORGET => {
                let count = self.take::<abi::BatchForgetIn>()?.count;
                let count = usize::try_from(count).map_err(|_| Errno::INVAL)?;
                let there = (len - FORGETS_AT) / size_of::<abi::ForgetOne>();
                Operation::BatchForget {
                    count: count.min(there),
                }
            }
            opcode::GETATTR => {
                let args: abi::GetattrIn = self.take()?;
                Operation::Getattr {
                    handle: (args.flags & flag::GETATTR_FH != 0).then_some(args.fh),
                }
            }
            opcode::SETATTR => Operation::Setattr(self.take()?),
            opcode::READLINK => Operation::Readlink,
            opcode::SYMLINK => Operation::Symlink {
                name: self.name()?,
                target: self.target()?,
            },
            opcode::MKNOD => {
                let args: abi::MknodIn = self.take()?;
                Operation::Mknod {
                    mode: args.mode,
                    name: self.last_name()?,
                }
            }
            opcode::MKDIR => {
                let args: abi::MkdirIn = self.take()?;
                Operation::Mkdir {
                    mode: args.mode,
                    name: self.last_name()?,
                }
            }
            opcode::UNLINK => Operation::Unlink {
                name: self.last_name()?,
            },
            opcode::RMDIR => Operation::Rmdir {
                name: self.last_name()?,
            },
            opcode::RENAME => {
                let args: abi::RenameIn = self.take()?;
                self.rename(args.newdir, 0)?
            }
            opcode::RENAME2 => {
                let args: abi::Rename2In = self.take()?;
                self.rename(args.newdir, args.flags)?
            }
            opcode::LINK => Operation::Link {
                node: self.take::<abi::LinkIn>()?.oldnodeid,
                name: self.last_name()?,
            },
            opcode::STATFS => Operation::Statfs,
            opcode::INIT => self.init()?,
            opcode::ACCESS => Operation::Access {
                mask: self.take::<abi::AccessIn>()?.mask,
            },
            opcode::CREATE => Operation::Create {
                args: self.take()?,
                name: self.last_name()?,
            },
            opcode::DESTROY => Operation::Destroy,
            opcode::SYNCFS => Operation::Syncfs,
            opcode::SETXATTR | opcode::GETXATTR | opcode::LISTXATTR | opcode::REMOVEXATTR => {
                self.attribute(opcode, setxattr_ext)?
            }
            _ => self.on_handle(opcode, len)?,
        };
        Ok(operation)
    }

    /// Parses an operation on an open file or directory.
    fn on_handle(&mut self, opcode: u32, len: usize) -> Result<Operation<'a>, Errno> {
        Ok(match opcode {
            opcode::OPEN => Operation::Open(self.take()?),
            opcode::READ => Operation::Read(self.take()?),
            opcode::WRITE => {
                let args: abi::WriteIn = self.take()?;
                let contents = u64::try_from(len - CONTENTS_AT).map_err(|_| Errno::INVAL)?;
                if u64::from(args.size) != contents {
                    return Err(Errno::INVAL);
                }
                Operation::Write(args)
            }
            opcode::RELEASE => Operation::Release {
                handle: self.take::<abi::ReleaseIn>()?.fh,
            },
            opcode::FSYNC => {
                let args: abi::FsyncIn = self.take()?;
                Operation::Fsync {
                    handle: args.fh,
                    data_only: args.fsync_flags & flag::FSYNC_FDATASYNC != 0,
                }
            }
            opcode::FLUSH => Operation::Flush {
                handle: self.take::<abi::FlushIn>()?.fh,
            },
            opcode::OPENDIR => Operation::Opendir,
            opcode::READDIR | opcode::READDIRPLUS => Operation::Readdir {
                args: self.take()?,
                plus: opcode == opcode::READDIRPLUS,
            },
            opcode::RELEASEDIR => Operation::Releasedir {
                handle: self.take::<abi::ReleaseIn>()?.fh,
            },
            opcode::FSYNCDIR => {
                let args: abi::FsyncIn = self.take()?;
                Operation::Fsyncdir {
                    handle: args.fh,
                    data_only: args.fsync_flags & flag::FSYNC_FDATASYNC != 0,
                }
            }
            opcode::IOCTL => Operation::Ioctl,
            opcode::FALLOCATE => Operation::Fallocate(self.take()?),
            opcode::LSEEK => Operation::Lseek(self.take()?),
            opcode::COPY_FILE_RANGE => Operation::CopyFileRange(self.take()?),
            _ => Operation::Unknown,
        })
    }

    /// Parses an operation on an extended attribute.
    fn attribute(&mut self, opcode: u32, setxattr_ext: bool) -> Result<Operation<'a>, Errno> {
        Ok(match opcode {
            opcode::SETXATTR => {
                let (size, flags) = if setxattr_ext {
                    let args: abi::SetxattrIn = self.take()?;
                    (args.size, args.flags)
                } else {
                    let args: abi::SetxattrCompatIn = self.take()?;
                    (args.size, args.flags)
                };
                let name = self.attribute_name()?;
                if usize::try_from(size) != Ok(self.bytes.len()) {
                    return Err(Errno::INVAL);
                }
                Operation::Setxattr {
                    name,
                    value: self.bytes,
                    flags,
                }
            }
            opcode::GETXATTR => Operation::Getxattr {
                size: self.take::<abi::GetxattrIn>()?.size,
                name: self.attribute_name()?,
            },
            opcode::LISTXATTR => Operation::Listxattr {
                size: self.take::<abi::GetxattrIn>()?.size,
            },
            _ => Operation::Removexattr {
                name: self.attribute_name()?,
            },
        })
    }

    fn rename(&mut self, new_parent: u64, flags: u32) -> Result<Operation<'a>, Errno> {
        Ok(Operation::Rename {
            name: self.name()?,
            new_parent,
            new_name: self.last_name()?,
            flags,
        })
    }

    /// Parses INIT, whose length depends on the version of the driver.
    fn init(&mut self) -> Result<Operation<'a>, Errno> {
        let args: abi::InitIn = self.take()?;
        let mut flags = u64::from(args.flags);
        if flags & init::INIT_EXT != 0
            && let Ok(more) = self.take::<u32>()
        {
            flags |= u64::from(more) << 32;
        }
        Ok(Operation::Init {
            major: args.major,
            minor: args.minor,
            max_readahead: args.max_readahead,
            flags,
        })
    }

    /// Takes a structure.
    fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.bytes).map_err(|_| Errno::INVAL)?;
        self.bytes = rest;
        Ok(value)
    }

    /// Takes bytes up to the next NUL.
    fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.bytes).map_err(|_| Errno::INVAL)?;
        self.bytes = &self.bytes[text.count_bytes() + 1..];
        Ok(text)
    }

    /// Takes the name of an entry.
    fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.text()?)
    }

    /// Takes the name of an entry, after which there is nothing.
    fn last_name(&mut self) -> Result<Name<'a>, Errno> {
        let name = self.name()?;
        if !self.bytes.is_empty() {
            return Err(Errno::INVAL);
        }
        Ok(name)
    }

    fn target(&mut self) -> Result<&'a CStr, Errno> {
        let target = self.text()?;
        match target.count_bytes() {
            1..=MAX_TARGET if self.bytes.is_empty() => Ok(target),
            0..=MAX_TARGET => Err(Errno::INVAL),
            _ => Err(Errno::NAMETOOLONG),
        }
    }

    fn attribute_name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        if !(1..=MAX_NAME).contains(&name.count_bytes()) {
            return Err(Errno::RANGE);
        }
        Ok(name)
    }
}
