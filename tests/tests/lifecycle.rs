//! Detached VMs: exec, logs, stop, kill, removal, and killed VMMs.
#![expect(clippy::expect_used, reason = "a failed expectation is a failed test")]

use sm_e2e::{Home, image, unique};

fn names(home: &Home, arguments: &[&str]) -> Vec<String> {
    let listing = home.sm(arguments).exits(0).json();
    listing
        .as_array()
        .expect("a listing is an array")
        .iter()
        .map(|vm| vm["name"].as_str().unwrap_or_default().to_owned())
        .collect()
}

#[test]
fn commands_run_next_to_the_workload() {
    let vm = Home::shared().detached(&["-e", "FROM=run", &image("busybox"), "sleep", "1000"]);
    let done = vm
        .exec(&["sh", "-c", "echo out; echo err >&2; exit 3"])
        .exits(3);
    assert_eq!(
        (done.out().as_str(), done.err().as_str()),
        ("out\n", "err\n")
    );
    let done = vm.exec(&["ps"]).exits(0);
    assert!(done.out().contains("sleep 1000"), "{}", done.out());
    let home = Home::shared();
    let done = home.sm(&[
        "exec",
        "-e",
        "A=b",
        "-w",
        "/tmp",
        "-u",
        "7",
        &vm.name,
        "sh",
        "-c",
        "echo $A $PWD; id -u",
    ]);
    assert_eq!(done.exits(0).out(), "b /tmp\n7\n");
    let done = home.sm_with_input(&["exec", "-i", &vm.name, "cat"], b"through");
    assert_eq!(done.exits(0).out(), "through");
    vm.exec(&["no-such"]).exits(127);
}

#[test]
fn a_command_in_a_starting_vm_is_refused() {
    let home = Home::shared();
    let name = sm_e2e::unique("slow");
    let image = image("busybox");
    let run = [
        "run", "-d", "--cold", "--name", &name, &image, "sleep", "1000",
    ];
    let starting = home.command(&run).spawn().unwrap();
    let refused = loop {
        let done = home.sm(&["exec", &name, "echo", "too early"]);
        // The VM does not exist yet, or does not accept connections yet.
        if !done.err().contains("no such VM") && !done.err().contains("not running") {
            break done;
        }
    };
    if refused.code != Some(0) {
        let error = refused.exits(1).err();
        assert!(error.contains("still starting"), "{error}");
    }
    assert!(starting.wait_with_output().unwrap().status.success());
    let later = home.sm(&["exec", &name, "echo", "in time"]).exits(0);
    assert_eq!(later.out(), "in time\n");
    home.sm(&["rm", "-f", &name]).exits(0);
}

#[test]
fn logs_are_kept_and_followed_to_the_end() {
    let home = Home::shared();
    // The VM is booted, because a restored guest writes nothing to its console.
    let vm = home.detached(&[
        "--cold",
        &image("busybox"),
        "sh",
        "-c",
        "echo one; echo two >&2; sleep 1; echo three",
    ]);
    let done = home.sm(&["logs", "-f", &vm.name]).exits(0);
    assert_eq!(
        (done.out().as_str(), done.err().as_str()),
        ("one\nthree\n", "two\n")
    );
    let again = home.sm(&["logs", &vm.name]).exits(0);
    assert_eq!(again.out(), "one\nthree\n");
    let console = home.sm(&["logs", "--console", &vm.name]).exits(0);
    assert!(!console.out().is_empty(), "the guest's console is kept");
}

/// A guest that is too slow, on a machine with much other work, is stopped instead.
#[test]
fn a_guest_powers_itself_off_when_its_workload_has_exited() {
    let home = Home::shared();
    let mut slow = Vec::new();
    while slow.len() < 6 {
        let vm = home.detached(&["--cold", &image("busybox"), "true"]);
        let id = vm.inspect()["id"].as_str().unwrap().to_owned();
        let record = home.data().join("sm/vms").join(id);
        // The VM's process exits after the guest.
        let lock = std::fs::File::open(record.join("lock")).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockShared).unwrap();
        let console = home.sm(&["logs", "--console", &vm.name]).exits(0).out();
        if console.contains("reboot: Power down") {
            return;
        }
        let log = std::fs::read_to_string(record.join("vmm.log")).unwrap();
        assert!(log.contains("did not power itself off"), "{console}\n{log}");
        slow.push(console);
    }
    panic!("no guest has powered itself off in time: {slow:?}");
}

#[test]
fn a_machine_is_listed_while_it_runs_and_kept_when_it_ended() {
    let home = Home::shared();
    let vm = home.detached(&[
        &image("busybox"),
        "sh",
        "-c",
        "read x < /dev/zero; sleep 1000",
    ]);
    assert!(names(home, &["ps", "--json"]).contains(&vm.name));
    home.sm(&["stop", "-t", "1", &vm.name]).exits(0);
    assert!(!names(home, &["ps", "--json"]).contains(&vm.name));
    assert!(names(home, &["ps", "-a", "--json"]).contains(&vm.name));
    home.sm(&["rm", &vm.name]).exits(0);
    assert!(!names(home, &["ps", "-a", "--json"]).contains(&vm.name));
}

#[test]
fn stop_asks_first() {
    let home = Home::shared();
    let script = "trap 'echo bye; exit 4' TERM; echo up; while :; do sleep 0.1; done";
    let vm = home.detached(&[&image("busybox"), "sh", "-c", script]);
    vm.until_it_says("up");
    home.sm(&["stop", "-t", "60", &vm.name]).exits(0);
    let out = home.sm(&["logs", &vm.name]).exits(0).out();
    assert_eq!(out, "up\nbye\n");
    assert_eq!(vm.inspect()["state"]["exit_code"], 4);
}

#[test]
fn kill_does_not_ask() {
    let home = Home::shared();
    let vm = home.detached(&[&image("busybox"), "sh", "-c", "trap '' TERM; sleep 1000"]);
    home.sm(&["kill", &vm.name]).exits(0);
    // As with Docker, it has ended then.
    assert_eq!(vm.inspect()["state"]["exit_code"], 137);
}

#[test]
fn a_vmm_that_is_killed_leaves_nothing_behind() {
    let home = Home::new();
    let vm = home.detached(&[&image("busybox"), "sleep", "1000"]);
    let pid = vm.inspect()["state"]["pid"].as_i64().expect("a pid");
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let handle = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_send_signal(&handle, rustix::process::Signal::KILL).unwrap();
    let mut fds = [rustix::event::PollFd::new(
        &handle,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, None).unwrap();
    assert!(names(&home, &["ps", "--json"]).is_empty());
    home.sm(&["images"]).exits(0);
    let done = home
        .sm(&["run", "--rm", &image("busybox"), "echo", "again"])
        .exits(0);
    assert_eq!(done.out(), "again\n", "the store is sound");
    home.sm(&["rm", "-f", &vm.name]).exits(0);
    assert!(names(&home, &["ps", "-a", "--json"]).is_empty());
}

#[test]
fn a_guest_panic_is_reported_with_its_console() {
    let home = Home::shared();
    let vm = home.detached(&["-m", "128m", &image("busybox"), "sleep", "1000"]);
    // The tuned kernel has no sysrq; this panic is possible in any kernel.
    vm.exec(&[
        "sh",
        "-c",
        "echo 1 > /proc/sys/vm/panic_on_oom; exec tail /dev/zero",
    ]);
    let state = vm.wait()["state"].clone();
    assert_eq!(state["exit_code"], 125, "{state}");
    assert_eq!(state["exit"]["reason"], "guest_failed", "{state}");
    let message = state["exit"]["message"].as_str().unwrap();
    let (what, console) = message.split_once('\n').expect("several lines");
    assert!(
        what.contains("the guest's kernel panicked: Kernel panic - not syncing: Out of memory"),
        "{message}"
    );
    let (head, tail) = console.split_once('\n').expect("a console");
    assert_eq!(head, "Last lines of the guest's console:", "{message}");
    let console = home.sm(&["logs", "--console", &vm.name]).exits(0).out();
    let last = |text: &str| text.lines().last().unwrap_or_default().trim().to_owned();
    assert!(tail.lines().count() > 5, "{message}");
    assert_eq!(last(tail), last(console.trim_end()), "{message}");
}

#[test]
fn a_triple_fault_is_reported_with_the_console() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = sm_e2e::tiny::triple_faulting_kernel(dir.path(), "first words\nlast words\n");
    let kernel = kernel.to_str().unwrap();
    let image = image("busybox");
    let run = ["run", "--rm", "--kernel", kernel, &image, "true"];
    let error = Home::shared().sm(&run).exits(125).err();
    assert!(error.contains("triple fault"), "{error}");
    let (_, console) = error
        .split_once("Last lines of the guest's console:\n")
        .expect("the console");
    let lines: Vec<_> = console.lines().map(str::trim).collect();
    assert_eq!(lines, ["first words", "last words"], "{error}");
}

#[test]
fn images_are_pulled_listed_and_removed() {
    let home = Home::new();
    home.sm(&["pull", &image("busybox")]).exits(0);
    let listing = home.sm(&["images", "--json"]).exits(0).json();
    let id = listing[0]["id"].as_str().expect("an id").to_owned();
    assert_eq!(listing.as_array().map(Vec::len), Some(1));
    home.sm(&["rmi", &id]).exits(0);
    let listing = home.sm(&["images", "--json"]).exits(0).json();
    assert_eq!(listing.as_array().map(Vec::len), Some(0));
}

#[test]
fn an_image_in_use_is_not_removed() {
    let home = Home::new();
    let image = image("busybox");
    let vm = home.detached(&["--cold", &image, "sleep", "1000"]);
    let disks = || {
        std::fs::read_dir(home.data().join("sm/images/disks"))
            .unwrap()
            .count()
    };
    let refused = home.sm(&["rmi", &image]).exits(1).err();
    assert!(
        refused.contains(&format!("is used by VM \"{}\"", vm.name)),
        "{refused}"
    );
    assert_eq!(disks(), 1, "the disk of a running VM was removed");
    // The contents are not in the guest's page cache yet.
    let done = vm.exec(&["sh", "-c", "cat /bin/busybox | wc -c"]).exits(0);
    assert!(done.out().trim().parse::<u64>().unwrap() > 100_000);
    drop(vm);
    home.sm(&["rmi", &image]).exits(0);
    assert_eq!(disks(), 0, "nobody uses it any more");
}

#[test]
fn many_machines_run_at_once() {
    let home = Home::shared();
    let vms: Vec<_> = (0..4)
        .map(|_| home.detached(&["-m", "96m", &image("busybox"), "sleep", "1000"]))
        .collect();
    for (n, vm) in vms.iter().enumerate() {
        let done = vm
            .exec(&["sh", "-c", &format!("echo {n} > /n; cat /n; hostname")])
            .exits(0);
        assert!(done.out().starts_with(&format!("{n}\n")), "{}", done.out());
    }
}

#[test]
fn a_name_is_free_again_after_rm() {
    let home = Home::shared();
    let name = unique("again");
    for _ in 0..2 {
        home.sm(&["run", "--rm", "--name", &name, &image("busybox"), "true"])
            .exits(0);
    }
}
