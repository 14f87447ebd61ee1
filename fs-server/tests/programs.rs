//! Programs on a mounted server. They need root, for `/dev/fuse`.
#![allow(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Mounted, descriptors};
use sm_fs_server::{CacheMode, ShareOptions};

/// Runs a script in a directory; returns its output.
fn shell(directory: &Path, script: &str) -> String {
    let output = Command::new("sh")
        .args(["-euc", script])
        .current_dir(directory)
        .env("HOME", directory)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{script}: {text}{errors}");
    text
}

#[test]
fn git_works() {
    if !sm_test_needs::programs(&["git"]) {
        return;
    }
    for cache in [CacheMode::Auto, CacheMode::Exclusive] {
        let folder = tempfile::tempdir().unwrap();
        let Some(mounted) = Mounted::new(folder.path(), ShareOptions::default().cache(cache))
        else {
            return;
        };
        let script = "
            git init -q -b main one; cd one
            git config user.email a@b; git config user.name a
            for d in a b c; do
                mkdir $d; for i in $(seq 60); do echo $d $i > $d/$i; done
            done
            chmod +x a/1; ln -s a/1 link
            git add .; git commit -qm first
            for i in $(seq 30); do echo more >> b/$i; done; git mv c/1 c/new; rm c/2
            git commit -qam second; git checkout -q -b other HEAD^; git checkout -q main
            git gc -q --prune=now; git fsck --strict
            git clone -q . ../two; cd ../two; git status --porcelain; git ls-tree -r HEAD | wc -l
            git -C ../one status --porcelain
            git ls-files -s a/1 link | cut -c1-6";
        let through = shell(&mounted.guest, script);
        let plain = tempfile::tempdir().unwrap();
        assert_eq!(through, shell(plain.path(), script));
        // The host sees the same repository.
        mounted.unmount();
        let host = shell(
            &folder.path().join("one"),
            "git fsck --strict; git status --porcelain",
        );
        assert_eq!(host, "");
    }
}

#[test]
fn sqlite_works() {
    if !sm_test_needs::programs(&["sqlite3"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let Some(mounted) = Mounted::new(folder.path(), ShareOptions::default()) else {
        return;
    };
    let script = "
        sqlite3 db 'pragma journal_mode=wal; create table t(a integer primary key, b text);'
        for process in 1 2 3; do
            (for i in $(seq 40); do
                sqlite3 -cmd '.timeout 60000' db \"insert into t(b) values('$process $i')\"
            done) &
        done
        wait
        sqlite3 db 'select count(*), count(distinct b) from t; pragma integrity_check;'
        sqlite3 db 'pragma wal_checkpoint(truncate);' > /dev/null";
    assert_eq!(shell(&mounted.guest, script), "wal\n120|120\nok\n");
    mounted.unmount();
    let host = shell(folder.path(), "sqlite3 db 'select count(*) from t'");
    assert_eq!(host, "120\n");
}

/// Walks a tree of `files` files in directories of 4; returns the most descriptors that the
/// server had.
fn walk(files: usize) -> usize {
    let folder = tempfile::tempdir().unwrap();
    for directory in 0..files / 4 {
        let path = folder
            .path()
            .join(format!("{}/{directory}", directory % 50));
        fs::create_dir_all(&path).unwrap();
        for file in 0..4 {
            fs::write(path.join(file.to_string()), "").unwrap();
        }
    }
    let before = descriptors();
    let Some(mounted) = Mounted::new(folder.path(), ShareOptions::default()) else {
        return 0;
    };
    for _ in 0..2 {
        let found = shell(&mounted.guest, "find . -type f -size 0 | wc -l");
        assert_eq!(found.trim(), (files / 4 * 4).to_string());
    }
    let used = descriptors().saturating_sub(before);
    let removed = shell(&mounted.guest, "rm -rf * && ls -A | wc -l");
    assert_eq!(removed, "0\n");
    mounted.unmount();
    used
}

#[test]
fn many_files_need_few_descriptors() {
    if sm_test_needs::programs(&["find"]) {
        let used = walk(8_000);
        assert!(used < 2000, "{used} descriptors");
    }
}

#[test]
#[ignore = "takes minutes"]
fn a_million_files_need_few_descriptors() {
    if sm_test_needs::programs(&["find"]) {
        let used = walk(1_000_000);
        assert!(used < 2000, "{used} descriptors");
    }
}

/// The host changes files while they are used through the server.
#[test]
fn changes_of_the_host_are_seen() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mounted) = Mounted::new(folder.path(), ShareOptions::default()) else {
        return;
    };
    let (host, guest) = (folder.path().join("f"), mounted.guest.join("f"));
    for round in 0..20 {
        // An editor replaces the file; then it is written in place.
        let text = format!("replaced {round}");
        fs::write(folder.path().join("t"), &text).unwrap();
        fs::rename(folder.path().join("t"), &host).unwrap();
        assert_eq!(fs::read_to_string(&guest).unwrap_or_default(), text);
        let text = format!("in place {round}, and longer");
        fs::write(&host, &text).unwrap();
        assert_eq!(fs::read_to_string(&guest).unwrap_or_default(), text);
    }
    mounted.unmount();
}
