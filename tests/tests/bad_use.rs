//! Wrong use: messages with a remedy, and Docker's exit statuses.
#![expect(clippy::expect_used, reason = "a failed expectation is a failed test")]

use std::process::Command;

use sm_e2e::{Done, Home, image, unique};

fn says(done: Done, code: i32, words: &[&str]) {
    let done = done.exits(code);
    for word in words {
        assert!(done.err().contains(word), "no {word:?} in: {}", done.err());
    }
    assert!(!done.err().contains("panicked"), "{}", done.err());
}

/// Runs `inner` in a mount namespace of its own, after `set_up`.
fn elsewhere(set_up: &str, inner: &Command) -> Done {
    let mut command = Command::new("unshare");
    command
        .args(["-m", "sh", "-c", &format!("{set_up} && exec \"$@\""), "sh"])
        .arg(inner.get_program())
        .args(inner.get_args());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.output().expect("unshare can be started").into()
}

#[test]
fn an_unknown_image_is_named() {
    let done = Home::shared().sm(&["run", "oci:/nowhere/at/all"]);
    says(done, 125, &["/nowhere/at/all"]);
}

#[test]
fn too_little_memory_is_refused_with_the_minimum() {
    let done = Home::shared().sm(&["run", "-m", "1m", &image("busybox"), "true"]);
    says(done, 125, &["64"]);
}

#[test]
fn an_invalid_option_value_is_refused() {
    says(
        Home::shared().sm(&["run", "-m", "lots", &image("busybox")]),
        125,
        &["lots"],
    );
    says(
        Home::shared().sm(&["run", "--no-such-flag", "x"]),
        125,
        &["--no-such-flag"],
    );
}

#[test]
fn a_taken_name_is_reported() {
    let home = Home::shared();
    let vm = home.detached(&[&image("busybox"), "sleep", "1000"]);
    let done = home.sm(&["run", "--name", &vm.name, &image("busybox"), "true"]);
    says(done, 125, &[&vm.name]);
}

#[test]
fn a_kernel_that_is_not_there_is_named() {
    let home = Home::shared();
    let image = image("busybox");
    let done = home.sm(&["run", "--rm", "--kernel", "/no/kernel", &image, "true"]);
    says(
        done,
        125,
        &["cannot use kernel \"/no/kernel\"", "No such file"],
    );
}

#[test]
fn the_error_without_a_kernel_has_a_remedy() {
    let (home, empty) = (Home::new(), tempfile::tempdir().unwrap());
    let mut sm = home.command(&["run", "--rm", &image("busybox"), "true"]);
    sm.env_remove("SM_KERNEL")
        .env("XDG_CACHE_HOME", empty.path());
    let done = elsewhere("mount -t tmpfs none /boot", &sm);
    let ways = ["sm kernel build", "sm kernel use PATH", "--kernel PATH"];
    says(done, 125, &[&["no guest kernel found"], &ways[..]].concat());
}

#[test]
fn a_file_that_is_no_kernel_is_refused() {
    let home = Home::shared();
    let done = home.sm(&[
        "run",
        "--rm",
        "--kernel",
        "/etc/passwd",
        &image("busybox"),
        "true",
    ]);
    says(done, 125, &["/etc/passwd"]);
}

#[test]
fn commands_that_a_vm_cannot_execute_now_are_refused() {
    let home = Home::shared();
    let vm = home.detached(&[&image("busybox"), "sleep", "1000"]);
    let name = vm.name.as_str();
    says(home.sm(&["rm", name]), 1, &[name, "is running", "--force"]);
    says(
        home.sm(&["reset", name]),
        1,
        &["not started from a workload snapshot"],
    );
    home.sm(&["stop", "-t", "0", name]).exits(0);
    for arguments in [
        &["exec", name, "true"][..],
        &["attach", name],
        &["kill", name],
        &["pause", name],
        &["stats", name],
        &["snapshot", "create", name, "late"],
    ] {
        says(home.sm(arguments), 1, &[name, "is not running"]);
    }
    // These commands behave as in Docker.
    home.sm(&["stop", name]).exits(0);
    assert_eq!(home.sm(&["wait", name]).exits(0).out(), "137\n");
    home.sm(&["logs", name]).exits(0);
}

#[test]
fn an_interrupted_start_leaves_nothing() {
    let home = Home::new();
    let image = image("busybox");
    home.sm(&["pull", &image]).exits(0);
    // If the interrupt is too late, the command exits by itself.
    let run = [
        "run", "--rm", "--cold", "--name", "early", &image, "sleep", "20",
    ];
    let listed = || home.sm(&["ps", "-a"]).exits(0).out().contains("early");
    let mut child = home.foreground(&run).spawn().unwrap();
    while !listed() {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let done: Done = child.wait_with_output().unwrap().into();
    assert!(matches!(done.code, None | Some(0)), "{done:?}");
    while listed() {}
    home.sm(&["run", "--rm", "--name", "early", &image, "true"])
        .exits(0);
}

#[test]
fn an_unknown_machine_is_named() {
    let name = unique("nobody");
    for arguments in [
        vec!["exec", &name, "true"],
        vec!["logs", &name],
        vec!["stop", &name],
        vec!["inspect", &name],
        vec!["rm", &name],
    ] {
        let done = Home::shared().sm(&arguments);
        assert_ne!(done.code, Some(0), "{arguments:?}");
        assert!(done.err().contains(&name), "{arguments:?}: {}", done.err());
    }
}

/// Other devices that a process needs.
const EMPTY_DEV: &str = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && chmod 666 /dev/null";

#[test]
fn the_error_without_a_device_has_a_remedy() {
    let sm = Home::shared().command(&["run", "--rm", &image("busybox"), "true"]);
    let done = elsewhere(EMPTY_DEV, &sm);
    says(
        done,
        125,
        &[
            "there is no /dev/kvm",
            "load the kvm_intel or kvm_amd module",
        ],
    );
}

#[test]
fn the_error_without_permission_names_the_group() {
    // The device belongs to user and group 1, "daemon" on every Debian; without these
    // capabilities, permissions apply to root.
    let device = "mknod -m 660 /dev/kvm c 10 232 && chown 1:1 /dev/kvm";
    let sm = Home::shared().command(&["run", "--rm", &image("busybox"), "true"]);
    let mut bound = Command::new("setpriv");
    bound
        .arg("--bounding-set=-dac_override,-dac_read_search")
        .arg(sm.get_program())
        .args(sm.get_args());
    for (name, value) in sm.get_envs() {
        bound.env(name, value.unwrap_or_default());
    }
    let done = elsewhere(&format!("{EMPTY_DEV} && {device}"), &bound);
    let action = "add this user to the group that owns it (daemon)";
    says(done, 125, &["no permission to open /dev/kvm", action]);
}

#[test]
fn an_invalid_kvm_device_and_a_missing_one_differ() {
    let sm = Home::shared().command(&["run", "--rm", &image("busybox"), "true"]);
    let done = elsewhere("mount --bind /dev/null /dev/kvm", &sm);
    says(done, 125, &["/dev/kvm cannot be used"]);
}
