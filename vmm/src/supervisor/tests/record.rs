//! A fake record in a directory of its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::{FlockOperation, flock};
use sm_control::event::EventRecord;
use sm_control::exit::ExitRecord;

use super::*;
use crate::environment::{OutputLog, VmRecord};

#[derive(Clone, Debug)]
pub(super) struct FakeRecord {
    home: Arc<tempfile::TempDir>,
    directory: PathBuf,
    output: Output,
    events: Arc<Mutex<Vec<EventRecord>>>,
}

/// The logged output.
type Output = Arc<Mutex<Vec<(FrameType, Vec<u8>)>>>;

impl FakeRecord {
    /// Returns a record and its lock, which is held.
    pub(super) fn create() -> (Self, File) {
        let home = Arc::new(tempfile::tempdir().unwrap());
        let record = Self {
            directory: home.path().join("record"),
            home,
            output: Arc::default(),
            events: Arc::default(),
        };
        fs::create_dir(&record.directory).unwrap();
        fs::create_dir(record.sockets()).unwrap();
        let lock = File::create(record.directory.join("lock")).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        (record, lock)
    }

    /// Returns the directory with all files of the VM.
    pub(super) fn home(&self) -> &Path {
        self.home.path()
    }

    pub(super) fn sockets(&self) -> PathBuf {
        self.home().join("sockets")
    }

    /// Returns true if the VM's process holds the lock.
    pub(super) fn is_locked(&self) -> bool {
        let lock = File::open(self.directory.join("lock")).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockShared).is_err()
    }

    /// Returns the exit record, if there is one.
    pub(super) fn exit(&self) -> Option<ExitRecord> {
        match fs::read(self.directory.join("exit.json")) {
            Ok(exit) => Some(serde_json::from_slice(&exit).unwrap()),
            Err(_) => (!self.is_locked()).then(ExitRecord::lost),
        }
    }

    /// Returns the actions of the logged events.
    pub(super) fn events(&self) -> Vec<&'static str> {
        let events = self.events.lock().unwrap();
        events.iter().map(|event| event.action.as_str()).collect()
    }

    /// Returns the logged events.
    pub(super) fn noted(&self) -> Vec<EventRecord> {
        self.events.lock().unwrap().clone()
    }

    /// Returns the logged output of the workload.
    pub(super) fn output(&self) -> Vec<u8> {
        let output = self.output.lock().unwrap();
        output.iter().flat_map(|(_, bytes)| bytes.clone()).collect()
    }
}

impl VmRecord for FakeRecord {
    fn directory(&self) -> &Path {
        &self.directory
    }

    fn console(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    fn control_socket(&self) -> PathBuf {
        self.sockets().join("control.sock")
    }

    fn exec_socket(&self) -> PathBuf {
        self.sockets().join("exec.sock")
    }

    fn output_log(&self) -> io::Result<Box<dyn OutputLog>> {
        Ok(Box::new(FakeLog(Arc::clone(&self.output))))
    }

    fn note_event(&self, event: &EventRecord) {
        self.events.lock().unwrap().push(event.clone());
    }

    fn write_exit(&self, exit: &ExitRecord) -> io::Result<()> {
        let fresh = self.directory.join(".exit.json.new");
        fs::write(&fresh, serde_json::to_vec(exit)?)?;
        fs::rename(fresh, self.directory.join("exit.json"))
    }

    fn remove_sockets(&self) -> io::Result<()> {
        fs::remove_dir_all(self.sockets())
    }

    fn erase(&self) -> io::Result<()> {
        self.remove_sockets()?;
        fs::remove_dir_all(&self.directory)
    }
}

struct FakeLog(Output);

impl OutputLog for FakeLog {
    fn append(&mut self, kind: FrameType, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().push((kind, bytes.to_owned()));
        Ok(())
    }

    fn note_dropped(&mut self) -> io::Result<()> {
        Ok(())
    }
}
