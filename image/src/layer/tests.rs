use std::io::{Seek as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use proptest::prelude::*;

use super::*;
use crate::index::IndexReader;
use crate::skeleton::Assembler;
use sm_tar::{END, encode, padding};

/// The files of a layer.
struct Files {
    blob: File,
    small: File,
    index: File,
    skeleton: File,
}

impl Files {
    fn new() -> Self {
        let file = || tempfile::tempfile().unwrap();
        Self {
            blob: file(),
            small: file(),
            index: file(),
            skeleton: file(),
        }
    }

    fn of(&self) -> LayerFiles<'_> {
        LayerFiles {
            blob: &self.blob,
            small: &self.small,
            index: &self.index,
            skeleton: &self.skeleton,
        }
    }

    fn index(&self) -> IndexReader {
        IndexReader::open(rewound(&self.index)).unwrap().unwrap()
    }

    /// Returns paths and types of all entries.
    fn entries(&self) -> Vec<(String, String)> {
        let mut index = self.index();
        let mut found = Vec::new();
        while let Some(entry) = index.next().unwrap() {
            let path = String::from_utf8_lossy(entry.path).into_owned();
            found.push((path, format!("{:?}", entry.kind)));
        }
        found
    }

    fn contents(&self, number: usize) -> Vec<u8> {
        let mut index = self.index();
        for _ in 0..number {
            index.next().unwrap();
        }
        let EntryKind::File { location, size } = index.next().unwrap().unwrap().kind else {
            panic!("a file");
        };
        let mut data = vec![0; usize::try_from(size).unwrap()];
        match location {
            ContentLocation::Blob(at) => self.blob.read_exact_at(&mut data, at).unwrap(),
            ContentLocation::Small(at) => self.small.read_exact_at(&mut data, at).unwrap(),
        }
        data
    }

    fn assembled(&self) -> Assembler {
        let clone = |file: &File| file.try_clone().unwrap();
        let (blob, small) = (clone(&self.blob), clone(&self.small));
        Assembler::new(rewound(&self.skeleton), blob, small).unwrap()
    }
}

fn rewound(file: &File) -> File {
    let mut file = file.try_clone().unwrap();
    file.rewind().unwrap();
    file
}

fn tar(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, data) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        // The builder refuses some of the paths that these tests need.
        let name = &mut header.as_old_mut().name;
        name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        builder.append(&header, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

fn expected(stored: &[u8], tar: &[u8]) -> Expected {
    Expected {
        digest: Digest::of(stored),
        size: Some(stored.len() as u64),
        diff_id: Some(Digest::of(tar)),
    }
}

fn run(stored: &[u8], expected: &Expected) -> (Result<Converted, Error>, Files) {
    let files = Files::new();
    let (limits, decoders) = (Limits::default(), Decoders::default());
    let converted = convert(stored, expected, limits, &decoders, files.of(), &mut |_| {});
    (converted, files)
}

/// A stream that cannot be read differs from one that cannot be parsed, whose digest is that
/// of all its bytes.
#[test]
fn an_index_is_recreated_of_what_can_be_read() {
    struct Failing<'a>(&'a [u8], Option<rustix::io::Errno>);
    impl Read for Failing<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match (self.0.read(buffer)?, self.1) {
                (0, Some(errno)) => Err(errno.into()),
                (count, _) => Ok(count),
            }
        }
    }
    let index = || tempfile::tempfile().unwrap();
    let bytes = vec![7; 3 * 512];
    let recreated = index_again(Failing(&bytes, None), &index()).unwrap();
    assert_eq!(recreated.diff_id, Digest::of(&bytes));
    assert!(recreated.index.is_err(), "{recreated:?}");
    let errno = rustix::io::Errno::IO;
    for bytes in [&bytes[..], &[0; 2048], &[0; 100]] {
        let error = index_again(Failing(bytes, Some(errno)), &index()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno.raw_os_error()), "{error}");
    }
    // An index that cannot be written is not an error of the stream.
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let tar = END;
    let recreated = index_again(Failing(&tar, None), &full).unwrap();
    assert_eq!(recreated.diff_id, Digest::of(&tar));
    assert!(recreated.index.is_err(), "{recreated:?}");
}

/// A stream of unknown size may be as long as the longest one that a manifest may state.
#[test]
fn streams_of_unknown_size_are_limited() {
    let limits = Limits {
        layer_bytes: 1 << 20,
        ..Limits::default()
    };
    // Skippable frames (RFC 8878 section 3.1.2) decompress to nothing.
    let stream = |most: u64| {
        let mut stream = zstd::encode_all(&END[..], 1).unwrap();
        let rest = usize::try_from(most).unwrap() - stream.len() - 8;
        stream.extend(0x184d_2a50_u32.to_le_bytes());
        stream.extend(u32::try_from(rest).unwrap().to_le_bytes());
        stream.resize(stream.len() + rest, 0);
        stream
    };
    let convert = |stream: &[u8]| {
        let expected = Expected {
            digest: Digest::of(b""),
            size: None,
            diff_id: Some(Digest::of(&END)),
        };
        let files = Files::new();
        let decoders = Decoders::default();
        convert(
            stream,
            &expected,
            limits,
            &decoders,
            files.of(),
            &mut |_| {},
        )
    };
    convert(&stream(limits.stored_bytes())).unwrap();
    let error = convert(&stream(limits.stored_bytes() + 1)).unwrap_err();
    assert!(error.to_string().contains("it has more than"), "{error}");
    // One that never ends is not read for ever.
    let endless = zstd::encode_all(&END[..], 1).unwrap();
    let endless = endless.chain(io::repeat(0));
    let expected = Expected {
        digest: Digest::of(b""),
        size: None,
        diff_id: None,
    };
    let files = Files::new();
    let decoders = Decoders::default();
    super::convert(
        endless,
        &expected,
        limits,
        &decoders,
        files.of(),
        &mut |_| {},
    )
    .unwrap_err();
}

#[test]
fn all_compressions_give_the_same_layer() {
    let tar = tar(&[("a", b"hello"), ("d/b", &[3; 5000])]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
    for stored in [&tar, &gzip, &zstd] {
        let (converted, files) = run(stored, &expected(stored, &tar));
        let totals = converted.unwrap().totals;
        assert_eq!((totals.blob_len, totals.small_len), (8192, 5));
        assert_eq!((totals.tar_len, totals.entries), (tar.len() as u64, 2));
        assert_eq!(files.contents(0), b"hello");
        assert_eq!(files.contents(1), [3; 5000]);
    }
}

#[test]
fn damage_is_noticed() {
    let tar = tar(&[("a", b"hello")]);
    let good = expected(&tar, &tar);
    let wrong_digest = Expected {
        digest: Digest::of(b"x"),
        ..good
    };
    assert!(matches!(
        run(&tar, &wrong_digest).0,
        Err(Error::Blob { .. })
    ));
    let wrong_size = Expected {
        size: Some(7000),
        ..good
    };
    assert!(run(&tar, &wrong_size).0.is_err());
    let wrong_diff = Expected {
        diff_id: Some(Digest::of(b"x")),
        ..good
    };
    let error = run(&tar, &wrong_diff).0.unwrap_err().to_string();
    assert!(error.contains("diff_id"), "{error}");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
    // The stored stream was truncated, and its descriptor matches.
    for stored in [gzip, zstd] {
        let cut = &stored[..stored.len() - 10];
        let error = run(cut, &expected(cut, &tar)).0.unwrap_err().to_string();
        assert!(
            error.contains("truncated") || error.contains("frame"),
            "{error}"
        );
    }
}

#[test]
fn hostile_paths_are_refused_by_name() {
    for path in ["../x", "a/../../x", "/../x", "a/.wh..", "b/.wh."] {
        let tar = tar(&[(path, b"x")]);
        let error = run(&tar, &expected(&tar, &tar)).0.unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::Entry { .. }) && text.contains(path),
            "{text}"
        );
    }
}

#[test]
fn whiteouts_become_entries() {
    let tar = tar(&[
        ("d/.wh.gone", b""),
        ("d/.wh..wh..opq", b""),
        (".wh.top", b""),
        (".wh..wh.plnk", b""),
        ("/abs/./x", b""),
    ]);
    let (converted, files) = run(&tar, &expected(&tar, &tar));
    converted.unwrap();
    let seen = files.entries();
    assert_eq!(seen[0], ("d/gone".into(), "Whiteout".into()));
    assert_eq!(seen[1], ("d".into(), "Opaque".into()));
    assert_eq!(seen[2], ("top".into(), "Whiteout".into()));
    assert_eq!(seen[3].0, "abs/x");
    assert_eq!(seen.len(), 4);
}

#[test]
fn zeros_take_no_space() {
    let tar = tar(&[("z", &vec![0; 8 << 20]), ("a", &[b'x'; 3000])]);
    let (converted, files) = run(&tar, &expected(&tar, &tar));
    assert_eq!(converted.unwrap().totals.blob_len, (8 << 20) + 4096);
    assert!(files.blob.metadata().unwrap().blocks() * 512 < 1 << 20);
}

/// Creates a tar stream with this crate's encoder, followed by `trailing` bytes.
fn stream(files: &[(String, Vec<u8>)], xattrs: usize, trailing: usize) -> Vec<u8> {
    let mut tar = Vec::new();
    for (path, data) in files {
        tar.extend(encode(&TarHeader {
            path: path.clone().into_bytes(),
            kind: TarKind::File,
            mode: 0o600,
            uid: 5,
            gid: 1 << 30,
            mtime: (1, 2),
            size: data.len() as u64,
            sparse: None,
            xattrs: (0..xattrs)
                .map(|n| (format!("user.{n}").into(), vec![7; n]))
                .collect(),
        }));
        tar.extend(data);
        tar.resize(tar.len() + padding(data.len() as u64), 0);
    }
    tar.extend(END);
    tar.resize(tar.len() + trailing, b't');
    tar
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_layer_is_reconstructed(
        files in prop::collection::vec(
            ("[a-z]{1,9}(/[a-z]{1,120})?", prop::collection::vec(any::<u8>(), 0..6000)), 0..12),
        xattrs in 0..4usize,
        trailing in 0..3000usize,
    ) {
        let tar = stream(&files, xattrs, trailing);
        let (converted, layer) = run(&tar, &expected(&tar, &tar));
        let converted = converted.unwrap();
        let mut again = Vec::new();
        layer.assembled().read_to_end(&mut again).unwrap();
        prop_assert!(again == tar);
        // The index can be recreated from the assembled stream.
        let index = tempfile::tempfile().unwrap();
        let reindexed = index_again(layer.assembled(), &index).unwrap();
        prop_assert_eq!(reindexed.diff_id, converted.diff_id);
        prop_assert_eq!(reindexed.index.unwrap(), converted.totals);
        let mut bytes = [Vec::new(), Vec::new()];
        rewound(&layer.index).read_to_end(&mut bytes[0]).unwrap();
        rewound(&index).read_to_end(&mut bytes[1]).unwrap();
        prop_assert!(bytes[0] == bytes[1]);
    }
}
