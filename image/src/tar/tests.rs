use proptest::prelude::*;

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
    let mut reader = Reader::new(bytes.as_slice());
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
    let header = Reader::new(bytes.as_slice()).next_entry().unwrap().unwrap();
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
        let mut reader = Reader::new(&bytes[..len]);
        let result = (|| {
            while reader.next_entry()?.is_some() {
                io::copy(&mut reader, &mut io::sink())?;
            }
            Ok::<_, TarError>(())
        })();
        assert!(result.unwrap_err().reason.contains("truncated"), "{len}");
    }
    let mut damaged = bytes;
    damaged[3] ^= 1;
    assert!(Reader::new(damaged.as_slice()).next_entry().is_err());
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
            let mut reader = Reader::new(&bytes[..len]);
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
        let mut reader = Reader::new(bytes.as_slice());
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
        let mut reader = Reader::new(bytes.as_slice());
        while let Ok(Some(_)) = reader.next_entry() {}
    }
}
