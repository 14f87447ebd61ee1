//! Reading a workload's output, including output that is still being written.

use std::io::{self, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use rustix::io::Errno;
use sm_control::network::{NETWORK_LOG, OLDER_NETWORK_LOG};
pub use sm_control::network::{NetworkEvent, NetworkEventKind};
use sm_control::{Control, ControlError, with_causes};

use crate::Error;
use crate::output_log::LogReader;
pub use crate::output_log::{LogRecord, Stream};
use crate::record::{Record, VmState};

/// A reader of a workload's output, from the oldest stored record.
#[derive(Debug)]
pub struct Logs {
    record: Record,
    reader: LogReader,
    watch: Option<Watch>,
}

/// A source of change notifications.
#[derive(Debug)]
enum Watch {
    /// The record's directory, through inotify.
    Directory(OwnedFd),
    /// The VM's process, through [`sm_control::launch::ControlCall::Follow`].
    Process(UnixStream),
    /// The VM has ended.
    Nothing,
}

fn log_error(record: &Record) -> impl Fn(io::Error) -> Error {
    let path = record.directory().to_owned();
    move |source| Error::File {
        operation: "read the output log in",
        path: path.clone(),
        source,
    }
}

/// Returns what the process of a VM has logged about its network, the oldest first.
pub(crate) fn network_events(record: &Record) -> Result<Vec<NetworkEvent>, Error> {
    let mut events = Vec::new();
    for name in [OLDER_NETWORK_LOG, NETWORK_LOG] {
        let path = record.directory().join(name);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => {
                return Err(Error::File {
                    operation: "read the log of the network",
                    path,
                    source,
                });
            }
        };
        // The last line may be incomplete.
        let lines = text.lines();
        events.extend(lines.filter_map(|line| serde_json::from_str(line).ok()));
    }
    Ok(events)
}

impl Logs {
    pub(crate) fn open(record: Record) -> Result<Self, Error> {
        let reader = LogReader::open(record.directory()).map_err(log_error(&record))?;
        Ok(Self {
            record,
            reader,
            watch: None,
        })
    }

    /// Returns the next record; `None` at the current end.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn next_record(&mut self) -> Result<Option<LogRecord>, Error> {
        self.reader.next_record().map_err(log_error(&self.record))
    }

    /// Waits for the next record; `None` when the VM has ended and everything has been
    /// read.
    ///
    /// # Errors
    /// The log cannot be read or watched.
    pub fn wait_record(&mut self) -> Result<Option<LogRecord>, Error> {
        loop {
            // The watch starts before the state is read, so that no change is missed in
            // between.
            self.start_watching().map_err(log_error(&self.record))?;
            let ended = match self.record.state() {
                Ok(VmState::Running | VmState::Restarting(_)) => false,
                // The record was removed in the meantime; open files can still be read.
                Ok(VmState::Exited(_) | VmState::Created) | Err(_) => true,
            };
            if let Some(record) = self.next_record()? {
                return Ok(Some(record));
            }
            if ended {
                return Ok(None);
            }
            self.wait_for_change().map_err(log_error(&self.record))?;
        }
    }

    fn start_watching(&mut self) -> io::Result<()> {
        if self.watch.is_some() {
            return Ok(());
        }
        let watch = match watch_directory(&self.record) {
            Ok(watch) => Watch::Directory(watch),
            // The default limit of inotify instances is 128 per user, shared with other
            // programs.
            Err(errno @ (Errno::MFILE | Errno::NOSPC)) => match self.follow() {
                Ok(watch) => watch,
                Err(error) => {
                    let causes = with_causes(&error);
                    tracing::info!(
                        error = causes,
                        "cannot follow the output through the VM's process"
                    );
                    return Err(errno.into());
                }
            },
            // The record was removed in the meantime; open files can still be read.
            Err(Errno::NOENT) => Watch::Nothing,
            Err(errno) => return Err(errno.into()),
        };
        self.watch = Some(watch);
        Ok(())
    }

    /// Asks the VM's process for notifications of output.
    fn follow(&self) -> Result<Watch, Error> {
        match Control::connect(&self.record.control_endpoint()).and_then(Control::follow) {
            Ok(stream) => Ok(Watch::Process(stream)),
            // Without a process there is no more output.
            Err(ControlError::NotRunning(_)) => {
                self.record.wait_until_unlocked()?;
                Ok(Watch::Nothing)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn wait_for_change(&mut self) -> io::Result<()> {
        let exited = match &mut self.watch {
            Some(Watch::Directory(watch)) => wait_for_events(watch)?,
            Some(Watch::Process(stream)) => {
                let mut buffer = [0; 4096];
                match stream.read(&mut buffer) {
                    Ok(count) => count == 0,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => false,
                    // The process was killed.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => true,
                    Err(error) => return Err(error),
                }
            }
            Some(Watch::Nothing) | None => false,
        };
        if exited {
            // The event arrives shortly before the lock is released.
            self.record
                .wait_until_unlocked()
                .map_err(io::Error::other)?;
        }
        Ok(())
    }
}

/// Watches the directory of a record.
fn watch_directory(record: &Record) -> Result<OwnedFd, Errno> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let watch = inotify::init(flags)?;
    // The events: output was written, a file was rotated, the exit record was renamed
    // into place, a killed VMM closed the lock, or the record was removed.
    let events = inotify::WatchFlags::MODIFY
        | inotify::WatchFlags::MOVE
        | inotify::WatchFlags::CREATE
        | inotify::WatchFlags::CLOSE_WRITE
        | inotify::WatchFlags::MOVE_SELF
        | inotify::WatchFlags::DELETE_SELF;
    inotify::add_watch(&watch, record.directory(), events)?;
    Ok(watch)
}

/// Waits for a change in a directory; returns true if the lock in it was closed.
fn wait_for_events(watch: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(watch, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    let mut lock_closed = false;
    loop {
        match events.next() {
            Ok(event) => {
                // All other events only matter as a wake-up.
                lock_closed |= event.events().contains(inotify::ReadFlags::CLOSE_WRITE)
                    && event.file_name().is_some_and(|name| name == c"lock");
            }
            Err(Errno::AGAIN) => return Ok(lock_closed),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
