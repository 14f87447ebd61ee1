//! The workload's output on disk: what `sm logs` shows.
//!
//! A log is a sequence of records, each a 16-byte header and the bytes as they
//! came: `[u8 stream][3 zero bytes][u32 BE length][u64 BE nanoseconds since the
//! Unix epoch]`. When `output.log` is full it becomes `output.log.1`, so that a
//! workload that writes without end keeps between one and two files' worth of
//! its latest output.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Name of the current file in a VM's record.
pub(crate) const FILE: &str = "output.log";
/// Name of the previous file.
pub(crate) const ROTATED: &str = "output.log.1";
/// Size at which a file is rotated, in bytes.
pub(crate) const ROTATE_AT: u64 = 16 << 20;

const HEADER_LEN: usize = 16;
/// Largest record a reader accepts; a writer's are far smaller.
const MAX_RECORD: u32 = 16 << 20;

/// Which stream bytes were written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout = 1,
    /// Standard error.
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
    file: File,
    written: u64,
    rotate_at: u64,
}

impl LogWriter {
    pub(crate) fn create(directory: &Path, rotate_at: u64) -> io::Result<Self> {
        let file = open_log(directory)?;
        let written = file.metadata()?.len();
        Ok(Self {
            directory: directory.to_owned(),
            file,
            written,
            rotate_at,
        })
    }

    /// Appends one record, in a single write so that a reader sees all or none
    /// of it unless the disk is full.
    pub(crate) fn append(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let Ok(len) = u32::try_from(bytes.len()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if self.written >= self.rotate_at {
            std::fs::rename(self.directory.join(FILE), self.directory.join(ROTATED))?;
            self.file = open_log(&self.directory)?;
            self.written = 0;
        }
        let mut record = Vec::with_capacity(HEADER_LEN + bytes.len());
        record.extend_from_slice(&[stream as u8, 0, 0, 0]);
        record.extend_from_slice(&len.to_be_bytes());
        record.extend_from_slice(&unix_nanos().to_be_bytes());
        record.extend_from_slice(bytes);
        self.file.write_all(&record)?;
        self.written += u64::from(len) + HEADER_LEN as u64;
        Ok(())
    }
}

fn open_log(directory: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(directory.join(FILE))
}

/// Nanoseconds since the Unix epoch, 0 if the clock is before it.
pub(crate) fn unix_nanos() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|elapsed| u64::try_from(elapsed.as_nanos()).ok())
        .unwrap_or(0)
}

/// Reads a log from its oldest record on, across one rotation.
///
/// [`Self::next_record`] returns `None` at the present end; asking again later
/// continues there.
#[derive(Debug)]
pub(crate) struct LogReader {
    directory: PathBuf,
    current: Option<BufReader<File>>,
    partial: Vec<u8>,
    reading_rotated: bool,
}

impl LogReader {
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        let rotated = open_if_present(&directory.join(ROTATED))?;
        Ok(Self {
            directory: directory.to_owned(),
            reading_rotated: rotated.is_some(),
            current: rotated,
            partial: Vec::new(),
        })
    }

    pub(crate) fn next_record(&mut self) -> io::Result<Option<LogRecord>> {
        loop {
            if self.current.is_none() {
                self.current = open_if_present(&self.directory.join(FILE))?;
                self.reading_rotated = false;
            }
            let Some(file) = self.current.as_mut() else {
                return Ok(None);
            };
            if let Some(record) = read_record(file, &mut self.partial)? {
                return Ok(Some(record));
            }
            // At the end of a file that is no longer the one being written:
            // everything in it has been seen, because rotation happens
            // between records.
            if !self.reading_rotated && is_current(&self.directory, file)? {
                return Ok(None);
            }
            if self.partial.is_empty()
                && let Some(record) = read_record(file, &mut self.partial)?
            {
                return Ok(Some(record));
            }
            self.current = None;
            self.partial.clear();
        }
    }
}

/// Whether an open file is still the one being written.
fn is_current(directory: &Path, file: &BufReader<File>) -> io::Result<bool> {
    let open = file.get_ref().metadata()?;
    match std::fs::metadata(directory.join(FILE)) {
        Ok(named) => Ok(open.ino() == named.ino() && open.dev() == named.dev()),
        // Between the two steps of a rotation, or removed altogether.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

fn open_if_present(path: &Path) -> io::Result<Option<BufReader<File>>> {
    match File::open(path) {
        Ok(file) => Ok(Some(BufReader::new(file))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads on until `partial` holds one record; `None` at the end of the file.
fn read_record(file: &mut impl Read, partial: &mut Vec<u8>) -> io::Result<Option<LogRecord>> {
    if !fill_to(file, partial, HEADER_LEN)? {
        return Ok(None);
    }
    let bad = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let Some([stream, _, _, _, a, b, c, d, time @ ..]) = partial.first_chunk::<HEADER_LEN>() else {
        return Ok(None);
    };
    let (stream, time_ns) = (*stream, u64::from_be_bytes(*time));
    let len = u32::from_be_bytes([*a, *b, *c, *d]);
    if len > MAX_RECORD {
        return Err(bad("the output log is damaged: a record is too long"));
    }
    let end = HEADER_LEN + usize::try_from(len).unwrap_or(usize::MAX);
    if !fill_to(file, partial, end)? {
        return Ok(None);
    }
    let stream = match stream {
        1 => Stream::Stdout,
        2 => Stream::Stderr,
        _ => return Err(bad("the output log is damaged: unknown stream")),
    };
    let bytes = partial.get(HEADER_LEN..end).unwrap_or_default().to_vec();
    partial.clear();
    Ok(Some(LogRecord {
        stream,
        time_ns,
        bytes,
    }))
}

fn fill_to(file: &mut impl Read, buffer: &mut Vec<u8>, len: usize) -> io::Result<bool> {
    let missing = len.saturating_sub(buffer.len());
    file.by_ref()
        .take(u64::try_from(missing).unwrap_or(u64::MAX))
        .read_to_end(buffer)?;
    Ok(buffer.len() >= len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(reader: &mut LogReader) -> Vec<(Stream, Vec<u8>)> {
        std::iter::from_fn(|| reader.next_record().unwrap())
            .map(|record| (record.stream, record.bytes))
            .collect()
    }

    #[test]
    fn records_come_back_in_order_and_reading_continues() {
        let dir = tempfile::tempdir().unwrap();
        let mut reader = LogReader::open(dir.path()).unwrap();
        assert_eq!(reader.next_record().unwrap(), None);
        let mut writer = LogWriter::create(dir.path(), 1 << 20).unwrap();
        writer.append(Stream::Stdout, b"one").unwrap();
        writer.append(Stream::Stderr, b"").unwrap();
        assert_eq!(
            read_all(&mut reader),
            [
                (Stream::Stdout, b"one".to_vec()),
                (Stream::Stderr, Vec::new())
            ]
        );
        writer.append(Stream::Stdout, &[0, 255]).unwrap();
        assert_eq!(read_all(&mut reader), [(Stream::Stdout, vec![0, 255])]);
    }

    #[test]
    fn a_reader_follows_across_rotation_and_size_stays_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(dir.path(), 100).unwrap();
        let mut reader = LogReader::open(dir.path()).unwrap();
        let mut seen = Vec::new();
        for n in 0..50u8 {
            writer.append(Stream::Stdout, &[n; 10]).unwrap();
            seen.extend(read_all(&mut reader));
        }
        let expected: Vec<_> = (0..50u8).map(|n| (Stream::Stdout, vec![n; 10])).collect();
        assert_eq!(seen, expected);
        for name in [FILE, ROTATED] {
            assert!(std::fs::metadata(dir.path().join(name)).unwrap().len() <= 130);
        }
        let late = read_all(&mut LogReader::open(dir.path()).unwrap());
        assert!(late.len() >= 4 && late.last() == expected.last());
    }

    #[test]
    fn a_half_written_record_is_not_returned_and_garbage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(dir.path(), 1 << 20).unwrap();
        writer.append(Stream::Stdout, b"whole").unwrap();
        let path = dir.path().join(FILE);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let mut reader = LogReader::open(dir.path()).unwrap();
        assert_eq!(reader.next_record().unwrap(), None);
        std::fs::write(&path, [9; 32]).unwrap();
        assert!(LogReader::open(dir.path()).unwrap().next_record().is_err());
    }
}
