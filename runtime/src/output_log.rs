//! The workload's output on disk, which `sm logs` prints.
//!
//! A log is a sequence of records: a 16-byte header and the bytes of output. The header
//! is `[u8 kind][3 zero bytes][u32 BE length][u64 BE nanoseconds since the Unix epoch]`.
//! A full `output.log` is renamed to `output.log.1`, so that the latest output of a
//! workload takes the size of one to two files.
//!
//! Each file begins with a record of the amount of output in all earlier files, from
//! which a reader that was overtaken by rotation computes its loss. Output that could not
//! be written (because the disk was full) is counted in a record, too.

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
const NEXT_FILE: &str = ".output.log.new";
/// Size at which a file is rotated, in bytes.
pub(crate) const ROTATE_AT: u64 = 16 << 20;

const HEADER_LEN: usize = 16;
/// Largest record that a reader accepts; records of writers are far smaller.
const MAX_RECORD: u32 = 16 << 20;

/// Kind of a record that contains the bytes of output in earlier files, as a `u64` BE.
const POSITION: u8 = 3;
/// Kind of a record that contains the bytes of output that could not be written between
/// its neighbours, as a `u64` BE.
const DROPPED: u8 = 4;

/// An output stream of the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[non_exhaustive]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout = 1,
    /// Standard error, and notes of `sm` about missing output.
    Stderr = 2,
}

/// A piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LogRecord {
    /// The stream it was written to.
    pub stream: Stream,
    /// Time of arrival, in nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl LogRecord {
    /// Creates a piece of output that arrived at `time_ns`.
    #[must_use]
    pub fn new(stream: Stream, time_ns: u64, bytes: Vec<u8>) -> Self {
        Self {
            stream,
            time_ns,
            bytes,
        }
    }
}

/// Appends to a log.
#[derive(Debug)]
pub(crate) struct LogWriter {
    directory: PathBuf,
    /// `None` after a rotation whose next file could not be created yet.
    file: Option<File>,
    /// Bytes of whole records in the file.
    written: u64,
    /// True if the file may end in a partial record.
    torn: bool,
    /// Bytes of output in all files; `None` if an earlier writer created the log.
    logged: Option<u64>,
    /// Bytes of output since the last record that are in no file.
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
        let mut options = OpenOptions::new();
        let existing = options.read(true).append(true).open(directory.join(FILE));
        match existing {
            Ok(file) => {
                // A writer that was killed may have left a part of a record.
                (writer.written, writer.logged) = extent(&file)?;
                writer.torn = file.metadata()?.len() > writer.written;
                writer.file = Some(file);
                writer.repair()?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A writer that was killed may have renamed the file.
                if directory.join(ROTATED).exists() {
                    writer.logged = None;
                }
                writer.create_file()?;
            }
            Err(error) => return Err(error),
        }
        Ok(writer)
    }

    /// Appends a record, in a single write. A failed record leaves the log unchanged, and
    /// the next successful record is preceded by a count of the missing bytes.
    ///
    /// # Errors
    /// The write failed, for instance because the disk is full.
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

    /// Writes a count of the missing bytes, if there are any.
    ///
    /// # Errors
    /// The write failed; it can be repeated.
    pub(crate) fn note_dropped(&mut self) -> io::Result<()> {
        match self.dropped {
            0 => Ok(()),
            _ => self.write(&[]),
        }
    }

    /// Creates the next file, which is renamed to its name after its first record was
    /// written.
    fn create_file(&mut self) -> io::Result<()> {
        let fresh = self.directory.join(NEXT_FILE);
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&fresh)?;
        // A failed attempt may have left bytes.
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

    /// Truncates the partial record of a failed write.
    fn repair(&mut self) -> io::Result<()> {
        if self.torn
            && let Some(file) = &self.file
        {
            file.set_len(self.written)?;
            self.torn = false;
        }
        Ok(())
    }

    /// Writes a record, preceded by a count of missing bytes.
    fn write(&mut self, record: &[u8]) -> io::Result<()> {
        self.repair()?;
        if self.written >= self.rotate_at {
            // The older file is removed first: on a full disk, its space is needed.
            std::fs::rename(self.directory.join(FILE), self.directory.join(ROTATED))?;
            self.file = None;
            self.written = 0;
        }
        if self.file.is_none() {
            self.create_file()?;
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
            // Immediate repair spares readers the wait; a failure is repeated by the next
            // write.
            let _ = self.repair();
            return Err(error);
        }
        self.written += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.dropped = 0;
        Ok(())
    }
}

/// Returns the length of the whole records of a file, and the bytes of output up to its
/// end in all files, if it says how many there are before it.
fn extent(file: &File) -> io::Result<(u64, Option<u64>)> {
    let mut reader = BufReader::new(file);
    let end = file.metadata()?.len();
    let (mut whole, mut logged) = (0, None);
    let mut header = [0; HEADER_LEN];
    while fill(&mut reader, &mut header)? {
        let [kind, _, _, _, a, b, c, d, ..] = header;
        let len = u32::from_be_bytes([a, b, c, d]);
        let next = whole + HEADER_LEN as u64 + u64::from(len);
        if next > end || len > MAX_RECORD {
            break;
        }
        let mut number = [0; 8];
        match kind {
            POSITION if len == 8 && fill(&mut reader, &mut number)? => {
                logged = Some(u64::from_be_bytes(number));
            }
            _ => {
                if kind == Stream::Stdout as u8 || kind == Stream::Stderr as u8 {
                    logged = logged.map(|logged: u64| logged.saturating_add(len.into()));
                }
                reader.seek_relative(len.into())?;
            }
        }
        whole = next;
    }
    Ok((whole, logged))
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

/// Reads a log from its oldest record, across rotations. A note in [`Stream::Stderr`]
/// takes the place of output that was rotated away or never written.
///
/// [`Self::next_record`] returns `None` at the current end; a later call continues there.
#[derive(Debug)]
pub(crate) struct LogReader {
    directory: PathBuf,
    /// The file stays open until its successor is, so that its inode number is not
    /// reused.
    current: Option<Reading>,
    /// Bytes of output before the next record; `None` while unknown.
    position: Option<u64>,
}

impl LogReader {
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        let current = oldest(directory)?;
        Ok(Self {
            directory: directory.to_owned(),
            // A reader of a log without files starts at position 0 and detects any loss;
            // for others, the log begins with its oldest file.
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
                // Records may have been added between the last read and the rotation.
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

    /// Converts a record of the file to one for the reader, if it contains output or a
    /// loss.
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

/// Opens the oldest file. The order of the two calls matters: a rotation in between hides
/// no file.
fn oldest(directory: &Path) -> io::Result<Option<Reading>> {
    let current = Reading::open(&directory.join(FILE))?;
    Ok(Reading::open(&directory.join(ROTATED))?.or(current))
}

/// A record as stored in a file.
struct Raw {
    kind: u8,
    time_ns: u64,
    bytes: Vec<u8>,
}

/// An open file of a log.
#[derive(Debug)]
struct Reading {
    file: BufReader<File>,
    /// Offset of the next record.
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

    /// Opens the next file: `None` if this is the last. Files that were rotated away in
    /// between are skipped.
    ///
    /// The order of the two calls matters: the current file of the first call is the
    /// successor of the rotated file of the second.
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

    /// Reads the next record; `None` while it is incomplete.
    ///
    /// A partially written record is truncated, and a record of another kind,
    /// [`DROPPED`], takes its place. If the header is unchanged after the bytes were
    /// read, they therefore belong to it.
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

    /// Seeks to the start of the record and discards the buffer.
    fn rewind(&mut self) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(self.offset)).map(drop)
    }
}

/// Fills the buffer. Returns false at the end of the file.
fn fill(file: &mut BufReader<impl io::Read>, buffer: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
