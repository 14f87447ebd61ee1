//! Records on a disk that is full, by pages or by inodes: on a small tmpfs in a mount
//! namespace of the test's own process.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::tests::{config, fixture_in};

const OWN: &str = "SM_TEST_SMALL_DISK";

/// Runs the test `name` again with a tmpfs mounted with `options`; returns its directory
/// in that run.
fn small_disk(name: &str, options: &str) -> Option<PathBuf> {
    if let Some(disk) = std::env::var_os(OWN) {
        return Some(disk.into());
    }
    let at = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    // Users other than root may mount in a user namespace.
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let name = format!("record::full::{name}");
    let ran = command
        .args(["--mount", "sh", "-c"])
        .arg(format!(
            "mount -t tmpfs -o {options} none \"${OWN}\" && exec \"$0\" \"$@\""
        ))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", &name])
        .env(OWN, at.path())
        .output()
        .unwrap();
    assert!(ran.status.success(), "{ran:?}");
    assert!(String::from_utf8_lossy(&ran.stdout).contains("1 passed"));
    None
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        }
        // The lock of the registry stays once it was taken.
        if !path.ends_with("vms/.lock") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Creates a record with ever more room until that succeeds. Every failure names the
/// cause and leaves nothing behind.
fn created_once_there_is_room(disk: &Path, fill: impl Fn(u64) -> Vec<PathBuf>) {
    let records = fixture_in(disk);
    let before = files_below(disk);
    for room in 0.. {
        let ballast = fill(room);
        let created = records.create(&super::tests::named(Some("vm")), |id, name| {
            Ok(config(id, name))
        });
        for path in ballast {
            fs::remove_file(path).unwrap();
        }
        let Err(error) = created else {
            assert!(room > 0, "nothing was refused");
            assert_eq!(records.list().unwrap().len(), 1);
            return;
        };
        let text = sm_control::with_causes(&error);
        assert!(text.contains("No space left"), "with {room}: {text}");
        assert_eq!(files_below(disk), before, "with {room}");
    }
}

#[test]
fn a_record_is_whole_or_absent_when_pages_run_out() {
    let name = "a_record_is_whole_or_absent_when_pages_run_out";
    let Some(disk) = small_disk(name, "size=256k") else {
        return;
    };
    created_once_there_is_room(&disk, |pages| {
        let path = disk.join("ballast");
        let mut file = File::create(&path).unwrap();
        while file.write(&[0; 4096]).is_ok_and(|count| count == 4096) {}
        let len = file.metadata().unwrap().len();
        file.set_len(len.saturating_sub(pages * 4096)).unwrap();
        vec![path]
    });
}

#[test]
fn a_record_is_whole_or_absent_when_inodes_run_out() {
    let name = "a_record_is_whole_or_absent_when_inodes_run_out";
    let Some(disk) = small_disk(name, "size=1m,nr_inodes=40") else {
        return;
    };
    created_once_there_is_room(&disk, |inodes| {
        let mut files: Vec<_> = (0..)
            .map(|number| disk.join(format!("ballast-{number}")))
            .take_while(|path| File::create(path).is_ok())
            .collect();
        for _ in 0..inodes {
            fs::remove_file(files.pop().unwrap()).unwrap();
        }
        files
    });
}
