//! A host that replaces directories by symbolic links while the guest uses them.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use common::directory;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use sm_fs_server::testing::FuseDriver;
use sm_fs_server::{FsConfig, Server, Share, ShareOptions};

/// Exchanges a directory of the share with a link to one outside, again and again, while a
/// guest uses both for everything. Returns the number of operations that succeeded.
fn swap(rounds: u64) -> u64 {
    let outer = tempfile::tempdir().unwrap();
    let (share, outside) = (outer.path().join("share"), outer.path().join("outside"));
    fs::create_dir_all(share.join("d/e")).unwrap();
    fs::create_dir_all(outside.join("e")).unwrap();
    for place in [
        share.join("d"),
        share.join("d/e"),
        outside.clone(),
        outside.join("e"),
    ] {
        fs::write(place.join("f"), "text").unwrap();
    }
    symlink(&outside, share.join("link")).unwrap();
    let before = state(&outside);

    let shared = Share::new("s", directory(&share), ShareOptions::default()).unwrap();
    let config = FsConfig::default().share(shared).max_directories(16);
    let mut driver = FuseDriver::started(Server::new(config).unwrap());
    let stop = AtomicBool::new(false);
    let mut done = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (d, link) = (share.join("d"), share.join("link"));
            while !stop.load(Ordering::Relaxed) {
                renameat_with(CWD, &d, CWD, &link, RenameFlags::EXCHANGE).unwrap();
            }
        });
        for round in 0..rounds {
            done += u64::from(one_round(&mut driver, round, outer.path()).is_ok());
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(state(&outside), before, "something outside was touched");
    done
}

/// Names, lengths, modes and times of everything below a directory.
fn state(path: &Path) -> Vec<(String, u64, u32, i64, u64)> {
    let mut all = Vec::new();
    let mut left = vec![path.to_owned()];
    while let Some(at) = left.pop() {
        let meta = fs::symlink_metadata(&at).unwrap();
        if meta.is_dir() {
            left.extend(
                fs::read_dir(&at)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        let name = at.to_string_lossy().into_owned();
        all.push((
            name,
            meta.size(),
            meta.mode(),
            meta.mtime_nsec(),
            meta.nlink(),
        ));
    }
    all.sort();
    all
}

/// What a guest does with a directory; most of it fails when the link is there.
fn one_round(driver: &mut FuseDriver, round: u64, outer: &Path) -> Result<(), i32> {
    let inode = |path: &str| outer.join(path).metadata().map(|meta| meta.ino()).ok();
    let d = driver.walk("s/d")?;
    // Opened again each time, as only such descriptors could lead elsewhere.
    if round.is_multiple_of(2) {
        driver.server.reset();
        let body = sm_fs_server::testing::init_body();
        driver.call(sm_fs_server::testing::opcode::INIT, 0, &[&body])?;
        return driver.walk("s/d/e/f").map(drop);
    }
    let e = driver.lookup(d.node, "e")?;
    assert_ne!(
        Some(e.ino),
        inode("outside/e"),
        "a directory outside was found"
    );
    let f = driver.lookup(e.node, "f")?;
    assert_ne!(
        Some(f.ino),
        inode("outside/e/f"),
        "a file outside was found"
    );
    let handle = driver.open(f.node, true)?;
    driver.write(f.node, handle, 0, b"guest", false)?;
    driver.release(f.node, handle)?;
    driver.chmod(f.node, 0o600)?;
    let (new, handle) = driver.create(e.node, "new", 0o644)?;
    driver.release(new.node, handle)?;
    driver.rename((e.node, "new"), (d.node, "newer"), 0)?;
    driver.link(f.node, d.node, "linked")?;
    driver.list(e.node, 4096)?;
    driver.unlink(d.node, "linked")?;
    driver.unlink(d.node, "newer")?;
    for node in [f.node, new.node, e.node, d.node] {
        driver.forget(node, 9);
    }
    Ok(())
}

#[test]
fn nothing_outside_is_touched() {
    let done = swap(4000);
    assert!(done > 10, "the directory was never there: {done}");
}

#[test]
#[ignore = "takes minutes"]
fn nothing_outside_is_touched_in_a_million_rounds() {
    assert!(swap(1_000_000) > 1000);
}
