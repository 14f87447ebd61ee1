//! Pax records: `LENGTH KEY=VALUE\n` (POSIX pax, "pax Extended Header").

use super::sparse::PaxSparse;
use super::{TarError, check_device, invalid};

/// Values of extended headers for the following entry.
#[derive(Clone, Default)]
pub(super) struct Extended {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: PaxSparse,
}

impl Extended {
    pub(super) fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        let text = || {
            std::str::from_utf8(value).map_err(|_| invalid("a number in a pax header is malformed"))
        };
        let parse = |text: &str| {
            text.parse::<u64>()
                .map_err(|_| invalid("a number in a pax header is malformed"))
        };
        let id = |text: &str| {
            u32::try_from(parse(text)?)
                .map_err(|_| invalid("a number in a pax header is out of range"))
        };
        match key {
            // An empty value restores the header's own value.
            b"path" => self.path = (!value.is_empty()).then(|| value.to_vec()),
            b"linkpath" => self.link = (!value.is_empty()).then(|| value.to_vec()),
            // These records are written if the number does not fit the header. All
            // numbers that Linux supports fit.
            b"SCHILY.devmajor" => check_device(id(text()?)?, 0)?,
            b"SCHILY.devminor" => check_device(0, id(text()?)?)?,
            b"size" | b"uid" | b"gid" | b"mtime" if value.is_empty() => {}
            b"size" => self.size = Some(parse(text()?)?),
            b"uid" => self.uid = Some(id(text()?)?),
            b"gid" => self.gid = Some(id(text()?)?),
            b"mtime" => {
                let time = pax_time(text()?)
                    .ok_or_else(|| invalid("a time in a pax header is malformed"))?;
                self.mtime = Some(time);
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.apply(key, value)?;
                }
            }
        }
        Ok(())
    }
}

pub(super) fn pax_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let len: usize = std::str::from_utf8(bytes.get(..space)?)
        .ok()?
        .parse()
        .ok()?;
    let record = bytes.get(space + 1..len)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((
        record.get(..equals)?,
        record.get(equals + 1..)?,
        bytes.get(len..)?,
    ))
}

/// Parses `SECONDS[.FRACTION]`, possibly negative, into whole seconds and non-negative
/// nanoseconds.
pub(super) fn pax_time(text: &str) -> Option<(i64, u32)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let negative = whole.starts_with('-');
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanos: u32 = digits.parse().ok()?;
    Some(match (negative, nanos) {
        (true, 1..) => (seconds.checked_sub(1)?, 1_000_000_000 - nanos),
        _ => (seconds, nanos),
    })
}

/// Sorts by name. The last of several records for one name is kept.
pub(super) fn by_name(mut xattrs: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<(Vec<u8>, Vec<u8>)> {
    xattrs.reverse();
    xattrs.sort_by(|a, b| a.0.cmp(&b.0));
    xattrs.dedup_by(|later, earlier| later.0 == earlier.0);
    xattrs
}
