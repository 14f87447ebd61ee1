//! The environment of the VMM process: its record in the state directory, and the boot
//! files.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sm_control::event::EventRecord;
use sm_control::exit::ExitRecord;
use sm_control::id::VmId;
use sm_control::launch::{DiskSegment, ImageSource, LaunchPurpose, LaunchRequest};
use sm_control::with_causes;
use sm_guest_proto::frame::FrameType;
use sm_vmm::environment::{BootAssets, Identity, OutputLog, VmRecord, VmmEnvironment};

use crate::digests::file_digest;
use crate::guest_agent;
use crate::home::Home;
use crate::initramfs::Initramfs;
use crate::kernel::Kernel;
use crate::output_log::{LogWriter, ROTATE_AT, Stream};
use crate::record::{CONSOLE, FileAccessRecord, Record, Records, VmConfig};
use crate::sm::register_program;

/// Runs the VMM, and does not return, if this process was started as one.
///
/// A program that starts VMs through this library calls this first in `main`, before it
/// starts threads; in all other processes it returns at once, and registers the program as
/// that of its VMs. A program that cannot do so names another one with
/// [`crate::SmBuilder::vmm`].
pub fn run_vmm_if_asked() {
    register_program();
    sm_vmm::run_if_vmm(&Installed);
}

/// The user's directories and the files installed on the host.
struct Installed;

impl VmmEnvironment for Installed {
    fn open_record(&self, request: &LaunchRequest) -> io::Result<Arc<dyn VmRecord>> {
        let home = Home::new(&request.data, &request.run, &request.cache);
        let records = Records::open(&home).map_err(io::Error::other)?;
        let record = records.record(request.config.clone().into());
        Ok(match request.purpose {
            LaunchPurpose::Workload => Arc::new(record),
            LaunchPurpose::Files => Arc::new(FileAccessRecord(record.for_file_access())),
        })
    }

    fn boot_assets(
        &self,
        request: &LaunchRequest,
        image: &ImageSource,
    ) -> Result<BootAssets, String> {
        let explicit = std::env::var_os(guest_agent::VARIABLE);
        let explicit = explicit.filter(|path| !path.is_empty()).map(PathBuf::from);
        let agent = guest_agent::read(explicit.as_deref()).map_err(|error| with_causes(&error))?;
        let kernel = Kernel {
            path: request.config.kernel.clone(),
            modules: image.modules.clone(),
        };
        let modules = kernel.read_modules().map_err(|error| with_causes(&error))?;
        let initramfs = Initramfs { agent, modules };
        Ok(BootAssets {
            identity: Identity {
                kernel: file_digest(&kernel.path, &request.cache)
                    .map_err(|error| format!("cannot read the kernel: {error}"))?,
                agent: initramfs.digest(),
            },
            initramfs: Box::new(move || initramfs.build()),
        })
    }

    fn open_segment(&self, segment: &DiskSegment) -> io::Result<File> {
        let segment = sm_image::StoredSegment {
            path: segment.path.clone(),
            offset: segment.offset,
            len: segment.len,
        };
        // The store does not remove parts of a disk that are open.
        segment.open().map_err(io::Error::other)
    }
}

impl VmRecord for Record {
    fn directory(&self) -> &Path {
        Self::directory(self)
    }

    fn console(&self) -> PathBuf {
        Self::directory(self).join(CONSOLE)
    }

    fn control_socket(&self) -> PathBuf {
        Self::control_socket(self)
    }

    fn exec_socket(&self) -> PathBuf {
        Self::exec_socket(self)
    }

    fn take_over(&self) -> io::Result<()> {
        Self::take_over(self).map_err(io::Error::other)
    }

    fn current_config(&self) -> io::Result<Option<VmConfig>> {
        self.reread_config().map(Some).map_err(io::Error::other)
    }

    fn name_of(&self, vm: &VmId) -> Option<String> {
        Self::name_of(self, vm)
    }

    fn note_event(&self, event: &EventRecord) {
        self.events().note(event);
    }

    fn output_log(&self) -> io::Result<Box<dyn OutputLog>> {
        Ok(Box::new(LogWriter::create(
            Self::directory(self),
            ROTATE_AT,
        )?))
    }

    fn write_exit(&self, exit: &ExitRecord) -> io::Result<()> {
        Self::write_exit(self, exit).map_err(io::Error::other)
    }

    fn remove_sockets(&self) -> io::Result<()> {
        Self::remove_sockets(self).map_err(io::Error::other)
    }

    fn erase(&self) -> io::Result<()> {
        Self::erase(self).map_err(io::Error::other)
    }
}

impl OutputLog for LogWriter {
    fn append(&mut self, kind: FrameType, bytes: &[u8]) -> io::Result<()> {
        let stream = match kind {
            FrameType::Stderr => Stream::Stderr,
            _ => Stream::Stdout,
        };
        Self::append(self, stream, bytes)
    }

    fn note_dropped(&mut self) -> io::Result<()> {
        Self::note_dropped(self)
    }
}
