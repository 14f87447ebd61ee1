//! Repeated restores, kills at random moments, and concurrent starts.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::{BuildHasher as _, Hasher as _};
use std::os::unix::ffi::OsStrExt as _;
use std::process::Child;
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sm_e2e::{Home, Mount, full, image, lab, unique, until};

const SMALL: [&str; 2] = ["-m", "128m"];

fn snapshots(home: &Home) -> Vec<String> {
    let listed = home.sm(&["snapshot", "ls", "-q"]).exits(0).out();
    listed.lines().map(str::to_owned).collect()
}

fn says(home: &Home, image: &str, word: &str) {
    let run = ["run", "--rm", SMALL[0], SMALL[1], image, "echo", word];
    assert_eq!(home.sm(&run).exits(0).out(), format!("{word}\n"));
}

#[test]
fn restores_in_a_row_are_all_ready() {
    let home = Home::new();
    let part = if full() { 1 } else { 4 };
    for (name, count) in [("busybox", 120), ("debian", 40), ("python", 40)] {
        // The run creates an image snapshot.
        let of_images = || {
            let all = snapshots(&home);
            all.iter().filter(|name| name.starts_with("image-")).count()
        };
        let before = of_images();
        says(&home, &image(name), "first");
        until("it is published", || of_images() > before);
        for n in 0..count / part {
            let vm = unique("restored");
            let run = [
                "run",
                "-d",
                "--rm",
                "--json",
                "--name",
                &vm,
                SMALL[0],
                SMALL[1],
                &image(name),
                "sleep",
                "1000",
            ];
            let started = home.sm(&run).exits(0).json();
            let phases = started["timings"].as_array().unwrap();
            let reached = |wanted: &str| phases.iter().any(|phase| phase["name"] == wanted);
            // A booted VM lacks the first phase, one of the base snapshot has the second.
            assert!(reached("agent answered"), "{name} {n}: {started}");
            assert!(!reached("root attached"), "{name} {n}: {started}");
            let script = ["exec", &vm, "sh", "-c", "echo $((6 * 7))"];
            let said = home.sm(&script).exits(0).out();
            assert_eq!(said, "42\n", "{name} {n}");
            home.sm(&["rm", "-f", &vm]).exits(0);
        }
    }
}

#[test]
fn processes_that_make_the_same_snapshots_at_once_leave_one_good_copy() {
    let home = Home::new();
    let run = ["run", "--rm", SMALL[0], SMALL[1], &image("busybox"), "true"];
    let children: Vec<Child> = (0..3)
        .map(|_| home.command(&run).spawn().unwrap())
        .collect();
    for child in children {
        let done: sm_e2e::Done = child.wait_with_output().unwrap().into();
        done.exits(0);
    }
    until("both are published", || snapshots(&home).len() == 2);
    for name in snapshots(&home) {
        home.sm(&["snapshot", "verify", &name]).exits(0);
    }
    says(&home, &image("busybox"), "sound");
    assert_eq!(snapshots(&home).len(), 2);
}

/// Returns the VMM processes of `home`.
fn machines(home: &Home) -> Vec<Pid> {
    let data = home.data();
    let ours = |pid: &str| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let ours = data.as_os_str().as_bytes();
        environment.windows(ours.len()).any(|window| window == ours)
            && command.windows(5).any(|window| window == b"__vmm")
    };
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()) && ours(name))
        .filter_map(|name| Pid::from_raw(name.parse().ok()?))
        .collect()
}

fn kill_all(home: &Home, child: &mut Child) {
    // An error means that it has already exited.
    let _ = child.kill();
    for machine in machines(home) {
        let _ = kill_process(machine, Signal::KILL);
    }
    child.wait().unwrap();
    until("they are gone", || machines(home).is_empty());
}

/// Waits for a random time.
fn wait_up_to(milliseconds: u64) -> u64 {
    let chosen = RandomState::new().build_hasher().finish() % milliseconds;
    sleep(Duration::from_millis(chosen));
    chosen
}

/// Checks that listed snapshots are valid, and a start works.
fn is_sound(home: &Home, when: &str) {
    for name in snapshots(home) {
        let verified = home.sm(&["snapshot", "verify", &name]);
        assert_eq!(verified.code, Some(0), "{when}: {name}: {}", verified.err());
    }
    let listed = home.sm(&["ps", "--json"]).exits(0).json();
    assert_eq!(listed.as_array().unwrap().len(), 0, "{when}: {listed}");
    home.sm(&["images"]).exits(0);
    says(home, &image("busybox"), "sound");
}

#[test]
fn death_during_a_first_start_leaves_everything_sound() {
    for _ in 0..if full() { 14 } else { 5 } {
        let home = Home::new();
        let run = ["run", "--rm", SMALL[0], SMALL[1], &image("busybox"), "true"];
        let mut child = home.command(&run).spawn().unwrap();
        // The time covers the boot, the workload, and the snapshots that follow.
        let after = wait_up_to(3000);
        kill_all(&home, &mut child);
        is_sound(&home, &format!("a first start after {after} ms"));
    }
}

#[test]
fn death_during_captures_and_restores_leaves_everything_sound() {
    let home = Home::new();
    // The data are on a disk, or the closest equivalent in the lab.
    let _disk = lab().then(|| Mount::ext4(8, &home.data()));
    says(&home, &image("busybox"), "warm");
    until("both are published", || snapshots(&home).len() == 2);
    // The snapshot for resets and forks.
    let first = home.detached(&[SMALL[0], SMALL[1], &image("busybox"), "sleep", "1000"]);
    home.sm(&["snapshot", "create", "--stop", &first.name, "mine"])
        .exits(0);
    for n in 0..if full() { 36 } else { 12 } {
        let name = unique("vm");
        let script = "head -c 20000000 /dev/urandom >/tmp/f; sleep 1000";
        let run = [
            "run",
            "-d",
            "--name",
            &name,
            SMALL[0],
            SMALL[1],
            &image("busybox"),
            "sh",
            "-c",
            script,
        ];
        let snapshot = unique("snap");
        let from = ["run", "-d", "--name", &name, "--from", "mine"];
        let (ready, doomed, what): (Option<&[&str]>, &[&str], _) = match n % 4 {
            0 => (
                Some(&run),
                &["snapshot", "create", &name, &snapshot],
                "a capture",
            ),
            1 => (None, &run, "a restore"),
            2 => (Some(&from), &["fork", "-n", "2", "--rm", &name], "a fork"),
            _ => (Some(&from), &["reset", &name], "a reset"),
        };
        if let Some(ready) = ready {
            home.sm(ready).exits(0);
        }
        let mut child = home.command(doomed).spawn().unwrap();
        let after = wait_up_to(600);
        kill_all(&home, &mut child);
        is_sound(&home, &format!("{what} after {after} ms"));
        // A snapshot that was complete at the kill can be used and removed.
        if snapshots(&home).contains(&snapshot) {
            let clone = unique("clone");
            home.sm(&["run", "-d", "--name", &clone, "--from", &snapshot])
                .exits(0);
            home.sm(&["exec", &clone, "true"]).exits(0);
            home.sm(&["rm", "-f", &clone]).exits(0);
            until("it is free", || {
                home.sm(&["snapshot", "rm", &snapshot]).code == Some(0)
            });
        }
        home.sm(&["rm", "-f", &name]);
    }
    // Incomplete files are removed by the sweep of the next start.
    let vm = home.detached(&[SMALL[0], SMALL[1], &image("busybox"), "sleep", "1000"]);
    home.sm(&["snapshot", "create", "--stop", &vm.name, "last"])
        .exits(0);
    let store = home.data().join("sm/snapshots");
    let left: Vec<_> = fs::read_dir(&store)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !snapshots(&home).contains(name) && name != "lock")
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
