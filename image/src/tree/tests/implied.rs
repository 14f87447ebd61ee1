//! Tests of directories without an entry of their own.

use super::*;

#[test]
fn the_uppermost_has_the_group_of_a_set_group_id_directory() {
    let mut tree = Tree::new(Limits::default());
    let mut add = |path: &[u8], kind, mode, gid| {
        let meta = Meta {
            mode,
            gid,
            ..Meta::default()
        };
        let xattrs = Xattrs::default();
        tree.add(
            0,
            &Entry {
                path,
                kind,
                meta,
                xattrs,
            },
        )
        .unwrap();
    };
    let file = EntryKind::File {
        location: ContentLocation::Blob(0),
        size: 1,
    };
    add(b"usr/local", EntryKind::Directory, 0o2775, 50);
    add(b"usr/local/a/b/file", file, 0o644, 0);
    add(b"usr/local/a/b/c/file", file, 0o644, 0);
    let seen = ["usr", "usr/local/a", "usr/local/a/b", "usr/local/a/b/c"].map(|path| {
        let id = tree.walk(path.as_bytes(), false).unwrap().unwrap();
        (tree.meta(id).mode, tree.meta(id).gid)
    });
    assert_eq!(seen, [(0o755, 0), (0o755, 50), (0o755, 0), (0o755, 0)]);
}

#[test]
fn a_path_that_leaves_them_creates_none() {
    let tree = merge(&[vec![
        link("l", "x/y/../../z/./w/../v"),
        file("l/f"),
        link("r", "/../q/../.."),
        file("r/g"),
    ]])
    .unwrap();
    assert_eq!(paths(&tree), ["/g@0", "/l", "/r", "/z/v/f@0"]);
    let mut names = Vec::new();
    tree.children(ROOT, &mut names);
    let names: Vec<_> = names.iter().map(|(name, _)| tree.text(*name)).collect();
    assert_eq!(names, [&b"g"[..], b"l", b"r", b"z"]);
}

#[test]
fn an_implied_directory_keeps_the_mark_of_an_entry() {
    let mut tree = merge(&[vec![
        file("d/x/f"),
        entry("d/x", EntryKind::Directory),
        entry("d/x", EntryKind::Whiteout),
        entry("d/y", EntryKind::Directory),
        entry("d/y", EntryKind::Whiteout),
        entry("d/x/gone", EntryKind::Whiteout),
        entry("d/z/gone", EntryKind::Whiteout),
        entry("d", EntryKind::Opaque),
        // The mark also survives an opaque marker.
        entry("d/y/gone", EntryKind::Whiteout),
        entry("d", EntryKind::Opaque),
    ]])
    .unwrap();
    let is_there = ["d/x", "d/y", "d/z"].map(|path| tree.walk(path.as_bytes(), false).unwrap());
    assert_eq!(is_there.map(|id| id.is_some()), [true, true, false]);
    assert_eq!(paths(&tree), [""; 0]);
}
