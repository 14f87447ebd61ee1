//! Files of a VM: reading, writing, copying, and comparing with the image.
//!
//! All operations are performed by the guest's agent, as root and in the root file system
//! of the workload, out of which no path leads. Contents are streamed in both directions.
//!
//! [`Vm::files`] has those of a running VM, [`Vm::open_files`] those of any: for a VM that is
//! stopped, a machine is started that runs no workload.

mod copy;
mod error;
mod stream;

use std::io::Read;

use serde::de::DeserializeOwned;
use sm_guest_proto::container::ContainerId;
pub use sm_guest_proto::files::{ChangeKind, FileChange, FileStat, FileType};
use sm_guest_proto::files::{FileOperation, FileRequest, PathBytes, WriteFile};

pub use self::copy::{Copied, CopyOptions};
pub use self::error::FilesError;
pub use self::stream::{GuestLines, GuestReader};
use crate::Error;
use crate::record::Record;
use crate::vm::Vm;

/// The files of a running VM; see [`Vm::files`].
#[derive(Clone, Debug)]
pub struct Files {
    record: Record,
    container: ContainerId,
}

/// Options of [`Files::write`].
#[derive(Clone, Copy, Debug)]
pub struct WriteOptions {
    mode: u32,
    create_new: bool,
    append: bool,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            mode: 0o644,
            create_new: false,
            append: false,
        }
    }
}

impl WriteOptions {
    /// Creates options to create a file with the mode 0644, or to replace the contents of
    /// an existing one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the permission bits of a new file.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Fails if the file exists.
    #[must_use]
    pub fn create_new(mut self, create_new: bool) -> Self {
        self.create_new = create_new;
        self
    }

    /// Writes behind the existing contents.
    #[must_use]
    pub fn append(mut self, append: bool) -> Self {
        self.append = append;
        self
    }
}

/// The treatment of a symbolic link at the end of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Links {
    /// The link itself is meant.
    Keep,
    /// The file that it leads to is meant.
    Follow,
}

/// The processes of a container while its root is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Processes {
    /// They run.
    Run,
    /// They are frozen.
    Pause,
}

/// The files that an access reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileScope {
    /// Those of the root. Mounts of a VM that is not running are not needed.
    Root,
    /// Those of volumes and directories of the host as well. A VM that is not running must
    /// be able to mount them; a clone of a snapshot has none of them then.
    Mounts,
}

/// The operations of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileAccess {
    /// They read files.
    Read,
    /// They also create, change or remove some.
    Write,
}

impl Vm {
    /// Returns the files of the VM.
    #[must_use]
    pub fn files(&self) -> Files {
        Files::of(self.record())
    }
}

impl Files {
    /// Returns the files of a VM with the sockets of `record`.
    pub(crate) fn of(record: &Record) -> Self {
        Self {
            record: record.clone(),
            container: ContainerId::default(),
        }
    }

    fn start(&self, operation: FileOperation) -> Result<GuestReader, Error> {
        let request = FileRequest {
            container: self.container.clone(),
            operation,
        };
        GuestReader::start(&self.record, request)
    }

    /// Performs an operation that has no result.
    fn perform(&self, operation: FileOperation) -> Result<(), Error> {
        self.start(operation)?.finish()
    }

    fn lines<T: DeserializeOwned>(&self, operation: FileOperation) -> Result<GuestLines<T>, Error> {
        Ok(GuestLines::new(self.start(operation)?))
    }

    /// Describes a file.
    ///
    /// # Errors
    /// There is no such file, or the VM is not running.
    pub fn stat(&self, path: impl AsRef<[u8]>, links: Links) -> Result<FileStat, Error> {
        let operation = FileOperation::Stat {
            path: PathBytes::from(path.as_ref()),
            follow: links == Links::Follow,
        };
        let mut lines = self.lines(operation)?;
        let stat = lines.next().transpose()?;
        stat.ok_or_else(|| FilesError::Answer("no description of a file".to_owned()).into())
    }

    /// Lists a directory, in no order.
    ///
    /// # Errors
    /// The VM is not running. Whether the directory exists shows in the first item.
    pub fn list(&self, path: impl AsRef<[u8]>) -> Result<GuestLines<FileStat>, Error> {
        let path = PathBytes::from(path.as_ref());
        self.lines(FileOperation::List { path })
    }

    /// Reads a regular file from `offset` to its end, or at most `len` bytes.
    ///
    /// # Errors
    /// The VM is not running. Whether the file exists shows in the first read.
    pub fn read(
        &self,
        path: impl AsRef<[u8]>,
        offset: u64,
        len: Option<u64>,
    ) -> Result<GuestReader, Error> {
        let path = PathBytes::from(path.as_ref());
        self.start(FileOperation::Read { path, offset, len })
    }

    /// Writes `contents` to a regular file, whose directory must exist.
    ///
    /// # Errors
    /// The file cannot be written, `contents` cannot be read, or the VM is not running.
    pub fn write(
        &self,
        path: impl AsRef<[u8]>,
        contents: impl Read,
        options: &WriteOptions,
    ) -> Result<(), Error> {
        let operation = FileOperation::Write(WriteFile {
            path: PathBytes::from(path.as_ref()),
            mode: options.mode,
            create_new: options.create_new,
            append: options.append,
        });
        self.start(operation)?.send(contents)
    }

    /// Creates a directory with these permission bits, and its missing parents.
    ///
    /// # Errors
    /// A file is in its place, or the VM is not running.
    pub fn make_directory(&self, path: impl AsRef<[u8]>, mode: u32) -> Result<(), Error> {
        self.perform(FileOperation::MakeDirectory {
            path: PathBytes::from(path.as_ref()),
            mode,
            parents: true,
        })
    }

    /// Removes a file or an empty directory.
    ///
    /// # Errors
    /// There is no such file, the directory is not empty, or the VM is not running.
    pub fn remove(&self, path: impl AsRef<[u8]>) -> Result<(), Error> {
        self.perform(FileOperation::Remove {
            path: PathBytes::from(path.as_ref()),
            recursive: false,
        })
    }

    /// Removes a file, or a directory with all files in it.
    ///
    /// # Errors
    /// There is no such file, or the VM is not running.
    pub fn remove_all(&self, path: impl AsRef<[u8]>) -> Result<(), Error> {
        self.perform(FileOperation::Remove {
            path: PathBytes::from(path.as_ref()),
            recursive: true,
        })
    }

    /// Renames a file, which replaces an existing one.
    ///
    /// # Errors
    /// There is no such file, the paths are on different file systems, or the VM is not
    /// running.
    pub fn rename(&self, from: impl AsRef<[u8]>, to: impl AsRef<[u8]>) -> Result<(), Error> {
        self.perform(FileOperation::Rename {
            from: PathBytes::from(from.as_ref()),
            to: PathBytes::from(to.as_ref()),
        })
    }

    /// Reads a file or a directory as a tar archive, in which it has the name `name`; with
    /// `.`, the archive has the contents of the directory.
    ///
    /// # Errors
    /// The VM is not running. Whether the file exists shows in the first read.
    pub fn pack(
        &self,
        path: impl AsRef<[u8]>,
        name: impl AsRef<[u8]>,
        links: Links,
    ) -> Result<GuestReader, Error> {
        self.start(FileOperation::Pack {
            path: PathBytes::from(path.as_ref()),
            name: PathBytes::from(name.as_ref()),
            follow: links == Links::Follow,
        })
    }

    /// Extracts a tar archive in a directory. With `owners`, files have the owners and
    /// extended attributes in the archive, otherwise they belong to root.
    ///
    /// # Errors
    /// There is no such directory, a file cannot be created, an entry is refused, `archive`
    /// cannot be read, or the VM is not running.
    pub fn unpack(
        &self,
        path: impl AsRef<[u8]>,
        archive: impl Read,
        owners: bool,
    ) -> Result<(), Error> {
        let path = PathBytes::from(path.as_ref());
        self.start(FileOperation::Unpack { path, owners })?
            .send(archive)
    }

    /// Compares the root file system with the image, as `docker diff` does: a directory
    /// comes before its files, and files by name.
    ///
    /// # Errors
    /// The VM is not running.
    pub fn changes(&self) -> Result<GuestLines<FileChange>, Error> {
        self.lines(FileOperation::Changes)
    }

    /// Reads the root file system as a tar archive, without file systems that are mounted
    /// in it.
    ///
    /// # Errors
    /// The VM is not running.
    pub fn export(&self) -> Result<GuestReader, Error> {
        self.start(FileOperation::Export)
    }

    /// Reads the differences between the root file system and the image as a layer (OCI
    /// image-spec layer.md).
    ///
    /// # Errors
    /// The VM is not running.
    pub fn layer(&self, processes: Processes) -> Result<GuestReader, Error> {
        let pause = processes == Processes::Pause;
        self.start(FileOperation::Layer { pause })
    }
}
