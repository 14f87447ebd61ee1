//! The request line as Firecracker parses it: the word CONNECT in any case and a port,
//! surrounded by white space.

/// Longest request line in bytes, including its newline.
pub(crate) const MAX_LINE: usize = 32;

const WORD: &[u8] = b"CONNECT";

/// Classification of a client's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestLine {
    /// Incomplete: more bytes may complete the request.
    Part,
    /// A request for `port`, in the first `len` bytes.
    Request {
        /// The vsock port.
        port: u32,
        /// Length of the line in bytes, including its newline.
        len: usize,
    },
    /// Not a prefix of any request.
    Malformed,
}

/// Classifies the first bytes of a client.
pub(crate) fn read(bytes: &[u8]) -> RequestLine {
    let bytes = bytes.get(..MAX_LINE).unwrap_or(bytes);
    match bytes.iter().position(|&byte| byte == b'\n') {
        Some(end) => match bytes.get(..end).and_then(parse) {
            Some(port) => RequestLine::Request { port, len: end + 1 },
            None => RequestLine::Malformed,
        },
        None if bytes.len() < MAX_LINE && is_prefix(bytes) => RequestLine::Part,
        None => RequestLine::Malformed,
    }
}

/// Parses the port from a line without its newline.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = words(line);
    let (word, digits) = (words.next()?, words.next()?);
    let is_last = words.next().is_none();
    if !is_last || !word.eq_ignore_ascii_case(WORD) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Returns true if the bytes are a prefix of a request line.
fn is_prefix(bytes: &[u8]) -> bool {
    let mut words = words(bytes);
    let Some(word) = words.next() else {
        return true;
    };
    let followed = bytes.iter().skip_while(|byte| byte.is_ascii_whitespace());
    let is_over = followed.count() > word.len();
    let known = WORD.get(..word.len());
    let fits = known.is_some_and(|known| known.eq_ignore_ascii_case(word));
    if !fits || is_over && word.len() < WORD.len() {
        return false;
    }
    let digits = words.next().unwrap_or_default();
    digits.iter().all(u8::is_ascii_digit) && words.next().is_none()
}

fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_that_firecracker_accepts_are_accepted() {
        for (line, port) in [
            ("CONNECT 52\n", 52),
            ("connect 52\n", 52),
            ("Connect 52\n", 52),
            ("CONNECT 52\r\n", 52),
            ("CONNECT  52\n", 52),
            (" CONNECT\t52 \n", 52),
            ("CONNECT 4294967295\n", u32::MAX),
            ("CONNECT 0\n", 0),
        ] {
            let len = line.len();
            assert_eq!(
                read(line.as_bytes()),
                RequestLine::Request { port, len },
                "{line:?}"
            );
            // Bytes after the line are ignored, and the line may arrive in pieces.
            let more = format!("{line}more\n");
            assert_eq!(
                read(more.as_bytes()),
                RequestLine::Request { port, len },
                "{line:?}"
            );
            for end in 0..len {
                assert_eq!(
                    read(&line.as_bytes()[..end]),
                    RequestLine::Part,
                    "{line:?} {end}"
                );
            }
        }
    }

    #[test]
    fn invalid_requests_are_detected_early() {
        for nonsense in [
            "\n",
            "G",
            "CONE",
            "CON 5",
            "CONNECTS",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT x",
            "CONNECT -1",
            "CONNECT +1",
            "CONNECT 4294967296\n",
            "CONNECT 5 6",
            "\0",
            "CONNECT                         5",
        ] {
            assert_eq!(
                read(nonsense.as_bytes()),
                RequestLine::Malformed,
                "{nonsense:?}"
            );
        }
    }
}
