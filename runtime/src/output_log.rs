//! The workload's output on disk: what `sm logs` shows.
//!
//! A log is a sequence of records, each a 16-byte header and the bytes as they
//! came: `[u8 kind][3 zero bytes][u32 BE length][u64 BE nanoseconds since the
//! Unix epoch]`. When `output.log` is full it becomes `output.log.1`, so that a
//! workload that writes without end keeps between one and two files' worth of
//! its latest output.
//!
//! Each file begins with a record that counts the output in all files before it,
//! so that a reader that was overtaken by rotation knows how much it missed. Output
//! that could not be written (the disk was full) is counted in a record, too.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sm_control::timings::unix_nanos;

/// Name of the current file in a VM's record.
pub(crate) const FILE: &str = "output.log";
/// Name of the previous file.
pub(crate) const ROTATED: &str = "output.log.1";
/// Name of the next file until its first record is complete.
const FRESH: &str = ".output.log.new";
/// Size at which a file is rotated, in bytes.
pub(crate) const ROTATE_AT: u64 = 16 << 20;

const HEADER_LEN: usize = 16;
/// Largest record a reader accepts; a writer's are far smaller.
const MAX_RECORD: u32 = 16 << 20;

/// Kind of a record that holds, as a `u64` BE, the bytes of output in earlier files.
const POSITION: u8 = 3;
/// Kind of a record that holds, as a `u64` BE, the bytes of output that could not be
/// written between the records around it.
const DROPPED: u8 = 4;

/// Which stream bytes were written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout = 1,
    /// Standard error, and notes of `sm` about output that is missing.
    Stderr = 2,
}

/// A piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRecord {
    /// Where it was written.
    pub stream: Stream,
    /// When it arrived, in nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Appends to a log.
#[derive(Debug)]
pub(crate) struct LogWriter {
    directory: PathBuf,
    /// `None` after a rotation whose next file could not be created yet.
    file: Option<File>,
    /// Bytes of whole records in the file.
    written: u64,
    /// The file may end in a part of a record.
    torn: bool,
    /// Bytes of output in all files; `None` for a log that another writer began.
    logged: Option<u64>,
    /// Bytes of output that are in no file, since the last record.
    dropped: u64,
    rotate_at: u64,
}

impl LogWriter {
    pub(crate) fn create(directory: &Path, rotate_at: u64) -> io::Result<Self> {
        let mut writer = Self {
            directory: directory.to_owned(),
            file: None,
            written: 0,
            torn: false,
            logged: Some(0),
            dropped: 0,
            rotate_at,
        };
        let existing = OpenOptions::new().append(true).open(directory.join(FILE));
        match existing {
            Ok(file) => {
                writer.written = file.metadata()?.len();
                writer.file = Some(file);
                writer.logged = None;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => writer.begin_file()?,
            Err(error) => return Err(error),
        }
        Ok(writer)
    }

    /// Appends one record, in a single write. After a failure the log is as if it had
    /// not been tried, and the next record that can be written is preceded by a note
    /// of how much is missing.
    ///
    /// # Errors
    /// The file system refused, for instance because it is full.
    pub(crate) fn append(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let appended = self.try_append(stream, bytes);
        if appended.is_err() {
            let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            self.dropped = self.dropped.saturating_add(len);
        }
        appended
    }

    fn try_append(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        self.write(&encode(stream as u8, bytes)?)?;
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.logged = self.logged.map(|logged| logged.saturating_add(len));
        Ok(())
    }

    /// Notes what is missing, if anything is.
    ///
    /// # Errors
    /// The file system refused; it can be tried again.
    pub(crate) fn note_dropped(&mut self) -> io::Result<()> {
        match self.dropped {
            0 => Ok(()),
            _ => self.write(&[]),
        }
    }

    /// Creates the next file, which has its first record when it gets its name.
    fn begin_file(&mut self) -> io::Result<()> {
        let fresh = self.directory.join(FRESH);
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&fresh)?;
        // An earlier attempt may have left something.
        file.set_len(0)?;
        let mut written = 0;
        if let Some(logged) = self.logged {
            let record = encode(POSITION, &logged.to_be_bytes())?;
            file.write_all(&record)?;
            written = u64::try_from(record.len()).unwrap_or(u64::MAX);
        }
        std::fs::rename(&fresh, self.directory.join(FILE))?;
        self.file = Some(file);
        self.written = written;
        self.torn = false;
        Ok(())
    }

    /// Cuts off what a failed write left.
    fn repair(&mut self) -> io::Result<()> {
        if self.torn
            && let Some(file) = &self.file
        {
            file.set_len(self.written)?;
            self.torn = false;
        }
        Ok(())
    }

    /// Writes a record, after a note of what is missing before it.
    fn write(&mut self, record: &[u8]) -> io::Result<()> {
        self.repair()?;
        if self.written >= self.rotate_at {
            // The older file goes first: on a full disk its room is needed.
            std::fs::rename(self.directory.join(FILE), self.directory.join(ROTATED))?;
            self.file = None;
            self.written = 0;
        }
        if self.file.is_none() {
            self.begin_file()?;
        }
        let mut bytes = Vec::new();
        if self.dropped > 0 {
            bytes = encode(DROPPED, &self.dropped.to_be_bytes())?;
        }
        bytes.extend_from_slice(record);
        let Some(file) = &mut self.file else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if let Err(error) = file.write_all(&bytes) {
            self.torn = true;
            // At once if it can be, so that no reader waits for the rest.
            let _ = self.repair();
            return Err(error);
        }
        self.written += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.dropped = 0;
        Ok(())
    }
}

fn encode(kind: u8, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let Ok(len) = u32::try_from(bytes.len()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut record = Vec::with_capacity(HEADER_LEN + bytes.len());
    record.extend_from_slice(&[kind, 0, 0, 0]);
    record.extend_from_slice(&len.to_be_bytes());
    record.extend_from_slice(&unix_nanos().to_be_bytes());
    record.extend_from_slice(bytes);
    Ok(record)
}

/// Reads a log from its oldest record on, across rotations. Output that is in no file
/// any more, or never was, is replaced by a note in [`Stream::Stderr`].
///
/// [`Self::next_record`] returns `None` at the present end; asking again later
/// continues there.
#[derive(Debug)]
pub(crate) struct LogReader {
    directory: PathBuf,
    /// Kept open until its successor is, so that its identity is nobody else's.
    current: Option<Reading>,
    /// Bytes of output before the next record; `None` while it is not known.
    position: Option<u64>,
}

impl LogReader {
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        let current = oldest(directory)?;
        Ok(Self {
            directory: directory.to_owned(),
            // A reader that is there first misses nothing unnoticed; to a later one
            // the log begins where its oldest file does.
            position: current.is_none().then_some(0),
            current,
        })
    }

    pub(crate) fn next_record(&mut self) -> io::Result<Option<LogRecord>> {
        loop {
            if self.current.is_none() {
                self.current = oldest(&self.directory)?;
            }
            let Some(reading) = self.current.as_mut() else {
                return Ok(None);
            };
            let mut raw = reading.next()?;
            if raw.is_none() {
                let Some(next) = reading.successor(&self.directory)? else {
                    return Ok(None);
                };
                // No record was added since it had a successor, but maybe before.
                raw = reading.next()?;
                if raw.is_none() {
                    self.current = Some(next);
                    continue;
                }
            }
            if let Some(record) = raw.map(|raw| self.understand(raw)).transpose()?.flatten() {
                return Ok(Some(record));
            }
        }
    }

    /// What a record is to whoever reads the log, if anything.
    fn understand(&mut self, raw: Raw) -> io::Result<Option<LogRecord>> {
        let Raw {
            kind,
            time_ns,
            bytes,
        } = raw;
        let number = || <[u8; 8]>::try_from(bytes.as_slice()).map(u64::from_be_bytes);
        let note = |text: String| LogRecord {
            stream: Stream::Stderr,
            time_ns,
            bytes: text.into_bytes(),
        };
        let stream = match kind {
            1 => Stream::Stdout,
            2 => Stream::Stderr,
            POSITION => {
                let start = number().map_err(|_| damaged("a position has another length"))?;
                let lost = self
                    .position
                    .map_or(0, |position| start.saturating_sub(position));
                self.position = Some(start);
                return Ok((lost > 0).then(|| {
                    note(format!(
                        "[sm: {lost} bytes of output were lost: they were written faster than read]\n"
                    ))
                }));
            }
            DROPPED => {
                let dropped = number().map_err(|_| damaged("a count has another length"))?;
                return Ok(Some(note(format!(
                    "[sm: {dropped} bytes of output are missing: they could not be logged]\n"
                ))));
            }
            _ => return Err(damaged("unknown stream")),
        };
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.position = self.position.map(|position| position.saturating_add(len));
        Ok(Some(LogRecord {
            stream,
            time_ns,
            bytes,
        }))
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the output log is damaged: {what}"),
    )
}

/// The oldest file there is. Opened in this order, so that a rotation in between hides
/// none.
fn oldest(directory: &Path) -> io::Result<Option<Reading>> {
    let current = Reading::open(&directory.join(FILE))?;
    Ok(Reading::open(&directory.join(ROTATED))?.or(current))
}

/// A record as it is in a file.
struct Raw {
    kind: u8,
    time_ns: u64,
    bytes: Vec<u8>,
}

/// A file of a log.
#[derive(Debug)]
struct Reading {
    file: BufReader<File>,
    /// The next record's.
    offset: u64,
}

impl Reading {
    fn open(path: &Path) -> io::Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => Ok(Some(Self {
                file: BufReader::new(file),
                offset: 0,
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn is(&self, other: &Self) -> io::Result<bool> {
        let (own, other) = (
            self.file.get_ref().metadata()?,
            other.file.get_ref().metadata()?,
        );
        Ok(own.ino() == other.ino() && own.dev() == other.dev())
    }

    /// The file that follows: `None` while this is the last. Files in between that
    /// were rotated away are skipped.
    ///
    /// The order of the two looks matters: what was the current file at the first is
    /// the successor of what is the rotated one at the second.
    fn successor(&self, directory: &Path) -> io::Result<Option<Self>> {
        let current = Self::open(&directory.join(FILE))?;
        if let Some(current) = &current
            && self.is(current)?
        {
            return Ok(None);
        }
        match Self::open(&directory.join(ROTATED))? {
            Some(rotated) if !self.is(&rotated)? => Ok(Some(rotated)),
            // Between the two steps of a rotation there is no current file.
            _ => Ok(current),
        }
    }

    /// The next record; `None` while it is not there as a whole.
    ///
    /// A record of which only a part could be written is cut off again, and another
    /// one takes its place. That one's kind is [`DROPPED`], so a header that is still
    /// the same after the bytes were read belongs to them.
    fn next(&mut self) -> io::Result<Option<Raw>> {
        loop {
            let mut header = [0; HEADER_LEN];
            if !fill(&mut self.file, &mut header)? {
                return self.again_later();
            }
            let [kind, _, _, _, a, b, c, d, time @ ..] = header;
            let (len, time_ns) = (u32::from_be_bytes([a, b, c, d]), u64::from_be_bytes(time));
            let mut bytes = vec![0; usize::try_from(len.min(MAX_RECORD)).unwrap_or(0)];
            if len <= MAX_RECORD && !fill(&mut self.file, &mut bytes)? {
                return self.again_later();
            }
            let mut now = [0; HEADER_LEN];
            let still = self.file.get_ref().read_exact_at(&mut now, self.offset);
            if still.is_err() || now != header {
                self.rewind()?;
                continue;
            }
            if len > MAX_RECORD {
                return Err(damaged("a record is too long"));
            }
            self.offset += u64::from(len) + HEADER_LEN as u64;
            return Ok(Some(Raw {
                kind,
                time_ns,
                bytes,
            }));
        }
    }

    fn again_later(&mut self) -> io::Result<Option<Raw>> {
        self.rewind()?;
        Ok(None)
    }

    /// Back to the start of the record, and to what is in the file now.
    fn rewind(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.offset)).map(drop)
    }
}

/// `Ok(false)` at the end of the file.
fn fill(file: &mut BufReader<File>, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
