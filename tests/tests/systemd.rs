//! systemd as the workload.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;

use sm_e2e::{Done, Home, Reaped, Vm, unique};

/// The lab is some 20 times slower than hardware.
const GRACE: &str = "200";

fn layout() -> String {
    let images = PathBuf::from(std::env::var_os("SM_SYSTEMD").expect("SM_SYSTEMD is set"));
    format!("oci:{}", images.join("systemd").display())
}

/// systemd's programs wait 25 s for an answer on the bus by default, which is too short
/// for an emulated processor.
const PATIENT: &str = "SYSTEMD_BUS_TIMEOUT=600s";

/// Prints the state of the system after the boot. The bus socket does not exist before
/// systemd has created it.
const BOOTED: &str = "until [ -S /run/dbus/system_bus_socket ]; do sleep 1; done; \
    systemctl is-system-running --wait; systemctl --failed --no-pager";

/// Runs a command of systemd with a long bus timeout.
fn patiently(vm: &Vm<'_>, command: &[&str]) -> Done {
    vm.exec(&[&["env", PATIENT], command].concat())
}

/// Returns machine ID, epoch and host name of a process, and the machine ID of services.
fn identity(vm: &Vm<'_>) -> Vec<String> {
    let script = "cat /etc/machine-id /run/sm-epoch; hostname; systemd-run -q --pipe --wait \
        cat /etc/machine-id";
    let said = patiently(vm, &["sh", "-c", script]).exits(0).out();
    let lines: Vec<_> = said.lines().map(str::to_owned).collect();
    let [machine_id, epoch, hostname, of_a_service] = lines.try_into().unwrap();
    assert_eq!(machine_id, of_a_service);
    assert_eq!(vm.inspect()["state"]["epoch"], *epoch);
    vec![machine_id, epoch, hostname]
}

#[test]
fn full_systemd_boots_takes_commands_and_ends_cleanly() {
    let home = Home::shared();
    let layout = layout();
    let vm = home.detached(&["-m", "512m", &layout, "/sbin/init"]);

    // A command starts as soon as PID 1 runs, and lives as long as the VM.
    let mut early = home.command(&["exec", &vm.name, "sh", "-c", "echo here; sleep 100000"]);
    let mut early = Reaped(early.spawn().unwrap());
    let mut here = BufReader::new(early.0.stdout.take().unwrap()).lines();
    assert_eq!(here.next().unwrap().unwrap(), "here");
    let comm = vm.exec(&["cat", "/proc/1/comm"]).exits(0).out();
    eprintln!("PID 1 was {comm}");

    let booted = patiently(&vm, &["sh", "-c", BOOTED]).exits(0).out();
    eprintln!("{booted}");
    let state = booted.lines().next().unwrap();
    assert!(["running", "degraded"].contains(&state), "{booted}");

    // Services have limits, which needs a root cgroup without processes.
    let script = "cat /proc/self/cgroup /sys/fs/cgroup/cgroup.procs \
        /sys/fs/cgroup/cgroup.subtree_control; systemd-run -q --pipe --wait \
        -p MemoryMax=64M -p TasksMax=50 sh -c '
            cd /sys/fs/cgroup/$(sed s/0::// /proc/self/cgroup); cat memory.max pids.max'";
    let said = patiently(&vm, &["sh", "-c", script]).exits(0).out();
    let lines: Vec<_> = said.lines().collect();
    let [own, controllers, memory, tasks] = lines[..] else {
        panic!("processes are in the topmost group: {said}");
    };
    assert_eq!((own, memory, tasks), ("0::/init.scope", "67108864", "50"));
    assert!(
        controllers.split(' ').any(|name| name == "memory"),
        "{said}"
    );
    let journal = vm.exec(&["journalctl", "-b", "--no-pager", "-o", "cat"]);
    assert!(journal.exits(0).out().contains("Reached target"));
    // systemd must not store the machine ID of this guest in the image.
    let kept = ["show", "-P", "ConditionResult", "systemd-machine-id-commit"];
    let kept = patiently(&vm, &[&["systemctl"], &kept[..]].concat());
    assert_eq!(kept.exits(0).out(), "no\n");

    let snapshot = unique("systemd");
    home.sm(&["snapshot", "create", &vm.name, &snapshot])
        .exits(0);
    home.sm(&["snapshot", "prove-distinct", "-n", "2", &snapshot])
        .exits(0);
    let clones = [(); 2].map(|()| home.clone_of(&snapshot, "systemd"));
    let mut seen = BTreeSet::new();
    for vm in [&vm].into_iter().chain(&clones) {
        for part in identity(vm) {
            assert!(seen.insert(part.clone()), "{part} twice");
        }
    }

    // One VM is stopped from the host, the other from inside.
    let [stopped, other] = &clones;
    for vm in [&vm, stopped] {
        home.sm(&["stop", "-t", GRACE, &vm.name]).exits(0);
    }
    patiently(other, &["systemctl", "poweroff"]);
    for (vm, word) in [
        // The last message of systemd-shutdown, whose unit never becomes active: the
        // targets after it may not be reached.
        (&vm, "Halting system."),
        (stopped, "Halting system."),
        (other, "Powering off."),
    ] {
        // Linux kills PID 1 of a PID namespace that halts with SIGINT (reboot(2)).
        let end = vm.wait()["state"]["exit"].clone();
        let console = home.sm(&["logs", "--console", &vm.name]).exits(0).out();
        assert_eq!(end["status"], 130, "{end}: {console}");
        assert_eq!(end["reason"], "workload", "{end}");
        assert!(console.contains(word), "{console}");
    }
    drop(clones);
    home.sm(&["snapshot", "rm", &snapshot]).exits(0);
}
