//! Writing of tar headers: ustar, with pax records for values that do not fit.

use super::{BLOCK, TarHeader, TarKind};

/// Maximum value of an eleven-digit octal field (sizes and times).
const MAX_OCTAL_11: u64 = 0o77_777_777_777;
/// Maximum value of a seven-digit octal field (owners, modes, device numbers).
const MAX_OCTAL_7: u64 = 0o7_777_777;

/// The two zero blocks at the end of an archive.
pub const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// Returns the number of padding bytes after `size` bytes of data.
pub fn padding(size: u64) -> usize {
    let excess = usize::try_from(size % BLOCK as u64).unwrap_or(0);
    (BLOCK - excess) % BLOCK
}

/// Encodes the header of an entry that is not sparse, preceded by pax records.
pub fn encode(header: &TarHeader) -> Vec<u8> {
    let mut records = Vec::new();
    let mut block = [0; BLOCK];
    let mut path = header.path.clone();
    if header.kind == TarKind::Directory && !path.ends_with(b"/") {
        path.push(b'/');
    }
    put_text(&mut block, 0, &path, "path", &mut records);
    let (flag, link, device) = match &header.kind {
        TarKind::File => (b'0', None, None),
        TarKind::Hardlink(target) => (b'1', Some(target), None),
        TarKind::Symlink(target) => (b'2', Some(target), None),
        TarKind::CharDevice(major, minor) => (b'3', None, Some((major, minor))),
        TarKind::BlockDevice(major, minor) => (b'4', None, Some((major, minor))),
        TarKind::Directory => (b'5', None, None),
        TarKind::Fifo => (b'6', None, None),
    };
    if let Some(target) = link {
        put_text(&mut block, 157, target, "linkpath", &mut records);
    }
    let mut number = |at, len, value: u64, most, key: &str| {
        if value > most {
            record(&mut records, key.as_bytes(), value.to_string().as_bytes());
        } else {
            put_octal(&mut block, at, len, value);
        }
    };
    number(100, 8, u64::from(header.mode), MAX_OCTAL_7, "mode");
    number(108, 8, u64::from(header.uid), MAX_OCTAL_7, "uid");
    number(116, 8, u64::from(header.gid), MAX_OCTAL_7, "gid");
    number(124, 12, header.size, MAX_OCTAL_11, "size");
    if let Some((major, minor)) = device {
        number(329, 8, u64::from(*major), MAX_OCTAL_7, "SCHILY.devmajor");
        number(337, 8, u64::from(*minor), MAX_OCTAL_7, "SCHILY.devminor");
    }
    match (u64::try_from(header.mtime.0), header.mtime.1) {
        (Ok(seconds), 0) if seconds <= MAX_OCTAL_11 => put_octal(&mut block, 136, 12, seconds),
        _ => record(&mut records, b"mtime", time(header.mtime).as_bytes()),
    }
    for (name, value) in &header.xattrs {
        record(
            &mut records,
            &[b"SCHILY.xattr.", name.as_slice()].concat(),
            value,
        );
    }
    let mut bytes = Vec::new();
    if !records.is_empty() {
        let mut extended = [0; BLOCK];
        write_field(&mut extended, 0, b"PaxHeader");
        put_octal(&mut extended, 100, 8, 0o644);
        put_octal(&mut extended, 124, 12, records.len() as u64);
        finish(&mut extended, b'x');
        bytes.extend_from_slice(&extended);
        bytes.extend_from_slice(&records);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    }
    finish(&mut block, flag);
    bytes.extend_from_slice(&block);
    bytes
}

fn write_field(block: &mut [u8; BLOCK], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Writes an octal number. Fields of `len` bytes end with a zero.
fn put_octal(block: &mut [u8; BLOCK], at: usize, len: usize, value: u64) {
    let text = format!("{value:0width$o}", width = len - 1);
    write_field(block, at, text.as_bytes());
}

fn put_text(block: &mut [u8; BLOCK], at: usize, text: &[u8], key: &str, records: &mut Vec<u8>) {
    if text.len() <= 100 {
        write_field(block, at, text);
    } else {
        record(records, key.as_bytes(), text);
    }
}

fn finish(block: &mut [u8; BLOCK], flag: u8) {
    block[156] = flag;
    write_field(block, 257, b"ustar\x0000");
    write_field(block, 148, b"        ");
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    put_octal(block, 148, 7, sum);
    block[154] = 0;
}

/// Appends a record. Its length includes the digits of the length itself.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    records.extend_from_slice(format!("{len} ").as_bytes());
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// Formats a time as decimal seconds. Nanoseconds count forward, but the fraction of a
/// negative decimal number counts away from zero.
fn time((seconds, nanos): (i64, u32)) -> String {
    match (seconds, nanos) {
        (seconds, 0) => seconds.to_string(),
        (0.., nanos) => format!("{seconds}.{nanos:09}"),
        (seconds, nanos) => {
            let whole = (seconds + 1).unsigned_abs();
            format!("-{whole}.{:09}", 1_000_000_000 - nanos)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::TarReader;
    use super::*;

    fn kind() -> impl Strategy<Value = TarKind> {
        let target = prop::collection::vec(1u8.., 1..300);
        prop_oneof![
            Just(TarKind::File),
            Just(TarKind::Directory),
            Just(TarKind::Fifo),
            target.clone().prop_map(TarKind::Symlink),
            target.prop_map(TarKind::Hardlink),
            (0u32..1 << 12, 0u32..1 << 20).prop_map(|(a, b)| TarKind::CharDevice(a, b)),
            (0u32..1 << 12, 0u32..1 << 20).prop_map(|(a, b)| TarKind::BlockDevice(a, b)),
        ]
    }

    proptest! {
        #[test]
        fn written_entries_are_read_back(
            kind in kind(),
            path in prop::collection::vec(prop_oneof![b'a'..=b'z', 128u8..], 1..300),
            (mode, uid, gid) in (0u16..0o10000, any::<u32>(), any::<u32>()),
            mtime in (any::<i32>().prop_map(i64::from), 0u32..1_000_000_000),
            xattrs in prop::collection::btree_map("[a-z.]{1,20}", any::<Vec<u8>>(), 0..3),
        ) {
            let mut header = TarHeader {
                path, kind, mode, uid, gid, mtime,
                size: 0,
                sparse: None,
                xattrs: xattrs.into_iter().map(|(k, v)| (k.into_bytes(), v)).collect(),
            };
            let mut bytes = encode(&header);
            bytes.extend_from_slice(&END);
            let read = TarReader::new(bytes.as_slice()).next_entry().unwrap().unwrap();
            if header.kind == TarKind::Directory {
                header.path.push(b'/');
            }
            prop_assert_eq!(read, header);
        }
    }
}
