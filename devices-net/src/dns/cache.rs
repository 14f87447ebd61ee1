//! Responses that are stored.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::message::{DNS_HEADER, DnsQuestion};
use super::records::{age, lifetime};

/// Longest response that is stored, in bytes.
const MAX_RESPONSE: usize = 4096;

/// A question without its number, and with its name in lower case.
type CacheKey = Arc<[u8]>;

struct CacheEntry {
    response: Box<[u8]>,
    stored: Instant,
    end: Instant,
    number: u64,
}

/// Responses for questions, as long as they are valid; bounded in number and bytes: the one that
/// ends first is dropped for others. Answers that there is nothing are stored, too (RFC 2308).
pub struct DnsCache {
    entries: HashMap<CacheKey, CacheEntry>,
    ends: BTreeMap<(Instant, u64), CacheKey>,
    next: u64,
    bytes: usize,
    max_entries: usize,
    max_bytes: usize,
}

impl DnsCache {
    /// Creates a cache of at most this number of responses, and of bytes of questions and
    /// responses together.
    #[must_use]
    pub fn new(max_entries: usize, max_bytes: usize) -> Self {
        Self {
            entries: HashMap::new(),
            ends: BTreeMap::new(),
            next: 0,
            bytes: 0,
            max_entries,
            max_bytes,
        }
    }

    /// Returns the number of responses.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns true if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Removes all responses.
    pub fn clear(&mut self) {
        *self = Self::new(self.max_entries, self.max_bytes);
    }

    /// Stores the response to a question, if it may be stored.
    pub fn insert(&mut self, question: &[u8], response: &[u8], now: Instant) {
        let Some(key) = cache_key(question) else {
            return;
        };
        // A later answer counts, also if it may not be stored.
        self.remove(&key);
        let ttl = lifetime(response).map(|ttl| Duration::from_secs(ttl.into()));
        let Some(end) = ttl.and_then(|ttl| now.checked_add(ttl)) else {
            return;
        };
        let size = size(&key, response);
        if response.len() > MAX_RESPONSE || size > self.max_bytes || self.max_entries == 0 {
            return;
        }
        while self.entries.len() >= self.max_entries || self.bytes + size > self.max_bytes {
            let Some((_, first)) = self.ends.first_key_value() else {
                break;
            };
            let first = Arc::clone(first);
            self.remove(&first);
        }
        let number = self.next;
        self.next += 1;
        self.bytes += size;
        self.ends.insert((end, number), Arc::clone(&key));
        let entry = CacheEntry {
            response: response.into(),
            stored: now,
            end,
            number,
        };
        self.entries.insert(key, entry);
    }

    fn remove(&mut self, key: &CacheKey) {
        if let Some(entry) = self.entries.remove(key) {
            self.ends.remove(&(entry.end, entry.number));
            self.bytes -= size(key, &entry.response);
        }
    }

    /// Writes the response to a question into `response`, with the number and the spelling of the
    /// question and the times to live that are left; returns false if there is none.
    #[must_use]
    pub fn get(&mut self, question: &[u8], now: Instant, response: &mut Vec<u8>) -> bool {
        let Some(key) = cache_key(question) else {
            return false;
        };
        let Some(entry) = self.entries.get(&key) else {
            return false;
        };
        if entry.end <= now {
            self.remove(&key);
            return false;
        }
        response.clear();
        response.extend_from_slice(&entry.response);
        let since = now.saturating_duration_since(entry.stored).as_secs();
        age(response, u32::try_from(since).unwrap_or(u32::MAX));
        let end = DnsQuestion::parse(question).map_or(0, |it| it.end);
        for range in [0..2, DNS_HEADER..end] {
            if let (Some(to), Some(from)) = (response.get_mut(range.clone()), question.get(range)) {
                to.copy_from_slice(from);
            }
        }
        true
    }
}

impl std::fmt::Debug for DnsCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DnsCache")
            .field("entries", &self.entries.len())
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

fn size(key: &[u8], response: &[u8]) -> usize {
    key.len() + response.len()
}

/// Returns the key of a question: flags and options are a part of it, as answers depend on them.
fn cache_key(question: &[u8]) -> Option<CacheKey> {
    let end = DnsQuestion::parse(question).ok()?.end;
    let mut key = question.get(2..)?.to_vec();
    // Lengths of labels are less than letters.
    key.get_mut(DNS_HEADER - 2..end - 2)?.make_ascii_lowercase();
    Some(key.into())
}

#[cfg(test)]
#[path = "cache/tests.rs"]
mod tests;
