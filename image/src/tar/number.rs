//! Parsing of numbers in headers.

use super::{BLOCK, TarError, field, invalid, until_nul};

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
        _ => {
            let is_filler = |byte: &u8| matches!(byte, b' ' | 0);
            let begin = bytes.iter().position(|byte| !is_filler(byte));
            let digits = bytes.get(begin.unwrap_or(bytes.len())..);
            // The text ends at the first zero byte, like a C string.
            let digits = until_nul(digits.unwrap_or_default());
            let digits = digits.trim_ascii_end();
            if !digits.iter().all(|byte| matches!(byte, b'0'..=b'7')) {
                return Err(malformed());
            }
            digits.iter().try_fold(0u64, |value, digit| {
                let value = value.checked_mul(8).ok_or_else(malformed)?;
                Ok(value | u64::from(digit - b'0'))
            })
        }
    }
}

fn malformed() -> TarError {
    invalid("a number in a header is malformed: it is not a tar archive")
}

/// Checks that all numbers in a header are valid, including unused ones, as Go's reader
/// does. An invalid number indicates damage, or a block that is not a header.
pub(super) fn check(block: &[u8; BLOCK]) -> Result<(), TarError> {
    // Mode, owner, group, size, time.
    let mut fields = vec![(100, 8), (108, 8), (116, 8), (124, 12), (136, 12)];
    // Headers before POSIX have no device numbers.
    if matches!(
        field(block, 257, 8),
        [b'u', b's', b't', b'a', b'r', 0, ..] | b"ustar  \0"
    ) {
        fields.extend([(329, 8), (337, 8)]);
    }
    for (start, len) in fields {
        signed(field(block, start, len))?;
    }
    Ok(())
}
