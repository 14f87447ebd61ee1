//! Tests that compare images with the view of erofs-utils.
#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a failed expectation is a failed test"
)]

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use sm_erofs::{
    BLOCK, Data, Entry, EntryKind, Error, FileTree as _, Kind, Meta, Options, ROOT, Tree, write,
};

/// Reads an entire image with `fsck.erofs` and extracts it to `to`.
fn extract(image: &Path, to: &Path) {
    let output = Command::new("fsck.erofs")
        .arg(format!("--extract={}", to.display()))
        .arg("--preserve-perms")
        .arg(image)
        .output()
        .expect("fsck.erofs is needed by this test (Debian: erofs-utils)");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn image_of(tree: &Tree, path: &Path) -> Vec<u8> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    let len = write(tree, &file, &Options::default()).unwrap();
    let bytes = fs::read(path).unwrap();
    assert_eq!(bytes.len() as u64, len);
    assert_eq!(len % BLOCK, 0);
    bytes
}

/// Sizes around all boundaries.
const SIZES: [usize; 9] = [0, 1, 2048, 4031, 4032, 4033, 4096, 10_000, (1 << 20) + 4097];

fn contents(size: usize) -> Vec<u8> {
    (0..size)
        .map(|at| (at * 7 % 251 + 1).to_le_bytes()[0])
        .collect()
}

/// Creates a directory with all kinds of files that need no privilege.
fn make(at: &Path) {
    fs::create_dir_all(at.join("files/empty")).unwrap();
    for size in SIZES {
        fs::write(at.join(format!("files/{size}")), contents(size)).unwrap();
    }
    fs::hard_link(at.join("files/2048"), at.join("another")).unwrap();
    symlink("files/2048", at.join("link")).unwrap();
    symlink("x".repeat(4090), at.join("long-link")).unwrap();
    let mode = fs::Permissions::from_mode(0o751);
    fs::set_permissions(at.join("files/1"), mode).unwrap();
    fs::create_dir(at.join("many")).unwrap();
    for n in 0..500 {
        fs::write(at.join(format!("many/file-{n:03}")), b"x").unwrap();
    }
}

/// Asserts that two directories have the same contents.
fn same(left: &Path, right: &Path) {
    let list = |path: &Path| {
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    assert_eq!(list(left), list(right), "{left:?}");
    for name in list(left) {
        let (left, right) = (left.join(&name), right.join(&name));
        let (a, b) = (
            fs::symlink_metadata(&left).unwrap(),
            fs::symlink_metadata(&right).unwrap(),
        );
        assert_eq!(a.file_type(), b.file_type(), "{left:?}");
        if a.is_symlink() {
            assert_eq!(
                fs::read_link(&left).unwrap(),
                fs::read_link(&right).unwrap()
            );
            continue;
        }
        assert_eq!(a.mode(), b.mode(), "{left:?}");
        assert_eq!(
            (a.mtime(), a.mtime_nsec()),
            (b.mtime(), b.mtime_nsec()),
            "{left:?}"
        );
        if a.is_dir() {
            same(&left, &right);
        } else {
            assert!(
                fs::read(&left).unwrap() == fs::read(&right).unwrap(),
                "{left:?}"
            );
        }
    }
}

#[test]
fn a_directory_is_restored_from_its_image() {
    if !sm_test_needs::programs(&["fsck.erofs"]) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let source = place.path().join("source");
    make(&source);
    let tree = Tree::from_directory(&source).unwrap();
    let first = image_of(&tree, &place.path().join("image"));
    let to = place.path().join("to");
    extract(&place.path().join("image"), &to);
    same(&source, &to);
    let tree = Tree::from_directory(&source).unwrap();
    let second = image_of(&tree, &place.path().join("again"));
    assert!(first == second, "the same tree gives the same bytes");
}

#[test]
fn hard_links_are_one_inode() {
    let place = tempfile::tempdir().unwrap();
    let source = place.path().join("source");
    make(&source);
    let tree = Tree::from_directory(&source).unwrap();
    let mut root = Vec::new();
    tree.children(ROOT, &mut root);
    let find = |wanted: &[u8], names: &[(&[u8], u32)]| {
        names.iter().find(|(name, _)| *name == wanted).unwrap().1
    };
    let mut files = Vec::new();
    tree.children(find(b"files", &root), &mut files);
    assert_eq!(find(b"another", &root), find(b"2048", &files));
    let file = Kind::File {
        data: Data::Image,
        size: 2048,
    };
    assert_eq!(tree.kind(find(b"another", &root)), file);
}

#[cfg(feature = "tar")]
#[test]
fn an_image_of_a_tar_stream_has_its_contents() {
    if !sm_test_needs::programs(&["fsck.erofs"]) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let source = place.path().join("source");
    make(&source);
    // Pax archives have times to the nanosecond.
    let archive = Command::new("tar")
        .args(["--format=pax", "--numeric-owner", "-c", "-C"])
        .arg(&source)
        .arg(".")
        .output()
        .unwrap();
    assert!(archive.status.success());
    let tree = Tree::from_tar(&archive.stdout[..], tempfile::tempfile().unwrap()).unwrap();
    image_of(&tree, &place.path().join("image"));
    let to = place.path().join("to");
    extract(&place.path().join("image"), &to);
    same(&source, &to);
    let cut = &archive.stdout[..archive.stdout.len() / 2];
    let error = Tree::from_tar(cut, tempfile::tempfile().unwrap()).unwrap_err();
    assert!(matches!(error, Error::Tar(_)), "{error:?}");
}

#[test]
fn contents_may_lie_behind_the_image() {
    if !sm_test_needs::programs(&["fsck.erofs"]) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("disk");
    let mut tree = Tree::new();
    for (name, offset, size) in [(b"a", 0, 5000), (b"b", 2 * BLOCK, 3)] {
        let kind = EntryKind::Behind { offset, size };
        tree.add(name, Entry::new(kind)).unwrap();
    }
    let mut disk = File::options()
        .read(true)
        .append(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    // The file is written at offsets, so it must not be in append mode.
    let image = File::options().read(true).write(true).open(&path).unwrap();
    let behind = 3 * BLOCK;
    let len = write(&tree, &image, &Options::default().behind(behind)).unwrap();
    let mut data = contents(5000);
    data.resize(8192, 0);
    data.extend_from_slice(b"end");
    data.resize(12_288, 0);
    disk.write_all(&data).unwrap();
    assert_eq!(disk.metadata().unwrap().len(), len + behind);
    let to = place.path().join("to");
    extract(&path, &to);
    assert_eq!(fs::read(to.join("a")).unwrap(), contents(5000));
    assert_eq!(fs::read(to.join("b")).unwrap(), b"end");
}

#[test]
fn uuid_owner_and_devices_are_read_by_dump_erofs() {
    if !sm_test_needs::programs(&["dump.erofs"]) {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("image");
    let mut tree = Tree::new();
    let meta = Meta {
        mode: 0o4600,
        uid: 70_000,
        gid: 80_000,
        mtime: (-5, 7),
    };
    let device = Entry::new(EntryKind::CharDevice(5, 1)).meta(meta);
    tree.add(b"dev/console", device).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let uuid = *b"0123456789abcdef";
    write(&tree, &file, &Options::default().uuid(uuid)).unwrap();
    let mut found = [0; 16];
    file.read_exact_at(&mut found, 1024 + 48).unwrap();
    assert_eq!(found, uuid);
    let output = Command::new("dump.erofs")
        .args(["--path=/dev/console", path.to_str().unwrap()])
        .output()
        .expect("dump.erofs is needed by this test (Debian: erofs-utils)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("Uid: 70000   Gid: 80000"), "{text}");
    // dump.erofs prints three digits of the mode; the inode contains the fourth.
    assert!(text.contains("Access: 0600"), "{text}");
    let nid = text.split("NID: ").nth(1).unwrap();
    let nid: u64 = nid.split_whitespace().next().unwrap().parse().unwrap();
    let mut mode = [0; 2];
    file.read_exact_at(&mut mode, nid * 32 + 4).unwrap();
    assert_eq!(u16::from_le_bytes(mode), 0o024_600);
}

#[test]
fn invalid_paths_are_refused() {
    let file = || Entry::new(EntryKind::Bytes(b"x".to_vec()));
    let mut tree = Tree::new();
    tree.add(b"file", file()).unwrap();
    let long = [b'n'; 256];
    for path in [&b"a/../b"[..], b"a\0b", b"file/below", b"/", &long] {
        let error = tree.add(path, file()).unwrap_err();
        assert!(matches!(error, Error::Entry { .. }), "{error}");
    }
    assert!(tree.link(b"x", b"nothing").is_err());
    assert!(tree.link(b"x", b"/").is_err());
    // A directory that replaces a directory keeps its contents; a file replaces it.
    tree.add(b"d/f", file()).unwrap();
    tree.add(b"d", Entry::new(EntryKind::Directory)).unwrap();
    tree.link(b"g", b"d/f").unwrap();
    tree.add(b"d", file()).unwrap();
    assert!(tree.link(b"x", b"d/f").is_err());
}

#[test]
fn a_file_that_became_shorter_is_an_error() {
    let place = tempfile::tempdir().unwrap();
    let source = place.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("f"), b"contents").unwrap();
    let tree = Tree::from_directory(&source).unwrap();
    fs::write(source.join("f"), b"con").unwrap();
    let error = write(&tree, &tempfile::tempfile().unwrap(), &Options::default()).unwrap_err();
    assert!(matches!(error, Error::Read(_)), "{error:?}");
}

fn refusal(tree: &Tree) -> String {
    let file = tempfile::tempfile().unwrap();
    write(tree, &file, &Options::default())
        .unwrap_err()
        .to_string()
}

#[test]
fn values_beyond_the_format_are_refused() {
    let huge = |tree: &mut Tree, name: &[u8]| {
        let kind = EntryKind::Extent {
            file: tempfile::tempfile().unwrap().into(),
            offset: 0,
            size: u64::MAX,
        };
        tree.add(name, Entry::new(kind)).unwrap();
    };
    let mut tree = Tree::new();
    huge(&mut tree, b"a");
    assert!(refusal(&tree).contains("16 TiB"));
    huge(&mut tree, b"b");
    assert!(refusal(&tree).contains("16 TiB"));
    // Truncated to 12 bits, this would be the number of /dev/null.
    let mut tree = Tree::new();
    tree.add(b"d", Entry::new(EntryKind::CharDevice(4097, 3)))
        .unwrap();
    assert!(refusal(&tree).contains("device number"));
}

#[test]
fn the_last_value_of_an_attribute_counts() {
    let file = Entry::new(EntryKind::Bytes(Vec::new()));
    let file = file.xattr("user.a", "2").xattr("user.b", "x");
    let mut tree = Tree::new();
    let id = tree.add(b"f", file.xattr("user.a", "1")).unwrap();
    let mut attributes = Vec::new();
    tree.xattrs(tree.xattr_set(id), &mut attributes);
    assert_eq!(attributes, [(&b"user.a"[..], &b"1"[..]), (b"user.b", b"x")]);
}

/// A tree whose answers change between calls.
struct Liar {
    tree: Tree,
    asked: std::cell::Cell<u32>,
    turn: u32,
}

impl sm_erofs::FileTree for Liar {
    fn inode_count(&self) -> usize {
        self.tree.inode_count()
    }

    fn kind(&self, id: sm_erofs::InodeId) -> Kind<'_> {
        self.asked.set(self.asked.get() + 1);
        match (self.asked.get() > self.turn, self.tree.kind(id)) {
            (true, Kind::File { data, .. }) => Kind::File {
                data,
                size: u64::MAX,
            },
            (_, kind) => kind,
        }
    }

    fn meta(&self, id: sm_erofs::InodeId) -> Meta {
        self.tree.meta(id)
    }

    fn parent(&self, _: sm_erofs::InodeId) -> sm_erofs::InodeId {
        u32::MAX
    }

    fn children<'t>(
        &'t self,
        directory: sm_erofs::InodeId,
        children: &mut Vec<(&'t [u8], sm_erofs::InodeId)>,
    ) {
        self.tree.children(directory, children);
        if self.asked.get() > self.turn {
            children.push((b"zz", u32::MAX - 1));
        }
    }

    fn xattr_set(&self, _: sm_erofs::InodeId) -> u32 {
        self.asked.get()
    }

    fn xattr_sets(&self) -> usize {
        self.tree.xattr_sets()
    }

    fn xattrs<'t>(&'t self, set: u32, attributes: &mut Vec<(&'t [u8], &'t [u8])>) {
        self.tree.xattrs(set, attributes);
    }

    fn read_at(
        &self,
        file: sm_erofs::InodeId,
        offset: u64,
        buffer: &mut [u8],
    ) -> std::io::Result<()> {
        self.tree.read_at(file, offset, buffer)
    }
}

#[test]
fn an_inconsistent_tree_does_not_panic() {
    for turn in 0..60 {
        let mut tree = Tree::new();
        for size in [10, 5000, 20_000] {
            let file = Entry::new(EntryKind::Bytes(contents(size)));
            tree.add(format!("d/{size}").as_bytes(), file).unwrap();
        }
        let liar = Liar {
            tree,
            asked: 0.into(),
            turn,
        };
        let _ = write(&liar, &tempfile::tempfile().unwrap(), &Options::default());
    }
}

/// Creates the header of a tar archive, with its checksum.
#[cfg(feature = "tar")]
fn header(name: &str, kind: u8) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, b"00000000000\0");
    put(136, b"00000000000\0");
    put(156, &[kind]);
    put(257, b"ustar  \0");
    header
}

#[cfg(feature = "tar")]
fn from_tar(mut header: [u8; 512]) -> Result<Tree, Error> {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let archive = [&header[..], &[0; 1024]].concat();
    Tree::from_tar(&archive[..], tempfile::tempfile().unwrap())
}

/// Holes take no space in an archive, but would take space on the host.
#[cfg(feature = "tar")]
#[test]
fn sparse_files_of_archives_are_refused() {
    let mut sparse = header("s", b'S');
    // One part without length at offset 2^62, and the size.
    for at in [386, 483] {
        sparse[at..at + 12].copy_from_slice(&[0x80, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0]);
    }
    sparse[398..410].copy_from_slice(b"00000000000\0");
    let refused = from_tar(sparse).unwrap_err().to_string();
    assert!(refused.contains("sparse"), "{refused}");
}

#[cfg(feature = "tar")]
#[test]
fn times_before_1970_are_read() {
    let mut old = header("old", b'0');
    old[136..148].fill(0xff);
    let tree = from_tar(old).unwrap();
    assert_eq!(tree.meta(1).mtime, (-1, 0));
}
