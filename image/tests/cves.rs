//! Tests with archives like those of published vulnerabilities in tar readers, image
//! tools and container engines. Each is either refused with the reason, or affects only
//! the image. (The CVE names describe the kind of archive; `sm` shares no code with the
//! vulnerable programs.)

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod support;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;
use std::process::Command;

use sm_image::{Compression, Config, LayoutBuilder, Limits, PullOptions, Reference, Store};
use support::{Entry, dir, entry, file, hardlink, image, symlink, tar, whiteout};

enum Outcome {
    /// The image is refused with these words.
    Refused(&'static [&'static str]),
    /// The image is accepted, and its disk is valid.
    Inside,
}
use Outcome::{Inside, Refused};

struct Case {
    cve: &'static str,
    what: &'static str,
    layers: Vec<Vec<u8>>,
    outcome: Outcome,
}

fn one(cve: &'static str, what: &'static str, entries: &[Entry], outcome: Outcome) -> Case {
    raw(cve, what, vec![tar(entries)], outcome)
}

fn raw(cve: &'static str, what: &'static str, layers: Vec<Vec<u8>>, outcome: Outcome) -> Case {
    Case {
        cve,
        what,
        layers,
        outcome,
    }
}

const DOTS: Outcome = Refused(&["leaves the file system"]);

/// Names that lead out of the directory where an archive is unpacked.
fn traversal() -> Vec<Case> {
    let x = |path: &str| [file(path, b"x")];
    vec![
        one(
            "CVE-2001-1267",
            "GNU tar: ../",
            &x("../../etc/cron.d/x"),
            DOTS,
        ),
        one("CVE-2002-0399", "GNU tar: ./..", &x("./../etc/x"), DOTS),
        one("CVE-2005-1918", "GNU tar: /../", &x("/../etc/x"), DOTS),
        one("CVE-2007-4131", "GNU tar: //..", &x("a//..//../x"), DOTS),
        one(
            "CVE-2016-6321",
            "GNU tar: a member that hides behind another",
            &x("etc/motd/../etc/shadow"),
            DOTS,
        ),
        one(
            "CVE-2007-4559",
            "Python: an absolute name",
            &x("/etc/passwd"),
            Inside,
        ),
        one("CVE-2007-4829", "Perl: ..", &x("d/../../x"), DOTS),
        one("CVE-2013-4420", "libtar: ..", &x(".//..//x"), DOTS),
        one(
            "CVE-2018-1000073",
            "RubyGems: a name that leaves",
            &x("gem/../../x"),
            DOTS,
        ),
        one(
            "CVE-2020-4053",
            "Helm: a plugin that leaves",
            &x("../plugin.yaml"),
            DOTS,
        ),
        one(
            "CVE-2021-32804",
            "node-tar: many slashes",
            &x("////etc/passwd"),
            Inside,
        ),
        one("CVE-2021-37713", "node-tar: a drive", &x("C:../x"), Inside),
        one(
            "CVE-2026-26157",
            "BusyBox: .. at the end",
            &[symlink("s", "/etc/pam.d/.."), file("s/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2018-8115",
            "hcsshim: backslashes",
            &x("..\\..\\windows\\x"),
            Inside,
        ),
        one(
            "CVE-2014-9358",
            "Docker: an ID that is a path",
            &x("a/../../../var/lib/docker/x"),
            DOTS,
        ),
    ]
}

/// Links that a later entry writes through.
fn links() -> Vec<Case> {
    let out = || symlink("l", "/etc");
    let up = || symlink("l", "../../../../../../etc");
    let deep = "d".repeat(247);
    let mut chain: Vec<Entry> = Vec::new();
    let mut path = String::new();
    for letter in "abcdefghijklmnop".chars() {
        chain.push(dir(format!("{path}{deep}")));
        chain.push(symlink(format!("{path}{letter}"), &deep));
        path = format!("{path}{letter}/");
    }
    chain.push(symlink(format!("{path}escape"), "../".repeat(17) + "etc"));
    chain.push(file(format!("{path}escape/x"), b"x"));
    vec![
        one(
            "CVE-2002-1216",
            "GNU tar: through a link",
            &[out(), file("l/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2006-6097",
            "GNU tar: a record of names",
            &[entry("names", b'N')],
            Refused(&["type 'N'"]),
        ),
        one(
            "CVE-2011-5325",
            "BusyBox: through a link",
            &[up(), file("l/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2015-8860",
            "node-tar: a link that leaves",
            &[up(), file("l/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2018-12015",
            "Perl: a link and a file of one name",
            &[symlink("l", "/etc/passwd"), file("l", b"x")],
            Inside,
        ),
        one(
            "CVE-2018-20834",
            "node-tar: a hard link, then a file of its name",
            &[hardlink("h", "/etc/passwd"), file("h", b"x")],
            Refused(&["does not exist"]),
        ),
        one(
            "CVE-2018-20990",
            "tar-rs: a hard link that leaves",
            &[hardlink("h", "../../etc/passwd")],
            DOTS,
        ),
        one(
            "CVE-2021-38511",
            "tar-rs: directories through a link",
            &[out(), dir("l/made"), dir("l/made/too")],
            Inside,
        ),
        one(
            "CVE-2021-32803",
            "node-tar: a directory becomes a link",
            &[dir("d"), symlink("d", "/etc"), file("d/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2021-37701",
            "node-tar: names that differ by slashes",
            &[dir("a\\b"), symlink("a\\b", "/etc"), file("a\\b/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2021-37712",
            "node-tar: names that look alike",
            &[
                dir("\u{e9}"),
                symlink("e\u{301}", "/etc"),
                file("e\u{301}/x", b"x"),
            ],
            Inside,
        ),
        one(
            "CVE-2020-29529",
            "go-slug: a chain of links",
            &[
                symlink("a", "b/.."),
                symlink("b", ".."),
                file("a/b/x", b"x"),
            ],
            Inside,
        ),
        one(
            "CVE-2021-21272",
            "ORAS: a hard link to a link",
            &[
                symlink("l", "/etc/passwd"),
                hardlink("h", "l"),
                file("h", b"x"),
            ],
            Inside,
        ),
        one(
            "CVE-2024-0406",
            "archiver: through a link",
            &[symlink("l", "/tmp"), file("l/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2025-4517",
            "Python: a path too long to be resolved",
            &chain,
            Inside,
        ),
        one(
            "CVE-2024-12718",
            "Python: metadata of what is outside",
            &[symlink("l", ".."), dir("l").mode(0o777)],
            Inside,
        ),
        raw(
            "CVE-2025-45582",
            "GNU tar: in two steps",
            vec![
                tar(&[symlink("x", "../../.ssh")]),
                tar(&[file("x/authorized_keys", b"x")]),
            ],
            Inside,
        ),
        one(
            "CVE-2026-26158",
            "BusyBox: a hard link that is not checked",
            &[hardlink("h", "/etc/shadow")],
            Refused(&["does not exist"]),
        ),
        one(
            "CVE-2026-42496",
            "Perl: a link to anywhere",
            &[symlink("l", "/etc/shadow")],
            Inside,
        ),
        one(
            "CVE-2016-5418",
            "libarchive: a hard link with contents",
            &[
                symlink("l", "/etc/passwd"),
                Entry {
                    data: b"xxxx".to_vec(),
                    ..hardlink("h", "l")
                },
            ],
            Refused(&["not a tar archive"]),
        ),
        one(
            "CVE-2021-31566",
            "libarchive: attributes of what a link means",
            &[symlink("l", "/etc")
                .mode(0o777)
                .pax("SCHILY.xattr.user.a", b"b")],
            Inside,
        ),
        raw(
            "CVE-2014-6407",
            "Docker: links of a lower layer",
            vec![
                tar(&[out(), hardlink("k", "l")]),
                tar(&[file("l/x", b"x"), file("k/y", b"y")]),
            ],
            Inside,
        ),
        one(
            "CVE-2014-9356",
            "Docker: an absolute link",
            &[symlink("tmp", "/"), file("tmp/etc/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2015-3629",
            "libcontainer: a link in place of a mount point",
            &[symlink("proc", "/etc"), symlink("dev", "../..")],
            Inside,
        ),
        one(
            "CVE-2018-15664",
            "docker cp: a directory that becomes a link",
            &[dir("d"), whiteout(".wh.d"), symlink("d", "/")],
            Inside,
        ),
        one(
            "CVE-2019-5736",
            "runc: a program that is the runtime",
            &[symlink("bin", "/proc/self/exe")],
            Inside,
        ),
        one(
            "CVE-2019-19921",
            "runc: /proc is elsewhere",
            &[symlink("proc", "/evil/level1")],
            Inside,
        ),
        one(
            "CVE-2020-10696",
            "buildah: through a link",
            &[out(), file("l/cron.d/x", b"x")],
            Inside,
        ),
        one(
            "CVE-2021-29136",
            "umoci: the root is a link",
            &[symlink(".", "/etc")],
            Refused(&["root of the file system"]),
        ),
        one(
            "CVE-2021-29136",
            "umoci: the root is a link, by a slash",
            &[symlink("/", "/etc")],
            Refused(&["root of the file system"]),
        ),
        one(
            "CVE-2021-30465",
            "runc: a directory that becomes a link",
            &[symlink("m", "/"), dir("m"), symlink("m", "/etc")],
            Inside,
        ),
        one(
            "CVE-2021-32760",
            "containerd: permissions through a hard link",
            &[file("f", b"x").mode(0o4755), hardlink("h", "f").mode(0o777)],
            Inside,
        ),
        one(
            "CVE-2024-9676",
            "containers/storage: /etc/passwd is a link",
            &[
                symlink("etc/passwd", "/dev/zero"),
                symlink("etc/group", "/proc/self/mem"),
            ],
            Inside,
        ),
        one(
            "CVE-2026-41579",
            "runc: /dev is a link",
            &[symlink("dev", "/home/user")],
            Inside,
        ),
    ]
}

/// Creates a header block with its checksum.
fn header(change: impl FnOnce(&mut [u8; 512])) -> Vec<u8> {
    let mut block: [u8; 512] = tar(&[file("f", b"")])[..512].try_into().unwrap();
    change(&mut block);
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.to_vec()
}

/// Headers that are invalid, or request excessive resources.
fn headers() -> Vec<Case> {
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

fn layout(case: &Case, at: &Path) {
    image(at, &case.layers);
}

/// Opens an image, writes its disk, and checks the disk with `fsck.erofs`.
fn open(store: &Path, reference: &str, disk: &Path) -> Result<(), String> {
    let store = Store::open(store).unwrap();
    let reference = Reference::parse(reference).unwrap();
    let opened = store.open_image(&reference, &PullOptions::default());
    let opened = opened.map_err(|error| error.to_string())?;
    let mut out = File::create(disk).unwrap();
    for segment in &opened.segments {
        io::copy(&mut segment.open().unwrap(), &mut out).unwrap();
    }
    let checked = Command::new("fsck.erofs")
        .arg("--extract")
        .arg(disk)
        .output()
        .expect("fsck.erofs is needed by this test");
    assert!(checked.status.success(), "{checked:?}");
    Ok(())
}

#[test]
fn known_attacks_stay_inside_or_are_refused() {
    let cases: Vec<_> = [traversal(), links(), headers()]
        .into_iter()
        .flatten()
        .collect();
    assert!(cases.len() >= 60, "{}", cases.len());
    for case in cases {
        let name = format!("{} ({})", case.cve, case.what);
        let work = tempfile::tempdir().unwrap();
        // Files that an escaping archive would reach first.
        let around = work.path().join("a/b/c");
        fs::create_dir_all(&around).unwrap();
        fs::write(work.path().join("witness"), "untouched").unwrap();
        layout(&case, &around.join("layout"));
        let reference = format!("oci:{}", around.join("layout").display());
        let opened = open(&around.join("store"), &reference, &around.join("disk"));
        match (&case.outcome, opened) {
            (Inside, Err(error)) => panic!("{name}: {error}"),
            (Inside, Ok(())) => {}
            (Refused(_), Ok(())) => panic!("{name}: it is accepted"),
            (Refused(words), Err(error)) => {
                for word in *words {
                    assert!(error.contains(word), "{name}: {error}");
                }
                assert!(error.contains("sha256:"), "{name}: {error}");
                assert!(!error.contains('\x1b'), "{name}: {error:?}");
            }
        }
        let outside = |at: &str| fs::read_dir(work.path().join(at)).unwrap().count();
        assert_eq!(
            (outside(""), outside("a"), outside("a/b")),
            (2, 1, 1),
            "{name}"
        );
        let names: Vec<_> = fs::read_dir(&around).unwrap().flatten().collect();
        assert!(names.len() <= 3, "{name}: {names:?}");
    }
}

/// CVE-2022-30631 (Go): an endless sequence of gzip members without contents.
/// CVE-2022-37434 and CVE-2018-25032 (zlib): a header with an extra field, in small
/// pieces.
#[test]
fn gzip_streams_may_be_odd() {
    let layer = tar(&[file("f", vec![7; 10_000])]);
    let mut stored = Vec::new();
    for _ in 0..100_000 {
        stored.extend_from_slice(b"\x1f\x8b\x08\0\0\0\0\0\0\xff\x03\0\0\0\0\0\0\0\0\0");
    }
    let builder = flate2::GzBuilder::new()
        .extra(vec![0x55; 65_000])
        .comment("c");
    let mut encoder = builder.write(stored, flate2::Compression::fast());
    encoder.write_all(&layer).unwrap();
    let stored = encoder.finish().unwrap();
    let work = tempfile::tempdir().unwrap();
    let at = work.path().join("layout");
    // The manifest declares a plain layer; the stream is detected as gzip.
    let mut builder = LayoutBuilder::new(&at, Compression::None).unwrap();
    builder.layer(stored.as_slice()).unwrap();
    builder.finish("latest", Config::default()).unwrap();
    let error = open(
        &work.path().join("store"),
        &format!("oci:{}", at.display()),
        &work.path().join("disk"),
    );
    // All of the stream was read: only the diff_id in the configuration does not match.
    assert!(error.unwrap_err().contains("diff_id"));
}

/// Small archives with large contents.
#[test]
fn bombs_end_at_limits() {
    let limits = |change: fn(&mut Limits)| {
        let mut limits = Limits {
            layer_bytes: 4 << 20,
            entries: 1000,
            index_bytes: 100_000,
            names_bytes: 50_000,
            ratio: 100,
            ratio_floor: 1 << 20,
        };
        change(&mut limits);
        limits
    };
    let zeros = file("zeros", vec![0; 8 << 20]);
    let many: Vec<_> = (0..2000).map(|n| file(format!("{n}"), b"")).collect();
    let names: Vec<_> = (0..500).map(|n| file(format!("{n:0150}"), b"")).collect();
    let xattrs: Vec<_> = (0..500)
        .map(|n| file(format!("{n}"), b"").pax("SCHILY.xattr.user.a", vec![b'x'; 300]))
        .collect();
    let deep: Vec<_> = (0..20)
        .map(|n| file(format!("{n}/").repeat(99) + "f", b""))
        .collect();
    let sparse = file("sparse", b"x")
        .pax("GNU.sparse.size", b"1099511627776")
        .pax("GNU.sparse.map", b"0,1");
    for (layer, limits, word) in [
        (vec![zeros.clone()], limits(|_| {}), "bytes"),
        (
            vec![zeros],
            limits(|l| l.layer_bytes = 1 << 30),
            "times its size",
        ),
        (vec![sparse], limits(|_| {}), "bytes"),
        (many, limits(|_| {}), "entries"),
        (names.clone(), limits(|_| {}), "names and attributes"),
        (names, limits(|l| l.index_bytes = 1 << 30), "bytes of names"),
        (xattrs, limits(|_| {}), "names and attributes"),
        (deep, limits(|_| {}), "files"),
    ] {
        let work = tempfile::tempdir().unwrap();
        let at = work.path().join("layout");
        image(&at, &[tar(&layer)]);
        let store = Store::open(&work.path().join("store"))
            .unwrap()
            .with_limits(limits);
        let reference = Reference::parse(&format!("oci:{}", at.display())).unwrap();
        let opened = store.open_image(&reference, &PullOptions::default());
        let error = opened.unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
}
