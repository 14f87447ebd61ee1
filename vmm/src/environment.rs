//! The seam between a VMM and the program that it is part of, which provides the record of
//! the VM and the files that the machine boots and reads. The VMM knows neither the layout
//! of the state directory, nor a store of images, nor where kernels and agents come from.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sm_control::exit::ExitRecord;
use sm_control::launch::{DiskSegment, LaunchRequest};
use sm_guest_proto::frame::FrameType;

/// The program around a VMM.
pub trait Environment {
    /// Opens the record of the VM that is asked for.
    ///
    /// # Errors
    /// The state directory cannot be used.
    fn open_record(&self, request: &LaunchRequest) -> io::Result<Arc<dyn VmRecord>>;

    /// Reads what a machine boots, as far as it tells one from another.
    ///
    /// # Errors
    /// Kernel, modules or agent cannot be read; a sentence.
    fn boot_assets(&self, request: &LaunchRequest) -> Result<BootAssets, String>;

    /// Opens the file of a part of the root disk for reading. It is not removed from where
    /// it is while it is open.
    ///
    /// # Errors
    /// The file cannot be opened, or has been removed.
    fn open_segment(&self, segment: &DiskSegment) -> io::Result<File>;
}

/// Digests that tell one guest software from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// SHA-256 of the kernel.
    pub kernel: String,
    /// Digest of the initial RAM file system's contents, which are agent and modules.
    pub agent: String,
}

/// The files that a machine boots besides the kernel.
pub struct BootAssets {
    /// Digests of the kernel and of the other files.
    pub identity: Identity,
    /// Is called if the machine boots, and not if it is restored from a snapshot.
    pub initramfs: InitramfsBuilder,
}

/// Builds the initial RAM file system.
pub type InitramfsBuilder = Box<dyn FnOnce() -> io::Result<Vec<u8>>>;

/// The record of a VM, as its VMM sees it.
pub trait VmRecord: Send + Sync {
    /// The VM's directory.
    fn directory(&self) -> &Path;

    /// Path of the file for the guest's serial console.
    fn console(&self) -> PathBuf;

    /// Path of the control socket.
    fn control_socket(&self) -> PathBuf;

    /// Path of the socket that leads to the guest's exec server.
    fn exec_socket(&self) -> PathBuf;

    /// Creates the log of the workload's output, or opens it at its end.
    ///
    /// # Errors
    /// The file system refuses.
    fn output_log(&self) -> io::Result<Box<dyn OutputLog>>;

    /// Durably leaves word of how the VM ended.
    ///
    /// # Errors
    /// The file system refuses.
    fn write_exit(&self, exit: &ExitRecord) -> io::Result<()>;

    /// Removes the sockets.
    ///
    /// # Errors
    /// The file system refuses.
    fn remove_sockets(&self) -> io::Result<()>;

    /// Removes the sockets and the record itself.
    ///
    /// # Errors
    /// The file system refuses.
    fn erase(&self) -> io::Result<()>;
}

/// The log of a workload's output.
pub trait OutputLog: Send {
    /// Appends bytes of standard output (`FrameType::Stdout`) or error. After a failure
    /// the log is as if it had not been tried.
    ///
    /// # Errors
    /// The file system refuses.
    fn append(&mut self, kind: FrameType, bytes: &[u8]) -> io::Result<()>;

    /// Notes what could not be appended, if anything is missing.
    ///
    /// # Errors
    /// The file system refuses; it can be tried again.
    fn note_dropped(&mut self) -> io::Result<()>;
}
