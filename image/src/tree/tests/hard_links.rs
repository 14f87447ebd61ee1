//! Tests of metadata in the headers of hard links.

use super::*;
use crate::index::encode_xattrs;

type Pair<'a> = (&'a str, &'a str);

fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        uid: u32::from(mode),
        gid: 7,
        mtime: (i64::from(mode), 5),
    }
}

/// Adds entries to a tree: path, kind, mode, extended attributes.
fn tree(entries: &[(&str, EntryKind<'_>, u16, &[Pair<'_>])]) -> Result<Tree, String> {
    let mut tree = Tree::new(Limits::default());
    for (path, kind, mode, xattrs) in entries {
        let xattrs: Vec<_> = xattrs
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
            .collect();
        let xattrs = encode_xattrs(&xattrs).unwrap();
        tree.add(
            0,
            &Entry {
                path: path.as_bytes(),
                kind: *kind,
                meta: meta(*mode),
                xattrs: Xattrs::encoded(&xattrs),
            },
        )
        .map_err(|reason| reason.to_string())?;
    }
    Ok(tree)
}

fn xattrs(tree: &Tree, id: InodeId) -> Vec<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    tree.xattrs(tree.xattr_set(id))
        .iter()
        .map(|(name, value)| (text(name), text(value)))
        .collect()
}

const FILE: EntryKind<'static> = EntryKind::File {
    location: ContentLocation::Blob(0),
    size: 1,
};

#[test]
fn the_header_of_a_hard_link_applies_to_the_file() {
    let link = EntryKind::Hardlink(b"a");
    let tree = tree(&[("a", FILE, 0o4755, &[]), ("b", link, 0o600, &[])]).unwrap();
    let id = tree.child(ROOT, b"a").unwrap();
    assert_eq!(tree.child(ROOT, b"b"), Some(id));
    assert_eq!(tree.meta(id), meta(0o600));
}

#[test]
fn links_to_links_keep_their_mode() {
    let tree = tree(&[
        ("a", EntryKind::Symlink(b"x"), 0o644, &[]),
        ("b", EntryKind::Hardlink(b"a"), 0o600, &[]),
    ])
    .unwrap();
    let id = tree.child(ROOT, b"a").unwrap();
    let expected = Meta {
        mode: 0o777,
        ..meta(0o600)
    };
    assert_eq!(tree.meta(id), expected);
}

#[test]
fn attributes_of_a_hard_link_are_added() {
    let link = EntryKind::Hardlink(b"a");
    let capability = ("security.capability", "c");
    let tree = tree(&[
        (
            "a",
            FILE,
            0o755,
            &[capability, ("user.a", "1"), ("user.b", "1")],
        ),
        ("b", link, 0o755, &[("user.0", "2"), ("user.b", "2")]),
        // A header with the same attributes changes nothing.
        ("c", FILE, 0o755, &[capability]),
        ("d", EntryKind::Hardlink(b"c"), 0o755, &[capability]),
    ])
    .unwrap();
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let expected = [
        pair("user.0", "2"),
        pair("user.a", "1"),
        pair("user.b", "2"),
    ];
    assert_eq!(xattrs(&tree, tree.child(ROOT, b"a").unwrap()), expected);
    let expected = [pair("security.capability", "c")];
    assert_eq!(xattrs(&tree, tree.child(ROOT, b"c").unwrap()), expected);
}

#[test]
fn attributes_of_many_hard_links_do_not_grow_without_end() {
    let value = "v".repeat(30_000);
    let link = EntryKind::Hardlink(b"a");
    let error = tree(&[
        ("a", FILE, 0o755, &[("user.a", &value)]),
        ("b", link, 0o755, &[("user.b", &value)]),
        ("c", link, 0o755, &[("user.c", &value)]),
    ])
    .err();
    let expected = "its extended attributes are larger than 64 KiB";
    assert_eq!(error.as_deref(), Some(expected));
}

/// The work for each link of a file grows with the file's attributes.
#[test]
fn the_work_for_attributes_is_bounded_over_the_whole_image() {
    let attributes = |count: u16| -> Vec<(Vec<u8>, Vec<u8>)> {
        (0..count)
            .map(|n| (n.to_be_bytes().to_vec(), Vec::new()))
            .collect()
    };
    let (many, some) = (attributes(4000), attributes(400));
    let (many, some) = (encode_xattrs(&many).unwrap(), encode_xattrs(&some).unwrap());
    let limits = Limits {
        entries: 1000,
        ..Limits::default()
    };
    let mut tree = Tree::new(limits);
    let mut add = |path: &str, kind, xattrs| {
        let entry = Entry {
            path: path.as_bytes(),
            kind,
            meta: Meta::default(),
            xattrs: Xattrs::encoded(xattrs),
        };
        tree.add(0, &entry)
    };
    let file = EntryKind::File {
        location: ContentLocation::Blob(0),
        size: 1,
    };
    add("f", file, &many).unwrap();
    // 64 steps are permitted for each entry.
    let taken = (0..100)
        .take_while(|n| add(&format!("l{n}"), EntryKind::Hardlink(b"f"), &some).is_ok())
        .count();
    assert!((5..16).contains(&taken), "{taken}");
}
