//! Wrong use: a sentence that says what to do, and Docker's exit status.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

use sm_e2e::{Done, Home, image, unique};

fn says(done: Done, code: i32, words: &[&str]) {
    let done = done.exits(code);
    for word in words {
        assert!(done.err().contains(word), "no {word:?} in: {}", done.err());
    }
    assert!(!done.err().contains("panicked"), "{}", done.err());
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
fn nonsense_in_a_flag_is_refused() {
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
fn a_taken_name_is_said_to_be_taken() {
    let home = Home::shared();
    let vm = home.detached(&[&image("busybox"), "sleep", "1000"]);
    let done = home.sm(&["run", "--name", &vm.name, &image("busybox"), "true"]);
    says(done, 125, &[&vm.name]);
}

#[test]
fn a_missing_kernel_says_how_to_get_one() {
    let home = Home::new();
    let output = home
        .command(&[
            "run",
            "--rm",
            "--kernel",
            "/no/kernel",
            &image("busybox"),
            "true",
        ])
        .output()
        .unwrap();
    says(output.into(), 125, &["/no/kernel"]);
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

#[test]
fn without_a_device_the_sentence_says_so() {
    // In a mount namespace of its own, with /dev/kvm hidden.
    let home = Home::shared();
    let script = "mount --bind /dev/null /dev/kvm && exec \"$@\"";
    let inner = home.command(&["run", "--rm", &image("busybox"), "true"]);
    let mut command = std::process::Command::new("unshare");
    command
        .args(["-m", "sh", "-c", script, "sh"])
        .arg(inner.get_program())
        .args(inner.get_args());
    for (key, value) in inner.get_envs() {
        if let Some(value) = value {
            command.env(key, value);
        }
    }
    let output = command.output().unwrap();
    says(output.into(), 125, &["/dev/kvm"]);
}
