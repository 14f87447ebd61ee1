//! Base snapshots: the second VM does not boot, and clones share no identity.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::collections::BTreeSet;
use std::fs;

use sm_e2e::{Home, image, until};
use sm_snapshot::state_file::StateFile;
use sm_snapshot::store::read_manifest;

/// Returns a home that has a base snapshot for small machines.
fn warm() -> Home {
    let home = Home::new();
    run(&home, "true");
    await_base(&home);
    home
}

/// Waits until the first VM's process, which continues after `sm run` has returned, has
/// published both snapshots.
fn await_base(home: &Home) {
    until("both snapshots are published", || {
        let listed = home.sm(&["snapshot", "ls", "-q"]).exits(0).out();
        listed.lines().count() >= 2
    });
}

/// Returns the names of the base snapshot and the image snapshot.
fn automatic(home: &Home) -> [String; 2] {
    let listed = home.sm(&["snapshot", "ls", "--json"]).exits(0).json();
    ["base", "image"].map(|layer| {
        let mut all = listed.as_array().unwrap().iter();
        let found = all.find(|snapshot| snapshot["layer"] == layer).unwrap();
        found["name"].as_str().unwrap().to_owned()
    })
}

fn run(home: &Home, script: &str) -> String {
    let image = image("busybox");
    let arguments = ["run", "--rm", "-m", "128m", &image, "sh", "-c", script];
    home.sm(&arguments).exits(0).out()
}

/// Returns the names of the phases of a run.
fn phases(home: &Home, more: &[&str]) -> String {
    let image = image("busybox");
    let mut arguments = vec!["run", "--rm", "--timings", "-m", "128m"];
    arguments.extend_from_slice(more);
    arguments.extend_from_slice(&[&image, "true"]);
    home.sm(&arguments).exits(0).err()
}

#[test]
fn the_second_machine_is_restored_and_a_cold_one_is_not() {
    let home = warm();
    let restored = phases(&home, &[]);
    assert!(restored.contains("state restored"), "{restored}");
    assert!(!restored.contains("kernel reached init"), "{restored}");
    let cold = phases(&home, &["--cold"]);
    assert!(cold.contains("kernel reached init"), "{cold}");
    // Another kind of machine has its own snapshot.
    let other = phases(&home, &["--cpus", "2"]);
    assert!(other.contains("kernel reached init"), "{other}");
}

#[test]
fn clones_share_no_identity() {
    let home = warm();
    let script = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid \
                  /etc/machine-id; hostname; head -c16 /dev/urandom | md5sum";
    let mut seen = BTreeSet::new();
    for clone in 0..6 {
        for line in run(&home, script).lines() {
            assert!(seen.insert(line.to_owned()), "clone {clone} repeats {line}");
        }
    }
    assert_eq!(seen.len(), 6 * 5);
}

#[test]
fn the_clock_of_a_clone_is_right() {
    let home = warm();
    for _ in 0..3 {
        let before = std::time::SystemTime::now();
        let seconds: u64 = run(&home, "date +%s").trim().parse().unwrap();
        let after = std::time::SystemTime::now();
        let seconds = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        let second = std::time::Duration::from_secs(1);
        assert!(
            before - second <= seconds && seconds <= after,
            "{seconds:?}"
        );
    }
}

#[test]
fn snapshots_are_listed_verified_compared_and_removed() {
    let home = warm();
    let [base, name] = automatic(&home);
    home.sm(&["snapshot", "diff", &base, &name]).exits(1);
    home.sm(&["snapshot", "verify", &base, &name]).exits(0);
    home.sm(&["snapshot", "verify", &name]).exits(0);
    home.sm(&["snapshot", "diff", &name, &name]).exits(0);
    let manifest = home.sm(&["snapshot", "inspect", &name]).exits(0).json();
    assert_eq!(manifest["memory_bytes"], 128 << 20);
    // A snapshot in use is not removed.
    let vm = home.detached(&["-m", "128m", &image("busybox"), "sleep", "1000"]);
    let refused = home.sm(&["snapshot", "rm", &name]).exits(1);
    assert!(refused.err().contains("in use"), "{}", refused.err());
    drop(vm);
    // The VM's process may exit shortly after the VM's removal.
    for _ in 0..100 {
        if home.sm(&["snapshot", "rm", &name]).code == Some(0) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    home.sm(&["snapshot", "rm", &base]).exits(0);
    let done = home.sm(&["snapshot", "inspect", &name]).exits(1);
    assert!(done.err().contains(&name), "{}", done.err());
}

#[test]
fn a_damaged_snapshot_is_replaced_not_used() {
    let home = warm();
    for name in automatic(&home) {
        let path = home
            .data()
            .join("sm/snapshots")
            .join(&name)
            .join("state.bin");
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        home.sm(&["snapshot", "verify", &name]).exits(1);
    }
    let again = phases(&home, &[]);
    assert!(again.contains("kernel reached init"), "booted: {again}");
    await_base(&home);
    let restored = phases(&home, &[]);
    assert!(restored.contains("state restored"), "{restored}");
}

/// Changes the machine's state to a version that this sm does not write, with valid
/// checksums.
fn spoil(home: &Home, name: &str) {
    let dir = home.data().join("sm/snapshots").join(name);
    let mut manifest = read_manifest(&dir).unwrap();
    let path = dir.join("state.bin");
    let bytes = fs::read(&path).unwrap();
    let mut state = StateFile::decode(&path, &bytes, &manifest.state.digest).unwrap();
    let machine = state.sections.iter_mut().find(|s| s.name == "machine");
    machine.unwrap().payload[0] = 99;
    let (bytes, digest) = state.encode();
    fs::write(&path, bytes).unwrap();
    manifest.state.digest = digest;
    fs::write(dir.join("manifest.json"), manifest.encode().unwrap()).unwrap();
}

#[test]
fn an_unusable_cached_snapshot_is_replaced_with_a_warning() {
    let home = warm();
    let names = automatic(&home);
    for name in &names {
        spoil(&home, name);
        home.sm(&["snapshot", "verify", name]).exits(0);
    }
    let said = phases(&home, &[]);
    for name in &names {
        assert!(said.contains(&format!("snapshot \"{name}\"")), "{said}");
    }
    assert!(said.contains("machine version 99"), "{said}");
    assert!(said.contains("kernel reached init"), "booted: {said}");
    await_base(&home);
    let restored = phases(&home, &[]);
    assert!(restored.contains("state restored"), "{restored}");
    assert!(!restored.contains("cannot be restored"), "{restored}");
}

#[test]
fn an_unusable_workload_snapshot_is_named_and_kept() {
    let home = warm();
    let vm = home.detached(&["-m", "128m", &image("busybox"), "sleep", "1000"]);
    home.sm(&["snapshot", "create", "--stop", &vm.name, "mine"])
        .exits(0);
    spoil(&home, "mine");
    let error = home.sm(&["run", "--from", "mine"]).exits(125).err();
    assert!(
        error.contains("\"mine\"") && error.contains("machine version 99"),
        "{error}"
    );
    home.sm(&["snapshot", "inspect", "mine"]).exits(0);
}

#[test]
fn a_restored_machine_has_all_its_processors() {
    let home = Home::new();
    let image = image("busybox");
    for _ in 0..2 {
        let script = "nproc; for i in 1 2 3 4; do (i=0; while [ $i -lt 5000 ]; do i=$((i+1)); \
                      done; echo $i) & done; wait";
        let arguments = [
            "run", "--rm", "-m", "128m", "--cpus", "4", &image, "sh", "-c", script,
        ];
        let out = home.sm(&arguments).exits(0).out();
        assert_eq!(out, "4\n5000\n5000\n5000\n5000\n");
        await_base(&home);
    }
}
