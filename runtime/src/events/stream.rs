//! Reading of the log, including events that are still to come.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::io::Errno;
use sm_control::event::EventRecord;
use sm_control::timings::unix_nanos;

use super::EventQuery;
use super::log::{EventLog, FILE, MAX_LINE, PREVIOUS};
use crate::Error;
use crate::sm::Sm;

/// The events of a user; see [`Sm::events`].
#[derive(Debug)]
pub struct EventStream {
    directory: PathBuf,
    query: EventQuery,
    /// Watches the directory, from before the files were opened.
    watch: Option<OwnedFd>,
    /// The file before [`Self::current`], to which late writers may still add lines.
    previous: Option<LineFile>,
    current: Option<LineFile>,
}

/// An open file of the log.
#[derive(Debug)]
struct LineFile {
    file: BufReader<File>,
    inode: u64,
    /// The beginning of a line whose rest is not there yet.
    partial: Vec<u8>,
}

impl Sm {
    /// Opens the events of this user's VMs, images and snapshots that `query` asks for,
    /// oldest first. About 8 MiB of them are kept.
    ///
    /// # Errors
    /// The log cannot be read or watched.
    pub fn events(&self, query: EventQuery) -> Result<EventStream, Error> {
        EventStream::open(&EventLog::of(self.home()), query)
    }
}

impl EventStream {
    pub(super) fn open(log: &EventLog, query: EventQuery) -> Result<Self, Error> {
        let directory = log.directory();
        let failed = failed(directory);
        log.prepare().map_err(&failed)?;
        let watch = match query.follow {
            true => Some(watch(directory).map_err(|errno| failed(errno.into()))?),
            false => None,
        };
        let mut stream = Self {
            directory: directory.to_owned(),
            watch,
            previous: None,
            current: None,
            query,
        };
        stream.open_files().map_err(&failed)?;
        Ok(stream)
    }

    fn open_files(&mut self) -> io::Result<()> {
        // A rotation between these calls leaves the same file in both.
        self.current = LineFile::open(&self.directory.join(FILE))?;
        self.previous = LineFile::open(&self.directory.join(PREVIOUS))?;
        if let (Some(current), Some(previous)) = (&self.current, &self.previous)
            && current.inode == previous.inode
        {
            self.current = None;
        }
        if self.query.since_ns.is_none() {
            for file in [&mut self.previous, &mut self.current]
                .into_iter()
                .flatten()
            {
                file.skip_all()?;
            }
        }
        Ok(())
    }

    /// Returns the next event that the query asks for; `None` at the current end.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn next_event(&mut self) -> Result<Option<EventRecord>, Error> {
        self.read().map_err(failed(&self.directory))
    }

    /// Waits for the next event that the query asks for; `None` at its end, or at the
    /// current end if it does not follow.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn wait_event(&mut self) -> Result<Option<EventRecord>, Error> {
        loop {
            // Lines that are written before the end of the query are read after it.
            let is_over = self
                .query
                .until_ns
                .is_some_and(|until| unix_nanos() >= until);
            if let Some(event) = self.next_event()? {
                return Ok(Some(event));
            }
            let Some(watch) = self.watch.as_ref().filter(|_| !is_over) else {
                return Ok(None);
            };
            wait_for_change(watch, self.query.until_ns).map_err(failed(&self.directory))?;
        }
    }

    fn read(&mut self) -> io::Result<Option<EventRecord>> {
        loop {
            // Each line that is read ends the loop or is left out.
            for file in [&mut self.previous, &mut self.current]
                .into_iter()
                .flatten()
            {
                while let Some(line) = file.line()? {
                    if let Some(event) = parse(&line)
                        && self.query.asks_for(&event)
                    {
                        return Ok(Some(event));
                    }
                }
            }
            if !self.follow_rotation()? {
                return Ok(None);
            }
        }
    }

    /// Opens the file that is current now; returns false if that is open already.
    fn follow_rotation(&mut self) -> io::Result<bool> {
        let Some(mut next) = LineFile::open(&self.directory.join(FILE))? else {
            return Ok(false);
        };
        let Some(current) = &self.current else {
            // The first file since the stream was opened may have been renamed already.
            let previous = LineFile::open(&self.directory.join(PREVIOUS))?;
            let is_new = |file: &LineFile| {
                let own = self.previous.as_ref();
                own.is_none_or(|own| own.inode != file.inode)
            };
            self.current = Some(previous.filter(is_new).unwrap_or(next));
            return Ok(true);
        };
        if current.inode == next.inode {
            return Ok(false);
        }
        let previous = LineFile::open(&self.directory.join(PREVIOUS))?;
        let left_out = previous.is_some_and(|previous| previous.inode != current.inode);
        if left_out {
            tracing::warn!("events are missing: they were written faster than read");
            // The oldest that is left is in the previous file.
            if let Some(previous) = LineFile::open(&self.directory.join(PREVIOUS))? {
                next = previous;
            }
        }
        self.previous = self.current.replace(next);
        Ok(true)
    }
}

impl LineFile {
    fn open(path: &Path) -> io::Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => Ok(Some(Self {
                inode: file.metadata()?.ino(),
                file: BufReader::new(file),
                partial: Vec::new(),
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn skip_all(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::End(0)).map(drop)
    }

    /// Returns the next complete line; `None` at the current end. A line that is too long
    /// is returned in pieces, which are no events.
    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let room = MAX_LINE.saturating_sub(self.partial.len()).max(1);
        let room = u64::try_from(room).unwrap_or(u64::MAX);
        let count = self
            .file
            .by_ref()
            .take(room)
            .read_until(b'\n', &mut self.partial)?;
        let whole = self.partial.ends_with(b"\n") || self.partial.len() >= MAX_LINE;
        Ok((count > 0 && whole).then(|| std::mem::take(&mut self.partial)))
    }
}

/// Parses a line. Empty lines, and lines that were written in part only, are no events.
fn parse(line: &[u8]) -> Option<EventRecord> {
    let line = line.trim_ascii();
    if line.is_empty() {
        return None;
    }
    serde_json::from_slice(line)
        .inspect_err(|error| tracing::debug!(%error, "a line is no event"))
        .ok()
}

fn watch(directory: &Path) -> Result<OwnedFd, Errno> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let watch = inotify::init(flags)?;
    let events =
        inotify::WatchFlags::MODIFY | inotify::WatchFlags::MOVE | inotify::WatchFlags::CREATE;
    inotify::add_watch(&watch, directory, events)?;
    Ok(watch)
}

/// Waits for a change in the directory, or for the time `until_ns`.
fn wait_for_change(watch: &OwnedFd, until_ns: Option<u64>) -> io::Result<()> {
    let left = until_ns.map(|until| {
        let left = std::time::Duration::from_nanos(until.saturating_sub(unix_nanos()));
        Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        }
    });
    let mut fds = [PollFd::new(watch, PollFlags::IN)];
    match poll(&mut fds, left.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    loop {
        match events.next() {
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn failed(directory: &Path) -> impl Fn(io::Error) -> Error {
    let path = directory.to_owned();
    move |source| Error::File {
        operation: "read the events in",
        path: path.clone(),
        source,
    }
}
