//! The seam between a VMM and the program that it is part of, which provides the record of
//! the VM and the files that the machine boots. The VMM knows neither the layout of the state directory nor where
//! kernels and agents come from.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sm_control::exit::ExitRecord;
use sm_control::launch::LaunchRequest;
use sm_guest_proto::frame::FrameType;

use super::identity::Identity;

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
}

/// The files that a machine boots besides the kernel.
pub struct BootAssets {
    pub identity: Identity,
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
