//! Headers that are invalid, or request excessive resources.

use super::Outcome::{Inside, Refused};
use super::support::{entry, file, tar};
use super::{Case, one, raw};

/// Creates a header block with its checksum.
fn header(change: impl FnOnce(&mut [u8; 512])) -> Vec<u8> {
    let mut block: [u8; 512] = tar(&[file("f", b"")])[..512].try_into().unwrap();
    change(&mut block);
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.to_vec()
}

pub(crate) fn headers() -> Vec<Case> {
    let many = |count: usize| (0..count).map(|n| format!("{},1", 2 * n));
    let map: Vec<_> = many(300_000).collect();
    let old_sparse = header(|block| {
        block[156] = b'S';
        block[482] = 1;
    });
    // Every extension header announces another one.
    let mut extensions = old_sparse;
    for _ in 0..15_000 {
        let mut extension = [b'0'; 512];
        extension[504] = 1;
        extensions.extend_from_slice(&extension);
    }
    let version_1 = {
        let lines = format!("{}\n", 1 << 30) + &"1\n1\n".repeat(270_000);
        file("holes", lines)
            .pax("GNU.sparse.major", b"1")
            .pax("GNU.sparse.minor", b"0")
            .pax("GNU.sparse.realsize", b"4000000")
    };
    let smuggled = {
        let inner = tar(&[file("smuggled", b"x")]);
        // The pax header has the real length; the other one is for other readers.
        let len = inner.len().to_string();
        file("outer", inner).size(0).pax("size", len.as_bytes())
    };
    let long_name = format!("SCHILY.xattr.user.{}", "n".repeat(100_000));
    vec![
        raw(
            "CVE-2022-48303",
            "GNU tar: a time of eleven spaces",
            vec![header(|block| {
                block[136..148].copy_from_slice(b"           \0")
            })],
            Inside,
        ),
        raw(
            "CVE-2022-48303",
            "GNU tar: a number of base 256 that is cut",
            vec![header(|block| block[136..148].fill(0x80))],
            Refused(&["malformed"]),
        ),
        one(
            "CVE-2023-39804",
            "GNU tar: the name of an attribute is too long",
            &[file("f", b"x").pax(&long_name, b"v")],
            Refused(&["64 KiB"]),
        ),
        one(
            "CVE-2021-20193",
            "GNU tar: a long name without an end",
            &[entry("l", b'L').size(2 << 20)],
            Refused(&["1 MiB"]),
        ),
        one(
            "CVE-2019-9923",
            "GNU tar: a sparse file without a map",
            &[file("f", b"x").pax("GNU.sparse.major", b"1")],
            Refused(&["sparse"]),
        ),
        one(
            "CVE-2018-20482",
            "GNU tar: a sparse file that is shorter",
            &[file("f", b"x")
                .pax("GNU.sparse.size", b"5")
                .pax("GNU.sparse.map", b"0,100")],
            Refused(&["sparse"]),
        ),
        one(
            "CVE-2022-2879",
            "Go: extended headers without an end",
            &[file("f", b"x").pax("comment", vec![b'c'; 2 << 20])],
            Refused(&["1 MiB"]),
        ),
        one(
            "CVE-2025-58183",
            "Go: a sparse map without an end",
            &[version_1],
            Refused(&["too many parts"]),
        ),
        raw(
            "CVE-2026-32288",
            "Go: an old sparse map without an end",
            vec![extensions],
            Refused(&["sparse"]),
        ),
        one(
            "CVE-2025-58183",
            "Go: a sparse map of many parts in a pax header",
            &[file("f", b"x")
                .pax("GNU.sparse.size", b"9")
                .pax("GNU.sparse.map", map.join(",").as_bytes())],
            Refused(&["1 MiB"]),
        ),
        one(
            "CVE-2023-42503",
            "Commons Compress: a number of many digits",
            &[file("f", b"x").pax("mtime", vec![b'9'; 500_000])],
            Refused(&["malformed"]),
        ),
        one(
            "CVE-2021-35517",
            "Commons Compress: a size that is too large",
            &[file("f", b"x").pax("size", b"9223372036854775807")],
            Refused(&["bytes"]),
        ),
        one(
            "CVE-2025-62518",
            "tokio-tar: an archive inside a file of two sizes",
            &[smuggled, file("after", b"x")],
            Inside,
        ),
        one(
            "CVE-2025-46394",
            "BusyBox: a name that clears the terminal",
            &[file("../\x1b[2J\x1b]0;owned\x07", b"x")],
            Refused(&["\\u{1b}[2J"]),
        ),
        one(
            "CVE-2024-28863",
            "node-tar: directories without an end",
            &[file("d/".repeat(100_000) + "f", b"x")],
            Refused(&["longer than 4095"]),
        ),
        one(
            "CVE-2017-14992",
            "Docker: an archive that asks for memory",
            &[entry("x", b'x').size(1 << 40)],
            Refused(&["1 MiB"]),
        ),
        one(
            "CVE-2023-25153",
            "containerd: a file larger than the archive",
            &[file("index.json", b"x").size(0o77_777_777_777)],
            Refused(&["truncated"]),
        ),
    ]
}
