mod hard_links;
mod implied;

use std::fs::File;

use super::*;
use crate::index::{IndexWriter, Totals};

/// An entry that owns its data.
struct Owned {
    path: String,
    kind: EntryKind<'static>,
}

fn entry(path: &str, kind: EntryKind<'static>) -> Owned {
    Owned {
        path: path.to_owned(),
        kind,
    }
}

fn file(path: &str) -> Owned {
    entry(
        path,
        EntryKind::File {
            location: ContentLocation::Blob(0),
            size: 1,
        },
    )
}

fn link(path: &str, target: &'static str) -> Owned {
    entry(path, EntryKind::Symlink(target.as_bytes()))
}

fn index(entries: &[Owned]) -> IndexReader {
    let file: File = tempfile::tempfile().unwrap();
    let mut writer = IndexWriter::new(&file).unwrap();
    for entry in entries {
        let meta = Meta {
            mode: 0o700,
            ..Meta::default()
        };
        writer
            .push(&Entry {
                path: entry.path.as_bytes(),
                kind: entry.kind,
                meta,
                xattrs: Xattrs::default(),
            })
            .unwrap();
    }
    let totals = Totals {
        entries: entries.len() as u64,
        blob_len: 4096,
        ..Totals::default()
    };
    writer.finish(totals).unwrap();
    IndexReader::open(file).unwrap().unwrap()
}

fn merge_within(limits: Limits, layers: &[Vec<Owned>]) -> Result<Tree, String> {
    let mut tree = Tree::new(limits);
    for (number, entries) in (0u16..).zip(layers) {
        tree.apply(number, &mut index(entries))
            .map_err(|error| match error {
                Refused::Entry { path, reason } => {
                    format!("{}: {reason}", String::from_utf8_lossy(&path))
                }
                Refused::Index(error) => panic!("{error}"),
            })?;
    }
    Ok(tree)
}

fn merge(layers: &[Vec<Owned>]) -> Result<Tree, String> {
    merge_within(Limits::default(), layers)
}

fn refusal(layers: &[Vec<Owned>]) -> String {
    merge(layers).err().expect("it is refused")
}

/// Returns the paths of all entries except directories, with the layer of files.
fn paths(tree: &Tree) -> Vec<String> {
    fn visit(tree: &Tree, id: InodeId, path: &str, found: &mut Vec<String>) {
        let mut children = Vec::new();
        tree.children(id, &mut children);
        for (name, child) in children {
            let path = format!("{path}/{}", String::from_utf8_lossy(tree.text(name)));
            match tree.kind(child) {
                Kind::Directory => {
                    assert_eq!(tree.parent(child), id);
                    visit(tree, child, &path, found);
                }
                Kind::File { layer, .. } => found.push(format!("{path}@{layer}")),
                _ => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    visit(tree, ROOT, "", &mut found);
    found
}

#[test]
fn whiteouts_are_applied_in_order() {
    let tree = merge(&[
        vec![file("a"), file("d/b"), file("d/c"), file("e")],
        vec![
            entry("a", EntryKind::Whiteout),
            file("a"),
            entry("d/b", EntryKind::Whiteout),
            file("e"),
            entry("e", EntryKind::Whiteout),
        ],
    ])
    .unwrap();
    assert_eq!(paths(&tree), ["/a@1", "/d/c@0"]);
}

#[test]
fn markers_do_not_follow_a_link_that_their_layer_replaces() {
    for (target, marker) in [
        ("usr/lib64", EntryKind::Opaque),
        ("/", EntryKind::Opaque),
        ("usr/lib64", EntryKind::Whiteout),
    ] {
        let hidden = match marker {
            EntryKind::Opaque => "lib64",
            _ => "lib64/ld.so",
        };
        let tree = merge(&[
            vec![file("usr/lib64/ld.so"), link("lib64", target)],
            vec![
                entry("lib64", EntryKind::Directory),
                entry(hidden, marker),
                file("lib64/new"),
            ],
        ])
        .unwrap();
        let expected = ["/lib64/new@1", "/usr/lib64/ld.so@0"];
        assert_eq!(paths(&tree), expected, "a link to {target}, {marker:?}");
    }
}

#[test]
fn an_opaque_marker_keeps_entries_of_its_own_layer() {
    let tree = merge(&[
        vec![file("d/a"), file("d/sub/low"), file("d/low/x")],
        vec![
            entry("d", EntryKind::Directory),
            entry("d/sub", EntryKind::Directory),
            file("d/sub/new"),
            file("d/implied/new"),
            entry("d", EntryKind::Opaque),
            file("d/after"),
        ],
    ])
    .unwrap();
    assert_eq!(paths(&tree), ["/d/after@1", "/d/sub/new@1"]);
    // Names that were kept can be replaced and removed like others.
    let tree = merge(&[
        vec![
            file("d/a"),
            file("d/b"),
            entry("d", EntryKind::Opaque),
            file("d/b"),
        ],
        vec![entry("d/a", EntryKind::Whiteout)],
    ])
    .unwrap();
    assert_eq!(paths(&tree), ["/d/b@0"]);
}

#[test]
fn a_hard_link_cannot_be_to_what_it_replaces() {
    let linked = entry("a", EntryKind::Hardlink(b"a"));
    let error = refusal(&[vec![file("a")], vec![linked]]);
    assert!(error.contains("a path that does not exist"), "{error}");
}

#[test]
fn devices_that_linux_does_not_have_are_refused() {
    merge(&[vec![entry("d", EntryKind::CharDevice(4095, 0xf_ffff))]]).unwrap();
    for kind in [
        EntryKind::CharDevice(4097, 3),
        EntryKind::BlockDevice(1, 1 << 20),
    ] {
        let error = refusal(&[vec![entry("d", kind)]]);
        assert!(error.contains("is out of range"), "{error}");
    }
}

#[test]
fn path_lookups_are_bounded_over_the_whole_image() {
    let limits = Limits {
        entries: 100,
        ..Limits::default()
    };
    // The path of every entry has forty links of a hundred components each.
    let target: &'static str = Box::leak("./".repeat(2000).into_boxed_str());
    let mut entries = vec![link("l", target)];
    entries.extend((0..90).map(|n| file(&format!("l/{n}"))));
    let error = merge_within(limits, &[entries]).err().unwrap();
    assert!(error.contains("too many links and directories"), "{error}");
    let mut entries: Vec<_> = (0..80).map(|n| file(&format!("f{n}"))).collect();
    entries.extend((0..200).map(|_| entry("", EntryKind::Opaque)));
    let error = merge_within(limits, &[entries]).err().unwrap();
    assert!(error.contains("too many links and directories"), "{error}");
}

#[test]
fn removed_names_can_be_added_again() {
    let gone = || {
        vec![
            entry("d", EntryKind::Whiteout),
            entry("f", EntryKind::Whiteout),
        ]
    };
    let tree = merge(&[
        vec![file("d/a"), file("f")],
        gone(),
        vec![file("d/b")],
        gone(),
        vec![file("f"), file("d/c")],
    ])
    .unwrap();
    assert_eq!(paths(&tree), ["/d/c@4", "/f@4"]);
}

#[test]
fn opaque_directories_hide_lower_contents() {
    let tree = merge(&[
        vec![file("d/a"), file("d/e/b")],
        vec![file("d/new"), file("d/a"), entry("d", EntryKind::Opaque)],
    ])
    .unwrap();
    assert_eq!(paths(&tree), ["/d/a@1", "/d/new@1"]);
}

#[test]
fn a_directory_keeps_its_entries_and_gets_new_metadata() {
    let tree = merge(&[vec![file("d/a")], vec![entry("d", EntryKind::Directory)]]).unwrap();
    assert_eq!(paths(&tree), ["/d/a@0"]);
    let id = tree.child(ROOT, b"d").unwrap();
    assert_eq!(tree.meta(id).mode, 0o700);
}

#[test]
fn a_file_replaces_a_tree_and_the_reverse() {
    let tree = merge(&[vec![file("d/a"), file("f")], vec![file("d"), file("f2")]]).unwrap();
    assert_eq!(paths(&tree), ["/d@1", "/f@0", "/f2@1"]);
    let error = refusal(&[vec![file("f"), file("f/a")]]);
    assert_eq!(error, "f/a: its parent is not a directory");
}

#[test]
fn parents_are_found_through_links_that_cannot_leave() {
    let tree = merge(&[
        vec![link("lib", "usr/lib"), link("out", "../../..//etc")],
        vec![file("lib/a"), file("out/passwd")],
    ])
    .unwrap();
    assert_eq!(
        paths(&tree),
        ["/etc/passwd@1", "/lib", "/out", "/usr/lib/a@1"]
    );
    let error = refusal(&[vec![link("a", "b"), link("b", "a"), file("a/x")]]);
    assert!(error.contains("too many symbolic links"), "{error}");
}

#[test]
fn hard_links_share_an_inode_across_layers() {
    let linked =
        |path: &str, target: &'static str| entry(path, EntryKind::Hardlink(target.as_bytes()));
    let tree = merge(&[vec![file("a")], vec![linked("b", "a")]]).unwrap();
    assert_eq!(tree.child(ROOT, b"a"), tree.child(ROOT, b"b"));
    for target in ["nothing", "d"] {
        let error = refusal(&[vec![entry("d", EntryKind::Directory), linked("b", target)]]);
        assert!(error.starts_with("b: it is a hard link to a"), "{error}");
    }
}

#[test]
fn an_image_is_no_larger_than_allowed() {
    let few = Limits {
        entries: 100,
        names_bytes: 500,
        ..Limits::default()
    };
    let deep = "d/".repeat(120) + "x";
    let error = merge_within(few, &[vec![file(&deep)]]).err().unwrap();
    assert!(error.contains("more than 100"), "{error}");
    let many = (0..20).map(|n| file(&format!("{n:030}"))).collect();
    let error = merge_within(few, &[many]).err().unwrap();
    assert!(error.contains("more than 500 bytes of names"), "{error}");
}
