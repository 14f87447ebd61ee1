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
use std::time::{SystemTime, UNIX_EPOCH};

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

/// Nanoseconds since the Unix epoch, 0 if the clock is before it.
pub(crate) fn unix_nanos() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|elapsed| u64::try_from(elapsed.as_nanos()).ok())
        .unwrap_or(0)
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

    fn text(record: &(Stream, Vec<u8>)) -> String {
        String::from_utf8_lossy(&record.1).into_owned()
    }

    #[test]
    fn a_reader_in_the_older_file_misses_nothing_by_one_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(dir.path(), 100).unwrap();
        let mut n = 0u8;
        let mut rotate = |writer: &mut LogWriter| {
            let inode = || std::fs::metadata(dir.path().join(FILE)).unwrap().ino();
            let before = inode();
            let first = n;
            while inode() == before {
                writer.append(Stream::Stdout, &[n; 10]).unwrap();
                n += 1;
            }
            first
        };
        rotate(&mut writer);
        let mut reader = LogReader::open(dir.path()).unwrap();
        let mut seen = vec![reader.next_record().unwrap().unwrap().bytes];
        rotate(&mut writer);
        seen.extend(read_all(&mut reader).into_iter().map(|(_, bytes)| bytes));
        let expected: Vec<_> = (0..n).map(|n| vec![n; 10]).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_reader_that_two_rotations_overtook_is_told_how_much_it_missed() {
        for open_first in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let early = LogReader::open(dir.path()).unwrap();
            let mut writer = LogWriter::create(dir.path(), 100).unwrap();
            let mut reader = match open_first {
                true => early,
                false => {
                    writer.append(Stream::Stdout, &[0; 10]).unwrap();
                    LogReader::open(dir.path()).unwrap()
                }
            };
            let begun = read_all(&mut reader).len();
            let first = u8::try_from(begun).unwrap();
            for n in first..50 {
                writer.append(Stream::Stdout, &[n; 10]).unwrap();
            }
            let mut lost = 0;
            let mut bytes = begun * 10;
            for record in read_all(&mut reader) {
                match record.0 {
                    Stream::Stdout => bytes += record.1.len(),
                    Stream::Stderr => {
                        let note = text(&record);
                        let count = note.strip_prefix("[sm: ").unwrap();
                        let (count, rest) = count.split_once(' ').unwrap();
                        assert!(rest.starts_with("bytes of output were lost"), "{note}");
                        lost += count.parse::<usize>().unwrap();
                    }
                }
            }
            assert!(lost > 0 && lost + bytes == 500, "{lost} {bytes}");
        }
    }

    /// The file of a log that takes `room` more bytes for as long as the limit stands.
    /// A limit of file sizes is of the process, so it is set in one of its own.
    fn in_a_process_of_its_own(name: &str) -> bool {
        const OWN: &str = "SM_TEST_OWN_PROCESS";
        if std::env::var_os(OWN).is_some() {
            return true;
        }
        let test = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", name])
            .env(OWN, "1")
            .output()
            .unwrap();
        assert!(test.status.success(), "{test:?}");
        assert!(
            String::from_utf8_lossy(&test.stdout).contains("1 passed"),
            "{test:?}"
        );
        false
    }

    #[test]
    fn a_log_goes_on_when_there_is_room_again_and_says_what_is_missing() {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let name =
            "output_log::tests::a_log_goes_on_when_there_is_room_again_and_says_what_is_missing";
        if !in_a_process_of_its_own(name) {
            return;
        }
        // EFBIG instead of a signal.
        let ignored = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        signal_hook::flag::register(signal_hook::consts::SIGXFSZ, ignored).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(dir.path(), 1 << 20).unwrap();
        let mut reader = LogReader::open(dir.path()).unwrap();
        writer.append(Stream::Stdout, b"first").unwrap();
        let len = std::fs::metadata(dir.path().join(FILE)).unwrap().len();
        let before = getrlimit(Resource::Fsize);
        let tight = Rlimit {
            current: Some(len + 30),
            ..before
        };
        setrlimit(Resource::Fsize, tight).unwrap();
        // A part of it fits.
        assert!(writer.append(Stream::Stdout, &[b'x'; 100]).is_err());
        assert!(writer.append(Stream::Stderr, &[b'x'; 20]).is_err());
        assert_eq!(
            std::fs::metadata(dir.path().join(FILE)).unwrap().len(),
            len,
            "no part of a record stays"
        );
        assert_eq!(read_all(&mut reader), [(Stream::Stdout, b"first".to_vec())]);
        setrlimit(Resource::Fsize, before).unwrap();
        writer.append(Stream::Stdout, b"second").unwrap();
        let seen = read_all(&mut reader);
        assert_eq!(seen.len(), 2);
        assert!(text(&seen[0]).starts_with("[sm: 120 bytes of output are missing"));
        assert_eq!(seen[1], (Stream::Stdout, b"second".to_vec()));
        assert_eq!(read_all(&mut LogReader::open(dir.path()).unwrap()).len(), 3);
    }

    #[test]
    fn a_record_that_takes_the_place_of_half_a_one_is_read_as_itself() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(dir.path(), 1 << 20).unwrap();
        writer.append(Stream::Stdout, b"first").unwrap();
        let mut reader = LogReader::open(dir.path()).unwrap();
        assert_eq!(read_all(&mut reader).len(), 1);
        let path = dir.path().join(FILE);
        let whole = std::fs::metadata(&path).unwrap().len();
        let half = encode(Stream::Stdout as u8, &[b'x'; 500]).unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(&half[..100]).unwrap();
        assert_eq!(reader.next_record().unwrap(), None);
        file.set_len(whole).unwrap();
        writer.dropped = 500;
        writer.append(Stream::Stderr, &[b'y'; 1000]).unwrap();
        let seen = read_all(&mut reader);
        assert!(text(&seen[0]).contains("500 bytes"));
        assert_eq!(seen[1], (Stream::Stderr, vec![b'y'; 1000]));
    }

    #[test]
    fn a_file_that_cannot_be_begun_is_begun_later() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = LogWriter::create(dir.path(), 50).unwrap();
        let mut reader = LogReader::open(dir.path()).unwrap();
        writer.append(Stream::Stdout, &[1; 30]).unwrap();
        // Something is in the way.
        std::fs::create_dir(dir.path().join(FRESH)).unwrap();
        for _ in 0..3 {
            assert!(writer.append(Stream::Stdout, &[2; 30]).is_err());
        }
        assert_eq!(read_all(&mut reader), [(Stream::Stdout, vec![1; 30])]);
        std::fs::remove_dir(dir.path().join(FRESH)).unwrap();
        writer.append(Stream::Stdout, &[3; 30]).unwrap();
        let seen = read_all(&mut reader);
        assert!(text(&seen[0]).starts_with("[sm: 90 bytes"), "{seen:?}");
        assert_eq!(seen[1], (Stream::Stdout, vec![3; 30]));
    }
}
