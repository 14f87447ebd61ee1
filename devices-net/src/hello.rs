//! The name in a TLS ClientHello (RFC 8446 4.1.2, RFC 6066 3).
//!
//! The parser gets the first bytes of a connection, copied out of the guest's memory. It looks
//! at nothing but lengths and the extension with the name: the peer checks the rest.
//!
//! A ClientHello may have an encrypted one inside, with another name (RFC 9849). That is not
//! readable, and browsers send a random one in any case: it is allowed by the outer name. A guest
//! that got the peer's keys otherwise than from name servers, whose answers lose them, can reach
//! another name of a peer that has several.
//!
//! Architecture invariants: no bytes make it panic, allocate more than [`MAX_HELLO`] bytes and
//! a name, or loop more often than there are bytes; what is ambiguous is malformed, so that a
//! peer cannot read another name than this.

/// Number of bytes of a connection in which a ClientHello must end.
pub const MAX_HELLO: usize = 16 << 10;

const RECORD_HANDSHAKE: u8 = 22;
const HANDSHAKE_CLIENT_HELLO: u8 = 1;
const EXTENSION_SERVER_NAME: u16 = 0;
const NAME_HOST: u8 = 0;
/// Length of a record's header: type, version and length.
const RECORD_HEADER: usize = 5;
/// Longest name in bytes (RFC 1035 2.3.4).
const MAX_NAME: usize = 253;

/// The first bytes of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientHello {
    /// More bytes are needed.
    Incomplete,
    /// It is complete, and has this name, in lower case and without a dot at the end.
    Named(String),
    /// It is complete, and has no name.
    Unnamed,
    /// They are no ClientHello, a malformed one, or one that is too long.
    Other,
}

/// The bytes end before the value does, or contradict each other.
enum Stop {
    More,
    Malformed,
}

/// Reads the ClientHello at the beginning of a connection.
#[must_use]
pub fn read_client_hello(bytes: &[u8]) -> ClientHello {
    let is_whole = bytes.len() >= MAX_HELLO;
    let bytes = bytes.get(..MAX_HELLO).unwrap_or(bytes);
    match parse(bytes) {
        Ok(Some(name)) => ClientHello::Named(name),
        Ok(None) => ClientHello::Unnamed,
        Err(Stop::More) if !is_whole => ClientHello::Incomplete,
        Err(_) => ClientHello::Other,
    }
}

fn parse(bytes: &[u8]) -> Result<Option<String>, Stop> {
    let hello = handshake(bytes)?;
    // The message is complete: a value that ends beyond it is malformed.
    client_hello(&hello).ok_or(Stop::Malformed)
}

/// Returns the content of the first handshake message, which may be in several records.
fn handshake(bytes: &[u8]) -> Result<Vec<u8>, Stop> {
    let mut message: Vec<u8> = Vec::new();
    let mut rest = bytes;
    loop {
        let (record, after) = record(rest)?;
        message.extend_from_slice(record);
        rest = after;
        if let Some(&kind) = message.first()
            && kind != HANDSHAKE_CLIENT_HELLO
        {
            return Err(Stop::Malformed);
        }
        let Some(&[_, a, b, c]) = message.first_chunk() else {
            continue;
        };
        let len = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        if len > MAX_HELLO {
            return Err(Stop::Malformed);
        }
        if let Some(content) = message.get(4..4 + len) {
            return Ok(content.to_vec());
        }
    }
}

/// Returns the content of a record, or as much of it as there is, and what follows.
fn record(bytes: &[u8]) -> Result<(&[u8], &[u8]), Stop> {
    let header = bytes.get(..RECORD_HEADER.min(bytes.len()));
    let header = header.unwrap_or_default();
    // A wrong beginning is known before the header is complete.
    if header.first().is_some_and(|kind| *kind != RECORD_HANDSHAKE)
        || header.get(1).is_some_and(|major| *major != 3)
    {
        return Err(Stop::Malformed);
    }
    let &[_, _, _, high, low] = header else {
        return Err(Stop::More);
    };
    let len = usize::from(u16::from_be_bytes([high, low]));
    // An empty record of a handshake is prohibited (RFC 8446 5.1).
    if len == 0 || len > MAX_HELLO {
        return Err(Stop::Malformed);
    }
    let rest = bytes.get(RECORD_HEADER..).unwrap_or_default();
    rest.split_at_checked(len).ok_or(Stop::More)
}

/// Parses a ClientHello; `None` if it is malformed.
fn client_hello(bytes: &[u8]) -> Option<Option<String>> {
    // Version and random bytes.
    let mut rest = bytes.get(34..)?;
    let session = take_u8(&mut rest)?;
    let ciphers = take_u16(&mut rest)?;
    let compressions = take_u8(&mut rest)?;
    if session.len() > 32 || ciphers.len() < 2 || compressions.is_empty() {
        return None;
    }
    if rest.is_empty() {
        return Some(None);
    }
    let mut extensions = take_u16(&mut rest)?;
    if !rest.is_empty() {
        return None;
    }
    let mut name = None;
    while !extensions.is_empty() {
        let (kind, after) = extensions.split_first_chunk()?;
        extensions = after;
        let data = take_u16(&mut extensions)?;
        if u16::from_be_bytes(*kind) == EXTENSION_SERVER_NAME {
            // A second one could be the one that the peer reads.
            if name.replace(server_name(data)?).is_some() {
                return None;
            }
        }
    }
    Some(name)
}

/// Parses the list of names, which has one host.
fn server_name(mut data: &[u8]) -> Option<String> {
    let mut list = take_u16(&mut data)?;
    let (&kind, after) = list.split_first()?;
    list = after;
    let name = take_u16(&mut list)?;
    if kind != NAME_HOST || !list.is_empty() || !data.is_empty() {
        return None;
    }
    let name = name.strip_suffix(b".").unwrap_or(name);
    let is_valid = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > MAX_NAME || !name.iter().all(is_valid) {
        return None;
    }
    let name = str::from_utf8(name).ok()?;
    Some(name.to_ascii_lowercase())
}

/// Takes a vector whose length is in one byte.
fn take_u8<'b>(bytes: &mut &'b [u8]) -> Option<&'b [u8]> {
    let (&len, rest) = bytes.split_first()?;
    let (value, rest) = rest.split_at_checked(len.into())?;
    *bytes = rest;
    Some(value)
}

/// Takes a vector whose length is in two bytes.
fn take_u16<'b>(bytes: &mut &'b [u8]) -> Option<&'b [u8]> {
    let (len, rest) = bytes.split_first_chunk()?;
    let (value, rest) = rest.split_at_checked(u16::from_be_bytes(*len).into())?;
    *bytes = rest;
    Some(value)
}

#[cfg(test)]
#[path = "hello/tests.rs"]
mod tests;
