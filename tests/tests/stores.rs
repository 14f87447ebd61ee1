//! Unusable stores, which are full or read-only, and a restore long after the capture.
//! The tests change mounts and the clock, so they run in the lab only.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::fs;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use sm_e2e::{Home, Mount, Vm, image, lab, lanes, until};

fn sleeping(home: &Home) -> Vm<'_> {
    home.detached(&["-m", "128m", &image("busybox"), "sleep", "1000"])
}

#[test]
fn a_lack_of_space_is_reported_and_affects_no_other_vm() {
    if !lab() {
        return;
    }
    let home = Home::new();
    let _disk = Mount::new(&["-t", "tmpfs", "-o", "size=20m", "full"], &home.data());
    // The image fits, snapshots of a booted kernel do not.
    let vm = sleeping(&home);
    let refused = home.sm(&["snapshot", "create", &vm.name, "mine"]);
    let error = refused.exits(1).err();
    assert!(error.contains("No space left"), "{error}");
    assert_eq!(vm.exec(&["echo", "goes on"]).exits(0).out(), "goes on\n");
    assert_eq!(home.sm(&["snapshot", "ls", "-q"]).exits(0).out(), "");
    // The size of its layers is compared with the free space before any is read.
    let pulled = home.sm(&["pull", &image("debian")]);
    let error = pulled.exits(1).err();
    assert!(error.contains("has room for"), "{error}");
    assert!(error.contains("hint: free some"), "{error}");
    assert_eq!(home.sm(&["images", "-q"]).exits(0).out().lines().count(), 1);
    // The failed snapshot occupies no space.
    fs::write(home.data().join("room"), vec![1; 4 << 20]).unwrap();
}

#[test]
fn a_read_only_store_is_used_and_not_written() {
    if !lab() {
        return;
    }
    let home = Home::new();
    drop(sleeping(&home));
    until("both are published", || {
        home.sm(&["snapshot", "ls", "-q"]).out().lines().count() == 2
    });
    let store = home.data().join("sm/snapshots");
    let path = store.to_str().unwrap();
    let bound = Mount::new(&["--bind", path], &store);
    let _read_only = Mount::new(&["-o", "remount,bind,ro"], &store);
    let vm = sleeping(&home);
    let run = [
        "run",
        "--rm",
        "-m",
        "128m",
        "--timings",
        &image("busybox"),
        "true",
    ];
    let phases = home.sm(&run).exits(0).err();
    assert!(phases.contains("state restored"), "{phases}");
    let refused = home.sm(&["snapshot", "create", &vm.name, "mine"]);
    let error = refused.exits(1).err();
    assert!(error.contains("Read-only"), "{error}");
    assert_eq!(vm.exec(&["echo", "goes on"]).exits(0).out(), "goes on\n");
    let refused = home.sm(&["snapshot", "rm", "image-none"]).exits(1).err();
    assert!(!refused.is_empty());
    drop(vm);
    drop(bound);

    let data = home.data();
    let _bound = Mount::new(&["--bind", data.to_str().unwrap()], &data);
    let _read_only = Mount::new(&["-o", "remount,bind,ro"], &data);
    let refused = home.sm(&["run", "--rm", &image("busybox"), "true"]);
    let error = refused.exits(125).err();
    assert!(error.contains("Read-only"), "{error}");
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap().as_secs()
}

fn number(vm: &Vm<'_>, command: &[&str]) -> u64 {
    let out = vm.exec(command).exits(0).out();
    let digits = out.trim().split('.').next().unwrap();
    digits.parse().unwrap()
}

/// A lock for the clock: held while a test depends on a changed clock.
static CLOCK: Mutex<()> = Mutex::new(());

fn clock() -> MutexGuard<'static, ()> {
    CLOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sets the clock forward by an hour; returns the new time.
fn an_hour_later() -> u64 {
    let later = now() + 3600;
    let set = Command::new("date")
        .args(["-s", &format!("@{later}")])
        .output();
    assert!(set.unwrap().status.success());
    later
}

#[test]
fn an_hour_later_clocks_are_right_and_timers_have_not_leapt() {
    if !lab() {
        return;
    }
    let _clock = clock();
    let home = Home::shared();
    let script = "sleep 20; date +%s >/tmp/woke; sleep 1000";
    let arguments = ["-m", "128m", &image("busybox"), "sh", "-c", script];
    let vm = home.detached(&arguments);
    home.sm(&["snapshot", "create", "--stop", &vm.name, "nap"])
        .exits(0);
    let uptime = number(&home.clone_of("nap", "before"), &["cat", "/proc/uptime"]);
    let later = an_hour_later();
    let clone = home.clone_of("nap", "after");
    let (guest, host) = (number(&clone, &["date", "+%s"]), now());
    assert!(host >= later && guest.abs_diff(host) <= 2, "{guest} {host}");
    let monotonic = number(&clone, &["cat", "/proc/uptime"]);
    assert!(monotonic <= uptime + 60, "{uptime} became {monotonic}");
    // The sleep continues: it has not ended at once.
    clone.exec(&["test", "-e", "/tmp/woke"]).exits(1);
    until("it wakes up", || {
        clone.exec(&["test", "-e", "/tmp/woke"]).code == Some(0)
    });
    let woke = number(&clone, &["cat", "/tmp/woke"]);
    assert!(woke > later, "it woke up by the new clock");
    drop(clone);
    until("it is free", || {
        home.sm(&["snapshot", "rm", "nap"]).code == Some(0)
    });
}

/// Absolute timers of the wall clock that expired while the guest was suspended fire at
/// once; the monotonic clock did not advance, so its timers still have their full time.
#[test]
fn timers_of_each_clock_fire_by_that_clock_an_hour_later() {
    if !lab() {
        return;
    }
    let _clock = clock();
    let home = Home::shared();
    let program = lanes();
    let image = format!("rootfs:{}", program.path().display());
    let vm = home.detached(&["-m", "128m", &image, "/lanes", "timers", "30"]);
    until("they are set", || {
        home.sm(&["logs", &vm.name]).out().contains("set")
    });
    home.sm(&["snapshot", "create", "--stop", &vm.name, "timers"])
        .exits(0);
    let later = an_hour_later();
    let clone = home.clone_of("timers", "later");
    let resumed = now();
    let ended = home.sm(&["wait", &clone.name]).exits(0).out();
    assert_eq!(ended.trim(), "0");
    let said = home.sm(&["logs", &clone.name]).exits(0).out();
    let told = |name: &str| -> (i64, u64) {
        let line = said.lines().find(|line| line.starts_with(name));
        let words: Vec<&str> = line
            .unwrap_or_else(|| panic!("{said}"))
            .split(' ')
            .collect();
        (words[1].parse().unwrap(), words[2].parse().unwrap())
    };
    let (late, at) = told("realtime");
    assert!((3500..3800).contains(&late), "{said}");
    assert!(at <= resumed + 20, "at once: {said}");
    for name in ["monotonic", "relative"] {
        let (late, at) = told(name);
        assert!((0..20).contains(&late), "not late by its own clock: {said}");
        assert!(at > later, "{said}");
    }
    drop(clone);
    until("it is free", || {
        home.sm(&["snapshot", "rm", "timers"]).code == Some(0)
    });
}
