//! A program that is the process of its VMs, with records of its own: a directory for each.
//!
//! `sm-control` has the launch request that such a process reads from its standard input;
//! without one, this program does nothing.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sm_control::exit::ExitRecord;
use sm_control::launch::{DiskSegment, ImageSource, LaunchRequest};
use sm_guest_proto::frame::FrameType;
use sm_vmm::environment::{BootAssets, Identity, OutputLog, VmRecord, VmmEnvironment};

fn main() {
    // Does not return in a process that was started for a VM.
    sm_vmm::run_if_vmm(&Program);
    println!(
        "started by hand; a launcher starts this as: PROGRAM {} ID",
        sm_vmm::SUBCOMMAND
    );
}

struct Program;

impl VmmEnvironment for Program {
    fn open_record(&self, request: &LaunchRequest) -> io::Result<Arc<dyn VmRecord>> {
        Ok(Arc::new(Directory(
            request.data.join(request.config.id.as_str()),
        )))
    }

    fn boot_assets(
        &self,
        _request: &LaunchRequest,
        _image: &ImageSource,
    ) -> Result<BootAssets, String> {
        // The digests decide which snapshots are of the same guest software.
        Ok(BootAssets {
            identity: Identity {
                kernel: "SHA-256 of the kernel".to_owned(),
                agent: "SHA-256 of the initramfs".to_owned(),
            },
            initramfs: Box::new(|| fs::read("/usr/lib/sm/initramfs")),
        })
    }

    fn open_segment(&self, segment: &DiskSegment) -> io::Result<File> {
        File::open(&segment.path)
    }
}

struct Directory(PathBuf);

impl VmRecord for Directory {
    fn directory(&self) -> &Path {
        &self.0
    }

    fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }

    fn control_socket(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    fn exec_socket(&self) -> PathBuf {
        self.0.join("exec.sock")
    }

    fn output_log(&self) -> io::Result<Box<dyn OutputLog>> {
        let path = self.0.join("output");
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Box::new(Output(file)))
    }

    fn write_exit(&self, exit: &ExitRecord) -> io::Result<()> {
        // A reader sees all of it or nothing.
        let new = self.0.join("exit.new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(exit)?)?;
        file.sync_all()?;
        fs::rename(new, self.0.join("exit.json"))
    }

    fn remove_sockets(&self) -> io::Result<()> {
        fs::remove_file(self.control_socket())?;
        fs::remove_file(self.exec_socket())
    }

    fn erase(&self) -> io::Result<()> {
        fs::remove_dir_all(&self.0)
    }
}

struct Output(File);

impl OutputLog for Output {
    fn append(&mut self, _kind: FrameType, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn note_dropped(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use sm_guest_proto::frame::FrameType;
    use sm_vmm::environment::VmRecord as _;

    use super::Directory;

    #[test]
    fn output_is_appended_and_a_record_disappears() {
        let directory = tempfile::tempdir().unwrap();
        let record = Directory(directory.path().join("vm"));
        fs::create_dir(record.directory()).unwrap();
        for text in [b"one ", b"two "] {
            // A log that is opened again continues at its end.
            let mut log = record.output_log().unwrap();
            log.append(FrameType::Stdout, text).unwrap();
        }
        assert_eq!(
            fs::read(record.directory().join("output")).unwrap(),
            b"one two "
        );
        record.erase().unwrap();
        assert!(!record.directory().exists());
    }
}
