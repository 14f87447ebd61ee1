//! The disk for changes to the root.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use sm_e2e::{Home, Mount, Reaped, Vm, image, lab, unique, until};

/// Space in bytes that the topmost layers of all disks of a home take.
fn written(home: &Home) -> u64 {
    let records = fs::read_dir(home.data().join("sm/vms")).unwrap().flatten();
    let tops = records.filter_map(|record| {
        let layers = fs::read_dir(record.path().join("disk-3")).ok()?;
        let number = |path: &Path| path.file_name()?.to_str()?.parse::<u32>().ok();
        let layers = layers.flatten().map(|layer| layer.path());
        let top = layers.max_by_key(|path| number(path))?;
        Some(fs::metadata(top).ok()?.blocks() * 512)
    });
    tops.sum()
}

fn idle<'a>(home: &'a Home, options: &[&str]) -> Vm<'a> {
    let image = image("busybox");
    home.detached(&[options, &["-m", "128m", &image, "sleep", "10000"]].concat())
}

fn sh(vm: &Vm<'_>, script: &str) -> String {
    vm.exec(&["sh", "-c", script]).exits(0).out()
}

#[test]
fn a_root_has_more_room_than_memory_and_returns_it() {
    let home = Home::new();
    let vm = idle(&home, &[]);
    let room = sh(&vm, "df -k / | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2");
    let room: u64 = room.trim().parse().unwrap();
    assert!((60 << 20..=64 << 20).contains(&room), "{room}");
    let before = written(&home);
    sh(
        &vm,
        "dd if=/dev/urandom of=/large bs=1M count=200 2>/dev/null && sync",
    );
    let full = written(&home) - before;
    assert!(full >= 200 << 20, "{full}");
    let sums = sh(
        &vm,
        "sha256sum < /large; echo 3 > /proc/sys/vm/drop_caches; sha256sum < /large",
    );
    let sums: Vec<_> = sums.lines().collect();
    assert_eq!(sums[0], sums[1]);
    // A file that is removed takes no space on the host any more.
    sh(&vm, "rm /large && sync");
    until("space is returned", || {
        sh(&vm, "sync");
        written(&home) - before < 32 << 20
    });
}

#[test]
fn snapshots_and_clones_have_their_own_changes() {
    let home = Home::shared();
    let vm = idle(home, &[]);
    sh(
        &vm,
        "echo one > /file; mkdir /new; rm -r /usr/share/none; true",
    );
    let snapshot = unique("disk");
    home.sm(&["snapshot", "create", &vm.name, &snapshot])
        .exits(0);
    // The original goes on.
    sh(&vm, "echo two > /file; sync");
    let clone = home.clone_of(&snapshot, "clone");
    assert_eq!(sh(&clone, "cat /file"), "one\n");
    sh(&clone, "echo three > /file; touch /cloned; sync");
    let other = home.clone_of(&snapshot, "clone");
    assert_eq!(
        sh(&other, "cat /file; ls /cloned 2>/dev/null; true"),
        "one\n"
    );
    assert_eq!(sh(&vm, "cat /file; ls /cloned 2>/dev/null; true"), "two\n");
    // A reset discards what the clone wrote.
    home.sm(&["reset", &clone.name]).exits(0);
    assert_eq!(
        sh(&clone, "cat /file; ls /cloned 2>/dev/null; true"),
        "one\n"
    );
    sh(&clone, "echo four > /file; sync");
    // A snapshot of a clone has the layers of both.
    let second = unique("disk");
    home.sm(&["snapshot", "create", &clone.name, &second])
        .exits(0);
    let grandchild = home.clone_of(&second, "clone");
    assert_eq!(sh(&grandchild, "cat /file"), "four\n");
    // A disk needs none of the snapshots below it.
    drop((other, grandchild));
    home.sm(&["rm", "-f", &clone.name]).exits(0);
    home.sm(&["snapshot", "rm", &second, &snapshot]).exits(0);
    assert_eq!(sh(&vm, "cat /file"), "two\n");
}

#[test]
fn the_storage_of_a_root_is_an_option() {
    let home = Home::shared();
    let image = image("busybox");
    let df =
        "df -k / | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2; grep -c ' /dev/vdb ' /proc/1/mountinfo";
    let size = |options: &[&str]| {
        let run = [
            &["run", "--rm", "-m", "128m"],
            options,
            &[&image, "sh", "-c", df],
        ]
        .concat();
        let out = home.sm(&run).out();
        let kibibytes = out.lines().next().unwrap_or_default();
        kibibytes.parse::<u64>().unwrap() >> 10
    };
    let gibibyte = size(&["--storage-opt", "size=1g"]);
    assert!((900..1024).contains(&gibibyte), "{gibibyte}");
    let half = size(&["--root", "tmpfs"]);
    assert!((40..70).contains(&half), "{half}");
    assert_eq!(size(&["--root", "tmpfs", "--storage-opt", "size=8m"]), 8);
    for (options, why) in [
        (["--storage-opt", "size=1m"], "no disk for the root"),
        (["--storage-opt", "inodes=1"], "the only option is size"),
        (["--root", "ramdisk"], "possible values: disk, tmpfs"),
    ] {
        let run = [&["run", "--rm"], &options[..], &[&image, "true"]].concat();
        let done = home.sm(&run).exits(125);
        assert!(done.err().contains(why), "{}", done.err());
    }
}

#[test]
fn a_vm_waits_while_the_host_has_no_space() {
    if !lab() {
        return;
    }
    let home = Home::new();
    fs::create_dir_all(home.data().join("sm/vms")).unwrap();
    let _small = Mount::new(
        &["-t", "tmpfs", "-o", "size=64m,mode=700", "small"],
        &home.data().join("sm/vms"),
    );
    let vm = idle(&home, &[]);
    let filler = home.data().join("sm/vms/.filler");
    fs::write(&filler, vec![1; 48 << 20]).unwrap();
    // It ends when there is space.
    let script = "dd if=/dev/zero of=/large bs=1M count=30 2> /dev/null; sync";
    let writing = home.command(&["exec", &vm.name, "sh", "-c", script]);
    let mut writing = Reaped({ writing }.spawn().unwrap());
    until("it waits for space", || {
        vm.inspect()["state"]["status"] == "paused"
    });
    let listed = home.sm(&["ps"]).exits(0).out();
    assert!(listed.contains("no disk space on the host"), "{listed}");
    let refused = home.sm(&["snapshot", "create", &vm.name, "full"]).exits(1);
    assert!(refused.err().contains("disk space"), "{}", refused.err());
    fs::remove_file(&filler).unwrap();
    until("it goes on", || {
        vm.inspect()["state"]["status"] == "running"
    });
    // Nothing was lost, and the file system is not read-only.
    assert!(writing.0.wait().unwrap().success());
    sh(&vm, "sync; touch /more");
    let sizes = sh(
        &vm,
        "stat -c %s /large; dmesg 2>/dev/null | grep -c 'I/O error'; true",
    );
    assert_eq!(sizes, "31457280\n0\n");
}

#[test]
fn changes_stay_when_a_vm_is_started_again() {
    let home = Home::shared();
    let script = "echo x >> /starts; wc -l < /starts; exec sleep 10000";
    let vm = home.created(&["-m", "128m", &image("busybox"), "sh", "-c", script]);
    let name = vm.name.clone();
    for number in 1..=4 {
        home.sm(&["start", &name]).exits(0);
        until("it has counted", || {
            let said = home.sm(&["logs", &name]).out();
            said.lines().last() == Some(&number.to_string())
        });
        match number {
            1 => drop(home.sm(&["stop", "-t", "0", &name]).exits(0)),
            2 => drop(home.sm(&["kill", &name]).exits(0)),
            // The process of the VM is gone, with everything that was not flushed.
            _ => {
                vm.exec(&["sync"]).exits(0);
                let pid = vm.inspect()["state"]["pid"].as_u64().unwrap();
                let kill = Command::new("kill").args(["-9", &pid.to_string()]).status();
                assert!(kill.unwrap().success());
            }
        }
        home.sm(&["wait", &name]);
    }
    // Removed with the VM.
    let disk = home.data().join("sm/vms");
    let id = vm.inspect()["id"].as_str().unwrap().to_owned();
    assert!(disk.join(&id).join("disk-3").exists());
    drop(vm);
    assert!(!disk.join(&id).exists());
}
