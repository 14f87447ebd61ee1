//! Tests of invalid and malicious images: each is either refused with an error that names
//! the layer and the entry, and leaves no data, or has the one safe meaning that other
//! runtimes give it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod support;

use std::fs;
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};
use sm_image::{Digest, Error, Limits, PullOptions, Reference, Store};
use support::{dir, entry, file, hardlink, image, symlink, tar, whiteout};

/// Returns the paths of all objects in the store.
fn left_in(store: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for part in ["tmp", "disks", "refs", "layers"] {
        for path in fs::read_dir(store.join(part)).unwrap() {
            found.push(format!("{part}/{}", path.unwrap().file_name().display()));
        }
    }
    found
}

/// Opens `layout` in a new store. Its parent directory must not change.
fn open_with(layout: &Path, limits: Limits) -> Result<(), Error> {
    let work = tempfile::tempdir().unwrap();
    let root = work.path().join("store");
    let store = Store::open(&root).unwrap().with_limits(limits);
    let reference = Reference::parse(&format!("oci:{}", layout.display())).unwrap();
    let result = store.open_image(&reference, &PullOptions::default());
    let around: Vec<_> = fs::read_dir(work.path()).unwrap().collect();
    assert_eq!(around.len(), 1, "something was written outside the store");
    if result.is_err() {
        assert!(
            store.list().unwrap().is_empty(),
            "an image is listed by half"
        );
        let left = left_in(&root);
        // A complete layer may remain for the next attempt.
        assert!(
            left.iter().all(|name| name.starts_with("layers/")),
            "left behind: {left:?}"
        );
    }
    result.map(drop)
}

fn open_layers(layers: &[Vec<u8>]) -> Result<(), Error> {
    let layout = tempfile::tempdir().unwrap();
    image(layout.path(), layers);
    open_with(layout.path(), Limits::default())
}

#[track_caller]
fn refused(layers: &[Vec<u8>], named: &str, reason: &str) {
    let error = open_layers(layers).expect_err("it is refused");
    let text = error.to_string();
    assert!(
        matches!(error, Error::Entry { .. } | Error::Layer { .. }),
        "{text}"
    );
    assert!(text.contains("layer sha256:"), "{text}");
    assert!(text.contains(named), "{text}");
    assert!(text.contains(reason), "{text}");
}

#[track_caller]
fn accepted(layers: &[Vec<u8>]) {
    open_layers(layers).unwrap();
}

#[test]
fn paths_outside_the_root() {
    for path in ["../x", "a/../../x", "/../x", "a/..", "./../x"] {
        refused(&[tar(&[file(path, b"x")])], path, "\"..\"");
    }
    for path in ["../d", "a/../../d"] {
        refused(&[tar(&[dir(path)])], path, "\"..\"");
    }
    refused(&[tar(&[symlink("../l", "x")])], "../l", "\"..\"");
}

#[test]
fn hard_links_outside_the_root() {
    for target in ["../outside", "/../outside", "a/../../x"] {
        refused(&[tar(&[hardlink("inside", target)])], "inside", "\"..\"");
    }
    // A target without ".." is inside the image, where it does not exist.
    refused(
        &[tar(&[hardlink("h", "/etc/passwd")])],
        "h",
        "does not exist",
    );
    refused(&[tar(&[dir("d"), hardlink("h", "d")])], "h", "directory");
    refused(
        &[tar(&[hardlink("self", "self")])],
        "self",
        "does not exist",
    );
}

#[test]
fn links_cannot_lead_out() {
    // The contents are valid; files written through the links stay in the image.
    accepted(&[tar(&[
        symlink("abs", "/etc"),
        symlink("up", "../../../../../.."),
        file("abs/cron.d", b"x"),
        file("up/escaped", b"x"),
        hardlink("h", "up/escaped"),
    ])]);
    accepted(&[
        tar(&[symlink("l", "/../../tmp")]),
        tar(&[file("l/evil", b"x"), whiteout("l/.wh.evil2")]),
    ]);
    let circle = [symlink("a", "b"), symlink("b", "a"), file("a/x", b"x")];
    refused(&[tar(&circle)], "a/x", "too many symbolic links");
    refused(
        &[tar(&[symlink("nothing", "")])],
        "nothing",
        "link without a target",
    );
}

#[test]
fn invalid_whiteouts() {
    refused(&[tar(&[whiteout(".wh.")])], ".wh.", "whiteout");
    refused(&[tar(&[whiteout("d/.wh...")])], "d/.wh...", "whiteout");
    refused(&[tar(&[whiteout("../.wh.x")])], "../.wh.x", "\"..\"");
    // Whiteouts of a parent, of nothing, and of an entry of the same layer are harmless.
    accepted(&[
        tar(&[dir("d"), file("d/x", b"x")]),
        tar(&[
            whiteout(".wh.d"),
            file("d/new", b"x"),
            whiteout("no/.wh.thing"),
        ]),
    ]);
    accepted(&[tar(&[whiteout(".wh..wh..opq"), file("x", b"x")])]);
}

#[test]
fn names_that_do_not_fit() {
    let long = "n".repeat(256);
    refused(&[tar(&[file(&long, b"x")])], &long, "longer than 255");
    let deep = "d/".repeat(2100) + "x";
    refused(&[tar(&[file(&deep, b"x")])], "d/d/", "longer than 4095");
    refused(
        &[tar(&[symlink("l", "t/".repeat(2100))])],
        "\"l\"",
        "longer than 4095",
    );
    let zero = file("x", b"x").pax("path", b"a\0b");
    refused(&[tar(&[zero])], "a\\u{0}b", "zero byte");
    accepted(&[tar(&[file("d/".repeat(2000) + "x", b"x")])]);
}

#[test]
fn impossible_structures() {
    refused(
        &[tar(&[file("f", b"x"), file("f/under", b"x")])],
        "f/under",
        "not a directory",
    );
    // A slash does not make a file of this type a directory.
    refused(&[tar(&[file("./", b"x")])], "\"./\"", "root");
    refused(&[tar(&[symlink(".", "x")])], "\".\"", "root");
    refused(&[tar(&[entry("odd", b'Z')])], "odd", "not known");
    let many = (0..3000).map(|n| (format!("user.{n}"), vec![b'x'; 100]));
    let many = many.fold(file("x", b""), |entry, (name, value)| {
        entry.pax(&format!("SCHILY.xattr.{name}"), value)
    });
    refused(&[tar(&[many])], "\"x\"", "64 KiB");
    let long = format!("SCHILY.xattr.user.{}", "n".repeat(300));
    refused(&[tar(&[file("x", b"").pax(&long, b"v")])], "\"x\"", "255");
}

#[test]
fn devices_and_duplicates_are_only_metadata() {
    accepted(&[tar(&[
        entry("dev/mem", b'3').device(1, 1).mode(0o666),
        entry("dev/sda", b'4').device(8, 0),
        entry("fifo", b'6'),
        file("twice", b"1"),
        file("twice", b"2"),
        dir("twice"),
        symlink("twice", "x"),
        file("/leading", b"x"),
        file("././/dots", b"x"),
    ])]);
}

#[test]
fn wrong_sizes() {
    for size in [1 << 20, 0o77_777_777_777, 513] {
        let lie = file("liar", b"short").size(size);
        refused(&[tar(&[lie])[..1024].to_vec()], "liar", "");
    }
    let lie = file("liar", b"x").pax("size", b"18446744073709551615");
    refused(&[tar(&[lie])], "liar", "");
    let sparse = file("holes", b"x")
        .pax("GNU.sparse.size", b"18446744073709551615")
        .pax("GNU.sparse.map", b"0,1");
    refused(&[tar(&[sparse])], "holes", "bytes");
    let backwards = file("holes", vec![1; 20])
        .pax("GNU.sparse.size", b"100")
        .pax("GNU.sparse.map", b"50,10,0,10");
    refused(&[tar(&[backwards])], "holes", "sparse");
}

#[test]
fn streams_that_are_not_archives() {
    refused(
        &[b"this is not a tar archive, not at all".repeat(100)],
        "",
        "not a tar",
    );
    let mut header = tar(&[file("x", b"data")]);
    header[2] ^= 1;
    refused(&[header], "", "checksum");
    let whole = tar(&[file("cut", vec![1; 5000])]);
    refused(&[whole[..2000].to_vec()], "cut", "truncated");
    refused(&[whole[..700].to_vec()], "cut", "truncated");
    let extended = tar(&[file("x", b"").pax("comment", vec![b'c'; 2 << 20])]);
    refused(&[extended], "", "larger than 1 MiB");
    let record = b"99999999999 path=x\n";
    let mut bad_pax = tar(&[file("p", record)]);
    bad_pax[156] = b'x';
    let sum: u32 = bad_pax[..512].iter().map(|byte| u32::from(*byte)).sum();
    let old: u32 = bad_pax[148..156].iter().map(|byte| u32::from(*byte)).sum();
    let text = format!("{:06o}\0 ", sum - old + 256);
    bad_pax[148..156].copy_from_slice(text.as_bytes());
    refused(&[bad_pax], "", "pax header is malformed");
}

#[test]
fn bombs_stop_at_limits() {
    let layout = tempfile::tempdir().unwrap();
    image(layout.path(), &[tar(&[file("zeros", vec![0; 40 << 20])])]);
    let mut small = Limits::default();
    small.layer_bytes = 10 << 20;
    let text = open_with(layout.path(), small).unwrap_err().to_string();
    assert!(text.contains("zeros") && text.contains("bytes"), "{text}");
    let mut ratio = Limits::default();
    ratio.ratio = 100;
    ratio.ratio_floor = 1 << 20;
    let text = open_with(layout.path(), ratio).unwrap_err().to_string();
    assert!(text.contains("100 times"), "{text}");
    let many = tempfile::tempdir().unwrap();
    let entries: Vec<_> = (0..101).map(|n| file(format!("{n}"), b"")).collect();
    image(many.path(), &[tar(&entries)]);
    let mut few = Limits::default();
    few.entries = 100;
    let text = open_with(many.path(), few).unwrap_err().to_string();
    assert!(text.contains("more than 100 entries"), "{text}");
}

/// A layout with a valid layer, and the paths of its blobs.
struct Layout(tempfile::TempDir);

impl Layout {
    fn new() -> Self {
        let layout = tempfile::tempdir().unwrap();
        image(layout.path(), &[tar(&[file("x", vec![7; 100_000])])]);
        Self(layout)
    }

    fn blob(&self, digest: &Value) -> std::path::PathBuf {
        let hex = digest
            .as_str()
            .unwrap()
            .strip_prefix("sha256:")
            .unwrap()
            .to_owned();
        self.0.path().join("blobs/sha256").join(hex)
    }

    fn read(&self, path: &Path) -> Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    fn index(&self) -> Value {
        self.read(&self.0.path().join("index.json"))
    }

    fn manifest(&self) -> Value {
        self.read(&self.blob(&self.index()["manifests"][0]["digest"]))
    }

    /// Replaces the image's manifest.
    fn set_manifest(&self, manifest: &Value) {
        let bytes = serde_json::to_vec(manifest).unwrap();
        let digest = Digest::of(&bytes);
        fs::write(
            self.0.path().join("blobs/sha256").join(digest.hex()),
            &bytes,
        )
        .unwrap();
        let mut index = self.index();
        index["manifests"][0]["digest"] = json!(digest.to_string());
        index["manifests"][0]["size"] = json!(bytes.len());
        fs::write(self.0.path().join("index.json"), index.to_string()).unwrap();
    }

    #[track_caller]
    fn refused(&self, reason: &str) {
        let text = open_with(self.0.path(), Limits::default())
            .unwrap_err()
            .to_string();
        assert!(text.contains(reason), "{text}");
    }
}

#[test]
fn corrupt_blobs() {
    let layout = Layout::new();
    let layer = layout.blob(&layout.manifest()["layers"][0]["digest"]);
    let good = fs::read(&layer).unwrap();
    let name = format!("sha256:{}", layer.file_name().unwrap().display());

    fs::write(&layer, &good[..good.len() - 20]).unwrap();
    layout.refused(&name);
    layout.refused("bytes instead of");
    let mut more = fs::OpenOptions::new().append(true).open(&layer).unwrap();
    more.write_all(&[0; 40]).unwrap();
    layout.refused("more than");
    let mut flipped = good.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    fs::write(&layer, &flipped).unwrap();
    layout.refused("its contents have digest");
    fs::remove_file(&layer).unwrap();
    layout.refused("missing");
    fs::write(&layer, &good).unwrap();
    open_with(layout.0.path(), Limits::default()).unwrap();
}

#[test]
fn invalid_documents() {
    let layout = Layout::new();
    let good = layout.manifest();
    let with = |edit: &dyn Fn(&mut Value)| {
        let mut manifest = good.clone();
        edit(&mut manifest);
        layout.set_manifest(&manifest);
    };
    with(&|m| m["layers"][0]["mediaType"] = json!("application/x-shellscript"));
    layout.refused("application/x-shellscript");
    with(&|m| m["layers"][0]["digest"] = json!("sha256:../../../../etc/passwd"));
    layout.refused("");
    with(&|m| m["layers"][0]["digest"] = json!("md5:d41d8cd98f00b204e9800998ecf8427e"));
    layout.refused("");
    with(&|m| m["layers"][0]["size"] = json!(5));
    layout.refused("more than 5 bytes");
    with(&|m| m["layers"][0]["size"] = json!(-1));
    layout.refused("manifest");
    with(&|m| m["layers"] = json!([]));
    layout.refused("diff_ids");
    with(&|m| m["layers"] = json!(vec![m["layers"][0].clone(); 2]));
    layout.refused("diff_ids");
    with(&|m| m["layers"] = json!(vec![m["layers"][0].clone(); 200]));
    layout.refused("more than 127 layers");
    with(&|m| m["config"]["size"] = json!(1u64 << 60));
    layout.refused("bytes instead of");
    with(&|m| m["config"] = m["layers"][0].clone());
    layout.refused("configuration");
    layout.set_manifest(&json!([1, 2, 3]));
    layout.refused("not an object");
    layout.set_manifest(&json!({"manifests": [], "schemaVersion": 2}));
    layout.refused("an index, but called");

    // The diff_id in the configuration is not that of the layer.
    let config = layout.blob(&good["config"]["digest"]);
    let mut changed = layout.read(&config);
    changed["rootfs"]["diff_ids"][0] = json!(Digest::of(b"else").to_string());
    let bytes = serde_json::to_vec(&changed).unwrap();
    let digest = Digest::of(&bytes);
    fs::write(config.with_file_name(digest.hex()), &bytes).unwrap();
    with(&|m| {
        m["config"]["digest"] = json!(digest.to_string());
        m["config"]["size"] = json!(bytes.len());
    });
    layout.refused("diff_id");

    fs::write(layout.0.path().join("index.json"), "{").unwrap();
    layout.refused("index");
    // Opening a pipe without a writer would block.
    let index = layout.0.path().join("index.json");
    fs::remove_file(&index).unwrap();
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &index, mode).unwrap();
    layout.refused("open");
    fs::remove_file(layout.0.path().join("index.json")).unwrap();
    layout.refused("not an OCI layout");
}
