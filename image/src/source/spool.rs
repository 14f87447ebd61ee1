//! Temporary storage of streams that must be read out of order: decompressed, in files
//! without names.

use std::cell::Cell;
use std::fs::File;
use std::io::{
    self, BufRead as _, BufReader, IsTerminal as _, Read, Seek as _, SeekFrom, Write as _,
};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::rc::Rc;

use super::Session;
use crate::Error;
use crate::error::{Cause, ErrorKind};
use crate::limits::Limits;

/// Maximum window of a zstd stream, as a power of two (128 MiB: `zstd --long`).
const ZSTD_WINDOW_LOG: u32 = 27;
/// Number of bytes moved at a time.
const CHUNK: usize = 1 << 20;

/// Compression of a stream, detected from its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DetectedCompression {
    None,
    Gzip,
    Zstd,
    /// A compression that is not supported, with its name.
    Other(&'static str),
}

impl DetectedCompression {
    fn of(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A frame, or a skippable one (RFC 8878 section 3.1).
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Other("xz"),
            [b'B', b'Z', b'h', ..] => Self::Other("bzip2"),
            [b'P', b'K', 3, 4, ..] => Self::Other("zip"),
            _ => Self::None,
        }
    }
}

/// Opens the file at `path`, or the standard input for `-`, for random access. A regular
/// file without compression is opened itself.
pub(super) fn open(path: &Path, session: Session<'_>) -> io::Result<File> {
    let mut file = match path.as_os_str() == "-" {
        false => File::open(path)?,
        true if io::stdin().is_terminal() => {
            return Err(io::Error::other(
                "the standard input is a terminal, but an archive is expected",
            ));
        }
        true => File::from(io::stdin().as_fd().try_clone_to_owned()?),
    };
    if !file.metadata()?.is_file() || file.stream_position()? != 0 {
        return spool(file, session);
    }
    let mut head = [0; 8];
    let len = read_up_to(&mut file, &mut head)?;
    file.seek(SeekFrom::Start(0))?;
    match DetectedCompression::of(head.get(..len).unwrap_or_default()) {
        DetectedCompression::None => Ok(file),
        _ => spool(file, session),
    }
}

/// Stores a stream in a file of the session's scratch directory.
///
/// # Errors
/// Reading or writing fails, the compression is not supported, the stream is too large,
/// or the operation was cancelled.
pub(super) fn spool(stream: impl Read, session: Session<'_>) -> io::Result<File> {
    spool_within(stream, session, Limits::default())
}

fn spool_within(stream: impl Read, session: Session<'_>, limits: Limits) -> io::Result<File> {
    let count = Rc::new(Cell::new(0));
    let counting = LimitedReader {
        stream,
        count: Rc::clone(&count),
        limits,
    };
    let mut stream = BufReader::with_capacity(CHUNK, counting);
    let mut plain: Box<dyn Read + '_> = match DetectedCompression::of(stream.fill_buf()?) {
        DetectedCompression::None => Box::new(stream),
        DetectedCompression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(stream)),
        DetectedCompression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
        DetectedCompression::Other(name) => {
            return Err(io::Error::other(Cause::new(
                ErrorKind::Unsupported,
                format!("it is compressed by {name}: decompress it first"),
            )));
        }
    };
    let mut file = tempfile::tempfile_in(session.scratch)?;
    let mut buffer = vec![0; CHUNK];
    let mut written = 0;
    loop {
        if session.cancel.is_cancelled() {
            return Err(io::Error::other(Error::Cancelled));
        }
        let len = read_up_to(&mut plain, &mut buffer)?;
        if len == 0 {
            break;
        }
        written += len as u64;
        limits.check_stream(written, count.get())?;
        file.write_all(buffer.get(..len).unwrap_or_default())?;
    }
    drop(plain);
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

fn read_up_to(stream: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while let Some(rest) = buffer.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match stream.read(rest) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

struct LimitedReader<R> {
    stream: R,
    count: Rc<Cell<u64>>,
    limits: Limits,
}

impl<R: Read> Read for LimitedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        self.count.set(self.count.get() + count as u64);
        self.limits.check_stored(self.count.get())?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::Cancel;

    const LIMITS: Limits = Limits {
        layer_bytes: 8 << 20,
        ratio: 100,
        ratio_floor: 4 << 20,
        ..Limits::NONE
    };

    fn spooled(bytes: &[u8], cancel: &Cancel) -> io::Result<Vec<u8>> {
        let directory = tempfile::tempdir().unwrap();
        let session = Session {
            scratch: directory.path(),
            cancel,
            message: &|_| {},
        };
        let mut file = spool_within(bytes, session, LIMITS)?;
        assert_eq!(
            directory.path().read_dir().unwrap().count(),
            0,
            "it has no name"
        );
        let mut read = Vec::new();
        file.read_to_end(&mut read)?;
        Ok(read)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(1));
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn streams_are_kept_decompressed() {
        let cancel = Cancel::new();
        let bytes: Vec<u8> = (0..1_200_000_u32).map(|n| (n % 251) as u8).collect();
        for stream in [
            bytes.clone(),
            gzip(&bytes),
            // `pigz` and `bgzip` write several members.
            [gzip(&bytes[..1000]), gzip(&bytes[1000..])].concat(),
            zstd::encode_all(bytes.as_slice(), 1).unwrap(),
        ] {
            assert_eq!(spooled(&stream, &cancel).unwrap(), bytes);
        }
        assert_eq!(spooled(b"", &cancel).unwrap(), b"");
    }

    #[test]
    fn unsupported_streams_are_reported() {
        let cancel = Cancel::new();
        let error = spooled(b"\xfd7zXZ\0rest", &cancel).unwrap_err();
        assert!(error.to_string().contains("xz"), "{error}");
        assert!(spooled(&gzip(&[1; 5000])[..50], &cancel).is_err());
        assert!(spooled(b"\x28\xb5\x2f\xfdgarbage", &cancel).is_err());
        cancel.cancel();
        let error = spooled(b"plain", &cancel).unwrap_err();
        assert!(error.to_string().contains("cancelled"), "{error}");
    }

    #[test]
    fn decompression_bombs_are_stopped() {
        let cancel = Cancel::new();
        let bomb = zstd::encode_all(vec![0; 6 << 20].as_slice(), 1).unwrap();
        let error = spooled(&bomb, &cancel).unwrap_err();
        assert!(error.to_string().contains("times its size"), "{error}");
        let error = spooled(&vec![b'x'; 9 << 20], &cancel).unwrap_err();
        assert!(error.to_string().contains("more than"), "{error}");
        // Frames without contents (RFC 8878 section 3.1.2).
        let mut nothing = vec![0x50, 0x2a, 0x4d, 0x18];
        nothing.extend((12_u32 << 20).to_le_bytes());
        nothing.resize(nothing.len() + (12 << 20), 0);
        let error = spooled(&nothing, &cancel).unwrap_err();
        assert!(error.to_string().contains("more than"), "{error}");
    }
}
