//! The guest's view of an image is equal to the result of `umoci unpack`, entry by entry:
//! images by umoci, buildah, skopeo, GNU tar and our own writer, with one layer and with
//! a hundred, with unusual files, with many, and with a large one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use sm_e2e::{Home, full};

/// Returns `None` if xtask could not create the images without root, which it has
/// reported.
fn images() -> Option<PathBuf> {
    let images = std::env::var_os("SM_FIDELITY").expect("cargo xtask test sets SM_FIDELITY");
    Some(PathBuf::from(images)).filter(|path| !path.as_os_str().is_empty())
}

/// Images of thousands of files, of which one per kind suffices outside full runs:
/// listing each takes a minute in an emulated machine.
const LONG: [&str; 8] = [
    "debian",
    "python",
    "nginx",
    "single",
    "oci-archive",
    "zstd",
    "small",
    "large",
];

/// Returns the lines by path.
fn by_path(list: &str) -> BTreeMap<&str, &str> {
    list.lines()
        .map(|line| line.split_once(' ').expect("a path and what is there"))
        .collect()
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// Removes the time from a line.
fn timeless(line: &str) -> String {
    let parts = line.split(' ').filter(|part| !part.starts_with("mtime="));
    parts.collect::<Vec<_>>().join(" ")
}

/// A file that the guest creates, independent of the image.
const MACHINE_ID: &str = "/etc/machine-id";
/// A file of the agent that is mounted over the image's.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Compares the guest's list with the expected one, except for mount points and files
/// that the guest has created.
fn compare(name: &str, seen: &str, expected: &str) {
    let (mut seen, mut expected) = (by_path(seen), by_path(expected));
    let is_file = |what: &&str| what.starts_with("mode=100");
    assert!(seen.get(MACHINE_ID).is_none_or(is_file), "{seen:?}");
    assert_eq!(seen.get(RESOLV_CONF), Some(&"mounted"));
    if let Some(what) = seen.get_mut(MACHINE_ID) {
        *what = "mounted";
    }
    let mounted: Vec<_> = seen
        .iter()
        .filter(|(_, what)| **what == "mounted")
        .map(|(path, _)| *path)
        .collect();
    expected.retain(|path, _| {
        let inside = |mount: &str| *path == mount || path.starts_with(&format!("{mount}/"));
        !mounted.iter().any(|mount| inside(mount))
    });
    let parents: Vec<_> = mounted.iter().map(|mount| parent(mount)).collect();
    let mut count = 0;
    for (path, what) in &seen {
        if *what == "mounted" {
            continue;
        }
        let wanted = expected.remove(path);
        let same = match (wanted, parents.contains(path)) {
            (Some(wanted), false) => wanted == *what,
            (Some(wanted), true) => timeless(wanted) == timeless(what),
            // The directory was created for a mount in it.
            (None, made) => made,
        };
        assert!(same, "{name} {path}:\n  guest {what}\n  umoci {wanted:?}");
        count += 1;
    }
    assert!(
        expected.is_empty(),
        "{name}: not in the guest: {expected:?}"
    );
    assert!(count > 3, "{name}: {count}");
}

#[test]
fn every_image_is_in_the_guest_as_umoci_unpacks_it() {
    let Some(images) = images() else {
        eprintln!("left out: the images are made as root");
        return;
    };
    let list = fs::read_to_string(images.join("list")).unwrap();
    assert!(list.lines().count() >= 12, "{list}");
    let home = Home::new();
    for line in list.lines() {
        let (name, reference) = line.split_once(' ').unwrap();
        if LONG.contains(&name) && !full() {
            println!("{name}: only with --full");
            continue;
        }
        let begun = Instant::now();
        let (transport, path) = reference.split_once(':').unwrap();
        let reference = format!("{transport}:{}/{path}", images.display());
        let listed = home
            .sm(&["run", "--rm", "-m", "256m", &reference, "/sm-tree", "/"])
            .exits(0)
            .out();
        let expected = fs::read_to_string(images.join(format!("{name}.tree"))).unwrap();
        compare(name, &listed, &expected);
        home.sm(&["rmi", &reference]).exits(0);
        println!(
            "{name}: {} entries are the same ({} s)",
            listed.lines().count(),
            begun.elapsed().as_secs()
        );
    }
}
