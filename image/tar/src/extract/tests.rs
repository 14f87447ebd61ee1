//! Archives as an attacker would write them.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::{END, encode, padding};

/// A destination in a directory in which nothing else may change.
struct Place {
    outside: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let outside = tempfile::tempdir().unwrap();
        fs::create_dir(outside.path().join("in")).unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        Self { outside }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.outside.path().join("in").join(name)
    }

    fn extract(
        &self,
        options: &ExtractOptions,
        archive: &[u8],
    ) -> Result<Extracted, ExtractionError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let into = rustix::fs::open(self.path(""), flags, Mode::empty()).unwrap();
        let result = options.extract(archive, into.as_fd());
        let outside = fs::read_dir(self.outside.path()).unwrap();
        assert_eq!(outside.count(), 2, "something was created outside");
        let secret = fs::read_to_string(self.outside.path().join("secret")).unwrap();
        assert_eq!(secret, "secret");
        result
    }
}

fn header(path: &str, kind: TarKind) -> TarHeader {
    TarHeader {
        path: path.as_bytes().to_vec(),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: (1_700_000_000, 5),
        size: 0,
        sparse: None,
        xattrs: Vec::new(),
    }
}

fn directory(path: &str) -> (TarHeader, &'static [u8]) {
    let header = TarHeader {
        mode: 0o755,
        ..header(path, TarKind::Directory)
    };
    (header, b"")
}

fn file(path: &str) -> (TarHeader, &'static [u8]) {
    (header(path, TarKind::File), b"data")
}

fn link(path: &str, target: &str) -> (TarHeader, &'static [u8]) {
    (
        header(path, TarKind::Symlink(target.as_bytes().to_vec())),
        b"",
    )
}

fn hard(path: &str, target: &str) -> (TarHeader, &'static [u8]) {
    (
        header(path, TarKind::Hardlink(target.as_bytes().to_vec())),
        b"",
    )
}

fn archive(entries: &[(TarHeader, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (header, data) in entries {
        let size = data.len() as u64;
        bytes.extend(encode(&TarHeader {
            size,
            ..header.clone()
        }));
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len() + padding(size), 0);
    }
    bytes.extend_from_slice(&END);
    bytes
}

fn refusal(result: Result<Extracted, ExtractionError>) -> String {
    match result.unwrap_err() {
        ExtractionError::Refused { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn files_have_their_contents_modes_and_times() {
    let place = Place::new();
    let mut tree = vec![
        directory("d"),
        file("d/f"),
        link("d/l", "f"),
        hard("h", "d/f"),
    ];
    tree[1].0.mode = 0o4751;
    let done = place
        .extract(&ExtractOptions::new(), &archive(&tree))
        .unwrap();
    assert_eq!((done.entries, done.bytes), (4, 4));
    let found = fs::metadata(place.path("d/f")).unwrap();
    // Without owners, set-user-ID bits are left out.
    assert_eq!(found.mode() & 0o7777, 0o751);
    assert_eq!((found.mtime(), found.mtime_nsec()), (1_700_000_000, 5));
    assert_eq!(found.nlink(), 2);
    // The time of a directory is set after that of its files.
    assert_eq!(
        fs::metadata(place.path("d")).unwrap().mtime(),
        1_700_000_000
    );
    assert_eq!(fs::read_link(place.path("d/l")).unwrap(), Path::new("f"));
    assert_eq!(fs::read(place.path("h")).unwrap(), b"data");
    let kept = ExtractOptions::new().special_modes(true);
    place.extract(&kept, &archive(&tree)).unwrap();
    let found = fs::metadata(place.path("d/f")).unwrap();
    assert_eq!(found.mode() & 0o7777, 0o4751);
}

#[test]
fn paths_that_leave_the_destination_are_refused() {
    for path in ["../x", "a/../../x", "..", "./../x"] {
        let place = Place::new();
        let result = place.extract(&ExtractOptions::new(), &archive(&[file(path)]));
        assert!(refusal(result).contains("leaves"), "{path}");
    }
    // A leading slash means the destination.
    let place = Place::new();
    let tree = archive(&[file("/x"), file("//a//b"), file("./c")]);
    place.extract(&ExtractOptions::new(), &tree).unwrap();
    for name in ["x", "a/b", "c"] {
        assert!(place.path(name).is_file(), "{name}");
    }
}

#[test]
fn links_in_a_path_are_not_followed() {
    for target in ["..", "/", ".", "/tmp", "d"] {
        let place = Place::new();
        fs::create_dir(place.path("d")).unwrap();
        symlink(target, place.path("l")).unwrap();
        for entry in [
            file("l/x"),
            directory("l/x"),
            link("l/x", "y"),
            file("l/a/b"),
        ] {
            let result = place.extract(&ExtractOptions::new(), &archive(&[entry]));
            assert!(refusal(result).contains("symbolic link"), "{target}");
        }
        assert_eq!(fs::read_dir(place.path("d")).unwrap().count(), 0);
    }
    // Nor are those that the archive itself has created.
    let place = Place::new();
    let tree = archive(&[link("l", "/tmp"), file("l/sm-tar-x")]);
    assert!(refusal(place.extract(&ExtractOptions::new(), &tree)).contains("symbolic link"));
    assert!(!Path::new("/tmp/sm-tar-x").exists());
}

#[test]
fn links_and_files_in_place_of_a_file_are_replaced() {
    let place = Place::new();
    symlink("../secret", place.path("a")).unwrap();
    fs::hard_link(place.outside.path().join("secret"), place.path("b")).unwrap();
    symlink("missing", place.path("c")).unwrap();
    let tree = archive(&[file("a"), file("b"), file("c")]);
    place.extract(&ExtractOptions::new(), &tree).unwrap();
    for name in ["a", "b", "c"] {
        let found = fs::symlink_metadata(place.path(name)).unwrap();
        assert!(found.is_file() && found.nlink() == 1, "{name}");
    }
    assert!(!place.path("missing").exists());
}

#[test]
fn a_hard_link_leads_to_a_file_of_the_destination() {
    for target in ["../secret", "/../secret", "", "d", "missing"] {
        let place = Place::new();
        fs::create_dir(place.path("d")).unwrap();
        let result = place.extract(&ExtractOptions::new(), &archive(&[hard("x", target)]));
        assert!(refusal(result).contains("link"), "{target}");
        assert!(!place.path("x").exists());
    }
    let place = Place::new();
    symlink("..", place.path("up")).unwrap();
    let tree = archive(&[hard("x", "up/secret")]);
    assert!(refusal(place.extract(&ExtractOptions::new(), &tree)).contains("link"));
    // A link to a link is that link.
    symlink("../secret", place.path("l")).unwrap();
    let tree = archive(&[hard("x", "l"), file("x")]);
    place.extract(&ExtractOptions::new(), &tree).unwrap();
}

#[test]
fn relative_links_that_leave_the_destination_are_refused() {
    for (path, target) in [("l", ".."), ("d/l", "../../x"), ("d/l", "a/../../../x")] {
        let place = Place::new();
        let result = place.extract(&ExtractOptions::new(), &archive(&[link(path, target)]));
        assert!(refusal(result).contains("leaves"), "{path}");
    }
    let place = Place::new();
    let tree = archive(&[link("d/l", "../x"), link("a", "/etc/passwd")]);
    place.extract(&ExtractOptions::new(), &tree).unwrap();
}

#[test]
fn directories_and_other_files_do_not_replace_each_other() {
    let place = Place::new();
    fs::create_dir(place.path("d")).unwrap();
    fs::write(place.path("f"), "").unwrap();
    symlink("d", place.path("l")).unwrap();
    for (entry, text) in [
        (
            file("d"),
            "cannot overwrite directory with non-directory: \"d\"",
        ),
        (
            link("d", "x"),
            "cannot overwrite directory with non-directory: \"d\"",
        ),
        (
            directory("f"),
            "cannot overwrite non-directory with directory: \"f/\"",
        ),
        (
            directory("l"),
            "cannot overwrite non-directory with directory: \"l/\"",
        ),
    ] {
        let result = place.extract(&ExtractOptions::new(), &archive(&[entry]));
        assert_eq!(result.unwrap_err().to_string(), text);
    }
    let result = place.extract(&ExtractOptions::new(), &archive(&[file("f/x")]));
    assert!(refusal(result).contains("another file"));
}

#[test]
fn only_entries_that_were_asked_for_are_created() {
    let file_only = ExtractOptions::new().only("x", false);
    let tree_only = ExtractOptions::new().only("x", true);
    let place = Place::new();
    place.extract(&file_only, &archive(&[file("x")])).unwrap();
    place
        .extract(&file_only, &archive(&[link("x", "y")]))
        .unwrap();
    fs::remove_file(place.path("x")).unwrap();
    let tree = archive(&[directory("x"), file("x/a")]);
    place.extract(&tree_only, &tree).unwrap();
    fs::remove_dir_all(place.path("x")).unwrap();
    for (options, entry) in [
        (&file_only, file(".bashrc")),
        (&file_only, directory("x")),
        (&file_only, file("x/a")),
        (&file_only, directory(".")),
        (&file_only, hard("x", ".bashrc")),
        (&tree_only, file("x")),
        (&tree_only, file("y/x")),
        (&tree_only, directory(".")),
        (&tree_only, hard("x/a", "y")),
    ] {
        refusal(place.extract(options, &archive(&[entry])));
        assert!(!place.path(".bashrc").exists());
    }
}

#[test]
fn devices_are_refused_and_pipes_created() {
    let place = Place::new();
    for kind in [TarKind::CharDevice(1, 3), TarKind::BlockDevice(8, 0)] {
        let tree = archive(&[(header("x", kind), b"")]);
        let result = place.extract(&ExtractOptions::new(), &tree);
        assert_eq!(refusal(result), "it is a device");
    }
    let tree = archive(&[(header("p", TarKind::Fifo), b"")]);
    place.extract(&ExtractOptions::new(), &tree).unwrap();
    let found = fs::symlink_metadata(place.path("p")).unwrap();
    assert_eq!(found.permissions().mode() & 0o777, 0o644);
}

#[test]
fn a_truncated_archive_leaves_no_part_of_a_file() {
    let place = Place::new();
    let bytes = archive(&[file("a"), (header("b", TarKind::File), &[7; 3000])]);
    let result = place.extract(&ExtractOptions::new(), &bytes[..bytes.len() - 2500]);
    assert!(
        matches!(result, Err(ExtractionError::Archive(_))),
        "{result:?}"
    );
    assert!(place.path("a").is_file() && !place.path("b").exists());
}

#[test]
fn hostile_names_are_shown_without_control_characters() {
    let place = Place::new();
    let result = place.extract(
        &ExtractOptions::new(),
        &archive(&[file("a\x1b[2J/../../x")]),
    );
    let text = result.unwrap_err().to_string();
    assert!(!text.contains('\x1b'), "{text:?}");
}

/// Returns entries over a few names, so that they meet each other.
fn entry() -> impl Strategy<Value = (TarHeader, &'static [u8])> {
    let name = prop_oneof![
        Just("a"),
        Just("b"),
        Just("a/b"),
        Just("a/b/c"),
        Just("../secret"),
        Just(".."),
        Just("."),
        Just("/"),
        Just("in/../../secret"),
    ];
    let target = prop_oneof![
        Just("a"),
        Just(".."),
        Just("../secret"),
        Just("/"),
        Just("b"),
        Just("."),
        Just("../in/a"),
    ];
    (name, target, 0..5).prop_map(|(name, target, kind)| match kind {
        0 => file(name),
        1 => directory(name),
        2 => link(name, target),
        3 => hard(name, target),
        _ => (header(name, TarKind::Fifo), &b""[..]),
    })
}

proptest! {
    #[test]
    fn nothing_outside_changes(entries in prop::collection::vec(entry(), 0..12)) {
        let place = Place::new();
        // Entries one by one, so that a refusal does not end the attack.
        for entry in &entries {
            let _ = place.extract(&ExtractOptions::new(), &archive(std::slice::from_ref(entry)));
        }
        let _ = place.extract(&ExtractOptions::new(), &archive(&entries));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let place = Place::new();
        let _ = place.extract(&ExtractOptions::new(), &bytes);
    }
}
