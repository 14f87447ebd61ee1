//! The log of events: two files that grow in turn.
//!
//! Any process of the user adds a line by a single write in append mode, which the kernel
//! does not mix with that of another process, and never waits for another one. The writer
//! that finds the file full renames it in place of the previous one; a line of a writer that
//! had it open then follows in the renamed file, where readers look for it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use sm_control::event::EventRecord;
use sm_control::with_causes;

use crate::home::{Home, ensure_private_dir};

/// The file that grows.
pub(super) const FILE: &str = "events.jsonl";
/// The one before.
pub(super) const PREVIOUS: &str = "events.1.jsonl";
const LOCK: &str = "lock";

/// Length at which the file is renamed.
const ROTATE_AT: u64 = 4 << 20;
/// Longest line; labels, and then attributes, of a longer one are left out.
pub(super) const MAX_LINE: usize = 64 << 10;

/// The log of a user's events, for writers.
#[derive(Clone, Debug)]
pub(crate) struct EventLog {
    directory: PathBuf,
    rotate_at: u64,
}

impl EventLog {
    pub(crate) fn of(home: &Home) -> Self {
        Self::with_limit(&home.events(), ROTATE_AT)
    }

    pub(super) fn with_limit(directory: &Path, rotate_at: u64) -> Self {
        Self {
            directory: directory.to_owned(),
            rotate_at,
        }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Adds an event. A failure is logged, as no operation fails for lack of its event.
    pub(crate) fn note(&self, event: &EventRecord) {
        if let Err(error) = self.append(event) {
            tracing::warn!(
                error = with_causes(&error),
                action = event.action.as_str(),
                "an event is not logged"
            );
        }
    }

    fn append(&self, event: &EventRecord) -> io::Result<()> {
        let line = line(event)?;
        let mut file = self.open()?;
        file.write_all(&line)?;
        if file.metadata()?.len() >= self.rotate_at {
            self.rotate(&file)?;
        }
        Ok(())
    }

    fn open(&self) -> io::Result<File> {
        let path = self.directory.join(FILE);
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        match options.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.prepare()?;
                options.open(&path)
            }
            other => other,
        }
    }

    /// Creates the directory.
    pub(super) fn prepare(&self) -> io::Result<()> {
        ensure_private_dir(&self.directory).map_err(io::Error::other)
    }

    /// Renames the full `file`, unless another process is about to or already has.
    fn rotate(&self, file: &File) -> io::Result<()> {
        let lock = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.directory.join(LOCK))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(());
        }
        let current = self.directory.join(FILE);
        match fs::metadata(&current) {
            Ok(now) if now.ino() == file.metadata()?.ino() => {
                fs::rename(&current, self.directory.join(PREVIOUS))
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Returns the line for an event. It begins with a line feed as well, so that a line of
/// which only a part could be written does not damage the next.
fn line(event: &EventRecord) -> io::Result<Vec<u8>> {
    let mut event = event.clone();
    loop {
        let mut line = vec![b'\n'];
        serde_json::to_writer(&mut line, &event)?;
        line.push(b'\n');
        if line.len() <= MAX_LINE {
            return Ok(line);
        }
        match event.labels.is_empty() {
            false => event.labels.clear(),
            true if event.attributes.is_empty() => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "it is too long",
                ));
            }
            true => event.attributes.clear(),
        }
    }
}
