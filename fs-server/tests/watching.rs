//! Notifying a guest of changes by the host.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::ffi::CString;
use std::fs;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;

use common::directory;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, mkdirat, openat, utimensat,
};
use rustix::io::Errno;
use sm_fs_server::dev_fuse::DevFuse;
use sm_fs_server::testing::{FuseDriver, ROOT};
use sm_fs_server::{FsConfig, MAX_WATCHES, Server, Share, ShareOptions, TOUCH, Watches};

fn server(path: &Path) -> (Server, Arc<Watches>) {
    let watches = Watches::new().unwrap();
    let options = ShareOptions::default().watch(true);
    let share = Share::new("s", directory(path), options).unwrap();
    let config = FsConfig::default().share(share).watches(watches.clone());
    (Server::new(config).unwrap(), watches)
}

/// Paths of changes; those of directories end with a slash.
fn taken(watches: &Watches) -> Vec<String> {
    let changes = watches.take(usize::MAX).into_iter();
    let text = changes.map(|change| {
        assert_eq!(change.share, b"s");
        let end = if change.is_directory { "/" } else { "" };
        String::from_utf8(change.path).unwrap() + end
    });
    text.collect()
}

#[test]
fn changes_in_directories_that_the_guest_knows_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    fs::create_dir_all(path.join("a/b")).unwrap();
    fs::create_dir(path.join("other")).unwrap();
    fs::write(path.join("a/b/f"), "").unwrap();
    let (server, watches) = server(path);
    let mut driver = FuseDriver::started(server);
    let share = driver.lookup(ROOT, "s").unwrap().node;
    let a = driver.lookup(share, "a").unwrap().node;
    let b = driver.lookup(a, "b").unwrap().node;
    for _ in 0..3 {
        fs::write(path.join("a/b/f"), "text").unwrap();
    }
    fs::write(path.join("other/f"), "").unwrap();
    fs::write(path.join("new"), "").unwrap();
    assert_eq!(taken(&watches), ["/", "a/b/f", "new"]);
    assert!(taken(&watches).is_empty());
    fs::rename(path.join("new"), path.join("a/moved")).unwrap();
    assert_eq!(taken(&watches), ["/", "a/", "a/moved"]);
    fs::remove_file(path.join("a/b/f")).unwrap();
    assert_eq!(taken(&watches), ["a/b/"]);
    // The guest moves a directory: its watch has another path then.
    driver.rename((a, "b"), (share, "c"), 0).unwrap();
    taken(&watches);
    fs::write(path.join("c/f"), "").unwrap();
    assert_eq!(taken(&watches), ["c/", "c/f"]);
    // Others are taken next time.
    fs::write(path.join("c/g"), "").unwrap();
    fs::write(path.join("a/g"), "").unwrap();
    assert_eq!(watches.take(1).len(), 1);
    assert_eq!(taken(&watches).len(), 3);
    driver.forget(b, 1);
    fs::write(path.join("c/f"), "").unwrap();
    assert!(taken(&watches).is_empty());
}

#[test]
fn watches_and_changes_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    for number in 0..MAX_WATCHES + 10 {
        fs::create_dir(folder.path().join(number.to_string())).unwrap();
    }
    let (server, watches) = server(folder.path());
    let mut driver = FuseDriver::started(server);
    let share = driver.lookup(ROOT, "s").unwrap().node;
    for number in 0..MAX_WATCHES + 10 {
        driver.lookup(share, &number.to_string()).unwrap();
    }
    // The root is watched, too.
    for (number, seen) in [(MAX_WATCHES - 2, true), (MAX_WATCHES - 1, false)] {
        fs::write(folder.path().join(format!("{number}/f")), "").unwrap();
        assert_eq!(!taken(&watches).is_empty(), seen, "{number}");
    }
    for number in 0..5000 {
        fs::write(folder.path().join(number.to_string()).join("f"), "").unwrap();
    }
    // More than are stored: everything may have changed.
    let mut seen = Vec::new();
    for _ in 0..10 {
        seen.push(taken(&watches));
    }
    assert!(seen.iter().any(|changes| *changes == ["/"]), "{seen:?}");
    assert!(seen.iter().all(|changes| changes.len() <= 4096));
    assert!(seen.last().is_some_and(Vec::is_empty), "{seen:?}");
}

/// A guest can make directories of any depth: each of its changes there would store a path of
/// megabytes.
#[test]
fn no_path_is_longer_than_a_guest_can_open() {
    let folder = tempfile::tempdir().unwrap();
    let (server, watches) = server(folder.path());
    let mut driver = FuseDriver::started(server);
    let mut node = driver.lookup(ROOT, "s").unwrap().node;
    let name = "d".repeat(255);
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at = openat(CWD, folder.path(), flags, Mode::empty()).unwrap();
    for depth in 1..20 {
        mkdirat(&at, &*name, Mode::RWXU).unwrap();
        node = driver.lookup(node, &name).unwrap().node;
        at = openat(&at, &*name, flags, Mode::empty()).unwrap();
        taken(&watches);
        let file = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        openat(&at, "f", file, Mode::RUSR).unwrap();
        let changes = watches.take(usize::MAX);
        assert!(changes.iter().all(|change| change.path.len() < 4096));
        let expected = match depth {
            ..16 => 2,
            // The directory's path is short enough, that of the file is not.
            16 => 1,
            _ => 0,
        };
        assert_eq!(changes.len(), expected, "{depth}");
    }
}

#[test]
fn a_restored_session_watches_what_its_guest_knows() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("a/b")).unwrap();
    let (first, _) = server(folder.path());
    let mut first = FuseDriver::started(first);
    first.walk("s/a/b").unwrap();
    let state = first.server.save().unwrap();
    let (mut second, watches) = server(folder.path());
    second.restore(&state).unwrap();
    fs::write(folder.path().join("a/b/f"), "").unwrap();
    assert_eq!(taken(&watches), ["a/b/", "a/b/f"]);
    second.reset();
}

/// A program in the guest that is notified of changes.
struct Watcher(std::os::fd::OwnedFd);

impl Watcher {
    /// A watch of a directory as Node.js has it.
    fn new(path: &Path) -> Self {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        let mask = WatchFlags::ATTRIB
            | WatchFlags::CREATE
            | WatchFlags::MODIFY
            | WatchFlags::DELETE
            | WatchFlags::MOVE;
        inotify::add_watch(&fd, path, mask).unwrap();
        Self(fd)
    }

    fn events(&self) -> Vec<(ReadFlags, String)> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        let mut events = Vec::new();
        while let Ok(event) = reader.next() {
            let name = event.file_name().unwrap_or_default();
            events.push((event.events(), name.to_string_lossy().into_owned()));
        }
        events
    }
}

/// Touches a path as the agent in a guest does.
fn touch(path: &Path, is_directory: bool) -> Result<(), Errno> {
    let (tv_sec, nanoseconds) = TOUCH;
    let touch = Timespec {
        tv_sec,
        tv_nsec: nanoseconds.into(),
    };
    let omit = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_OMIT,
    };
    let times = Timestamps {
        last_access: if is_directory { touch } else { omit },
        last_modification: touch,
    };
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
}

#[test]
fn programs_that_watch_files_see_changes_of_the_host() {
    if !sm_test_needs::root() {
        return;
    }
    let (folder, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let host = folder.path();
    fs::write(host.join("f"), "before").unwrap();
    let (server, watches) = server(host);
    let mounted = DevFuse::mount(server, target.path()).unwrap();
    let guest = target.path().join("s");
    assert_eq!(fs::read(guest.join("f")).unwrap(), b"before");
    let watcher = Watcher::new(&guest);

    // In place, and by another file of that name, as editors do.
    for round in 0..3 {
        let text = format!("round {round}, and longer than before");
        match round {
            0 => fs::write(host.join("f"), &text).unwrap(),
            _ => {
                fs::write(host.join(".f"), &text).unwrap();
                fs::rename(host.join(".f"), host.join("f")).unwrap();
            }
        }
        assert!(taken(&watches).contains(&"f".to_owned()));
        assert!(watcher.events().is_empty());
        let modified = fs::metadata(host.join("f")).unwrap().modified().unwrap();
        touch(&guest.join("f"), false).unwrap();
        assert_eq!(watcher.events(), [(ReadFlags::MODIFY, "f".to_owned())]);
        // It sees the new contents at once, and the host's file is not touched.
        assert_eq!(fs::read_to_string(guest.join("f")).unwrap(), text);
        let after = fs::metadata(host.join("f")).unwrap().modified().unwrap();
        assert_eq!(after, modified);
        watcher.events();
        assert!(taken(&watches).is_empty(), "an echo of the request");
    }
    fs::remove_file(host.join("f")).unwrap();
    assert_eq!(taken(&watches), ["/"]);
    touch(&guest, true).unwrap();
    let events = watcher.events();
    assert!(
        events
            .iter()
            .any(|(events, _)| events.contains(ReadFlags::ATTRIB)),
        "{events:?}"
    );
    assert!(!guest.join("f").exists());

    // Its own changes are no news.
    fs::write(guest.join("own"), "text").unwrap();
    fs::create_dir(guest.join("d")).unwrap();
    watcher.events();
    assert_eq!(taken(&watches), ["/", "d/", "own"]);
    for (path, is_directory) in [("own", false), ("d", true), (".", true)] {
        let touched = touch(&guest.join(path), is_directory);
        assert_eq!(touched, Err(Errno::CANCELED), "{path}");
    }
    assert!(watcher.events().is_empty());
    std::thread::sleep(std::time::Duration::from_millis(30));
    fs::write(host.join("own"), "of the host").unwrap();
    touch(&guest.join("own"), false).unwrap();
    assert_eq!(watcher.events(), [(ReadFlags::MODIFY, "own".to_owned())]);
    drop(watcher);
    mounted.unmount().unwrap();
}
