//! VMs with several runs: create, start, restart, restart policies, and their events.
#![expect(clippy::expect_used, reason = "a failed expectation is a failed test")]

use std::io::{BufRead as _, BufReader};

use serde_json::Value;
use sm_e2e::{Home, Reaped, image, unique, until};

fn state(home: &Home, name: &str) -> String {
    let format = "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}";
    let done = home.sm(&["inspect", "-f", format, name]).exits(0);
    done.out().trim().to_owned()
}

/// Returns the actions of all events about a VM.
fn actions(home: &Home, name: &str) -> Vec<String> {
    let filter = format!("vm={name}");
    let events = [
        "events", "--since", "24h", "--until", "0s", "--json", "--filter", &filter,
    ];
    let events = home.sm(&events).exits(0).out();
    let action = |line: &str| {
        let event: Value = serde_json::from_str(line).expect("a line is JSON");
        event["action"].as_str().expect("an action").to_owned()
    };
    events.lines().map(action).collect()
}

#[test]
fn a_vm_is_created_started_stopped_and_started_again() {
    let home = Home::shared();
    let name = unique("web");
    let create = [
        "create",
        "--name",
        &name,
        "-l",
        "role=web",
        "-e",
        "A=b",
        &image("busybox"),
        "sh",
        "-c",
        "echo run $A; sleep 1000",
    ];
    let id = home.sm(&create).exits(0).out();
    assert_eq!(state(home, &name), "created 0 0");
    let listed = home.sm(&["ps", "-q", "--no-trunc", "--filter", "status=created"]);
    assert!(listed.exits(0).out().contains(id.trim()));
    for round in 1..=3 {
        assert_eq!(home.sm(&["start", &name]).exits(0).out().trim(), name);
        assert_eq!(state(home, &name).split(' ').next(), Some("running"));
        // One that runs is left alone.
        home.sm(&["start", &name]).exits(0);
        until("the output is there", || {
            let log = home.sm(&["logs", &name]).exits(0).out();
            log == "run b\n".repeat(round)
        });
        home.sm(&["stop", "-t", "0", &name]).exits(0);
        assert_eq!(state(home, &name), "exited 137 0");
    }
    let again = home.sm(&["inspect", &name]).exits(0).json();
    assert_eq!(again[0]["id"], id.trim());
    home.sm(&["restart", &name]).exits(0);
    home.sm(&["exec", &name, "true"]).exits(0);
    home.sm(&["rm", "-f", &name]).exits(0);
    assert_eq!(
        actions(home, &name)[..6],
        ["create", "start", "kill", "die", "stop", "start"]
    );
    assert_eq!(actions(home, &name).last().expect("events"), "destroy");
}

#[test]
fn a_start_attaches_and_exits_with_the_workloads_status() {
    let home = Home::shared();
    let name = unique("cat");
    let command = "cat; exit 5";
    home.sm(&[
        "create",
        "-i",
        "--name",
        &name,
        &image("busybox"),
        "sh",
        "-c",
        command,
    ])
    .exits(0);
    for text in ["first", "second"] {
        let done = home.sm_with_input(&["start", "-ai", &name], text.as_bytes());
        assert_eq!(done.exits(5).out(), text);
    }
    home.sm(&["rm", &name]).exits(0);
}

#[test]
fn a_start_that_fails_says_why_and_keeps_the_vm() {
    let home = Home::shared();
    let name = unique("bad");
    home.sm(&["create", "--name", &name, &image("busybox"), "/no-such"])
        .exits(0);
    for _ in 0..2 {
        let done = home.sm(&["start", &name]).exits(1);
        assert!(done.err().contains("no-such"), "{}", done.err());
        assert_eq!(state(home, &name), "exited 127 0");
    }
    home.sm(&["rm", &name]).exits(0);
}

#[test]
fn a_workload_that_fails_is_restarted_until_it_is_stopped() {
    let home = Home::shared();
    let vm = home.detached(&[
        "--restart",
        "on-failure",
        &image("busybox"),
        "sh",
        "-c",
        "echo again; exit 3",
    ]);
    let pid = vm.inspect()["State"]["Pid"].clone();
    until("it was restarted twice", || {
        let log = home.sm(&["logs", &vm.name]).exits(0).out();
        log.lines().count() > 2
    });
    assert_eq!(vm.inspect()["State"]["Pid"], pid, "the same process");
    home.sm(&["stop", &vm.name]).exits(0);
    let ended = vm.inspect();
    assert_eq!(ended["State"]["Status"], "exited");
    assert_eq!(ended["state"]["exit"]["stopped"], true);
    let count = ended["RestartCount"].as_u64().expect("a number");
    assert!(count >= 2, "{ended}");
    let actions = actions(home, &vm.name);
    let starts = actions.iter().filter(|action| *action == "start").count();
    let dies = actions.iter().filter(|action| *action == "die").count();
    // A run that is stopped before its workload runs has no start.
    assert!(starts >= 3 && dies >= starts, "{actions:?}");
}

#[test]
fn restarts_end_at_their_number_and_a_success_ends_them() {
    let home = Home::shared();
    let failing = home.detached(&["--restart", "on-failure:2", &image("busybox"), "false"]);
    let done = home.sm(&["wait", &failing.name]).exits(0);
    assert_eq!(done.out().trim(), "1");
    assert_eq!(state(home, &failing.name), "exited 1 2");
    let well = home.detached(&["--restart", "on-failure", &image("busybox"), "true"]);
    home.sm(&["wait", &well.name]).exits(0);
    assert_eq!(state(home, &well.name), "exited 0 0");
}

/// The policy is changed while the VM runs.
#[test]
fn an_update_applies_to_the_next_end() {
    let home = Home::shared();
    let command = "sleep 1000; exit 4";
    let vm = home.detached(&[
        "--restart",
        "always",
        &image("busybox"),
        "sh",
        "-c",
        command,
    ]);
    home.sm(&["update", "--restart", "no", &vm.name]).exits(0);
    let name = unique("renamed");
    home.sm(&["rename", &vm.name, &name]).exits(0);
    let kill = "until kill -9 $(pidof sleep); do :; done";
    home.sm(&["exec", &name, "sh", "-c", kill]);
    assert_eq!(home.sm(&["wait", &name]).exits(0).out().trim(), "4");
    assert_eq!(state(home, &name), "exited 4 0");
    home.sm(&["rm", &name]).exits(0);
}

#[test]
fn a_vm_ends_when_its_time_is_over() {
    let home = Home::shared();
    let vm = home.detached(&["--expire", "1s", &image("busybox"), "sleep", "1000"]);
    home.sm(&["wait", &vm.name]).exits(0);
    assert_eq!(vm.inspect()["state"]["exit"]["stopped"], true);
}

#[test]
fn events_are_followed_as_they_happen() {
    let home = Home::new();
    let mut follower = home.command(&["events", "--format", "{{.action}} {{.name}}"]);
    let mut follower = Reaped(follower.spawn().expect("sm can be started"));
    let output = follower.0.stdout.take().expect("stdout is piped");
    let mut lines = BufReader::new(output).lines();
    // Only events after its start are shown.
    until("it watches", || {
        let maps = format!("/proc/{}/fd", follower.0.id());
        let fds = std::fs::read_dir(maps).expect("it runs");
        fds.flatten().any(|fd| {
            let link = std::fs::read_link(fd.path());
            link.is_ok_and(|link| link.as_os_str() == "anon_inode:inotify")
        })
    });
    let vm = home.detached(&[&image("busybox"), "sleep", "1000"]);
    home.sm(&["pause", &vm.name]).exits(0);
    home.sm(&["unpause", &vm.name]).exits(0);
    for action in ["create", "start", "pause", "unpause"] {
        let line = lines.next().expect("a line").expect("text");
        assert_eq!(line, format!("{action} {}", vm.name));
    }
}

/// All processes of VMs are killed, as at a power cut.
#[test]
fn what_should_run_is_resumed() {
    let home = Home::new();
    let busybox = image("busybox");
    let sleep = [busybox.as_str(), "sleep", "1000"];
    let with = |policy: &'static str| {
        let restart = ["--restart", policy];
        home.detached(&[&restart[..], &sleep[..]].concat())
    };
    let (always, unless, stopped, never) = (
        with("always"),
        with("unless-stopped"),
        with("unless-stopped"),
        with("no"),
    );
    home.sm(&["stop", "-t", "0", &stopped.name]).exits(0);
    for vm in [&always, &unless, &never] {
        let pid = vm.inspect()["State"]["Pid"].as_i64().expect("a number");
        let pid = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let pid = pid.expect("a process");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it is there");
        until("it is dead", || {
            state(&home, &vm.name).starts_with("exited")
        });
    }
    let resumed = home.sm(&["system", "resume"]).exits(0).out();
    let resumed: Vec<&str> = resumed.lines().collect();
    assert_eq!(resumed, [always.name.as_str(), unless.name.as_str()]);
    for vm in [&always, &unless] {
        assert!(state(&home, &vm.name).starts_with("running"));
    }
    assert!(state(&home, &stopped.name).starts_with("exited"));
    assert_eq!(home.sm(&["system", "resume"]).exits(0).out(), "");
}

#[test]
fn the_health_of_a_workload_is_watched() {
    let home = Home::shared();
    let vm = home.detached(&[
        "--health-cmd",
        "echo looking; test -e /tmp/well",
        "--health-interval",
        "200ms",
        "--health-retries",
        "2",
        &image("busybox"),
        "sleep",
        "1000",
    ]);
    let health = || {
        let health = vm.inspect()["State"]["Health"].clone();
        health["Status"].as_str().unwrap_or_default().to_owned()
    };
    until("it is unhealthy", || health() == "unhealthy");
    let shown = vm.inspect()["State"]["Health"].clone();
    assert_eq!(shown["Log"][0]["Output"], "looking", "{shown}");
    assert_eq!(shown["Log"][0]["ExitCode"], 1);
    vm.exec(&["touch", "/tmp/well"]).exits(0);
    until("it is healthy", || health() == "healthy");
    let listed = home
        .sm(&["ps", "-q", "--filter", "health=healthy"])
        .exits(0)
        .out();
    assert_eq!(listed.lines().count(), 1, "{listed}");
    let changes = actions(home, &vm.name);
    let changes = changes.iter().filter(|action| *action == "health_status");
    assert_eq!(changes.count(), 2);
}

#[test]
fn processes_of_a_guest_are_listed() {
    let home = Home::shared();
    let vm = home.detached(&[&image("busybox"), "sh", "-c", "sleep 1234; true"]);
    let sleep = || {
        let listed = home.sm(&["top", "--json", &vm.name]).exits(0).json();
        let mut processes = listed.as_array().expect("a list").iter();
        processes
            .find(|process| process["command"] == "sleep 1234")
            .cloned()
    };
    until("the child runs", || sleep().is_some());
    let sleep = sleep().expect("it sleeps");
    assert_eq!(sleep["ppid"], 1, "the shell is the first process");
    let listed = home.sm(&["top", &vm.name, "-o", "pid,cmd"]).exits(0).out();
    assert!(listed.contains("1     sh -c sleep 1234; true"), "{listed}");
    let done = home.sm(&["exec", &vm.name, "sh", "-c", "exit 7"]);
    done.exits(7);
    let events = actions(home, &vm.name);
    let last: Vec<&str> = events.iter().rev().take(3).map(String::as_str).collect();
    assert_eq!(last, ["exec_die", "exec_start", "exec_create"]);
}
