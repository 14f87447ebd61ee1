//! `sm ps` with hung or damaged VMs, and the console log.

use std::fs;

use serde_json::Value;

use crate::fake::{User, receive, send_running, text};

fn rows(user: &User, arguments: &[&str]) -> Vec<(String, String, String)> {
    let done = user.sm(arguments);
    assert!(done.status.success(), "{done:?}");
    let json: Value = serde_json::from_slice(&done.stdout).unwrap();
    let rows = json.as_array().unwrap().iter();
    let word = |row: &Value, name: &str| row[name].as_str().unwrap_or_default().to_owned();
    rows.map(|row| (word(row, "name"), word(row, "status"), word(row, "problem")))
        .collect()
}

#[test]
fn hung_and_damaged_vms_do_not_affect_the_listing() {
    let user = User::new();
    // The number of hung VMs would take minutes if they were queried one by one.
    let hung: Vec<_> = (1..=40).map(|n| user.vm(n, &format!("hung{n}"))).collect();
    let listeners: Vec<_> = hung.iter().map(|vm| vm.listens("control.sock")).collect();
    let well = user.vm(50, "well");
    well.answers();
    let young = user.vm(51, "young");
    let damaged = user.vm(52, "damaged");
    fs::write(damaged.directory.join("config.json"), b"{\"id\": 1}").unwrap();
    let unreadable = user.vm(53, "unreadable");
    fs::write(unreadable.directory.join("exit.json"), b"{").unwrap();
    let mut later = user.vm(54, "later");
    let exit = br#"{"status": 3, "reason": "of_a_later_version", "finished_ns": 1}"#;
    fs::write(later.directory.join("exit.json"), exit).unwrap();
    later.dies();

    let rows = rows(&user, &["ps", "-a", "--json"]);
    assert_eq!(rows.len(), 45, "{rows:?}");
    let of = |name: &str| rows.iter().find(|row| row.0 == name).unwrap();
    assert_eq!(of("well").1, "running");
    assert_eq!(of("young").1, "starting");
    assert_eq!(of("later").1, "exited");
    assert_eq!(of("unreadable").1, "damaged");
    assert!(of("unreadable").2.contains("exit.json"), "{rows:?}");
    let without_name = of("");
    assert_eq!(without_name.1, "damaged");
    assert!(without_name.2.contains("config.json"), "{rows:?}");
    for n in 1..=40 {
        assert_eq!(of(&format!("hung{n}")).1, "unresponsive");
    }
    // Files of VMs that are alive were not removed.
    assert!(damaged.sockets.exists() && young.sockets.exists());
    drop(listeners);
}

/// Each VM answers only when all have been asked, which one after another never are.
#[test]
fn all_are_asked_at_the_same_time() {
    let user = User::new();
    let vms: Vec<_> = (1..=40).map(|n| user.vm(n, &format!("vm{n}"))).collect();
    let listeners: Vec<_> = vms.iter().map(|vm| vm.listens("control.sock")).collect();
    let processes = std::thread::spawn(move || {
        let accepted = listeners
            .iter()
            .map(|listener| listener.accept().unwrap().0);
        let mut accepted: Vec<_> = accepted.collect();
        for stream in &mut accepted {
            receive(stream);
            send_running(stream);
        }
    });
    let rows = rows(&user, &["ps", "--json"]);
    assert_eq!(rows.len(), 40, "{rows:?}");
    assert!(rows.iter().all(|row| row.1 == "running"), "{rows:?}");
    processes.join().unwrap();
}

#[test]
fn a_damaged_record_can_be_inspected_and_removed() {
    let user = User::new();
    let mut damaged = user.vm(1, "damaged");
    fs::write(damaged.directory.join("config.json"), b"\x1b[2J").unwrap();
    let table = text(&user.sm(&["ps"]).stdout);
    assert!(
        table.contains("Damaged: ") && table.contains(&damaged.short),
        "{table}"
    );
    let done = user.sm(&["inspect", &damaged.short]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("is damaged"), "{done:?}");
    let done = user.sm(&["rm", &damaged.short]);
    assert_eq!(done.status.code(), Some(1), "its process lives");
    damaged.dies();
    assert!(user.sm(&["rm", &damaged.short]).status.success());
    assert!(!damaged.directory.exists() && !damaged.sockets.exists());

    let mut unreadable = user.vm(2, "unreadable");
    fs::write(unreadable.directory.join("exit.json"), b"{").unwrap();
    unreadable.dies();
    assert!(user.sm(&["rm", "-f", "unreadable"]).status.success());
    assert!(!unreadable.directory.exists());
}

/// The version of `sm` that has written it can read it.
#[test]
fn a_record_of_a_later_version_is_listed_and_not_removed() {
    let user = User::new();
    let mut later = user.vm(1, "later");
    fs::write(later.directory.join("config.json"), br#"{"version": 2}"#).unwrap();
    later.dies();
    let table = text(&user.sm(&["ps"]).stdout);
    assert!(
        table.contains("Unsupported: ")
            && table.contains("version 2")
            && table.contains(&later.short),
        "{table}"
    );
    assert_eq!(rows(&user, &["ps", "--json"])[0].1, "unsupported");
    for arguments in [&["rm", &later.short][..], &["rm", "-f", &later.short]] {
        let done = user.sm(arguments);
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        let error = text(&done.stderr);
        assert!(error.contains("version 2"), "{error}");
        assert!(error.contains("hint: use the version"), "{error}");
    }
    assert!(later.directory.exists() && later.sockets.exists());
}

#[test]
fn the_console_is_printed_unchanged() {
    let user = User::new();
    let _vm = user.vm(1, "vm");
    for (count, shown) in [
        ("1", &b"three\n"[..]),
        ("2", b"\xff two\nthree\n"),
        ("9", b"one\n\xff two\nthree\n"),
    ] {
        let done = user.sm(&["logs", "--console", "-n", count, "vm"]);
        assert!(done.status.success(), "{done:?}");
        assert_eq!(done.stdout, shown);
    }
}
