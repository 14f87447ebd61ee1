//! Runs images that exposed bugs: changes in layers, and files at the paths of files that
//! the guest creates.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs;
use std::path::Path;

use sm_e2e::{Done, Home};

#[expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]
#[path = "../../image/tests/support/mod.rs"]
mod support;

use support::{Entry, dir, file, symlink, tar, whiteout};

const PROGRAMS: [&str; 7] = ["sh", "cat", "find", "stat", "sort", "wc", "echo"];
const STUB: &str = "/run/systemd/resolve/stub-resolv.conf";

/// Returns a root file system of one static program and its links.
fn base() -> Vec<Entry> {
    let mut entries: Vec<_> = ["bin", "etc", "usr", "usr/lib64"].map(dir).into();
    let busybox = fs::read("/bin/busybox").unwrap();
    entries.push(file("bin/busybox", busybox).mode(0o755));
    entries.extend(PROGRAMS.map(|name| symlink(format!("bin/{name}"), "busybox")));
    entries
}

/// Runs `script` in an image of these layers.
fn run(layers: &[Vec<Entry>], options: &[&str], script: &str) -> Done {
    let layout = tempfile::tempdir().unwrap();
    let layers: Vec<_> = layers.iter().map(|entries| tar(entries)).collect();
    support::image(layout.path(), &layers);
    let image = format!("oci:{}:latest", layout.path().display());
    let mut arguments = vec!["run", "--rm", "-m", "128m"];
    arguments.extend(options);
    arguments.extend([&*image, "/bin/sh", "-c", script]);
    Home::shared().sm(&arguments)
}

#[test]
fn a_layer_changes_only_its_entries() {
    // Directories replace links; the targets of the links stay.
    let mut lower = base();
    lower.extend([
        file("usr/lib64/ld.so", "ld"),
        symlink("opaque", "usr/lib64"),
        symlink("root", "/"),
        symlink("plain", "usr/lib64"),
        // A directory has no data, even if its header has a size.
        dir("sized").size(1024),
        file("sized/file", "abc"),
    ]);
    let upper = vec![
        dir("opaque"),
        whiteout("opaque/.wh..wh..opq"),
        file("opaque/new", "n"),
        dir("root"),
        whiteout("root/.wh..wh..opq"),
        file("root/new", "n"),
        dir("plain"),
        whiteout("plain/.wh.ld.so"),
        file("plain/new", "n"),
    ];
    let script = "find /usr /opaque /root /plain /sized -type f | sort; cat /sized/file";
    let done = run(&[lower, upper], &[], script).exits(0);
    let expected = "/opaque/new\n/plain/new\n/root/new\n/sized/file\n/usr/lib64/ld.so\nabc";
    assert_eq!(done.out(), expected);
}

/// Prints `/etc`, and a device.
const IDENTITY: &str = "stat -c %F /dev/null; cat /etc/machine-id | wc -c; cat /etc/resolv.conf; \
    echo; echo changed >/etc/resolv.conf && cat /etc/resolv.conf";

#[test]
fn files_of_the_guest_replace_those_of_the_image() {
    let with = |mut entries: Vec<Entry>| {
        let mut layer = base();
        layer.append(&mut entries);
        vec![layer]
    };
    let links = with(vec![
        symlink("etc/machine-id", "/dev/null"),
        symlink("etc/resolv.conf", STUB),
    ]);
    let device = "character special file\n33\n";
    // Without name servers, the file is empty.
    let alone = ["--network", "none"];
    let done = run(&links, &alone, IDENTITY).exits(0);
    assert_eq!(done.out(), format!("{device}\nchanged\n"));
    let options = ["--network", "none", "--dns", "192.0.2.53"];
    let done = run(&links, &options, IDENTITY).exits(0);
    let server = format!("{device}nameserver 192.0.2.53\n\nchanged\n");
    assert_eq!(done.out(), server);

    let directories = with(vec![
        dir("etc/machine-id"),
        file("etc/machine-id/file", ""),
        file("etc/resolv.conf", "search own"),
    ]);
    let done = run(&directories, &alone, IDENTITY).exits(0);
    assert_eq!(done.out(), format!("{device}\nchanged\n"));
    assert!(!Path::new(STUB).exists());
}
