use proptest::prelude::*;

use super::*;

type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// Generates a path, a number for the kind, a link, and attributes.
fn parts() -> impl Strategy<Value = (Vec<u8>, u8, Vec<u8>, Pairs)> {
    let name = "[a-z\u{80}-\u{ff}]{1,20}";
    let path = prop::collection::vec(name, 0..6);
    let bytes = || prop::collection::vec(any::<u8>(), 0..80);
    let xattrs = prop::collection::vec((bytes(), bytes()), 0..4);
    (
        path.prop_map(|parts| parts.join("/").into_bytes()),
        0..10u8,
        bytes(),
        xattrs,
    )
}

fn kind_of(number: u8, link: &[u8]) -> EntryKind<'_> {
    match number {
        0 => EntryKind::File {
            location: ContentLocation::Blob(4096),
            size: 4000,
        },
        1 => EntryKind::File {
            location: ContentLocation::Small(17),
            size: 100,
        },
        2 => EntryKind::Directory,
        3 => EntryKind::Symlink(link),
        4 => EntryKind::Hardlink(link),
        5 => EntryKind::CharDevice(1, u32::MAX),
        6 => EntryKind::BlockDevice(259, 70_000),
        7 => EntryKind::Fifo,
        8 => EntryKind::Whiteout,
        _ => EntryKind::Opaque,
    }
}

const TOTALS: Totals = Totals {
    entries: 0,
    blob_len: 8192,
    small_len: 117,
    tar_len: 7,
};

fn written(entries: &[(Vec<u8>, u8, Vec<u8>, Pairs)], meta: Meta) -> File {
    let file = tempfile::tempfile().unwrap();
    let mut writer = IndexWriter::new(&file).unwrap();
    for (path, kind, link, xattrs) in entries {
        let xattrs = encode_xattrs(xattrs).unwrap();
        let entry = Entry {
            path,
            kind: kind_of(*kind, link),
            meta,
            xattrs: Xattrs::encoded(&xattrs),
        };
        writer.push(&entry).unwrap();
    }
    writer.finish(TOTALS).unwrap();
    file
}

/// Reads all entries twice and returns their number.
fn read_all(file: &File) -> io::Result<Option<usize>> {
    let Some(mut reader) = IndexReader::open(file.try_clone()?)? else {
        return Ok(None);
    };
    let mut count = 0;
    while let Some(entry) = reader.next()? {
        count += 1;
        entry.xattrs.iter().for_each(drop);
    }
    reader.rewind()?;
    while reader.next()?.is_some() {}
    Ok(Some(count))
}

#[test]
fn invalid_file_locations_are_corruption() {
    for (location, size, sound) in [
        (ContentLocation::Small(1), SMALL, true),
        (ContentLocation::Small(1), SMALL + 1, false),
        (ContentLocation::Small(0), u64::from(u32::MAX), false),
        (ContentLocation::Small(u64::MAX), 2, false),
        (ContentLocation::Blob(BLOCK), 1 << 40, true),
        (ContentLocation::Blob(BLOCK + 1), 1, false),
        (ContentLocation::Blob(1 << 41), 0, true),
        (ContentLocation::Blob(1 << 41), 1, false),
    ] {
        let file = tempfile::tempfile().unwrap();
        let mut writer = IndexWriter::new(&file).unwrap();
        let entry = Entry {
            path: b"file",
            kind: EntryKind::File { location, size },
            meta: Meta::default(),
            xattrs: Xattrs::default(),
        };
        writer.push(&entry).unwrap();
        let totals = Totals {
            entries: 1,
            blob_len: 1 << 41,
            small_len: 1 << 41,
            tar_len: 0,
        };
        writer.finish(totals).unwrap();
        assert_eq!(read_all(&file).is_ok(), sound, "{location:?} {size}");
    }
}

proptest! {
    #[test]
    fn written_entries_are_read_back(
        entries in prop::collection::vec(parts(), 0..20),
        (mode, uid, gid) in (0u16..0o10000, any::<u32>(), any::<u32>()),
        mtime in (any::<i64>(), 0u32..1_000_000_000),
    ) {
        let meta = Meta { mode, uid, gid, mtime };
        let file = written(&entries, meta);
        let mut reader = IndexReader::open(file).unwrap().unwrap();
        let totals = Totals { entries: entries.len() as u64, ..TOTALS };
        prop_assert_eq!(reader.totals(), totals);
        for (path, kind, link, xattrs) in &entries {
            let entry = reader.next().unwrap().unwrap();
            prop_assert_eq!(entry.path, path.as_slice());
            prop_assert_eq!(entry.kind, kind_of(*kind, link));
            prop_assert_eq!(entry.meta, meta);
            let read: Pairs =
                entry.xattrs.iter().map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
            prop_assert_eq!(&read, xattrs);
        }
        prop_assert!(reader.next().unwrap().is_none());
    }

    #[test]
    fn damage_is_an_error_or_another_index(
        entries in prop::collection::vec(parts(), 1..8),
        at in any::<prop::sample::Index>(),
        bit in 0..8u32,
        cut in any::<bool>(),
    ) {
        let file = written(&entries, Meta::default());
        let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
        let at = at.index(len);
        if cut {
            file.set_len(at as u64).unwrap();
            prop_assert_eq!(read_all(&file).unwrap(), None);
        } else {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at as u64).unwrap();
            byte[0] ^= 1 << bit;
            file.write_all_at(&byte, at as u64).unwrap();
            // Reading terminates for every damage.
            let _ = read_all(&file);
        }
    }
}
