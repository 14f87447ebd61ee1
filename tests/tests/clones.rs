//! Snapshots of running workloads, and clones that continue them.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::collections::BTreeSet;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use sm_e2e::{Done, Home, TIMEOUT, Vm, full, image, lanes, unique, until};

/// Counts in a file and on standard output until `/tmp/end` exists.
const COUNT: &str = "i=0; while [ ! -e /tmp/end ]; do i=$((i+1)); echo $i; echo $i >/tmp/i; \
                     sleep 0.1; done; exit 9";

fn counting(home: &Home) -> Vm<'_> {
    let vm = home.detached(&["-m", "128m", &image("busybox"), "sh", "-c", COUNT]);
    until("it counts", || count(home, &vm.name) > 3);
    vm
}

fn count(home: &Home, vm: &str) -> u32 {
    let read = home.sm(&["exec", vm, "cat", "/tmp/i"]);
    read.out().trim().parse().unwrap_or(0)
}

/// Waits for the end of a VM, whose status must be `status`.
#[track_caller]
fn ends(home: &Home, vm: &str, status: &str) {
    let ended = home.sm(&["wait", vm]).exits(0).out();
    if ended.trim() != status {
        let told = home.sm(&["inspect", vm]).out();
        panic!("{vm} ended with {ended}: {told}");
    }
}

/// Waits until a counting VM has counted beyond `then`.
#[track_caller]
fn goes_on(home: &Home, vm: &str, then: u32) {
    let begun = Instant::now();
    while count(home, vm) <= then {
        if begun.elapsed() > TIMEOUT {
            let told = home.sm(&["exec", vm, "sh", "-c", "uptime; ps; cat /tmp/i"]);
            let state = home.sm(&["inspect", vm]).out();
            let console = home.sm(&["logs", "--console", vm]).out();
            panic!("{vm} does not go on: {told:?}\n{state}\n{console}");
        }
        sleep(Duration::from_millis(100));
    }
}

fn names(home: &Home) -> BTreeSet<String> {
    let listed = home.sm(&["snapshot", "ls", "-q"]).exits(0).out();
    listed.lines().map(str::to_owned).collect()
}

/// Clones that are removed when the test ends.
struct Clones<'a>(&'a Home, Vec<String>);

impl Drop for Clones<'_> {
    fn drop(&mut self) {
        for name in &self.1 {
            self.0.sm(&["rm", "-f", name]);
        }
    }
}

fn clones<'a>(home: &'a Home, snapshot: &str, number: usize) -> Clones<'a> {
    let mut clones = Clones(home, Vec::new());
    for _ in 0..number {
        let name = unique("clone");
        home.sm(&["run", "-d", "--name", &name, "--from", snapshot])
            .exits(0);
        clones.1.push(name);
    }
    clones
}

fn remove(home: &Home, snapshot: &str) -> Done {
    home.sm(&["snapshot", "rm", snapshot])
}

#[test]
fn clones_go_on_where_the_workload_was_with_an_identity_of_their_own() {
    let home = Home::shared();
    let vm = counting(home);
    let name = unique("warm");
    let made = home.sm(&["snapshot", "create", &vm.name, &name]).exits(0);
    assert_eq!(made.out(), format!("{name}\n"));
    assert!(made.err().contains("vCPUs were paused for"), "{made:?}");
    let then = count(home, &vm.name);
    let clones = clones(home, &name, 3);
    let mut identities = BTreeSet::new();
    for clone in [&vm.name].into_iter().chain(&clones.1) {
        goes_on(home, clone, then);
        let identity = home
            .sm(&[
                "exec",
                clone,
                "sh",
                "-c",
                "cat /etc/machine-id /proc/sys/kernel/random/boot_id \
                 /proc/sys/kernel/random/uuid; hostname",
            ])
            .exits(0)
            .out();
        assert_eq!(identity.lines().count(), 4);
        for line in identity.lines() {
            assert!(identities.insert(line.to_owned()), "{clone}: {line}");
        }
        // The clone continues the count: its first number is not 1.
        if *clone != vm.name {
            let first = home.sm(&["logs", clone]).exits(0).out();
            let first: u32 = first.lines().next().unwrap().parse().unwrap();
            assert!(first > 3, "{clone} began with {first}");
        }
        // The workload exits with its own status, possibly before `touch` has: then
        // `touch` is killed with SIGKILL.
        let told = home.sm(&["exec", clone, "touch", "/tmp/end"]);
        assert!(matches!(told.code, Some(0 | 137)), "{told:?}");
        ends(home, clone, "9");
    }
    let refused = Home::shared().sm(&["snapshot", "create", &vm.name, "late"]);
    assert!(refused.exits(1).err().contains("not running"));
    drop(clones);
    until("its clones are gone", || {
        remove(home, &name).code == Some(0)
    });
}

#[test]
fn forked_clones_share_a_snapshot_that_goes_with_the_last() {
    let home = Home::shared();
    let vm = counting(home);
    let prefix = unique("fork");
    let before = names(home);
    let forked = home.sm(&["fork", &vm.name, "-n", "2", "--name", &prefix, "--json"]);
    let forked = forked.exits(0).json();
    let clones = Clones(home, vec![format!("{prefix}-1"), format!("{prefix}-2")]);
    assert_eq!(forked[1]["name"], clones.1[1].as_str());
    let made: Vec<_> = names(home).difference(&before).cloned().collect();
    let made = made.iter().find(|name| name.starts_with("fork-")).unwrap();
    for clone in &clones.1 {
        let then = count(home, clone);
        goes_on(home, clone, then);
    }
    let refused = remove(home, made).exits(1).err();
    assert!(refused.contains("in use"), "{refused}");
    drop(clones);
    until("it is removed", || !names(home).contains(made));
    assert!(count(home, &vm.name) > 3, "the original goes on");
}

/// Sixteen vector registers of each of four threads are in use at the snapshot; each
/// clone computes the same results as this machine does without a guest.
#[test]
fn a_computation_in_four_threads_ends_right_in_all_clones() {
    const ROUNDS: &str = "100";
    let home = Home::shared();
    let program = lanes();
    let expected = Command::new(program.path().join("lanes"))
        .args(["lanes", ROUNDS])
        .output()
        .unwrap();
    assert!(expected.status.success());
    let expected = String::from_utf8(expected.stdout).unwrap();
    assert_eq!(expected.lines().count(), 4);
    let root = format!("rootfs:{}", program.path().display());
    let vm = home.detached(&[
        "-m", "128m", "--cpus", "4", &root, "/lanes", "lanes", ROUNDS,
    ]);
    let round = || {
        let said = home.sm(&["logs", "--tail", "1", &vm.name]);
        let said = [said.out(), said.err()].concat();
        let last = said
            .lines()
            .last()
            .and_then(|line| line.strip_prefix("round "));
        last.and_then(|number| number.trim().parse::<u32>().ok())
    };
    until("it computes", || round() > Some(4));
    let name = unique("sum");
    home.sm(&["snapshot", "create", &vm.name, &name]).exits(0);
    assert!(round() < Some(95), "it was in the middle");
    let clones = clones(home, &name, 20);
    for clone in [&vm.name].into_iter().chain(&clones.1) {
        ends(home, clone, "0");
        let result = home.sm(&["logs", clone]).exits(0).out();
        assert_eq!(result, expected, "{clone}");
    }
    let sound = home.sm(&["snapshot", "verify", &name]).exits(0).out();
    assert!(sound.contains("sound"), "{sound}");
    drop(clones);
    until("its clones are gone", || {
        remove(home, &name).code == Some(0)
    });
}

/// Returns the private bytes of a process outside and inside of its guest's memory, and
/// the shared bytes of guest memory.
fn memory_of(pid: u64) -> (u64, u64, u64) {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut guest, mut own, mut shared) = (0, 0, 0);
    let mut of_guest = false;
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (first, second) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let kib: u64 = second.parse().unwrap_or(0);
        match first {
            "Private_Clean:" | "Private_Dirty:" if of_guest => guest += kib << 10,
            "Private_Clean:" | "Private_Dirty:" => own += kib << 10,
            "Shared_Clean:" | "Shared_Dirty:" if of_guest => shared += kib << 10,
            _ if first.contains('-') => of_guest = line.ends_with("/memory.bin"),
            _ => {}
        }
    }
    (guest, own, shared)
}

/// Concurrent clones have, besides the pages that their guests wrote, at most 3 MiB of
/// private memory each; all other memory is shared.
#[test]
fn twenty_clones_share_their_memory() {
    let home = Home::shared();
    let vm = counting(home);
    let name = unique("shared");
    home.sm(&["snapshot", "create", &vm.name, &name]).exits(0);
    let clones = clones(home, &name, 20);
    for clone in &clones.1 {
        let told = home.sm(&["inspect", clone]).exits(0).json();
        let Some(pid) = told[0]["state"]["pid"].as_u64() else {
            panic!("{clone} runs: {told}");
        };
        // Alignment of stacks for huge pages is random, so they must be disabled.
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("THP_enabled:\t0"), "{clone}: {status}");
        let (guest, own, shared) = memory_of(pid);
        println!("{clone}: {guest} written by the guest, {own} besides, {shared} shared");
        assert!(
            own <= 3 << 20,
            "{clone} has {own} bytes besides its guest's"
        );
        assert!(shared > 1 << 20, "{clone} shares {shared} bytes");
    }
    drop(clones);
    until("its clones are gone", || {
        remove(home, &name).code == Some(0)
    });
}

/// A capture of a booted machine writes only resident pages that are not zero.
#[test]
fn a_capture_writes_resident_pages_that_are_not_zero() {
    let home = Home::new();
    let image = image("busybox");
    let vm = home.detached(&["--cold", "-m", "256m", &image, "sleep", "1000"]);
    let pid = vm.inspect()["state"]["pid"].as_u64().unwrap();
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let rss = smaps.lines().find_map(|line| line.strip_prefix("Rss:"));
    let rss: u64 = rss.unwrap().trim().trim_end_matches(" kB").parse().unwrap();
    let made = home.sm(&["snapshot", "create", "--json", &vm.name, "all"]);
    let pages = made.exits(0).json()["pages"].as_u64().unwrap();
    let listed = home.sm(&["snapshot", "ls", "--json"]).exits(0).json();
    let disk = listed[0]["disk_bytes"].as_u64().unwrap();
    println!("{pages} pages stored, {disk} bytes on disk, {rss} KiB resident in the VMM");
    assert!(disk <= pages * 4096 + (1 << 20), "{disk} for {pages} pages");
    assert!(pages * 4 <= rss, "{pages} pages of {rss} KiB");
    // Each written page contains data.
    let dir = home.data().join("sm/snapshots/all");
    let memory = std::fs::read(dir.join("memory.bin")).unwrap();
    let filled = memory
        .chunks(4096)
        .filter(|page| page.iter().any(|&byte| byte != 0));
    assert_eq!(filled.count() as u64, pages);
}

#[test]
fn workloads_of_debian_and_python_go_on_in_clones() {
    let home = Home::shared();
    let python = "import time\ni = 0\nwhile True:\n    i += 1\n    open('/tmp/i', 'w').write(str(i))\n    time.sleep(0.1)\n";
    let bash = "i=0; while :; do i=$((i+1)); echo $i >/tmp/i; sleep 0.1; done";
    for (fixture, memory, command) in [
        ("debian", "128m", ["bash", "-c", bash]),
        ("python", "192m", ["python3", "-c", python]),
    ] {
        let image = image(fixture);
        let vm = home.detached(&[&["-m", memory, &*image], &command[..]].concat());
        until("it counts", || count(home, &vm.name) > 3);
        let name = unique(fixture);
        home.sm(&["snapshot", "create", &vm.name, &name]).exits(0);
        let then = count(home, &vm.name);
        let clones = clones(home, &name, 3);
        let mut identities = BTreeSet::new();
        for clone in [&vm.name].into_iter().chain(&clones.1) {
            goes_on(home, clone, then);
            let read = home.sm(&["exec", clone, "cat", "/etc/machine-id", "/run/sm-epoch"]);
            let read = read.exits(0).out();
            assert_eq!(read.lines().count(), 2);
            for line in read.lines() {
                assert!(identities.insert(line.to_owned()), "{clone} repeats {line}");
            }
            let told = home.sm(&["inspect", clone]).exits(0).json();
            let epoch = told[0]["state"]["epoch"].as_str().unwrap();
            assert_eq!(read.lines().nth(1), Some(epoch));
        }
        home.sm(&["snapshot", "verify", &name]).exits(0);
        drop(clones);
        until("its clones are gone", || {
            remove(home, &name).code == Some(0)
        });
    }
}

#[test]
fn large_files_in_memory_are_in_the_clone() {
    let home = Home::shared();
    let size: u64 = if full() { 100_000_000 } else { 25_000_000 };
    let script = format!("head -c {size} /dev/urandom >/big; sha256sum /big >/sum; sleep infinity");
    let vm = home.detached(&["-m", "512m", &image("debian"), "sh", "-c", &script]);
    until("they are written", || {
        let sum = home.sm(&["exec", &vm.name, "cat", "/sum"]);
        sum.out().contains("/big")
    });
    let name = unique("big");
    let made = home.sm(&["snapshot", "create", "--json", &vm.name, &name]);
    let pages = made.exits(0).json()["pages"].as_u64().unwrap();
    assert!(pages > size / 4096, "{pages}");
    let clone = home.clone_of(&name, "big");
    for vm in [&vm, &clone] {
        vm.exec(&["sha256sum", "-c", "/sum"]).exits(0);
    }
    drop(clone);
    until("its clone is gone", || remove(home, &name).code == Some(0));
}

#[test]
fn a_clone_is_reset_to_its_snapshot() {
    let home = Home::shared();
    let vm = counting(home);
    let name = unique("pool");
    home.sm(&["snapshot", "create", "--stop", &vm.name, &name])
        .exits(0);
    let clones = clones(home, &name, 1);
    let clone = &clones.1[0];
    let mut identities = BTreeSet::new();
    for round in 0..5 {
        goes_on(home, clone, 0);
        // The clone's changes, and files, since the last reset are undone.
        let script = "cat /etc/machine-id; test ! -e /tmp/mess; head -c 3000000 /dev/urandom \
                      >/tmp/mess; echo 100000 >/tmp/i; cat /tmp/mess | wc -c";
        let out = home
            .sm(&["exec", clone, "sh", "-ec", script])
            .exits(0)
            .out();
        let (identity, size) = out.trim().split_once('\n').unwrap();
        assert_eq!(size, "3000000");
        assert!(identities.insert(identity.to_owned()), "round {round}");
        home.sm(&["reset", clone]).exits(0);
    }
    assert!(count(home, clone) < 1000);
    home.sm(&["exec", clone, "touch", "/tmp/end"]).exits(0);
    ends(home, clone, "9");
    let refused = home.sm(&["reset", clone]).exits(1).err();
    assert!(refused.contains("not running"), "{refused}");
    drop(clones);
    until("its clones are gone", || {
        remove(home, &name).code == Some(0)
    });
}

#[test]
fn all_ways_of_paging_restore_the_same_clone() {
    let home = Home::shared();
    let script = "head -c 30000000 /dev/urandom >/tmp/f; sha256sum /tmp/f >/tmp/sum; sleep 1000";
    let vm = home.detached(&["-m", "128m", &image("busybox"), "sh", "-c", script]);
    until("it is written", || {
        let sum = home.sm(&["exec", &vm.name, "cat", "/tmp/sum"]);
        sum.out().contains("/tmp/f")
    });
    let name = unique("paged");
    home.sm(&["snapshot", "create", &vm.name, &name]).exits(0);
    let mut all = Clones(home, Vec::new());
    for how in ["map", "prefault", "userfault"] {
        let clone = unique(how);
        home.sm(&[
            "run", "-d", "--name", &clone, "--paging", how, "--from", &name,
        ])
        .exits(0);
        all.1.push(clone.clone());
        for _ in 0..2 {
            let script = "sha256sum -c /tmp/sum && test ! -e /tmp/mess && echo >/tmp/mess";
            home.sm(&["exec", &clone, "sh", "-c", script]).exits(0);
            home.sm(&["reset", &clone]).exits(0);
        }
        let next = unique("next");
        home.sm(&["snapshot", "create", &clone, &next]).exits(0);
        let child = home.clone_of(&next, "child");
        child.exec(&["sha256sum", "-c", "/tmp/sum"]).exits(0);
        drop(child);
        until("its clone is gone", || remove(home, &next).code == Some(0));
    }
    drop(all);
    until("its clones are gone", || {
        remove(home, &name).code == Some(0)
    });
}

#[test]
fn snapshots_of_clones_of_snapshots() {
    let home = Home::shared();
    let first = counting(home);
    let mut vm = first.name.clone();
    let mut made = Vec::new();
    let mut all = Clones(home, Vec::new());
    // The depth exceeds the limit of a chain: a snapshot in between is complete.
    for depth in 0..9 {
        let name = unique("deep");
        let report = home.sm(&["snapshot", "create", "--stop", "--json", &vm, &name]);
        let report = report.exits(0).json();
        let parent = report["parent"].as_str().map(str::to_owned);
        if depth > 0 {
            let before: &String = made.last().unwrap();
            assert!(
                parent.is_none() || parent.as_deref() == Some(before),
                "{parent:?}"
            );
        }
        made.push(name.clone());
        vm = unique("clone");
        home.sm(&["run", "-d", "--name", &vm, "--from", &name])
            .exits(0);
        all.1.push(vm.clone());
    }
    let then = count(home, &vm);
    goes_on(home, &vm, then);
    home.sm(&["snapshot", "verify", made.last().unwrap()])
        .exits(0);
    // A flattened copy is the same machine.
    let flat = unique("flat");
    home.sm(&["snapshot", "flatten", made.last().unwrap(), &flat])
        .exits(0);
    home.sm(&["snapshot", "diff", made.last().unwrap(), &flat])
        .exits(0);
    let inspected = home.sm(&["snapshot", "inspect", &flat]).exits(0).json();
    assert!(inspected["parent"].is_null());
    let clone = home.clone_of(&flat, "flat");
    let then = count(home, &clone.name);
    goes_on(home, &clone.name, then);
    drop(clone);
    until("its clone is gone", || remove(home, &flat).code == Some(0));
    let refused = remove(home, &made[0]).exits(1).err();
    assert!(refused.contains("builds on it"), "{refused}");
    drop(all);
    for name in made.iter().rev() {
        until("it can be removed", || remove(home, name).code == Some(0));
    }
}

#[test]
fn commands_beside_the_workload_stay_with_the_original() {
    let home = Home::shared();
    let vm = counting(home);
    let beside = home
        .command(&[
            "exec",
            &vm.name,
            "sh",
            "-c",
            "echo up; sleep 3; echo still here",
        ])
        .spawn()
        .unwrap();
    until("it runs", || {
        let ps = home.sm(&["exec", &vm.name, "ps"]);
        ps.out().contains("sleep 3")
    });
    let name = unique("beside");
    home.sm(&["snapshot", "create", &vm.name, &name]).exits(0);
    let clones = clones(home, &name, 1);
    let done: Done = beside.wait_with_output().unwrap().into();
    assert_eq!(done.exits(0).out(), "up\nstill here\n");
    // The stream of the command has no peer in the clone, so the agent ended it.
    until("it is gone", || {
        let ps = home.sm(&["exec", &clones.1[0], "ps"]).exits(0);
        !ps.out().contains("still here")
    });
    drop(clones);
    until("its clones are gone", || {
        remove(home, &name).code == Some(0)
    });
}

#[test]
fn clones_are_proved_distinct_in_every_layer() {
    let home = Home::new();
    let vm = home.detached(&["-m", "128m", &image("busybox"), "sh", "-c", COUNT]);
    until("both were published", || names(&home).len() == 2);
    home.sm(&["snapshot", "create", &vm.name, "warm"]).exits(0);
    for name in names(&home) {
        let proof = home.sm(&["snapshot", "prove-distinct", "-n", "3", "--json", &name]);
        let proof = proof.exits(0).json();
        let told = proof["clones"].as_array().unwrap();
        assert_eq!(told.len(), 3);
        for what in ["random", "uuid", "machine_id", "boot_id", "hostname", "mac"] {
            let values: BTreeSet<_> = told.iter().map(|c| c[what].as_str().unwrap()).collect();
            assert_eq!(values.len(), 3, "{name}: {what} of {told:?}");
            assert!(!values.contains(""), "{name}: {what}");
        }
    }
    assert!(home.sm(&["ps", "-aq"]).exits(0).out().lines().count() == 1);
}

#[test]
fn invalid_names_and_options_are_refused_and_the_vm_runs_on() {
    let home = Home::shared();
    let vm = counting(home);
    let create = |name: &str| home.sm(&["snapshot", "create", &vm.name, name]);
    for (name, why) in [
        ("base-mine", "are reserved"),
        ("a/b", "not a snapshot name"),
        ("", "not a snapshot name"),
    ] {
        let error = create(name).exits(1).err();
        assert!(error.contains(why), "{name}: {error}");
    }
    let name = unique("taken");
    create(&name).exits(0);
    let error = create(&name).exits(1).err();
    assert!(error.contains("exists already"), "{error}");
    let from = |more: &[&str]| {
        let mut all = vec!["run", "--rm", "--from", &name];
        all.extend_from_slice(more);
        home.sm(&all).exits(125).err()
    };
    for (more, why) in [
        (["-m", "1g"], "memory"),
        (["--cpus", "3"], "CPUs"),
        (["-e", "A=1"], "environment"),
        (["--shm-size", "1m"], "/dev/shm"),
        (["--root", "tmpfs"], "root file system"),
        (["--kernel-args", "quiet"], "kernel"),
    ] {
        let error = from(&more);
        assert!(
            error.contains(why) && error.contains("leave it out"),
            "{error}"
        );
    }
    let base = names(home).into_iter().find(|n| n.starts_with("image-"));
    let error = home.sm(&["run", "--from", &base.unwrap()]).exits(125).err();
    assert!(error.contains("an image only"), "{error}");
    let error = home.sm(&["run", "--from", "nothing"]).exits(125).err();
    assert!(error.contains("no snapshot \"nothing\""), "{error}");
    let then = count(home, &vm.name);
    goes_on(home, &vm.name, then);
    remove(home, &name).exits(0);
}
