//! Parsing of numbers in headers.

use super::{BLOCK, TarError, field, invalid, until_nul};

/// Offset and length of numbers that each header has: mode, owner, group, size, time.
const FIELDS: [(usize, usize); 5] = [(100, 8), (108, 8), (116, 8), (124, 12), (136, 12)];
/// Device numbers, which headers before POSIX do not have.
const DEVICES: [(usize, usize); 2] = [(329, 8), (337, 8)];

pub(super) fn small(bytes: &[u8]) -> Result<u32, TarError> {
    u32::try_from(number(bytes)?).map_err(|_| invalid("a number is out of range"))
}

/// As [`number`], with negative numbers in base 256 as two's complement.
pub(super) fn signed(bytes: &[u8]) -> Result<i64, TarError> {
    match bytes {
        // The second bit is the sign.
        [first, ..] if first & 0xc0 == 0xc0 => {
            let (fill, low) = bytes.split_at(bytes.len().saturating_sub(8));
            let low = low.try_into().map_err(|_| malformed())?;
            let value = i64::from_be_bytes(low);
            let fits = fill.iter().all(|byte| *byte == 0xff) && value < 0;
            fits.then_some(value).ok_or_else(malformed)
        }
        _ => i64::try_from(number(bytes)?).map_err(|_| malformed()),
    }
}

/// Parses octal digits, or base 256 if the first bit is set (GNU). Negative numbers are
/// refused.
pub(super) fn number(bytes: &[u8]) -> Result<u64, TarError> {
    match bytes.first() {
        Some(first) if first & 0xc0 == 0xc0 => Err(invalid("a number in a header is negative")),
        Some(first) if first & 0x80 != 0 => {
            let mut value = u64::from(first & 0x7f);
            for byte in bytes.iter().skip(1) {
                value = value.checked_mul(256).ok_or_else(malformed)? | u64::from(*byte);
            }
            Ok(value)
        }
        _ => octal(bytes),
    }
}

/// Parses octal digits, which fillers may precede and white space may follow. Nothing is
/// allocated: a header has up to seven numbers.
fn octal(bytes: &[u8]) -> Result<u64, TarError> {
    let begin = bytes.iter().position(|byte| !matches!(byte, b' ' | 0));
    let text = bytes.get(begin.unwrap_or(bytes.len())..);
    // The text ends at the first zero byte, like a C string.
    let text = until_nul(text.unwrap_or_default());
    let mut value = 0u64;
    for (at, byte) in text.iter().enumerate() {
        if !matches!(byte, b'0'..=b'7') {
            let rest = text.get(at..).unwrap_or_default();
            return match rest.trim_ascii_end() {
                b"" => Ok(value),
                _ => Err(malformed()),
            };
        }
        let shifted = value.checked_mul(8).ok_or_else(malformed)?;
        value = shifted | u64::from(byte - b'0');
    }
    Ok(value)
}

fn malformed() -> TarError {
    invalid("a number in a header is malformed: it is not a tar archive")
}

/// Checks that all numbers in a header are valid, including unused ones, as Go's reader
/// does. An invalid number indicates damage, or a block that is not a header.
pub(super) fn check(block: &[u8; BLOCK]) -> Result<(), TarError> {
    let has_devices = matches!(
        field(block, 257, 8),
        [b'u', b's', b't', b'a', b'r', 0, ..] | b"ustar  \0"
    );
    let devices: &[_] = if has_devices { &DEVICES } else { &[] };
    for &(start, len) in FIELDS.iter().chain(devices) {
        signed(field(block, start, len))?;
    }
    Ok(())
}
