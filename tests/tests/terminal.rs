//! Terminals: raw mode, size, control keys, detaching, and snapshots of them.

use sm_e2e::{Home, Terminal, image, unique};

/// Types a line to a shell and returns the terminal's output up to `done-42`, which the
/// shell computes, so that the echo of the line does not contain it.
#[track_caller]
fn shell(terminal: &mut Terminal, line: &str) -> String {
    terminal.types(&format!("{line}; echo done-$((6*7))\r"));
    terminal.shows("done-42")
}

/// Waits until the guest's terminal has the given size.
#[track_caller]
fn has_size(terminal: &mut Terminal, size: &str) {
    for _ in 0..100 {
        if shell(terminal, "stty size").contains(size) {
            return;
        }
    }
    panic!("the guest's terminal does not become {size}");
}

#[test]
fn a_shell_at_a_terminal_behaves_as_at_home() {
    let mut at = Home::shared().terminal(&["run", "--rm", "-it", &image("busybox"), "sh"]);
    assert!(shell(&mut at, "tty").contains("/dev/pts/"));
    assert!(at.is_raw(), "keys are the guest's");
    has_size(&mut at, "24 80");
    at.resize(132, 50);
    has_size(&mut at, "50 132");
    // Control-C reaches the command in the shell, not sm and not the shell.
    // A process that prints is in the foreground: the shell's own `echo` could be followed
    // by a Control-C that comes before `sleep` is.
    at.types("sh -c 'echo before; exec sleep 1000'; echo after\r");
    at.shows("before\r\n");
    at.types("\x03");
    let out = shell(&mut at, "echo status $?");
    assert!(out.contains("status 130"), "{out:?}");
    assert!(!out.contains("after\r\n"), "{out:?}");
    at.types("exit 5\r");
    assert_eq!(at.ends(), 5);
    assert!(!at.is_raw(), "the terminal is as it was");
}

#[test]
fn an_exec_has_a_terminal_of_its_own() {
    let vm = Home::shared().detached(&["-m", "128m", &image("busybox"), "sleep", "1000"]);
    let mut at = Home::shared().terminal(&["exec", "-it", &vm.name, "sh"]);
    has_size(&mut at, "24 80");
    at.resize(100, 30);
    has_size(&mut at, "30 100");
    // Input and output may be any bytes.
    assert!(shell(&mut at, "printf 'gr\\303\\274n'").contains("grün"));
    // Before the prompt, the terminal would handle the key instead of the shell.
    at.shows("# ");
    at.types("\x04");
    assert_eq!(at.ends(), 0);
    assert!(!at.is_raw());
    assert_eq!(
        vm.exec(&["echo", "still there"]).exits(0).out(),
        "still there\n"
    );
}

#[test]
fn a_terminal_can_be_detached_and_attached_also_in_a_clone() {
    let home = Home::shared();
    let name = unique("term");
    let mut at = home.terminal(&[
        "run",
        "-it",
        "-m",
        "128m",
        "--name",
        &name,
        &image("busybox"),
        "sh",
    ]);
    shell(&mut at, "kept=yes");
    at.types("\x10\x11");
    assert_eq!(at.ends(), 0);
    assert!(!at.is_raw());

    let snapshot = unique("shell");
    home.sm(&["snapshot", "create", &name, &snapshot]).exits(0);
    let clone = unique("clone");
    home.sm(&["run", "-d", "--name", &clone, "--from", &snapshot])
        .exits(0);
    for (vm, status) in [(&name, 3), (&clone, 4)] {
        let mut at = home.terminal(&["attach", vm]);
        assert!(shell(&mut at, "echo $kept").contains("yes"), "{vm}");
        at.resize(90, 33);
        has_size(&mut at, "33 90");
        at.types(&format!("exit {status}\r"));
        assert_eq!(at.ends(), status, "{vm}");
    }
    home.sm(&["rm", "-f", &name, &clone]).exits(0);
    home.sm(&["snapshot", "rm", &snapshot]).exits(0);
}
