//! Commands on VMs that run, have ended, or were never started.

use std::fs;

use serde_json::{Value, json};
use sm_guest_proto::frame::{ExitStatus, FrameType};

use crate::fake::{User, Vm, receive, send, text};

/// Ends a VM with a status.
fn ended(user: &User, number: u8, name: &str, status: u32) -> Vm {
    let mut vm = user.vm(number, name);
    let exit = json!({
        "status": status, "reason": "workload", "finished_ns": 2_000_000_000_u64,
        "started_ns": 1_000_000_000_u64, "stopped": true, "restarts": 2,
    });
    fs::write(vm.directory.join("exit.json"), exit.to_string()).unwrap();
    vm.dies();
    vm
}

fn created(user: &User, number: u8, name: &str) -> Vm {
    let mut vm = user.vm(number, name);
    fs::write(vm.directory.join("created"), b"").unwrap();
    fs::remove_file(vm.directory.join("console.log")).unwrap();
    vm.dies();
    vm
}

fn out(user: &User, arguments: &[&str]) -> String {
    let done = user.sm(arguments);
    assert!(done.status.success(), "{arguments:?}: {done:?}");
    text(&done.stdout)
}

#[test]
fn filters_select_vms_and_templates_print_them() {
    let user = User::new();
    let web = user.vm(1, "web");
    web.answers();
    let _job = ended(&user, 2, "job", 3);
    let _created = created(&user, 3, "new");
    let names = |arguments: &[&str]| {
        let mut line = vec!["ps", "--format", "{{.Names}}"];
        line.extend(arguments);
        let mut names: Vec<String> = out(&user, &line).lines().map(str::to_owned).collect();
        names.sort();
        names
    };
    assert_eq!(names(&["-a"]), ["job", "new", "web"]);
    assert_eq!(names(&[]), ["web"]);
    assert_eq!(names(&["--filter", "status=created"]), ["new"]);
    assert_eq!(names(&["--filter", "exited=3"]), ["job"]);
    assert_eq!(
        names(&["-a", "--filter", "name=ew", "--filter", "name=jo"]),
        ["job", "new"]
    );
    assert_eq!(names(&["-n", "1"]), ["new"]);
    let line = out(
        &user,
        &[
            "ps",
            "-a",
            "-f",
            "name=job",
            "--format",
            "{{.State}} {{.RestartCount}}",
        ],
    );
    assert_eq!(line, "exited 2\n");
    let table = out(
        &user,
        &[
            "ps",
            "-a",
            "-f",
            "name=job",
            "--format",
            "table {{.Names}}\\t{{.ID}}",
        ],
    );
    assert_eq!(table, "NAMES   ID\njob     020202020202\n");
    let table = out(&user, &["ps", "-a"]);
    assert!(table.contains("Created"), "{table}");
}

#[test]
fn what_is_no_filter_or_template_is_refused() {
    let user = User::new();
    for (arguments, words) in [
        (&["ps", "--filter", "colour=red"][..], "these are: ancestor"),
        (&["ps", "--filter", "web"], "NAME=VALUE"),
        (&["ps", "--format", "{{.Names"], "without its }}"),
        (
            &["events", "--filter", "colour=red"],
            "these are: container",
        ),
    ] {
        let done = user.sm(arguments);
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        assert!(text(&done.stderr).contains(words), "{done:?}");
    }
}

#[test]
fn inspect_has_dockers_state() {
    let user = User::new();
    let _job = ended(&user, 2, "job", 3);
    let _new = created(&user, 3, "new");
    let shown: Value = serde_json::from_str(&out(&user, &["inspect", "job", "new"])).unwrap();
    let (job, new) = (&shown[0], &shown[1]);
    assert_eq!(job["State"]["Status"], "exited");
    assert_eq!(job["State"]["ExitCode"], 3);
    assert_eq!(job["State"]["StartedAt"], "1970-01-01T00:00:01.000000000Z");
    assert_eq!(job["State"]["FinishedAt"], "1970-01-01T00:00:02.000000000Z");
    assert_eq!(job["RestartCount"], 2);
    assert_eq!(job["name"], "job", "our own members stay");
    assert_eq!(new["State"]["Status"], "created");
    assert_eq!(new["State"]["StartedAt"], "0001-01-01T00:00:00Z");
    let line = out(
        &user,
        &["inspect", "-f", "{{.State.Status}} {{.Name}}", "job"],
    );
    assert_eq!(line, "exited job\n");
}

#[test]
fn names_and_settings_change() {
    let user = User::new();
    let _job = ended(&user, 2, "job", 3);
    let _other = ended(&user, 3, "other", 0);
    out(&user, &["rename", "job", "task"]);
    let taken = user.sm(&["rename", "task", "other"]);
    assert!(text(&taken.stderr).contains("already taken"), "{taken:?}");
    let update = [
        "update",
        "--restart",
        "on-failure:2",
        "-l",
        "a=b",
        "--stop-timeout",
        "7",
    ];
    out(&user, &[&update[..], &["task"]].concat());
    let shown: Value = serde_json::from_str(&out(&user, &["inspect", "task"])).unwrap();
    assert_eq!(shown[0]["restart"], "on-failure:2");
    assert_eq!(
        shown[0]["HostConfig"]["RestartPolicy"]["MaximumRetryCount"],
        2
    );
    assert_eq!(shown[0]["stop_timeout_ms"], 7000);
    assert_eq!(
        out(&user, &["ps", "-aq", "--filter", "label=a=b"]),
        "020202020202\n"
    );
    out(&user, &["update", "--remove-label", "a", "task"]);
    assert_eq!(out(&user, &["ps", "-aq", "--filter", "label=a"]), "");
    let bad = user.sm(&["update", "--restart", "sometimes", "task"]);
    assert_eq!(bad.status.code(), Some(125), "{bad:?}");
    let events = out(
        &user,
        &[
            "events",
            "--since",
            "1h",
            "--until",
            "0s",
            "--format",
            "{{.action}} {{.name}}",
        ],
    );
    assert_eq!(events, "rename task\nupdate task\nupdate task\n");
}

/// The record is as if nothing had happened.
#[test]
fn a_start_that_cannot_begin_leaves_the_vm_as_it_is() {
    let user = User::new();
    let job = ended(&user, 2, "job", 3);
    let done = user.sm(&["start", "job"]);
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    assert!(job.directory.join("exit.json").exists());
    assert_eq!(
        out(&user, &["ps", "-a", "--format", "{{.State}}"]),
        "exited\n"
    );
    let attach = user.sm(&["start", "-a", "job", "other"]);
    assert!(text(&attach.stderr).contains("only one VM"), "{attach:?}");
}

/// Plays the agent's exec server.
#[test]
fn processes_are_listed_by_the_agent() {
    let user = User::new();
    let vm = user.vm(1, "vm");
    vm.answers();
    let exec = vm.listens("exec.sock");
    let agent = std::thread::spawn(move || {
        for refused in [false, true] {
            let (mut session, _) = exec.accept().unwrap();
            receive(&mut session).unwrap();
            let (kind, request) = receive(&mut session).unwrap();
            assert_eq!(
                (kind, request),
                (
                    FrameType::Control,
                    br#"{"processes":{"container":"main"}}"#.to_vec()
                )
            );
            let status = if refused {
                send(
                    &mut session,
                    FrameType::Error,
                    b"exec: unknown control message",
                );
                125
            } else {
                let list = json!([{"pid": 1, "uid": 5, "cpu_ms": 61_000, "command": "a\u{1b}b"}]);
                let list = list.to_string();
                let (first, second) = list.split_at(9);
                send(&mut session, FrameType::Stdout, first.as_bytes());
                send(&mut session, FrameType::Stdout, second.as_bytes());
                0
            };
            let exit = ExitStatus {
                status,
                peak_rss_kib: None,
            };
            send(&mut session, FrameType::Exit, &exit.to_payload());
        }
    });
    let listed = out(&user, &["top", "vm", "-o", "pid,user,time,cmd"]);
    assert_eq!(
        listed,
        "PID   USER   TIME       CMD\n1     5      00:01:01   a\\u{1b}b\n"
    );
    let refused = user.sm(&["top", "vm"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(
        text(&refused.stderr).contains("unknown control message"),
        "{refused:?}"
    );
    agent.join().unwrap();
}

#[test]
fn the_system_is_shown_and_pruned() {
    let user = User::new();
    let job = ended(&user, 2, "job", 3);
    let new = created(&user, 3, "new");
    let running = user.vm(1, "web");
    running.answers();
    let info: Value = serde_json::from_str(&out(&user, &["system", "info", "--json"])).unwrap();
    assert_eq!((&info["vms"], &info["running"]), (&json!(3), &json!(1)));
    let usage: Value = serde_json::from_str(&out(&user, &["system", "df", "--json"])).unwrap();
    assert_eq!(
        (&usage["vms"]["total"], &usage["vms"]["active"]),
        (&json!(3), &json!(1))
    );
    assert!(out(&user, &["system", "df"]).contains("RECLAIMABLE"));
    assert_eq!(out(&user, &["system", "resume"]), "", "none has a policy");
    let asked = user.sm(&["system", "prune"]);
    assert!(text(&asked.stderr).contains("--force"), "{asked:?}");
    let pruned = out(&user, &["system", "prune", "-f"]);
    assert!(pruned.starts_with("new\njob\nFreed "), "{pruned}");
    assert!(!job.directory.exists() && !new.directory.exists() && running.directory.exists());
    let again = out(&user, &["system", "prune", "-a", "-f", "--volumes"]);
    assert!(again.starts_with("Freed "), "{again}");
    let unit = out(&user, &["system", "install-unit", "--print"]);
    assert!(
        unit.contains("system resume") && unit.contains("[Install]"),
        "{unit}"
    );
}

#[test]
fn options_of_docker_that_a_vm_cannot_have_are_refused_with_the_reason() {
    let user = User::new();
    for (option, value, words) in [
        ("--device", "/dev/sda", "no hardware of the host"),
        ("--security-opt", "seccomp=p.json", "the VM is the boundary"),
        ("--sysctl", "net.core.somaxconn", "write NAME=VALUE"),
        ("--cap-drop", "FLY", "is no capability of Linux"),
    ] {
        for command in ["run", "create"] {
            let done = user.sm(&[command, "--privileged", "--init", option, value, "oci:x"]);
            assert_eq!(done.status.code(), Some(125), "{done:?}");
            let error = text(&done.stderr);
            assert!(error.contains(value) && error.contains(words), "{error}");
        }
    }
}
