//! Memory that guests return to the host.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use sm_e2e::{Home, Vm, image, unique, until};

const MIB: u64 = 1 << 20;

/// Returns the memory of a VM's process that no file has, in bytes.
fn private(vm: &Vm<'_>) -> u64 {
    let pid = vm.inspect()["state"]["pid"].as_u64().unwrap();
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Anonymous:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() * 1024
}

/// Fills a file in the guest's memory, and returns its checksum.
fn fill(vm: &Vm<'_>, file: &str, mib: u64) -> String {
    let script = format!(
        "yes {file} | dd of=/t/{file} bs=1M count={mib} iflag=fullblock 2>/dev/null; md5sum /t/{file}"
    );
    vm.exec(&["sh", "-c", &script]).exits(0).out()
}

fn sum(vm: &Vm<'_>, file: &str) -> String {
    vm.exec(&["md5sum", &format!("/t/{file}")]).exits(0).out()
}

fn free_total(vm: &Vm<'_>) -> u64 {
    let read = vm.exec(&[
        "sed",
        "-n",
        "s/MemTotal: *\\([0-9]*\\) kB/\\1/p",
        "/proc/meminfo",
    ]);
    read.exits(0).out().trim().parse::<u64>().unwrap() * 1024
}

fn with_memory<'a>(home: &'a Home, arguments: &[&str]) -> Vm<'a> {
    let busybox = image("busybox");
    let mut all = vec!["-m", "256m", "--tmpfs", "/t"];
    all.extend_from_slice(arguments);
    all.extend_from_slice(&[&busybox, "sleep", "100000"]);
    home.detached(&all)
}

#[test]
fn what_a_guest_frees_returns_to_the_host() {
    let home = Home::shared();
    for cold in [&["--cold"][..], &[]] {
        let vm = with_memory(home, cold);
        fill(&vm, "a", 80);
        let kept = fill(&vm, "b", 20);
        let full = private(&vm);
        assert!(full > 100 * MIB, "{full}");
        vm.exec(&["rm", "/t/a"]).exits(0);
        // Not all: the kernel reports blocks of 2 MiB, and what is left of some is in use.
        until("the memory returns", || private(&vm) < full - 40 * MIB);
        let returned = vm.inspect()["state"]["balloon"]["returned"].as_u64();
        assert!(returned.unwrap() > 40 * MIB, "{returned:?}");
        assert_eq!(sum(&vm, "b"), kept);
    }
}

/// Pages whose contents are in a snapshot: they are zero when the guest uses them again, and
/// neither the snapshot nor what the clone still uses is changed by that.
#[test]
fn a_clone_returns_memory_that_its_snapshot_has() {
    let home = Home::shared();
    let snapshot = unique("warm");
    let (a, b) = {
        let vm = with_memory(home, &[]);
        let sums = (fill(&vm, "a", 60), fill(&vm, "b", 10));
        home.sm(&["snapshot", "create", "--stop", &vm.name, &snapshot])
            .exits(0);
        sums
    };
    let clone = home.clone_of(&snapshot, "clone");
    assert_eq!((sum(&clone, "a"), sum(&clone, "b")), (a.clone(), b.clone()));
    // The same pages are written, and then freed.
    let write = "dd if=/dev/zero of=/t/a bs=1M count=60 conv=notrunc 2>/dev/null; md5sum /t/a";
    let zeros = clone.exec(&["sh", "-c", write]).exits(0).out();
    let full = private(&clone);
    assert!(full > 60 * MIB, "{full}");
    clone.exec(&["rm", "/t/a"]).exits(0);
    until("the memory returns", || private(&clone) < full - 30 * MIB);
    assert_eq!(sum(&clone, "b"), b);

    // A snapshot of it, in which they are zero, and a clone of that, which uses them again.
    let second = unique("freed");
    home.sm(&["snapshot", "create", &clone.name, &second])
        .exits(0);
    let stored = home.sm(&["snapshot", "inspect", &second]).exits(0).json();
    let pages = stored["memory"]["data_pages"].as_u64().unwrap();
    assert!(pages < 20 * MIB / 4096, "{stored}");
    let next = home.clone_of(&second, "next");
    assert_eq!(sum(&next, "b"), b);
    next.exec(&["sh", "-c", "truncate -s 60M /t/a"]).exits(0);
    assert_eq!(sum(&next, "a"), zeros);
    drop(next);

    // A reset brings back what the snapshot has.
    home.sm(&["reset", &clone.name]).exits(0);
    assert_eq!((sum(&clone, "a"), sum(&clone, "b")), (a, b));
    drop(clone);
    for name in [&second, &snapshot] {
        let remove = || home.sm(&["snapshot", "rm", name]).code == Some(0);
        until("its VMs are gone", remove);
    }
}

#[test]
fn the_memory_of_a_running_vm_is_limited() {
    let home = Home::shared();
    let vm = with_memory(home, &[]);
    let all = free_total(&vm);
    let update = |size: &str| home.sm(&["update", "--memory", size, &vm.name]);
    let balloon = || vm.inspect()["state"]["balloon"].clone();
    update("128m").exits(0);
    until("the balloon is large", || balloon()["size"] == 128 * MIB);
    assert_eq!(balloon()["target"], 128 * MIB);
    assert_eq!(free_total(&vm), all - 128 * MIB);
    assert_eq!(vm.inspect()["memory_limit"], 128 * MIB);
    assert_eq!(vm.inspect()["HostConfig"]["Memory"], 128 * MIB);
    let error = update("257m").exits(1).err();
    assert!(
        error.contains("256 MiB of memory cannot get 257 MiB"),
        "{error}"
    );
    let error = update("63m").exits(1).err();
    assert!(error.contains("64 MiB"), "{error}");

    // It is kept over a stop.
    home.sm(&["stop", "-t", "0", &vm.name]).exits(0);
    home.sm(&["start", &vm.name]).exits(0);
    until("the balloon is large again", || {
        balloon()["size"] == 128 * MIB
    });
    update("256m").exits(0);
    until("the balloon is empty", || balloon()["size"] == 0);
    assert_eq!(free_total(&vm), all);
}
