//! Tests of the workload's life cycle: attach, main command, freeze, power-off.

use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::{ControlReply, ControlRequest, GuestDns, IdentityReport, Refresh};
use sm_guest_proto::exec::{ExecRequest, Role};
use sm_guest_proto::frame::FrameType;

use crate::client::{
    Connection, ControlClient, attach_main, identity_request, run, shell, start, start_running,
    stats_request,
};
use crate::{Agent, Test};

pub(crate) const TESTS: &[Test] = &[
    ("requests_out_of_order", requests_out_of_order),
    ("the_root_is_assembled", the_root_is_assembled),
    ("a_read_only_root", a_read_only_root),
    (
        "main_is_pid_one_and_survives_its_client",
        main_is_pid_one_and_survives_its_client,
    ),
    (
        "a_main_command_that_cannot_start",
        a_main_command_that_cannot_start,
    ),
    ("freezing_holds_everything", freezing_holds_everything),
    (
        "the_main_command_waits_for_the_thaw",
        the_main_command_waits_for_the_thaw,
    ),
    (
        "commands_join_the_group_of_pid_one",
        commands_join_the_group_of_pid_one,
    ),
    (
        "cpu_time_counts_from_the_identity",
        cpu_time_counts_from_the_identity,
    ),
    ("power_off_ends_in_order", power_off_ends_in_order),
    ("power_off_without_a_workload", power_off_without_a_workload),
    (
        "power_off_kills_processes_that_ignore_sigterm",
        power_off_kills_processes_that_ignore_sigterm,
    ),
];

fn error(reply: ControlReply) -> String {
    match reply {
        ControlReply::Error { message } => message,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn identity_report(agent: &Agent) -> IdentityReport {
    match agent.control().ask(&identity_request()) {
        ControlReply::IdentityReport(identity_report) => identity_report,
        other => panic!("{other:?}"),
    }
}

/// An image snapshot relies on this: its clones are frozen until they have an identity,
/// and commands started before that wait.
fn the_main_command_waits_for_the_thaw() {
    let agent = Agent::attached();
    let mut control = agent.control();
    assert_eq!(control.ask(&ControlRequest::Freeze), ControlReply::Done);
    let mut request = shell("cat /etc/machine-id");
    request.role = Role::Main;
    let mut main = start(agent.path(), &request);
    let mut beside = start(agent.path(), &shell("cat /etc/machine-id"));
    for held in [&mut main, &mut beside] {
        held.next_kind(FrameType::Control);
        held.stream
            .set_read_timeout(Some(std::time::Duration::from_millis(200)))
            .unwrap();
        let read = std::io::Read::read(&mut held.stream, &mut [0]);
        assert!(read.is_err(), "nothing runs");
        held.stream
            .set_read_timeout(Some(std::time::Duration::from_secs(60)))
            .unwrap();
    }
    let machine_id = "fedcba9876543210fedcba9876543210";
    let refresh = Refresh {
        machine_id: machine_id.into(),
        ..Refresh::default()
    };
    control.ask(&ControlRequest::Refresh(refresh));
    assert_eq!(identity_report(&agent).machine_id, machine_id);
    assert_eq!(control.ask(&ControlRequest::Thaw), ControlReply::Done);
    assert_eq!(main.collect().text(), format!("{machine_id}\n"));
    // It exited with the main command, or before.
    let beside = beside.collect();
    assert!(
        beside.status == Some(137) || beside.text() == format!("{machine_id}\n"),
        "{:?}",
        beside.status
    );
}

fn requests_out_of_order() {
    let agent = Agent::bare();
    let output = run(agent.path(), &shell("true"));
    assert_eq!(output.status, Some(125));
    assert_eq!(
        output.error.unwrap(),
        "container main has no root file system yet"
    );

    let mut connection = Connection::open(agent.path(), "control");
    connection.send(FrameType::Control, br#""freeze""#);
    let reply = serde_json::from_slice(&connection.next_kind(FrameType::Control)).unwrap();
    assert!(error(reply).contains("first request must be hello"));
    assert!(connection.next().is_none(), "and the connection is closed");

    let mut control = agent.control();
    assert!(
        error(control.ask(&ControlRequest::SignalMain {
            container: ContainerId::default(),
            signal: 15,
            stop: false
        }))
        .contains("no main command")
    );
    let mut plan = agent.plan();
    plan.lower = "/dev/does-not-exist-either".into();
    // A missing device is reported, and attaching can be tried again.
    plan.hostname = "bad name".into();
    assert_eq!(
        error(control.ask(&ControlRequest::AttachRoot(plan))),
        "hostname is malformed"
    );
    let mut plan = agent.plan();
    plan.lower = "/etc/passwd".into();
    assert!(
        error(control.ask(&ControlRequest::AttachRoot(plan)))
            .contains("mount the image /etc/passwd")
    );
    assert_eq!(
        control.ask(&ControlRequest::AttachRoot(agent.plan())),
        ControlReply::Done
    );
    assert!(error(control.ask(&ControlRequest::AttachRoot(agent.plan()))).contains("already"));
    assert!(
        attach_main(agent.path())
            .collect()
            .error
            .unwrap()
            .contains("no main command")
    );
}

fn the_root_is_assembled() {
    let agent = Agent::attached();
    let refresh = Refresh {
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        dns: GuestDns {
            nameservers: vec!["10.9.9.9".parse().unwrap()],
            ..GuestDns::default()
        },
        hosts: vec![("10.1.2.3".into(), "other".into())],
        boot_id: "01234567-89ab-4def-8123-456789abcdef".into(),
        hostname: "clone".into(),
        epoch: "21234567-89ab-4def-8123-456789abcdef".into(),
        ..Refresh::default()
    };
    let text = |script: &str| run(agent.path(), &shell(script)).text();
    assert_eq!(text("hostname; cat /etc/hostname"), "box\nbox\n");
    let reply = agent.control().ask(&ControlRequest::Refresh(refresh));
    assert!(matches!(reply, ControlReply::Refreshed(_)), "{reply:?}");
    assert_eq!(text("hostname; cat /etc/hostname"), "clone\nclone\n");
    assert_eq!(
        text("cat /etc/machine-id"),
        "0123456789abcdef0123456789abcdef\n"
    );
    assert_eq!(
        text("cat /proc/sys/kernel/random/boot_id"),
        "01234567-89ab-4def-8123-456789abcdef\n"
    );
    assert_eq!(
        text("cat /run/sm-epoch"),
        "21234567-89ab-4def-8123-456789abcdef\n"
    );
    let identity_report = identity_report(&agent);
    assert_eq!(
        identity_report.machine_id,
        "0123456789abcdef0123456789abcdef"
    );
    assert_eq!(
        identity_report.boot_id,
        "01234567-89ab-4def-8123-456789abcdef"
    );
    assert_eq!(
        identity_report.epoch,
        "21234567-89ab-4def-8123-456789abcdef"
    );
    assert_eq!(identity_report.hostname, "clone");
    assert_eq!(identity_report.uuid.len(), 36);
    // The report contains what the workload reads, not what the host sent.
    text("rm /etc/machine-id && echo other >/etc/machine-id");
    assert_eq!(self::identity_report(&agent).machine_id, "other");
    assert_eq!(text("cat /etc/resolv.conf"), "nameserver 10.9.9.9\n");
    let hosts = text("cat /etc/hosts");
    assert!(
        hosts.contains("127.0.1.1\tclone\n") && hosts.contains("10.1.2.3\tother\n"),
        "{hosts}"
    );
    // Changes stay in the overlay, /dev/shm is bounded, and no file of the agent is
    // visible.
    assert_eq!(
        text("echo x > /usr/new; mv /usr/new /usr/new2; cat /usr/new2"),
        "x\n"
    );
    assert!(!std::path::Path::new("/usr/new2").exists());
    assert_eq!(
        run(
            agent.path(),
            &shell("head -c 2000000 /dev/zero > /dev/shm/x")
        )
        .status,
        Some(1)
    );
    let mounts = text("cut -d' ' -f2,3 /proc/mounts");
    assert!(mounts.starts_with("/ overlay\n"), "{mounts}");
    assert_eq!(
        mounts.lines().filter(|line| line.starts_with("/ ")).count(),
        1
    );
    for mount in [
        "/proc proc",
        "/sys sysfs",
        "/dev/pts devpts",
        "/dev/mqueue mqueue",
        "/sys/fs/cgroup cgroup2",
    ] {
        assert!(
            mounts.lines().any(|line| line == mount),
            "{mount} in {mounts}"
        );
    }
    assert!(!mounts.contains(agent.path().to_str().unwrap()), "{mounts}");
    // Only the waiting init and the shell. (The processes of a pipeline may or may not
    // exist when the list is read.)
    assert_eq!(
        text("set -- /proc/[0-9]*; echo $#")
            .trim()
            .parse::<u32>()
            .unwrap(),
        2
    );
    let ControlReply::Stats(stats) = agent.control().ask(&stats_request()) else {
        panic!("stats");
    };
    assert_eq!(stats.processes, 0);
    assert!(stats.memory_total_kib > stats.memory_available_kib);
}

/// A clone reports its own CPU time, without that of the VM that it is a clone of.
fn cpu_time_counts_from_the_identity() {
    let agent = Agent::attached();
    let mut control = agent.control();
    let cpu_us = |control: &mut ControlClient| match control.ask(&stats_request()) {
        ControlReply::Stats(stats) => stats.cpu_us,
        other => panic!("{other:?}"),
    };
    let busy = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
    assert_eq!(run(agent.path(), &shell(busy)).status, Some(0));
    let before = cpu_us(&mut control);
    assert!(before > 10_000, "{before}");
    let reply = control.ask(&ControlRequest::Refresh(Refresh::default()));
    assert!(matches!(reply, ControlReply::Refreshed(_)), "{reply:?}");
    let after = cpu_us(&mut control);
    assert!(after < before / 2, "{after} of {before}");
}

/// systemd leaves the topmost group and then enables controllers there, which succeeds
/// only while no process is in it.
fn commands_join_the_group_of_pid_one() {
    let agent = Agent::attached();
    let mut before = start_running(
        agent.path(),
        &shell("grep ^0: /proc/self/cgroup; exec sleep 1000"),
    );
    assert_eq!(before.next_kind(FrameType::Stdout), b"0::/\n");
    let mut request = shell(
        "cd /sys/fs/cgroup && mkdir init && for pid in $(cat cgroup.procs); do
            echo $pid >init/cgroup.procs 2>/dev/null
        done; echo left; read line; cat cgroup.procs; echo end",
    );
    request.role = Role::Main;
    request.stdin = true;
    let mut main = start_running(agent.path(), &request);
    assert_eq!(main.next_kind(FrameType::Stdout), b"left\n");
    let mut beside = start_running(
        agent.path(),
        &shell("grep ^0: /proc/self/cgroup; exec sleep 1000"),
    );
    assert_eq!(beside.next_kind(FrameType::Stdout), b"0::/init\n");
    main.send(FrameType::Stdin, b"\n");
    assert_eq!(main.collect().text(), "end\n");
}

fn a_read_only_root() {
    let agent = Agent::bare();
    let mut plan = agent.plan();
    plan.read_only = true;
    let mut control = agent.control();
    assert_eq!(
        control.ask(&ControlRequest::AttachRoot(plan)),
        ControlReply::Done
    );
    let refresh = Refresh {
        machine_id: "76543210fedcba9876543210fedcba98".into(),
        epoch: "41234567-89ab-4def-8123-456789abcdef".into(),
        ..Refresh::default()
    };
    control.ask(&ControlRequest::Refresh(refresh));
    let identity_report = identity_report(&agent);
    assert_eq!(
        identity_report.machine_id,
        "76543210fedcba9876543210fedcba98"
    );
    assert_eq!(
        identity_report.epoch,
        "41234567-89ab-4def-8123-456789abcdef"
    );
    let output = run(agent.path(), &shell("touch /run/x 2>/dev/null; echo $?"));
    assert_eq!(output.text(), "1\n");
    let output = run(
        agent.path(),
        &shell("touch /usr/x 2>/dev/null; echo $?; touch /dev/shm/x; echo $?; hostname"),
    );
    assert_eq!(output.text(), "1\n0\nbox\n");
}

fn main_is_pid_one_and_survives_its_client() {
    let agent = Agent::attached();
    // A command started before the main one continues.
    let mut before = start_running(agent.path(), &shell("echo here; sleep 1000"));
    before.next_kind(FrameType::Stdout);
    let mut request = shell("echo pid $$; pwd; read line; echo got $line; echo error >&2; exit 9");
    request.role = Role::Main;
    request.stdin = true;
    request.cwd = "/made/for/main".into();
    let mut main = start_running(agent.path(), &request);
    let mut seen = Vec::new();
    while !seen.ends_with(b"/made/for/main\n") {
        seen.extend(main.next_kind(FrameType::Stdout));
    }
    assert_eq!(seen, b"pid 1\n/made/for/main\n");
    let again = run(agent.path(), &request);
    assert_eq!(
        again.error.unwrap(),
        "the container's main command already runs"
    );
    assert_eq!(
        run(
            agent.path(),
            &shell("tr '\\0' ' ' < /proc/1/cmdline | cut -c1-5")
        )
        .text(),
        "sh -c\n"
    );

    drop(main);
    let mut main = attach_main(agent.path());
    assert_eq!(
        main.next_kind(FrameType::Control),
        br#"{"hello":{"protocol":3}}"#
    );
    assert_eq!(
        main.next_kind(FrameType::Control),
        br#"{"started":{"container":"main","pid":1}}"#
    );
    // Another client takes over from one that is still connected.
    let mut second = attach_main(agent.path());
    assert!(main.next().is_none());
    second.send(FrameType::Stdin, b"words\n");
    let output = second.collect();
    assert_eq!(output.text(), "got words\n");
    assert_eq!(output.stderr, b"error\n");
    assert_eq!((output.status, output.pid), (Some(9), Some(1)));

    assert_eq!(
        before.collect().status,
        Some(137),
        "all end with the main command"
    );
    assert_eq!(
        run(agent.path(), &shell("true")).error.unwrap(),
        "the workload has ended"
    );
}

fn a_main_command_that_cannot_start() {
    let agent = Agent::attached();
    let request = ExecRequest {
        argv: vec!["/no/such/program".into()],
        role: Role::Main,
        ..ExecRequest::default()
    };
    let output = run(agent.path(), &request);
    assert_eq!((output.status, output.pid), (Some(127), None));
    assert!(output.error.unwrap().contains("no such file or directory"));
    let next = run(agent.path(), &shell("true"));
    assert_eq!(next.error.unwrap(), "the workload has ended");
}

fn freezing_holds_everything() {
    let agent = Agent::attached();
    let mut control = agent.control();
    let mut ticker = start_running(agent.path(), &shell("while :; do sleep 1000; done"));
    assert_eq!(control.ask(&ControlRequest::Freeze), ControlReply::Done);
    assert_eq!(
        control.ask(&ControlRequest::PrepareSnapshot),
        ControlReply::Done
    );
    // A command that is started now is frozen before its first instruction.
    let mut held = start(agent.path(), &shell("echo late"));
    held.next_kind(FrameType::Control);
    held.stream
        .set_read_timeout(Some(std::time::Duration::from_millis(200)))
        .unwrap();
    let mut byte = [0];
    assert!(
        std::io::Read::read(&mut held.stream, &mut byte).is_err(),
        "nothing while frozen"
    );
    held.stream
        .set_read_timeout(Some(std::time::Duration::from_secs(60)))
        .unwrap();
    assert_eq!(control.ask(&ControlRequest::Thaw), ControlReply::Done);
    assert_eq!(held.collect().text(), "late\n");
    // A frozen command can be killed.
    assert_eq!(control.ask(&ControlRequest::Freeze), ControlReply::Done);
    ticker.send(FrameType::Signal, &[9]);
    assert_eq!(ticker.collect().status, Some(137));
}

fn power_off_ends_in_order() {
    let mut agent = Agent::attached();
    let mut request =
        shell("trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 1000 & wait; done");
    request.role = Role::Main;
    let mut main = start_running(agent.path(), &request);
    main.next_kind(FrameType::Stdout);
    let mut control = agent.control();
    control.send(&ControlRequest::PowerOff { grace_ms: 60_000 });
    let output = main.collect();
    assert_eq!((output.text().as_str(), output.status), ("bye\n", Some(3)));
    assert_eq!(control.reply(), ControlReply::Done);
    drop(control);
    assert!(agent.wait());
}

fn power_off_without_a_workload() {
    for mut agent in [Agent::bare(), Agent::attached()] {
        let mut control = agent.control();
        assert_eq!(
            control.ask(&ControlRequest::PowerOff { grace_ms: 60_000 }),
            ControlReply::Done
        );
        assert!(agent.wait());
    }
}

fn power_off_kills_processes_that_ignore_sigterm() {
    let mut agent = Agent::attached();
    let stubborn = "trap '' TERM; echo ready; while :; do sleep 1; done";
    let mut exec = start_running(agent.path(), &shell(stubborn));
    exec.next_kind(FrameType::Stdout);
    let mut control = agent.control();
    // This also works while everything is frozen.
    assert_eq!(control.ask(&ControlRequest::Freeze), ControlReply::Done);
    assert_eq!(
        control.ask(&ControlRequest::PowerOff { grace_ms: 100 }),
        ControlReply::Done
    );
    assert_eq!(exec.collect().status, Some(137));
    drop(control);
    assert!(agent.wait());
}
