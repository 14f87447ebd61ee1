//! Reading a workload's output, also while it is being written.

use std::io::{self, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use rustix::io::Errno;
use sm_control::{Control, ControlError, with_causes};

use crate::Error;
use crate::output_log::LogReader;
pub use crate::output_log::{LogRecord, Stream};
use crate::record::{Record, VmState};

/// A workload's output from the oldest record kept on.
#[derive(Debug)]
pub struct Logs {
    record: Record,
    reader: LogReader,
    watch: Option<Watch>,
}

/// By what a change is heard of.
#[derive(Debug)]
enum Watch {
    /// The record's directory, by inotify.
    Directory(OwnedFd),
    /// The VM's process, by [`sm_control::launch::ControlCall::Follow`].
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

impl Logs {
    pub(crate) fn open(record: Record) -> Result<Self, Error> {
        let reader = LogReader::open(record.directory()).map_err(log_error(&record))?;
        Ok(Self {
            record,
            reader,
            watch: None,
        })
    }

    /// The next record; `None` at the present end.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn next_record(&mut self) -> Result<Option<LogRecord>, Error> {
        self.reader.next_record().map_err(log_error(&self.record))
    }

    /// The next record, waiting for it; `None` when the VM has ended and
    /// everything has been read.
    ///
    /// # Errors
    /// The log cannot be read or watched.
    pub fn wait_record(&mut self) -> Result<Option<LogRecord>, Error> {
        loop {
            // Watch first, look afterwards, so that nothing falls in between.
            self.start_watching().map_err(log_error(&self.record))?;
            let ended = match self.record.state() {
                Ok(VmState::Running) => false,
                // Removed meanwhile: what is open can still be read.
                Ok(VmState::Exited(_)) | Err(_) => true,
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
            // A user may have 128 of these by default, all of whose programs take some.
            Err(errno @ (Errno::MFILE | Errno::NOSPC)) => match self.follow() {
                Ok(watch) => watch,
                Err(error) => {
                    let causes = with_causes(&error);
                    tracing::info!(error = causes, "the VM's process tells of no output");
                    return Err(errno.into());
                }
            },
            // Removed meanwhile: what is open can still be read.
            Err(Errno::NOENT) => Watch::Nothing,
            Err(errno) => return Err(errno.into()),
        };
        self.watch = Some(watch);
        Ok(())
    }

    /// Has the VM's process tell of output.
    fn follow(&self) -> Result<Watch, Error> {
        match Control::connect(&self.record.control_endpoint()).and_then(Control::follow) {
            Ok(stream) => Ok(Watch::Process(stream)),
            // Without a process there is no more output.
            Err(ControlError::NotRunning(_)) => {
                self.record.wait_until_dead()?;
                Ok(Watch::Nothing)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn wait_for_change(&mut self) -> io::Result<()> {
        let dead = match &mut self.watch {
            Some(Watch::Directory(watch)) => wait_for_events(watch)?,
            Some(Watch::Process(stream)) => {
                let mut buffer = [0; 4096];
                match stream.read(&mut buffer) {
                    Ok(count) => count == 0,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => false,
                    // It was killed.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => true,
                    Err(error) => return Err(error),
                }
            }
            Some(Watch::Nothing) | None => false,
        };
        if dead {
            // Heard of a moment before the lock is released.
            self.record.wait_until_dead().map_err(io::Error::other)?;
        }
        Ok(())
    }
}

/// Watches the directory of a record.
fn watch_directory(record: &Record) -> Result<OwnedFd, Errno> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let watch = inotify::init(flags)?;
    // Output is written, a file rotated, the exit status moved in place,
    // the lock closed by a VMM that was killed, all of it removed.
    let events = inotify::WatchFlags::MODIFY
        | inotify::WatchFlags::MOVE
        | inotify::WatchFlags::CREATE
        | inotify::WatchFlags::CLOSE_WRITE
        | inotify::WatchFlags::MOVE_SELF
        | inotify::WatchFlags::DELETE_SELF;
    inotify::add_watch(&watch, record.directory(), events)?;
    Ok(watch)
}

/// Waits for a change in a directory; says whether the lock in it was closed.
fn wait_for_events(watch: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(watch, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    let mut lock_closed = false;
    loop {
        match events.next() {
            Ok(event) => {
                // Otherwise it does not matter what changed, only that
                // something did.
                lock_closed |= event.events().contains(inotify::ReadFlags::CLOSE_WRITE)
                    && event.file_name().is_some_and(|name| name == c"lock");
            }
            Err(Errno::AGAIN) => return Ok(lock_closed),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
