//! Tests with archives like those of published vulnerabilities in tar readers, image
//! tools and container engines. Each is either refused with the reason, or affects only
//! the image. (The CVE names describe the kind of archive; `sm` shares no code with the
//! vulnerable programs.)

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod headers;
mod links;
#[path = "../support/mod.rs"]
mod support;
mod traversal;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;
use std::process::Command;

use headers::headers;
use links::links;
use sm_image::{Compression, Config, LayoutBuilder, Limits, PullOptions, Reference, Store};
use support::{Entry, file, image, tar};
use traversal::traversal;

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
    if !sm_test_needs::programs(&["fsck.erofs"]) {
        return;
    }
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
        let mut limits = Limits::default();
        limits.layer_bytes = 4 << 20;
        limits.entries = 1000;
        limits.index_bytes = 100_000;
        limits.names_bytes = 50_000;
        limits.ratio = 100;
        limits.ratio_floor = 1 << 20;
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
