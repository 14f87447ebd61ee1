//! Fuzz targets for tar streams, their indexes, and the disks created from them.
#![expect(
    clippy::expect_used,
    reason = "a fuzz target cannot continue without temporary files"
)]

use std::fs::File;
use std::io::{Read as _, Write as _};

use crate::digest::Digest;
use crate::erofs::{self, LayerData};
use crate::index::{
    ContentLocation, Entry, EntryKind, IndexReader, IndexWriter, Meta, Totals, Xattrs,
    encode_xattrs,
};
use crate::layer::{self, Expected, LayerFiles};
use crate::limits::Limits;
use crate::pipeline::Decoders;
use crate::skeleton::Assembler;
use crate::tree::Tree;
use sm_tar::{END, TarHeader, TarKind, TarReader, encode, padding};

/// Limits that are small enough for a fuzzer to reach.
const LIMITS: Limits = Limits {
    layer_bytes: 1 << 20,
    entries: 4096,
    index_bytes: 1 << 20,
    names_bytes: 256 << 10,
    ratio: 100,
    ratio_floor: 64 << 10,
};

/// Parses `data` as a layer, plain or compressed, and creates a disk from it.
///
/// # Panics
/// Temporary files cannot be created.
pub fn layer(data: &[u8]) {
    let file = || tempfile::tempfile().expect("a temporary file");
    let (blob, small, index, skeleton) = (file(), file(), file(), file());
    let digest = Digest::of(data);
    let expected = Expected {
        digest,
        size: u64::try_from(data.len()).ok(),
        diff_id: None,
    };
    let files = LayerFiles {
        blob: &blob,
        small: &small,
        index: &index,
        skeleton: &skeleton,
    };
    let decoders = Decoders::default();
    let Ok(converted) = layer::convert(data, &expected, LIMITS, &decoders, files, &mut |_| {})
    else {
        return;
    };
    // A layer that was split can be assembled again.
    let rewound = |mut file: &std::fs::File| {
        std::io::Seek::rewind(&mut file).expect("a file that can be read again");
        file.try_clone().expect("a descriptor")
    };
    let assembled =
        Assembler::new(rewound(&skeleton), rewound(&blob), rewound(&small)).expect("a skeleton");
    let again = layer::index_again(assembled, &file()).expect("the same stream");
    assert_eq!(again.diff_id, converted.diff_id);
    assert_eq!(again.index.expect("an archive"), converted.totals);
    let mut index = IndexReader::open(rewound(&index))
        .expect("a file that can be read")
        .expect("an index that is whole");
    let mut tree = Tree::new(LIMITS);
    if tree.apply(0, &mut index).is_ok() {
        let data = LayerData {
            blob_len: converted.totals.blob_len,
            small: &small,
        };
        let _ = erofs::build(&tree, &[data], digest, &file());
    }
}

/// Parses `data` as a tar archive.
pub fn tar(data: &[u8]) {
    let mut reader = TarReader::new(data);
    while let Ok(Some(header)) = reader.next_entry() {
        // Half of the data is read, the rest skipped.
        let mut some = vec![0; usize::try_from(header.size / 2).unwrap_or(0).min(4096)];
        let _ = reader.read_exact(&mut some);
    }
}

/// Parses `data` as the records of a pax header, for one entry and as a global header.
///
/// # Panics
/// Only if the parser panics.
pub fn pax(data: &[u8]) {
    for kind in [b'x', b'g'] {
        let file = |size: usize| TarHeader {
            path: b"file".to_vec(),
            kind: TarKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            size: size as u64,
            sparse: None,
            xattrs: Vec::new(),
        };
        let mut archive = encode(&file(data.len()));
        let old: u32 = archive.iter().take(148).map(|byte| u32::from(*byte)).sum();
        let rest: u32 = archive.iter().skip(156).map(|byte| u32::from(*byte)).sum();
        let sum = old + rest + 8 * u32::from(b' ') - u32::from(b'0') + u32::from(kind);
        if let Some(block) = archive.first_chunk_mut::<512>() {
            block[156] = kind;
            let text = format!("{sum:06o}\0 ");
            block[148..156].copy_from_slice(text.as_bytes());
        }
        archive.extend_from_slice(data);
        archive.resize(archive.len() + padding(data.len() as u64), 0);
        archive.extend_from_slice(&encode(&file(0)));
        archive.extend_from_slice(&END);
        self::tar(&archive);
    }
}

/// Parses `data` as the index of a layer, and creates a disk from it.
///
/// # Panics
/// Temporary files cannot be created.
pub fn layer_index(data: &[u8]) {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(data).expect("a file that can be written");
    let Ok(Some(mut index)) = IndexReader::open(file) else {
        return;
    };
    let blob_len = index.totals().blob_len;
    let mut tree = Tree::new(LIMITS);
    if tree.apply(0, &mut index).is_ok() {
        let (small, out) = (tempfile::tempfile(), tempfile::tempfile());
        let (small, out) = (small.expect("a file"), out.expect("a file"));
        let data = LayerData {
            blob_len,
            small: &small,
        };
        let _ = erofs::build(&tree, &[data], Digest::of(b""), &out);
    }
}

/// Creates a disk of layers that any `data` describes. The file is as long as its file
/// system; contents in blobs are zeros.
///
/// # Panics
/// Temporary files cannot be created, or the layers cannot be written.
#[must_use]
pub fn disk(data: &[u8]) -> Option<File> {
    let mut bytes = data.iter().copied();
    let mut tree = Tree::new(LIMITS);
    let mut small = tempfile::tempfile().expect("a file");
    small.write_all(&[b's'; SMALL_LEN]).expect("a file");
    let mut lens = Vec::new();
    for number in 0..LAYERS {
        let file = tempfile::tempfile().expect("a file");
        let mut writer = IndexWriter::new(&file).expect("a file");
        let mut entries = 0;
        // A zero byte ends a layer.
        while let Some(kind) = bytes.next().filter(|kind| *kind != 0) {
            entry(kind, &mut bytes, &mut writer);
            entries += 1;
        }
        let totals = Totals {
            entries,
            blob_len: BLOB_LEN,
            small_len: SMALL_LEN as u64,
            tar_len: 0,
        };
        writer.finish(totals).expect("a file");
        let mut index = IndexReader::open(file).expect("a file").expect("an index");
        tree.apply(number, &mut index).ok()?;
        lens.push(BLOB_LEN);
    }
    let layers: Vec<_> = lens
        .iter()
        .map(|blob_len| LayerData {
            blob_len: *blob_len,
            small: &small,
        })
        .collect();
    let out = tempfile::tempfile().expect("a file");
    let len = erofs::build(&tree, &layers, Digest::of(data), &out).ok()?;
    let blobs: u64 = lens.iter().sum();
    out.set_len(len + blobs).expect("a file");
    Some(out)
}

const LAYERS: u16 = 3;
const BLOB_LEN: u64 = 1 << 20;
const SMALL_LEN: usize = 64 << 10;

/// Writes one entry, whose parts are determined by the following bytes.
fn entry(kind: u8, bytes: &mut impl Iterator<Item = u8>, writer: &mut IndexWriter<'_>) {
    let mut next = || bytes.next().unwrap_or(0);
    let path = path(&mut next);
    let target = match kind % 8 {
        4 | 5 => self::path(&mut next),
        _ => Vec::new(),
    };
    let number = u64::from(next()) << 8 | u64::from(next());
    let kind = match kind % 8 {
        0 | 1 => EntryKind::File {
            location: ContentLocation::Small(number % 1000),
            size: number % 2049,
        },
        2 => EntryKind::File {
            location: ContentLocation::Blob(number % 200 * 4096),
            size: number * 3,
        },
        3 => EntryKind::Directory,
        4 if target.is_empty() => EntryKind::Fifo,
        4 => EntryKind::Symlink(&target),
        5 => EntryKind::Hardlink(&target),
        6 if number % 2 == 0 => EntryKind::Whiteout,
        6 => EntryKind::Opaque,
        _ => EntryKind::CharDevice(1, 3),
    };
    let xattrs: Vec<_> = (0..next() % 4)
        .map(|_| {
            let len = usize::from(next()) * 9;
            (format!("user.{}", next() % 3).into_bytes(), vec![b'v'; len])
        })
        .collect();
    let xattrs = encode_xattrs(&xattrs).unwrap_or_default();
    let meta = Meta {
        mode: u16::from(next()) | 0o400,
        ..Meta::default()
    };
    let entry = Entry {
        path: &path,
        kind,
        meta,
        xattrs: Xattrs::encoded(&xattrs),
    };
    // The root must be a directory.
    if !path.is_empty() || entry.kind == EntryKind::Directory {
        writer.push(&entry).expect("a file that can be written");
    }
}

/// Returns a path with few distinct names, so that collisions are frequent. Some names
/// have the maximum length.
fn path(next: &mut impl FnMut() -> u8) -> Vec<u8> {
    let parts: Vec<Vec<u8>> = (0..next() % 5)
        .map(|_| {
            let byte = next();
            let len = if byte & 0x80 == 0 { 1 } else { 255 };
            vec![b'a' + byte % 7; len]
        })
        .collect();
    parts.join(&b'/')
}
