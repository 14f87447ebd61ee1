//! Download of a blob, which is resumed after an interruption, at another location if
//! necessary.
//!
//! The reader of the blob checks the digest of the whole, so a location that continues
//! with different data is detected.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use ureq::Body;
use ureq::http::{Response, StatusCode, header};

use super::backoff::Backoff;
use super::client::{Client, Resource};
use super::failure::Failure;
use crate::digest::Digest;
use crate::error::{Cause, ErrorKind};

const ANYTHING: &str = "*/*";
/// Maximum number of consecutive attempts at one location without progress.
const RESUMES: u32 = 5;
/// Number of bytes that counts as progress.
const PROGRESS: u64 = 1 << 20;
/// Minimum number of bytes per [`WHILE`]; a slower connection is closed.
const SLOWEST: u64 = 60 << 10;
/// Interval for [`SLOWEST`].
const WHILE: Duration = Duration::from_secs(60);

/// A blob that is being read.
pub(super) struct Blob<'a> {
    /// Locations of the blob, the best first.
    clients: Vec<&'a Client<'a>>,
    digest: Digest,
    /// Length of the blob in bytes.
    size: u64,
    /// Number of bytes read.
    at: u64,
    body: Option<Box<dyn Read + Send>>,
    /// Retry state for the first of `clients`.
    backoff: Backoff<'a>,
    /// Number of bytes read when `backoff` started.
    since: u64,
    pace: Pace,
    /// Offset at which the last answer started.
    started_at: u64,
}

/// Measures the rate while data is awaited.
#[derive(Default)]
struct Pace {
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Records bytes and the time they took. Returns true if the rate is too low.
    fn drags(&mut self, count: u64, took: Duration) -> bool {
        self.bytes += count;
        self.waited += took;
        if self.bytes >= SLOWEST {
            *self = Self::default();
        }
        self.waited > WHILE
    }
}

impl<'a> Blob<'a> {
    /// Creates a reader; `None` if `clients` is empty.
    pub(super) fn new(clients: Vec<&'a Client<'a>>, digest: Digest, size: u64) -> Option<Self> {
        let session = clients.first()?.session;
        Some(Self {
            clients,
            digest,
            size,
            at: 0,
            body: None,
            backoff: Backoff::new(session, RESUMES),
            since: 0,
            pace: Pace::default(),
            started_at: 0,
        })
    }

    fn request(&self, client: &Client<'_>) -> Result<Box<dyn Read + Send>, Failure> {
        let response = client.get_once(Resource {
            kind: "blobs",
            name: &self.digest.to_string(),
            accept: ANYTHING,
            from: self.at,
        })?;
        let missing = || {
            let text = format!("it does not have blob {}", self.digest);
            Failure::last(Cause::new(ErrorKind::NotFound, text))
        };
        let response = response.ok_or_else(missing)?;
        let start = start_offset(&response, self.size)?;
        let announced = response.body().content_length();
        if announced.is_some_and(|len| len != self.size.saturating_sub(start)) {
            let len = announced.unwrap_or_default();
            let text = format!(
                "it announces {len} bytes of blob {} from byte {start} of {}",
                self.digest, self.size
            );
            return Err(Failure::passing(text, None));
        }
        // Some answers start earlier than requested; the known bytes are skipped.
        let Some(skip) = self.at.checked_sub(start) else {
            let text = format!("it omits a part of blob {}", self.digest);
            return Err(Failure::last(text));
        };
        let mut body = response.into_body().into_reader();
        let skipped = io::copy(&mut body.by_ref().take(skip), &mut io::sink());
        match skipped {
            Ok(skipped) if skipped == skip => Ok(Box::new(body)),
            Ok(_) => Err(broken(&io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(broken(&error)),
        }
    }

    fn read_once(&mut self, buffer: &mut [u8]) -> Result<usize, Failure> {
        let nowhere = || Failure::last("no registry is left to ask".to_owned());
        let client = *self.clients.first().ok_or_else(nowhere)?;
        let mut body = match self.body.take() {
            Some(body) => body,
            None => {
                let body = self.request(client)?;
                self.pace = Pace::default();
                self.started_at = self.at;
                body
            }
        };
        let started = Instant::now();
        let count = body.read(buffer).map_err(|error| broken(&error))?;
        if count == 0 {
            return Err(broken(&io::ErrorKind::UnexpectedEof.into()));
        }
        if self.pace.drags(count as u64, started.elapsed()) {
            let seconds = WHILE.as_secs();
            let text = format!("it sends less than {SLOWEST} bytes in {seconds} s");
            let reason = Cause::new(ErrorKind::Unreachable, text);
            return Err(Failure::Passing(reason, None));
        }
        self.body = Some(body);
        Ok(count)
    }

    /// Recovers from a failure: waits, or continues at the next location. An error means
    /// that no further attempt is possible.
    fn recover(&mut self, failure: Failure) -> io::Result<()> {
        self.body = None;
        let Some(client) = self.clients.first().copied() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        if self.at >= self.since + PROGRESS {
            self.backoff = Backoff::new(client.session, RESUMES);
            self.since = self.at;
        }
        let error = match failure {
            Failure::Final(reason) => client.error(reason),
            Failure::Passing(reason, requested) => {
                // A connection that delivered data is replaced immediately.
                let requested = requested.or((self.at > self.started_at).then_some(Duration::ZERO));
                self.started_at = self.at;
                match self
                    .backoff
                    .wait_for_retry(&client.repository().registry, requested)
                {
                    Ok(()) => return Ok(()),
                    Err(no_retry) => client.retry_error(&reason, &no_retry),
                }
            }
        };
        if self.clients.len() == 1 || client.session.cancel.is_cancelled() {
            return Err(io::Error::other(error));
        }
        self.clients.remove(0);
        self.backoff = Backoff::new(client.session, RESUMES);
        self.since = self.at;
        (client.session.message)(&format!("continuing at another location: {error}"));
        Ok(())
    }
}

fn broken(error: &io::Error) -> Failure {
    let text = format!("the connection broke: {error}");
    Failure::Passing(Cause::new(ErrorKind::Unreachable, text), None)
}

/// Returns the offset of an answer's first byte. A partial answer whose total is not
/// `size` belongs to another blob.
fn start_offset(response: &Response<Body>, size: u64) -> Result<u64, Failure> {
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return Ok(0);
    }
    let range = response.headers().get(header::CONTENT_RANGE);
    let range = range.and_then(|value| parse_range(value.to_str().ok()?));
    match range {
        Some((start, total)) if total.is_none_or(|total| total == size) => Ok(start),
        _ => {
            let text = "its answer does not state which part of the blob it contains".to_owned();
            Err(Failure::last(text))
        }
    }
}

/// Parses `bytes 5-9/10` into first byte and total length (RFC 9110 section 14.4).
pub(super) fn parse_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    (first <= last).then_some((first, total))
}

impl Read for Blob<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Bytes beyond the expected size are ignored; the digest covers the expected
        // size.
        let left = usize::try_from(self.size - self.at).unwrap_or(usize::MAX);
        let most = buffer.len().min(left);
        let Some(buffer) = buffer.get_mut(..most).filter(|buffer| !buffer.is_empty()) else {
            return Ok(0);
        };
        loop {
            match self.read_once(buffer) {
                Ok(count) => {
                    self.at += count as u64;
                    return Ok(count);
                }
                Err(failure) => self.recover(failure)?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_are_read() {
        assert_eq!(parse_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_range("bytes 5-9/*"), Some((5, None)));
        for bad in [
            "",
            "bytes",
            "bytes 5-9",
            "bytes 9-5/10",
            "bytes */10",
            "items 5-9/10",
            "bytes 5-9/x",
        ] {
            assert_eq!(parse_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn slow_connections_are_detected() {
        let mut pace = Pace::default();
        let second = Duration::from_secs(1);
        assert!(!(0..60).any(|_| pace.drags(10, second)));
        assert!(pace.drags(10, second));
        assert!(!pace.drags(SLOWEST, second));
        assert!(!pace.drags(1, second));
    }

    proptest! {
        #[test]
        fn any_range_is_parsed_without_panic(text in "(bytes )?[0-9*/ \u{e9}-]{0,40}") {
            let _ = parse_range(&text);
        }
    }
}
