//! Interface between the VMM and its program, which provides the record of the VM and the
//! files that the machine boots and reads. The VMM knows neither the layout of the state
//! directory, nor a store of images, nor the origin of kernels and agents.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sm_control::config::VmConfig;
use sm_control::event::EventRecord;
use sm_control::exit::ExitRecord;
use sm_control::id::VmId;
use sm_control::launch::{DiskSegment, ImageSource, LaunchRequest};
use sm_guest_proto::frame::FrameType;

/// The program that contains the VMM.
pub trait VmmEnvironment {
    /// Opens the record of the requested VM.
    ///
    /// # Errors
    /// The state directory cannot be used.
    fn open_record(&self, request: &LaunchRequest) -> io::Result<Arc<dyn VmRecord>>;

    /// Reads the boot files for an image of the request and computes the identity of the
    /// guest software.
    ///
    /// # Errors
    /// Kernel, modules or agent cannot be read; a sentence.
    fn boot_assets(
        &self,
        request: &LaunchRequest,
        image: &ImageSource,
    ) -> Result<BootAssets, String>;

    /// Opens the file of a part of the root disk for reading. The program must not remove
    /// the file while it is open.
    ///
    /// # Errors
    /// The file cannot be opened, or has been removed.
    fn open_segment(&self, segment: &DiskSegment) -> io::Result<File>;
}

/// Digests that identify guest software.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// SHA-256 of the kernel.
    pub kernel: String,
    /// Digest of the initial RAM file system's contents, which are agent and modules.
    pub agent: String,
}

/// The files that a machine boots besides the kernel.
pub struct BootAssets {
    /// Identity of the kernel and of the other files.
    pub identity: Identity,
    /// Called if the machine boots, and not if it is restored from a snapshot.
    pub initramfs: InitramfsBuilder,
}

/// Builds the initial RAM file system.
pub type InitramfsBuilder = Box<dyn FnOnce() -> io::Result<Vec<u8>>>;

/// The record of a VM, as far as its VMM uses it.
pub trait VmRecord: Send + Sync {
    /// Returns the VM's directory.
    fn directory(&self) -> &Path;

    /// Returns the path of the file for the guest's serial console.
    fn console(&self) -> PathBuf;

    /// Returns the path of the control socket.
    fn control_socket(&self) -> PathBuf;

    /// Returns the path of the socket of the guest's exec server.
    fn exec_socket(&self) -> PathBuf;

    /// Called when the process of the VM has its lock and its files, before the machine is
    /// started: a new run begins. By default, does nothing.
    ///
    /// # Errors
    /// A file cannot be changed.
    fn take_over(&self) -> io::Result<()> {
        Ok(())
    }

    /// Returns the present configuration, of which others may have changed name, labels,
    /// restart policy and stop timeout since the start; `None`, by default, if it does not
    /// change.
    ///
    /// # Errors
    /// The record cannot be read.
    fn current_config(&self) -> io::Result<Option<VmConfig>> {
        Ok(None)
    }

    /// Returns the present name of another VM; `None`, by default, if it is unknown.
    fn name_of(&self, vm: &VmId) -> Option<String> {
        let _ = vm;
        None
    }

    /// Logs an event in the life of the VM; by default, does nothing. Never waits for
    /// another process.
    fn note_event(&self, event: &EventRecord) {
        let _ = event;
    }

    /// Creates the log of the workload's output, or opens it at its end.
    ///
    /// # Errors
    /// The file cannot be created or opened.
    fn output_log(&self) -> io::Result<Box<dyn OutputLog>>;

    /// Writes the exit record durably.
    ///
    /// # Errors
    /// The file cannot be written.
    fn write_exit(&self, exit: &ExitRecord) -> io::Result<()>;

    /// Removes the sockets.
    ///
    /// # Errors
    /// A file cannot be removed.
    fn remove_sockets(&self) -> io::Result<()>;

    /// Removes the sockets and the record itself.
    ///
    /// # Errors
    /// A file cannot be removed.
    fn erase(&self) -> io::Result<()>;
}

/// The log of a workload's output.
pub trait OutputLog: Send {
    /// Appends bytes of standard output (`FrameType::Stdout`) or standard error. A failed
    /// call leaves the log unchanged.
    ///
    /// # Errors
    /// The file cannot be written.
    fn append(&mut self, kind: FrameType, bytes: &[u8]) -> io::Result<()>;

    /// Writes a count of the bytes that could not be appended, if there are any.
    ///
    /// # Errors
    /// The file cannot be written; the call can be repeated.
    fn note_dropped(&mut self) -> io::Result<()>;
}
