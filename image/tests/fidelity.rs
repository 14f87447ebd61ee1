//! Tests that an image's disk has the same contents that other tools produce: the host
//! kernel mounts the disk, `umoci unpack` unpacks the layers, and the trees are compared.
//!
//! The tests need `erofs-utils`, `umoci`, and root for mounting, and are left out without
//! them (`cargo xtask test` installs and requires the tools).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use sm_image::{Digest, PullOptions, Reference, Store};
use support::{Entry, dir, entry, file, hardlink, image, symlink, tar, whiteout};

/// A `security.capability` of revision 2: cap_net_raw, effective.
const CAPABILITY: &[u8] = &[
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed by this test: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Converts an image and writes its disk to one file.
fn disk(reference: &str, work: &Path) -> PathBuf {
    let store = Store::open(&work.join("store")).unwrap();
    let reference = Reference::parse(reference).unwrap();
    let image = store
        .open_image(&reference, &PullOptions::default())
        .unwrap();
    let path = work.join("disk.erofs");
    let mut disk = File::create(&path).unwrap();
    for segment in &image.segments {
        assert_eq!(segment.len % 4096, 0);
        io::copy(&mut segment.open().unwrap(), &mut disk).unwrap();
    }
    path
}

/// All properties of a path that a program in the guest can see.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    size: u64,
    device: u64,
    links: u64,
    /// First path of the same inode.
    same_as: PathBuf,
    contents: Option<Digest>,
    target: Option<PathBuf>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

fn tree(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let path = root.join(&relative);
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            let children = fs::read_dir(&path).unwrap();
            let mut children: Vec<_> = children
                .map(|child| relative.join(child.unwrap().file_name()))
                .collect();
            children.sort_by(|a, b| b.cmp(a));
            pending.extend(children);
        }
        let same_as = inodes.entry(meta.ino()).or_insert_with(|| relative.clone());
        let is_dir = meta.is_dir();
        let is_special = meta.rdev() != 0;
        seen.insert(
            relative.clone(),
            Seen {
                mode: meta.mode(),
                owner: (meta.uid(), meta.gid()),
                mtime: (meta.mtime(), meta.mtime_nsec()),
                // Size and links of directories depend on the file system.
                size: if is_dir { 0 } else { meta.len() },
                links: if is_dir { 0 } else { meta.nlink() },
                device: if is_special { meta.rdev() } else { 0 },
                same_as: same_as.clone(),
                contents: meta
                    .is_file()
                    .then(|| Digest::of(&fs::read(&path).unwrap())),
                target: fs::read_link(&path).ok(),
                xattrs: xattrs(&path),
            },
        );
    }
    seen
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65536];
    let len = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 65536];
            let len = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
            value.truncate(len);
            (name.to_vec(), value)
        })
        .collect()
}

/// A mounted disk.
struct Mount(PathBuf);

impl Mount {
    fn new(disk: &Path, at: PathBuf) -> Self {
        fs::create_dir(&at).unwrap();
        let (disk, target) = (disk.to_str().unwrap(), at.to_str().unwrap());
        run("mount", &["-t", "erofs", "-o", "loop,ro", disk, target]);
        Self(at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn compare(layout: &Path, tag: &str) {
    if !sm_test_needs::root() || !sm_test_needs::programs(&["fsck.erofs", "umoci"]) {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let layout = layout.to_str().unwrap();
    let disk = disk(&format!("oci:{layout}:{tag}"), work.path());
    run("fsck.erofs", &[disk.to_str().unwrap()]);
    let bundle = work.path().join("bundle");
    let image = format!("{layout}:{tag}");
    run(
        "umoci",
        &["unpack", "--image", &image, bundle.to_str().unwrap()],
    );
    let mount = Mount::new(&disk, work.path().join("mnt"));
    let (ours, theirs) = (tree(&mount.0), tree(&bundle.join("rootfs")));
    for (path, theirs) in &theirs {
        assert_eq!(ours.get(path), Some(theirs), "{path:?}");
    }
    let more: Vec<_> = ours
        .keys()
        .filter(|path| !theirs.contains_key(*path))
        .collect();
    assert!(more.is_empty(), "only on our disk: {more:?}");
}

fn kinds_and_metadata() -> Vec<Entry> {
    let long = format!("long/{}/{}", "d".repeat(200), "f".repeat(255));
    let mut entries = vec![
        dir("./").mode(0o711),
        file("empty", b""),
        file("one", b"1").mode(0o4755),
        file("block-1", vec![1; 4095]).mode(0o2755),
        file("block", vec![2; 4096]).owner(100_000, 70_000),
        file("block+1", vec![3; 4097]).mode(0),
        file(
            "large",
            (0..300_000u32)
                .flat_map(u32::to_le_bytes)
                .collect::<Vec<_>>(),
        ),
        file("zeros", vec![0; 3 << 20]),
        file("fraction", b"x").pax("mtime", "1600000000.123456789"),
        file("before-1970", b"x").pax("mtime", "-1000.25"),
        file("big-owner", b"x")
            .pax("uid", "4000000000")
            .pax("gid", "3000000000"),
        symlink("absolute", "/etc/passwd"),
        symlink("up", "../../../outside"),
        symlink("long-link", "t/".repeat(1000)),
        // Archivers repeat the header; containerd uses the last one, umoci the first.
        hardlink("same-as-one", "one").mode(0o4755),
        entry("fifo", b'6'),
        entry("null", b'3').device(1, 3).mode(0o666),
        entry("disk", b'4').device(259, 70_000),
        dir("sticky").mode(0o1777).owner(1, 2),
        file("sticky/Case", b"1"),
        file("sticky/case", b"2"),
        file(b"not-utf8-\xff\xfe", b"x"),
        file("new\nline", b"x"),
        dir("long"),
        dir(format!("long/{}", "d".repeat(200))),
        file(long, b"x"),
        file("cap", b"x").pax("SCHILY.xattr.security.capability", CAPABILITY),
        file("xattrs", b"x")
            .pax("SCHILY.xattr.user.a", b"one")
            .pax("SCHILY.xattr.user.long", vec![b'v'; 2500])
            .pax("SCHILY.xattr.trusted.t", b"\0\x01\n="),
        dir("xattr-dir").pax("SCHILY.xattr.user.d", b"dir"),
        dir("many"),
    ];
    entries.extend((0..2000).map(|n| file(format!("many/file-{n:05}"), format!("{n}"))));
    entries
}

#[test]
fn kinds_and_metadata_survive() {
    let work = tempfile::tempdir().unwrap();
    image(work.path(), &[tar(&kinds_and_metadata())]);
    compare(work.path(), "latest");
}

#[test]
fn layers_are_merged_as_others_do() {
    let work = tempfile::tempdir().unwrap();
    let lower = [
        dir("usr"),
        dir("usr/lib"),
        symlink("lib", "usr/lib"),
        file("gone", b"x"),
        dir("full"),
        file("full/a", b"a"),
        dir("full/b"),
        file("full/b/c", b"c"),
        dir("opaque").mode(0o700),
        file("opaque/old", b"old"),
        dir("opaque/olddir"),
        file("opaque/olddir/x", b"x"),
        dir("to-file"),
        file("to-file/x", b"x"),
        file("to-dir", b"x"),
        symlink("link-to-dir", "usr"),
        file("to-link", b"x"),
        file("first", b"shared"),
        file("kept", b"kept"),
        hardlink("kept-too", "kept"),
        dir("changed").mode(0o700),
        file("changed/inside", b"x"),
        file("again", b"1"),
    ];
    let middle = [
        whiteout(".wh.gone"),
        whiteout(".wh.full"),
        dir("opaque").mode(0o755),
        file("opaque/before", b"new"),
        whiteout("opaque/.wh..wh..opq"),
        file("opaque/after", b"new"),
        file("to-file", b"now a file"),
        dir("to-dir"),
        file("to-dir/x", b"x"),
        dir("link-to-dir"),
        file("link-to-dir/x", b"x"),
        symlink("to-link", "first"),
        hardlink("second", "first"),
        whiteout(".wh.kept"),
        dir("changed").mode(0o750).owner(5, 6),
        whiteout("again"),
    ];
    let upper = [
        file("lib/through-a-link", b"x"),
        file("usr/lib/direct", b"x"),
        dir("full"),
        file("full/new", b"x"),
        hardlink("third", "second"),
        file("again", b"3"),
        whiteout("nothing/.wh.there"),
    ];
    image(work.path(), &[tar(&lower), tar(&middle), tar(&upper[..6])]);
    compare(work.path(), "latest");
}

/// Sparse files in all formats that GNU tar writes. (umoci does not support all of them.)
#[test]
fn sparse_files_survive() {
    if !sm_test_needs::programs(&["fsck.erofs", "tar"]) {
        return;
    }
    use std::os::unix::fs::FileExt as _;
    let work = tempfile::tempdir().unwrap();
    let root = work.path().join("root");
    fs::create_dir(&root).unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    for n in 0..40u64 {
        sparse.write_all_at(&[7; 5000], n * 300_000).unwrap();
    }
    sparse.set_len(20 << 20).unwrap();
    fs::write(root.join("zafter"), b"after").unwrap();
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let tar = Command::new("tar")
            .args(["--sparse", "--sort=name", "-C"])
            .arg(&root)
            .args(format)
            .args(["-cf", "-", "."])
            .output()
            .unwrap();
        assert!(
            tar.status.success() && tar.stdout.len() < 1 << 20,
            "{format:?}"
        );
        let layout = work.path().join(format.join(""));
        image(&layout, &[tar.stdout]);
        let here = tempfile::tempdir().unwrap();
        let disk = disk(&format!("oci:{}:latest", layout.display()), here.path());
        run("fsck.erofs", &[disk.to_str().unwrap()]);
        if sm_test_needs::root() {
            let mount = Mount::new(&disk, here.path().join("mnt"));
            for name in ["sparse", "zafter"] {
                let read = |at: &Path| fs::read(at.join(name)).unwrap();
                assert!(read(&mount.0) == read(&root), "{format:?} {name}");
            }
        }
    }
}

#[test]
fn a_directory_is_an_image_of_itself() {
    if !sm_test_needs::programs(&["fsck.erofs", "tar"]) {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let root = work.path().join("root");
    fs::create_dir_all(root.join("d")).unwrap();
    fs::write(root.join("d/file"), vec![9; 10_000]).unwrap();
    fs::hard_link(root.join("d/file"), root.join("second")).unwrap();
    std::os::unix::fs::symlink("d/file", root.join("link")).unwrap();
    let disk = disk(&format!("rootfs:{}", root.display()), work.path());
    run("fsck.erofs", &[disk.to_str().unwrap()]);
    if sm_test_needs::root() {
        let mount = Mount::new(&disk, work.path().join("mnt"));
        assert_eq!(tree(&mount.0), tree(&root));
    }
}
