//! Records of responses: their times to live, and parameters that are removed.

use std::ops::Range;

use super::message::{
    DNS_HEADER, DnsQuestion, MalformedMessage, TRUNCATED, TYPE_HTTPS, TYPE_OPT, TYPE_SVCB,
    read_u16, skip_name,
};

const TYPE_SOA: u16 = 6;
/// Parameter of SVCB records with the keys for an encrypted ClientHello (RFC 9849).
const ECH: u16 = 5;
/// A key of private use, the largest: clients ignore what they do not know (RFC 9460 14.3.1).
const IGNORED: u16 = 65_534;
/// Longest time that an answer is stored, in seconds, and one that there is none (RFC 2308 5).
const MAX_TTL: u32 = 24 * 3600;
const MAX_NEGATIVE: u32 = 3 * 3600;
/// Size of answers for a guest that does not say (RFC 1035 4.2.1).
const MIN_SIZE: usize = 512;

/// A record of a message.
struct Record {
    kind: u16,
    /// Position of the time to live, and that time in seconds.
    ttl_at: usize,
    ttl: u32,
    data: Range<usize>,
}

/// Calls `visit` with each record of a response.
fn records(
    message: &[u8],
    mut visit: impl FnMut(&Record) -> Result<(), MalformedMessage>,
) -> Result<(), MalformedMessage> {
    let question = DnsQuestion::parse_response(message)?;
    let counts = (0..3).map(|section| read_u16(message, 6 + 2 * section).map(u32::from));
    let count = counts.sum::<Result<u32, _>>()?;
    let mut at = question.end;
    for _ in 0..count {
        let fixed = skip_name(message, at)?;
        let (high, low) = (read_u16(message, fixed + 4)?, read_u16(message, fixed + 6)?);
        let len = usize::from(read_u16(message, fixed + 8)?);
        let data = fixed + 10..fixed + 10 + len;
        if message.len() < data.end {
            return Err(MalformedMessage::Truncated);
        }
        at = data.end;
        visit(&Record {
            kind: read_u16(message, fixed)?,
            ttl_at: fixed + 4,
            ttl: u32::from(high) << 16 | u32::from(low),
            data,
        })?;
    }
    Ok(())
}

/// Returns the time in seconds for which a response may be stored; `None` if it may not.
#[must_use]
pub fn lifetime(response: &[u8]) -> Option<u32> {
    let &[.., c, d, _, _, _, _] = response.first_chunk::<DNS_HEADER>()?;
    let code = response.get(3)? & 15;
    let negative = code == 3 || (code == 0 && [c, d] == [0, 0]);
    if is_truncated(response) || !(code == 0 || negative) {
        return None;
    }
    let (mut shortest, mut minimum) = (MAX_TTL, None);
    let read = records(response, |record| {
        if record.kind == TYPE_OPT {
            return Ok(());
        }
        shortest = shortest.min(record.ttl);
        if record.kind == TYPE_SOA
            && let Some(data) = response.get(record.data.clone())
            && let Some(last) = data.last_chunk()
        {
            minimum = Some(u32::from_be_bytes(*last).min(MAX_NEGATIVE));
        }
        Ok(())
    });
    read.ok()?;
    let lifetime = match negative {
        true => shortest.min(minimum?),
        false => shortest,
    };
    (lifetime > 0).then_some(lifetime)
}

/// Subtracts `seconds` from the times to live of a response.
pub fn age(response: &mut [u8], seconds: u32) {
    let mut times = Vec::new();
    let read = records(response, |record| {
        if record.kind != TYPE_OPT {
            times.push((record.ttl_at, record.ttl.saturating_sub(seconds)));
        }
        Ok(())
    });
    if read.is_err() {
        return;
    }
    for (at, ttl) in times {
        if let Some(place) = response
            .get_mut(at..)
            .and_then(|rest| rest.first_chunk_mut())
        {
            *place = ttl.to_be_bytes();
        }
    }
}

/// Makes clients ignore keys for an encrypted ClientHello: the name in it could not be checked.
/// The length of the response stays the same, as names refer to positions.
pub fn strip_ech(response: &mut [u8]) {
    let mut services = Vec::new();
    let read = records(response, |record| {
        if record.kind == TYPE_SVCB || record.kind == TYPE_HTTPS {
            services.push(record.data.clone());
        }
        Ok(())
    });
    if read.is_err() {
        return;
    }
    for data in services {
        if let Some(data) = response.get_mut(data) {
            // A record that is malformed is one that clients ignore.
            let _ = strip_service(data);
        }
    }
}

/// Moves the parameter behind the others, and gives it a key that clients ignore.
fn strip_service(data: &mut [u8]) -> Result<(), MalformedMessage> {
    // Priority, and the name of the target.
    let mut at = skip_name(data, 2)?;
    while at < data.len() {
        let (key, len) = (read_u16(data, at)?, usize::from(read_u16(data, at + 2)?));
        let parameter = data.get_mut(at..).ok_or(MalformedMessage::Truncated)?;
        if parameter.len() < 4 + len {
            return Err(MalformedMessage::Truncated);
        }
        if key == ECH {
            parameter.rotate_left(4 + len);
            let start = parameter.len() - 4 - len;
            let moved = parameter.get_mut(start..);
            let (head, value) = moved
                .and_then(|moved| moved.split_first_chunk_mut::<2>())
                .ok_or(MalformedMessage::Truncated)?;
            *head = IGNORED.to_be_bytes();
            if let Some(value) = value.get_mut(2..) {
                value.fill(0);
            }
            return Ok(());
        }
        at += 4 + len;
    }
    Ok(())
}

/// Returns true if parts of a response were left out.
#[must_use]
pub fn is_truncated(response: &[u8]) -> bool {
    response.get(2).is_some_and(|flags| flags & TRUNCATED != 0)
}

/// Returns the length of the longest response that the sender of a question takes in a datagram
/// (RFC 6891 6.2.3).
#[must_use]
pub fn largest_response(question: &[u8]) -> usize {
    let size = || {
        let end = DnsQuestion::parse(question).ok()?.end;
        let fixed = skip_name(question, end).ok()?;
        let is_options = read_u16(question, fixed) == Ok(TYPE_OPT);
        let size = read_u16(question, fixed + 2).ok()?;
        is_options.then_some(usize::from(size))
    };
    size().unwrap_or(MIN_SIZE).max(MIN_SIZE)
}

#[cfg(test)]
#[path = "records/tests.rs"]
mod tests;
