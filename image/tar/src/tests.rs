use proptest::prelude::*;

use super::pax::pax_time;
use super::*;

fn archive(build: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    build(&mut builder);
    builder.into_inner().unwrap()
}

fn append(builder: &mut tar::Builder<Vec<u8>>, path: &str, data: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_size(data.len() as u64);
    header.set_mode(0o4755);
    header.set_uid(1000);
    header.set_gid(2000);
    header.set_mtime(1_700_000_000);
    builder.append_data(&mut header, path, data).unwrap();
}

#[test]
fn entries_and_their_data_are_read() {
    let long = "d/".repeat(80) + "file";
    let bytes = archive(|b| {
        append(b, "a", b"hello");
        append(b, &long, &[7; 1000]);
    });
    let mut reader = TarReader::new(bytes.as_slice());
    let first = reader.next_entry().unwrap().unwrap();
    assert_eq!((first.path.as_slice(), first.size), (&b"a"[..], 5));
    assert_eq!((first.mode, first.uid, first.gid), (0o4755, 1000, 2000));
    assert_eq!(first.mtime, (1_700_000_000, 0));
    let mut data = String::new();
    reader.read_to_string(&mut data).unwrap();
    assert_eq!(data, "hello");
    let second = reader.next_entry().unwrap().unwrap();
    assert_eq!(second.path, long.as_bytes());
    assert!(reader.next_entry().unwrap().is_none());
}

#[test]
fn pax_headers_override() {
    let bytes = archive(|b| {
        let records: [(&str, &[u8]); 4] = [
            ("path", b"\xc3\xa4"),
            ("mtime", b"1.5"),
            ("uid", b"3000000"),
            ("SCHILY.xattr.security.capability", b"\x01\n\x00"),
        ];
        b.append_pax_extensions(records).unwrap();
        append(b, "x", b"");
    });
    let header = TarReader::new(bytes.as_slice())
        .next_entry()
        .unwrap()
        .unwrap();
    assert_eq!(header.path, "ä".as_bytes());
    assert_eq!((header.mtime, header.uid), ((1, 500_000_000), 3_000_000));
    assert_eq!(
        header.xattrs,
        [(b"security.capability".to_vec(), b"\x01\n\x00".to_vec())]
    );
}

#[test]
fn times_before_the_epoch_count_forward() {
    assert_eq!(pax_time("-1.25"), Some((-2, 750_000_000)));
    assert_eq!(pax_time("-1"), Some((-1, 0)));
    assert_eq!(pax_time("1.x"), None);
}

#[test]
fn truncation_and_damage_are_errors() {
    let bytes = archive(|b| append(b, "a", &[1; 2000]));
    for len in [100, 512, 700, 2000] {
        let mut reader = TarReader::new(&bytes[..len]);
        let result = (|| {
            while reader.next_entry()?.is_some() {
                io::copy(&mut reader, &mut io::sink())?;
            }
            Ok::<_, TarError>(())
        })();
        assert!(
            result.unwrap_err().reason.to_string().contains("truncated"),
            "{len}"
        );
    }
    let mut damaged = bytes;
    damaged[3] ^= 1;
    assert!(TarReader::new(damaged.as_slice()).next_entry().is_err());
}

#[test]
fn the_last_padding_may_be_left_out() {
    let bytes = archive(|b| {
        append(b, "a", &[1; 100]);
        append(b, "b", &[1; 2000]);
    });
    let end = 1024 + 512 + 2000;
    for len in [end, end + 1, end + 47, end + 48] {
        for read in [true, false] {
            let mut reader = TarReader::new(&bytes[..len]);
            let mut count = 0;
            while reader.next_entry().unwrap().is_some() {
                count += 1;
                if read {
                    io::copy(&mut reader, &mut io::sink()).unwrap();
                }
            }
            assert_eq!((count, reader.position), (2, len as u64));
        }
    }
}

#[test]
fn times_in_headers_may_be_negative() {
    let mut field = [0xff; 12];
    assert_eq!(signed(&field).unwrap(), -1);
    field[11] = 0x9c;
    assert_eq!(signed(&field).unwrap(), -100);
    field[1] = 0;
    assert!(signed(&field).is_err());
    assert_eq!(signed(b"00000000010\0").unwrap(), 8);
}

#[test]
fn the_last_attribute_of_a_name_counts() {
    let pair = |name: &str, value: &str| (name.into(), value.into());
    let all = vec![pair("b", "1"), pair("a", "1"), pair("b", "2")];
    assert_eq!(by_name(all), [pair("a", "1"), pair("b", "2")]);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let mut reader = TarReader::new(bytes.as_slice());
        while let Ok(Some(_)) = reader.next_entry() {}
    }

    #[test]
    fn damaged_archives_never_panic(at in 0usize..4096, to in any::<u8>()) {
        let mut bytes = archive(|b| {
            b.append_pax_extensions([("path", &b"p"[..])]).unwrap();
            append(b, "a", &[1; 700]);
        });
        let at = at % bytes.len();
        bytes[at] = to;
        let mut reader = TarReader::new(bytes.as_slice());
        while let Ok(Some(_)) = reader.next_entry() {}
    }
}

/// Creates a raw ustar header.
fn raw(path: &str, kind: u8, size: u64, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path(path).unwrap();
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    let mut bytes = header.as_bytes().to_vec();
    bytes[156] = kind;
    change(&mut bytes);
    bytes[148..156].fill(b' ');
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    bytes
}

/// Returns paths and types of a stream's entries.
fn listed(bytes: &[u8]) -> Result<Vec<(String, TarKind)>, String> {
    let mut reader = TarReader::new(bytes);
    let mut entries = Vec::new();
    while let Some(header) = reader
        .next_entry()
        .map_err(|error| error.reason.to_string())?
    {
        entries.push((String::from_utf8_lossy(&header.path).into(), header.kind));
    }
    Ok(entries)
}

#[test]
fn only_files_have_data() {
    for kind in *b"123456" {
        let mut bytes = raw("first", kind, 1024, |_| ());
        bytes.extend(raw("second", b'0', 3, |_| ()));
        bytes.extend([7; 512]);
        let seen = listed(&bytes).unwrap();
        let kind = char::from(kind);
        assert_eq!(seen.len(), 2, "type {kind}");
        assert_eq!(seen[1], ("second".to_owned(), TarKind::File), "type {kind}");
    }
    let sized: [(&str, &[u8]); 1] = [("size", b"1024")];
    let mut bytes = archive(|b| b.append_pax_extensions(sized).unwrap());
    bytes.truncate(bytes.len() - 1024);
    bytes.extend(raw("d/", b'5', 0, |_| ()));
    bytes.extend(raw("f", b'0', 0, |_| ()));
    assert_eq!(listed(&bytes).unwrap().len(), 2);
}

#[test]
fn a_slash_makes_a_directory_of_the_oldest_type_only() {
    for (kind, expected) in [(0, TarKind::Directory), (b'0', TarKind::File)] {
        let mut bytes = raw("d/", kind, 512, |_| ());
        // The block is the data of a file, or the header after a directory.
        bytes.extend(raw("f", b'0', 0, |_| ()));
        let seen = listed(&bytes).unwrap();
        assert_eq!(seen[0].1, expected);
        assert_eq!(seen.len(), if kind == 0 { 2 } else { 1 });
    }
}

#[test]
fn global_headers_apply_to_nothing() {
    let mut bytes = raw("pax_global_header", b'g', 13, |_| ());
    bytes.extend(*b"13 uid=10001\n");
    bytes.resize(1024, 0);
    bytes.extend(raw("f", b'0', 0, |_| ()));
    let header = TarReader::new(bytes.as_slice())
        .next_entry()
        .unwrap()
        .unwrap();
    assert_eq!((header.path.as_slice(), header.uid), (&b"f"[..], 0));
    // Invalid values are ignored as well.
    bytes[512..525].copy_from_slice(b"13 uid=-1000\n");
    assert_eq!(listed(&bytes).unwrap().len(), 1);
}

#[test]
fn numbers_out_of_range_are_refused() {
    for (field, what) in [(108..116, "uid"), (116..124, "gid"), (124..136, "size")] {
        let bytes = raw("f", b'0', 0, |header| header[field].fill(0xff));
        let error = listed(&bytes).unwrap_err();
        assert_eq!(error, "a number in a header is negative", "{what}");
    }
    let bytes = raw("f", b'0', 0, |header| header[100] = 0xb0);
    assert_eq!(listed(&bytes).unwrap_err(), "a number is out of range");
    for (major, minor) in [("0010000", "0000003"), ("0000001", "4000000")] {
        let bytes = raw("null", b'3', 0, |header| {
            header[329..336].copy_from_slice(major.as_bytes());
            header[337..344].copy_from_slice(minor.as_bytes());
        });
        let error = listed(&bytes).unwrap_err();
        assert!(error.contains("is out of range"), "{error}");
    }
    let bytes = raw("f", b'0', 0, |header| {
        header[100..108].copy_from_slice(b"+000644\0");
    });
    assert!(listed(&bytes).is_err());
}

#[test]
fn numbers_that_are_not_used_are_numbers() {
    // Mode and owner of an extended header, device numbers of a file.
    for (kind, field) in [
        (b'x', 100),
        (b'L', 109),
        (b'g', 137),
        (b'0', 330),
        (b'5', 338),
    ] {
        let bytes = raw("f", kind, 0, |header| header[field] = b'8');
        let error = listed(&bytes).unwrap_err();
        assert!(error.contains("malformed"), "{error}");
    }
    // Headers before POSIX have no device numbers.
    let bytes = raw("f", 0, 0, |header| header[257..].fill(b'8'));
    assert_eq!(listed(&bytes).unwrap().len(), 1);
}

#[test]
fn zeros_and_blanks_before_a_number_are_skipped_in_any_order() {
    for text in [b" \0 755 \0", b"\0\0\x000755\0", b"\0  0755 "] {
        let bytes = raw("f", b'0', 0, |header| {
            header[100..108].copy_from_slice(text)
        });
        let header = TarReader::new(bytes.as_slice())
            .next_entry()
            .unwrap()
            .unwrap();
        assert_eq!(header.mode, 0o755, "{text:?}");
    }
    let time = |header: &mut [u8]| header[136..148].copy_from_slice(b"\x003000000000\0");
    let bytes = raw("f", b'0', 0, time);
    let header = TarReader::new(bytes.as_slice())
        .next_entry()
        .unwrap()
        .unwrap();
    assert_eq!(header.mtime, (0o3_000_000_000, 0));
}

/// Other readers take such a name from the whole blocks that it fills.
#[test]
fn gnu_names_have_the_size_that_their_header_states() {
    let name = |kind: u8, size: u64, name: &[u8]| {
        let mut bytes = raw("@", kind, size, |_| ());
        bytes.extend_from_slice(name);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    };
    let bytes = [
        name(b'L', 7, b"long/long/name"),
        name(b'K', 6, b"target/target"),
        raw("short", b'2', 0, |_| ()),
    ]
    .concat();
    let listed = listed(&bytes).unwrap();
    assert_eq!(
        listed,
        [("long/lo".to_owned(), TarKind::Symlink(b"target".to_vec()))]
    );
    // An empty one is none.
    for empty in [&b""[..], &[0; 512]] {
        let bytes = [
            name(b'L', empty.len() as u64, empty),
            raw("short", b'5', 0, |_| ()),
        ]
        .concat();
        let listed = self::listed(&bytes).unwrap();
        assert_eq!(listed, [("short".to_owned(), TarKind::Directory)]);
    }
}

#[test]
fn checksums_of_signed_bytes_are_accepted() {
    let mut bytes = raw("f\u{e4}", b'0', 0, |_| ());
    bytes[148..156].fill(b' ');
    let sum: i32 = bytes.iter().map(|byte| i32::from(byte.cast_signed())).sum();
    bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(listed(&bytes).unwrap().len(), 1);
}

#[test]
fn entries_after_a_zero_block_are_not_hidden() {
    let entry = raw("f", b'0', 0, |_| ());
    let zeros = vec![0; 512];
    assert_eq!(
        listed(&[entry.clone(), zeros.clone()].concat())
            .unwrap()
            .len(),
        1
    );
    let two = [entry.clone(), zeros.clone(), zeros.clone(), entry.clone()].concat();
    assert_eq!(listed(&two).unwrap().len(), 1);
    let error = listed(&[entry.clone(), zeros, entry].concat()).unwrap_err();
    assert_eq!(error, "it continues after a zero block");
}

#[test]
fn gnu_names_outrank_pax_names() {
    let mut bytes = raw("././@LongLink", b'L', 5, |_| ());
    bytes.extend(*b"long\0");
    bytes.resize(1024, 0);
    let mut pax = archive(|b| {
        let records: [(&str, &[u8]); 1] = [("path", b"pax")];
        b.append_pax_extensions(records).unwrap();
    });
    pax.truncate(1024);
    bytes.extend(pax);
    bytes.extend(raw("short", b'0', 0, |_| ()));
    assert_eq!(listed(&bytes).unwrap()[0].0, "long");
}

#[test]
fn an_extended_header_is_not_the_last() {
    let extended = |kind| {
        let mut bytes = raw("extended", kind, 9, |_| ());
        bytes.extend(*b"9 path=a\n");
        bytes.resize(1024, 0);
        bytes
    };
    for kind in *b"xLK" {
        for end in [&[][..], &[0; 1024]] {
            let error = listed(&[&extended(kind), end].concat()).unwrap_err();
            assert_eq!(error, "it ends after an extended header");
        }
    }
    // `git archive` writes only this header for an empty tree.
    assert_eq!(listed(&extended(b'g')).unwrap(), []);
}
