//! Questions, the addresses in answers, and refusals.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use thiserror::Error;

/// Length of a message's header in bytes.
pub const DNS_HEADER: usize = 12;
/// Longest name in bytes, in text.
const MAX_NAME: usize = 253;
/// Maximum number of aliases that a name is followed through.
const MAX_ALIASES: usize = 16;
/// Maximum number of references in a name: more than a name has labels.
const MAX_REFERENCES: usize = 128;

const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_AAAA: u16 = 28;
pub(super) const TYPE_OPT: u16 = 41;
pub(super) const TYPE_SVCB: u16 = 64;
pub(super) const TYPE_HTTPS: u16 = 65;
const CLASS_IN: u16 = 1;
/// The option for the reason of an error (RFC 8914 2).
const EXTENDED_ERROR: u8 = 15;
/// Parameters of SVCB records with addresses (RFC 9460 14.3.2).
const IPV4_HINT: u16 = 4;
const IPV6_HINT: u16 = 6;

/// Flags in the third and fourth byte of a message.
const RESPONSE: u8 = 0x80;
const OPCODE: u8 = 0x78;
pub(super) const TRUNCATED: u8 = 0x02;
const RECURSION_DESIRED: u8 = 0x01;
const RECURSION_AVAILABLE: u8 = 0x80;
const CODE: u8 = 0x0f;

/// Reason why a message was not understood.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MalformedMessage {
    /// The message ends within a part of it.
    #[error("the message is truncated")]
    Truncated,
    /// It is a response where a question is expected, or the other way round.
    #[error("the message is not of the expected kind")]
    Kind,
    /// It has no question, or several.
    #[error("the message has not exactly one question")]
    Questions,
    /// A name is too long, or refers to one that is not before it.
    #[error("a name in the message is malformed")]
    Name,
}

/// The code of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResponseCode {
    /// The question is malformed.
    FormatError,
    /// The servers do not answer.
    ServerFailure,
    /// There is no such name.
    NoSuchName,
    /// There is no such name for the guest.
    Prohibited(ExtendedError),
    /// The response is too long for a datagram.
    TooLong,
    /// The kind of question is not supported.
    NotImplemented,
}

/// The reason of a refusal (RFC 8914).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExtendedError {
    /// A rule denies it.
    Blocked,
    /// No rule allows it.
    Filtered,
}

impl ExtendedError {
    fn number(self) -> u8 {
        match self {
            Self::Blocked => 15,
            Self::Filtered => 17,
        }
    }
}

impl ResponseCode {
    fn number(self) -> u8 {
        match self {
            Self::FormatError => 1,
            Self::ServerFailure => 2,
            Self::NoSuchName | Self::Prohibited(_) => 3,
            Self::TooLong => 0,
            Self::NotImplemented => 4,
        }
    }
}

/// The question of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DnsQuestion {
    /// Number of the message.
    pub id: u16,
    /// The name in lower case, without a dot at the end. Bytes that are not those of host names
    /// are replaced, so that the text is not the name of another host.
    pub name: String,
    /// The type of the records in question.
    pub kind: u16,
    /// The end of the question in the message.
    pub end: usize,
    is_standard: bool,
}

impl DnsQuestion {
    /// Parses the question of a guest.
    ///
    /// # Errors
    /// The message is malformed, or not a question.
    pub fn parse(message: &[u8]) -> Result<Self, MalformedMessage> {
        Self::parse_kind(message, false)
    }

    /// Parses the question that a response answers.
    ///
    /// # Errors
    /// The message is malformed, or not a response.
    pub fn parse_response(message: &[u8]) -> Result<Self, MalformedMessage> {
        Self::parse_kind(message, true)
    }

    fn parse_kind(message: &[u8], response: bool) -> Result<Self, MalformedMessage> {
        let header = message.first_chunk::<DNS_HEADER>();
        let &[a, b, flags, _, c, d, ..] = header.ok_or(MalformedMessage::Truncated)?;
        if (flags & RESPONSE != 0) != response {
            return Err(MalformedMessage::Kind);
        }
        if [c, d] != [0, 1] {
            return Err(MalformedMessage::Questions);
        }
        let (name, after) = read_name(message, DNS_HEADER)?;
        let kind = read_u16(message, after)?;
        read_u16(message, after + 2)?;
        Ok(Self {
            id: u16::from_be_bytes([a, b]),
            name,
            kind,
            end: after + 4,
            is_standard: flags & OPCODE == 0,
        })
    }

    /// Returns true for a standard query.
    #[must_use]
    pub fn is_standard(&self) -> bool {
        self.is_standard
    }
}

/// Returns true if `response` answers `question`, byte for byte: its number, name and type.
#[must_use]
pub fn answers(question: &[u8], response: &[u8]) -> bool {
    let (Ok(asked), Ok(answered)) = (
        DnsQuestion::parse(question),
        DnsQuestion::parse_response(response),
    ) else {
        return false;
    };
    let same = |end| question.get(DNS_HEADER..end) == response.get(DNS_HEADER..end);
    asked.id == answered.id && asked.end == answered.end && same(asked.end)
}

/// An address in a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DnsAddress {
    /// The address.
    pub address: IpAddr,
    /// Time for which it is valid, in seconds.
    pub ttl: u32,
    /// It is of the name in question, or of one that an earlier record of the response says to
    /// be an alias or a server of that. Others are of mail servers, for example.
    pub of_name: bool,
}

/// Calls `found` with each address in the answers and additional records of a response, hints
/// of services included; returns its code.
///
/// # Errors
/// The response is malformed.
pub fn addresses(
    response: &[u8],
    mut found: impl FnMut(DnsAddress),
) -> Result<u8, MalformedMessage> {
    let question = DnsQuestion::parse_response(response)?;
    let mut at = question.end;
    let mut names = vec![question.name];
    let records = (0..3).map(|section| read_u16(response, 6 + 2 * section).map(u32::from));
    let records = records.sum::<Result<u32, _>>()?;
    for _ in 0..records {
        at = read_record(response, at, &mut names, &mut found)?;
    }
    let code = response
        .get(3)
        .copied()
        .ok_or(MalformedMessage::Truncated)?;
    Ok(code & CODE)
}

/// Reads a record; returns its end. `names` are those that stand for the name in question.
fn read_record(
    message: &[u8],
    at: usize,
    names: &mut Vec<String>,
    found: &mut impl FnMut(DnsAddress),
) -> Result<usize, MalformedMessage> {
    let owner = at;
    let at = skip_name(message, at)?;
    let (kind, class) = (read_u16(message, at)?, read_u16(message, at + 2)?);
    let ttl = u32::from(read_u16(message, at + 4)?) << 16 | u32::from(read_u16(message, at + 6)?);
    let len = usize::from(read_u16(message, at + 8)?);
    let start = at + 10;
    let data = message.get(start..start + len);
    let data = data.ok_or(MalformedMessage::Truncated)?;
    let has_address = matches!(
        kind,
        TYPE_A | TYPE_AAAA | TYPE_CNAME | TYPE_SVCB | TYPE_HTTPS
    );
    if class == CLASS_IN && has_address {
        let (owner, _) = read_name(message, owner)?;
        let of_name = names.contains(&owner);
        let mut found = |address| {
            found(DnsAddress {
                address,
                ttl,
                of_name,
            });
        };
        let mut target = None;
        match kind {
            TYPE_A => ipv4(data, &mut found),
            TYPE_AAAA => ipv6(data, &mut found),
            TYPE_CNAME => target = Some(start),
            // Behind the priority.
            _ => {
                hints(data, &mut found)?;
                target = Some(start + 2);
            }
        }
        if let Some(target) = target.filter(|_| of_name && names.len() <= MAX_ALIASES) {
            let (name, end) = read_name(message, target)?;
            if end > start + len {
                return Err(MalformedMessage::Name);
            }
            // An empty one is the owner itself (RFC 9460 2.5.2).
            names.extend(Some(name).filter(|name| !name.is_empty()));
        }
    }
    Ok(start + len)
}

fn ipv4(data: &[u8], found: &mut impl FnMut(IpAddr)) {
    let addresses = data.as_chunks::<4>().0;
    addresses
        .iter()
        .for_each(|it| found(Ipv4Addr::from(*it).into()));
}

fn ipv6(data: &[u8], found: &mut impl FnMut(IpAddr)) {
    let addresses = data.as_chunks::<16>().0;
    addresses
        .iter()
        .for_each(|it| found(Ipv6Addr::from(*it).into()));
}

/// Reads the hints of a service binding (RFC 9460 2.2).
fn hints(data: &[u8], found: &mut impl FnMut(IpAddr)) -> Result<(), MalformedMessage> {
    // Priority, and the name of the target, which is not compressed.
    let mut at = skip_name(data, 2)?;
    while at < data.len() {
        let (key, len) = (read_u16(data, at)?, usize::from(read_u16(data, at + 2)?));
        let value = data.get(at + 4..at + 4 + len);
        let value = value.ok_or(MalformedMessage::Truncated)?;
        match key {
            IPV4_HINT => ipv4(value, found),
            IPV6_HINT => ipv6(value, found),
            _ => {}
        }
        at += 4 + len;
    }
    Ok(())
}

/// Writes the response to `question` that refuses it, into `response`.
pub fn refusal(question: &[u8], code: ResponseCode, response: &mut Vec<u8>) {
    response.clear();
    let (end, count) = match DnsQuestion::parse(question) {
        Ok(parsed) => (parsed.end, 1),
        Err(_) => (DNS_HEADER, 0),
    };
    let Some(copied) = question.get(..end) else {
        return;
    };
    response.extend_from_slice(copied);
    let Some(header) = response.first_chunk_mut::<DNS_HEADER>() else {
        return;
    };
    header[2] = RESPONSE | header[2] & (OPCODE | RECURSION_DESIRED);
    if code == ResponseCode::TooLong {
        header[2] |= TRUNCATED;
    }
    header[3] = RECURSION_AVAILABLE | code.number();
    header[4..].copy_from_slice(&[0, count, 0, 0, 0, 0, 0, 0]);
    if has_options(question, end) {
        header[11] = 1;
        // An empty name, the type, and 1232 bytes (RFC 9715).
        let [high, low] = TYPE_OPT.to_be_bytes();
        response.extend_from_slice(&[0, high, low, 4, 208, 0, 0, 0, 0]);
        match code {
            ResponseCode::Prohibited(error) => {
                response.extend_from_slice(&[0, 6, 0, EXTENDED_ERROR, 0, 2, 0, error.number()]);
            }
            _ => response.extend_from_slice(&[0, 0]),
        }
    }
}

/// Returns true if a question has the options of RFC 6891.
fn has_options(question: &[u8], end: usize) -> bool {
    let is_options = || {
        let at = skip_name(question, end)?;
        read_u16(question, at).map(|kind| kind == TYPE_OPT)
    };
    question.get(10..12) == Some(&[0, 1]) && is_options() == Ok(true)
}

pub(super) fn read_u16(bytes: &[u8], at: usize) -> Result<u16, MalformedMessage> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map(|word| u16::from_be_bytes(*word))
        .ok_or(MalformedMessage::Truncated)
}

/// Returns the position after a name.
pub(super) fn skip_name(message: &[u8], at: usize) -> Result<usize, MalformedMessage> {
    let mut at = at;
    loop {
        let len = *message.get(at).ok_or(MalformedMessage::Truncated)?;
        match len {
            0 => return Ok(at + 1),
            1..=63 => at += 1 + usize::from(len),
            0xc0.. => return Ok(at + 2),
            _ => return Err(MalformedMessage::Name),
        }
    }
}

/// Returns a name as text, and the position after it.
fn read_name(message: &[u8], start: usize) -> Result<(String, usize), MalformedMessage> {
    let mut name = String::new();
    let mut at = start;
    for _ in 0..MAX_REFERENCES {
        let len = *message.get(at).ok_or(MalformedMessage::Truncated)?;
        match len {
            0 => return Ok((name, skip_name(message, start)?)),
            1..=63 => {
                let label = message.get(at + 1..at + 1 + usize::from(len));
                let label = label.ok_or(MalformedMessage::Truncated)?;
                if !name.is_empty() {
                    name.push('.');
                }
                name.extend(label.iter().map(|byte| text(*byte)));
                if name.len() > MAX_NAME {
                    return Err(MalformedMessage::Name);
                }
                at += 1 + usize::from(len);
            }
            // A reference: the lower 14 bits are the position of an earlier name (RFC 1035,
            // section 4.1.4). So a question has none: it is the first name.
            0xc0.. => {
                let earlier = usize::from(read_u16(message, at)? & 0x3fff);
                if !(DNS_HEADER..at).contains(&earlier) {
                    return Err(MalformedMessage::Name);
                }
                at = earlier;
            }
            _ => return Err(MalformedMessage::Name),
        }
    }
    Err(MalformedMessage::Name)
}

/// A character that stands for a byte of a name.
fn text(byte: u8) -> char {
    match byte.to_ascii_lowercase() {
        byte @ (b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_') => char::from(byte),
        // No host has such a name.
        _ => '?',
    }
}

#[cfg(test)]
mod tests;
