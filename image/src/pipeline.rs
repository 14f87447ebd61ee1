//! Decompression of a stored stream on a separate thread, while the caller hashes, parses
//! and writes the output.
//!
//! Chunks are passed to the caller through a short queue and returned for reuse, so that
//! memory does not grow with the stream.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

use sha2::{Digest as _, Sha256};

use crate::digest::{Digest, HashingReader};
use crate::limits::Limits;

/// Size of a chunk in bytes: large enough to make passing it cheap, small enough to be in
/// the cache when it is hashed and parsed.
const CHUNK: usize = 256 << 10;
/// Maximum number of chunks between the two threads.
const QUEUE: usize = 6;
/// Maximum window of a zstd stream, as a power of two (32 MiB).
const ZSTD_WINDOW_LOG: u32 = 25;

/// Number of bytes of a stored stream that are still read after the caller has stopped.
/// This reaches the end of a small stream, whose digest then distinguishes damage from an
/// invalid archive. Reading more of a large stream is not worthwhile.
const LAST: u64 = 64 << 10;

/// Limit of concurrent decoders. Each Zstandard decoder may need a window of 32 MiB, so
/// only a few may run.
pub(crate) struct Decoders {
    free: Mutex<usize>,
    freed: Condvar,
}

/// Maximum number of Zstandard streams that are decompressed concurrently.
const ZSTD_AT_ONCE: usize = 2;

impl Default for Decoders {
    fn default() -> Self {
        Self {
            free: Mutex::new(ZSTD_AT_ONCE),
            freed: Condvar::new(),
        }
    }
}

impl Decoders {
    /// Waits until another stream may be decompressed.
    fn take(&self) -> Permit<'_> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = self.freed.wait_while(free, |free| *free == 0);
        *wait.unwrap_or_else(PoisonError::into_inner) -= 1;
        Permit(self)
    }
}

/// Permission to decompress one stream.
struct Permit<'a>(&'a Decoders);

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let free = self.0.free.lock();
        *free.unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

struct Chunk {
    bytes: Vec<u8>,
    /// Number of bytes of the stored stream read for this chunk and all previous ones.
    stored: u64,
}

/// Digest and size of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Measured {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// Result of processing a stream.
#[derive(Debug)]
pub(crate) struct Outcome<T> {
    /// Return value of the caller's `consume`.
    pub(crate) result: T,
    /// Digest and size of the decompressed stream, as far as the caller has read it.
    pub(crate) uncompressed: Measured,
    /// Digest and size of the stored stream up to its end or limit; an error if reading
    /// stopped earlier.
    pub(crate) stored: io::Result<Measured>,
}

/// Decompresses at most `most` bytes of `stream` and passes the result to `consume`.
/// `progress` is called with the number of bytes of the stored stream that have been
/// read.
pub(crate) fn run<T>(
    stream: impl Read + Send,
    most: u64,
    limits: Limits,
    decoders: &Decoders,
    progress: &mut dyn FnMut(u64),
    consume: impl FnOnce(&mut Plain<'_>) -> T,
) -> Outcome<T> {
    let stopped = AtomicBool::new(false);
    let stream = StoredStream {
        inner: stream.take(most),
        stopped: &stopped,
        left: LAST,
    };
    thread::scope(|scope| {
        let (filled, chunks) = sync_channel(QUEUE);
        let (returns, empty) = sync_channel(QUEUE + 2);
        let decoder = scope.spawn(move || decode(stream, decoders, &empty, filled));
        let mut plain = Plain {
            chunks,
            returns,
            current: Vec::new(),
            at: 0,
            hash: Sha256::new(),
            count: 0,
            limits,
            progress,
        };
        let result = consume(&mut plain);
        // Stops the decoder, in case the caller has stopped early.
        stopped.store(true, Ordering::Relaxed);
        let plain = plain.finish();
        let stored = match decoder.join() {
            Ok(stored) => stored,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        Outcome {
            result,
            uncompressed: plain,
            stored,
        }
    })
}

/// The stored stream, limited after the caller has stopped.
struct StoredStream<'a, R> {
    inner: R,
    /// The output is no longer needed.
    stopped: &'a AtomicBool,
    /// Number of bytes that may still be read in this case.
    left: u64,
}

impl<R: Read> Read for StoredStream<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.stopped.load(Ordering::Relaxed) {
            return self.inner.read(buffer);
        }
        // One more byte shows whether the stream ends here.
        let left = usize::try_from(self.left.saturating_add(1)).unwrap_or(usize::MAX);
        let most = buffer.len().min(left);
        let count = self
            .inner
            .read(buffer.get_mut(..most).unwrap_or_default())?;
        match self.left.checked_sub(count as u64) {
            Some(left) => self.left = left,
            None => return Err(io::Error::other("it continues after its end")),
        }
        Ok(count)
    }
}

/// Runs on the decoder's thread. After an error, some more of the stored stream is read;
/// see [`LAST`].
fn decode(
    stream: StoredStream<'_, impl Read>,
    decoders: &Decoders,
    empty: &Receiver<Vec<u8>>,
    filled: SyncSender<io::Result<Chunk>>,
) -> io::Result<Measured> {
    let count = Rc::new(Cell::new(0));
    let stopped = stream.stopped;
    let mut stored = HashingReader::new(stream, Rc::clone(&count));
    if let Err(error) = decode_chunks(&mut stored, decoders, &count, empty, &filled) {
        // The caller may have stopped, and needs no error then.
        let _ = filled.send(Err(error));
    }
    drop(filled);
    stopped.store(true, Ordering::Relaxed);
    stored.drain()?;
    let (digest, size) = stored.finish();
    Ok(Measured { digest, size })
}

fn decode_chunks(
    stored: &mut impl Read,
    decoders: &Decoders,
    count: &Cell<u64>,
    empty: &Receiver<Vec<u8>>,
    filled: &SyncSender<io::Result<Chunk>>,
) -> io::Result<()> {
    let (mut plain, _permit) = decompress(BufReader::with_capacity(CHUNK, stored), decoders)?;
    loop {
        let mut bytes = empty.try_recv().unwrap_or_else(|_| vec![0; CHUNK]);
        bytes.resize(CHUNK, 0);
        let len = fill(&mut plain, &mut bytes)?;
        bytes.truncate(len);
        if len == 0 {
            return Ok(());
        }
        let stored = count.get();
        if filled.send(Ok(Chunk { bytes, stored })).is_err() {
            return Ok(());
        }
    }
}

/// Reads until the buffer is full or the stream ends.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while let Some(rest) = buffer.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// Selects a decoder by the first bytes of the stream. Media types of real images are not
/// always right, and a wrong guess cannot pass the digest checks.
fn decompress<'a>(
    mut stream: impl BufRead + 'a,
    decoders: &'a Decoders,
) -> io::Result<(Box<dyn Read + 'a>, Option<Permit<'a>>)> {
    let head = stream.fill_buf()?;
    if head.starts_with(&[0x1f, 0x8b]) {
        let decoder = flate2::bufread::MultiGzDecoder::new(stream);
        return Ok((Box::new(decoder), None));
    }
    if is_zstd(head) {
        let permit = decoders.take();
        let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG)?;
        return Ok((Box::new(decoder), Some(permit)));
    }
    Ok((Box::new(stream), None))
}

/// Returns true for a zstd frame, or a skippable frame (RFC 8878, 3.1), with which some
/// writers of zstd:chunked start.
fn is_zstd(head: &[u8]) -> bool {
    matches!(
        head,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]
    )
}

/// The decompressed stream, which is hashed and limited as it is read.
pub(crate) struct Plain<'p> {
    chunks: Receiver<io::Result<Chunk>>,
    returns: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    /// Number of bytes of `current` that have been read.
    at: usize,
    hash: Sha256,
    count: u64,
    limits: Limits,
    progress: &'p mut dyn FnMut(u64),
}

impl Plain<'_> {
    /// Receives the next chunk; `false` at the end.
    fn refill(&mut self) -> io::Result<bool> {
        let Ok(next) = self.chunks.recv() else {
            self.current.clear();
            self.at = 0;
            return Ok(false);
        };
        let Chunk { bytes, stored } = next?;
        self.hash.update(&bytes);
        self.count += bytes.len() as u64;
        self.limits.check_stream(self.count, stored)?;
        (self.progress)(stored);
        let used = std::mem::replace(&mut self.current, bytes);
        self.at = 0;
        // The queue is full or the decoder has exited, so the buffer is dropped.
        let _ = self.returns.try_send(used);
        Ok(true)
    }

    fn finish(self) -> Measured {
        Measured {
            digest: Digest::from_hash(self.hash),
            size: self.count,
        }
    }
}

impl Read for Plain<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.current.len() && !self.refill()? {
            return Ok(0);
        }
        let rest = self.current.get(self.at..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        self.at += len;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(plain: &mut Plain<'_>) -> Result<(), String> {
        let drained = io::copy(plain, &mut io::sink());
        drained.map(drop).map_err(|error| error.to_string())
    }

    fn measured(bytes: &[u8]) -> Measured {
        Measured {
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
        }
    }

    #[test]
    fn the_stored_digest_is_known_after_an_early_stop() {
        let bytes = vec![3; CHUNK / 8];
        let outcome = run(
            bytes.as_slice(),
            u64::MAX,
            Limits::default(),
            &Decoders::default(),
            &mut |_| {},
            |plain| plain.read(&mut [0; 10]).unwrap(),
        );
        assert_eq!(outcome.result, 10);
        assert_eq!(outcome.stored.unwrap(), measured(&bytes));
    }

    /// Returns the number of bytes read from an endless stream that starts with `head`,
    /// when its output is passed to `consume`.
    fn taken(head: &[u8], consume: impl FnOnce(&mut Plain<'_>)) -> u64 {
        let taken = std::sync::atomic::AtomicU64::new(0);
        struct Counted<'a, R>(R, &'a std::sync::atomic::AtomicU64);
        impl<R: Read> Read for Counted<'_, R> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let count = self.0.read(buffer)?;
                self.1.fetch_add(count as u64, Ordering::Relaxed);
                Ok(count)
            }
        }
        // The stream is limited, so that a failing test terminates.
        let endless = head.chain(io::repeat(b'x').take(1 << 30));
        let outcome = run(
            Counted(endless, &taken),
            u64::MAX,
            Limits::default(),
            &Decoders::default(),
            &mut |_| {},
            consume,
        );
        assert!(outcome.stored.is_err());
        taken.into_inner()
    }

    #[test]
    fn an_unusable_stream_is_not_read_further() {
        // A stream that cannot be decompressed.
        let damaged = taken(b"\x1f\x8bgarbage", |plain| {
            assert!(drain(plain).is_err());
        });
        assert!(damaged < 1 << 20, "{damaged}");
        // A consumer that stops early; some output is in the queue then.
        let most = (QUEUE as u64 + 4) * CHUNK as u64 + LAST;
        let unwanted = taken(b"", |plain| {
            assert_eq!(plain.read(&mut [0; 10]).unwrap(), 10);
        });
        assert!(unwanted <= most, "{unwanted}");
        // A compressed stream that ends before the stored one.
        let gzip = {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            io::Write::write_all(&mut gzip, b"all").unwrap();
            gzip.finish().unwrap()
        };
        let followed = taken(&gzip, |plain| drop(drain(plain)));
        assert!(followed < 1 << 20, "{followed}");
    }

    #[test]
    fn streams_are_measured_on_both_sides() {
        let plain: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
        let stored = zstd::encode_all(plain.as_slice(), 1).unwrap();
        let mut last = 0;
        let outcome = run(
            stored.as_slice(),
            u64::MAX,
            Limits::default(),
            &Decoders::default(),
            &mut |done| last = done,
            drain,
        );
        assert_eq!(outcome.result, Ok(()));
        assert_eq!(outcome.uncompressed, measured(&plain));
        assert_eq!(outcome.stored.unwrap(), measured(&stored));
        assert_eq!(last, stored.len() as u64);
    }

    #[test]
    fn errors_of_the_decoder_reach_the_reader() {
        let error = run(
            &b"\x1f\x8bgarbage"[..],
            u64::MAX,
            Limits::default(),
            &Decoders::default(),
            &mut |_| {},
            drain,
        );
        assert!(error.result.is_err());
    }
}
