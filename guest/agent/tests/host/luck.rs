//! Tests of adverse conditions: no descriptors, a workload that replaces files the agent
//! uses.

use std::fs;
use std::path::PathBuf;

use sm_guest_proto::control::{ControlReply, ControlRequest, IdentityReport, Refresh};
use sm_guest_proto::exec::Role;
use sm_guest_proto::frame::FrameType;

use crate::client::{
    Connection, ControlClient, identity_request, run, shell, start_running, stats_request,
};
use crate::{Agent, Test, cgroup_mount, children};

pub(crate) const TESTS: &[Test] = &[
    (
        "connections_wait_while_descriptors_are_exhausted",
        connections_wait_while_descriptors_are_exhausted,
    ),
    (
        "nowhere_to_log_to_ends_nothing",
        nowhere_to_log_to_ends_nothing,
    ),
    (
        "nothing_below_a_replaced_dev_is_opened",
        nothing_below_a_replaced_dev_is_opened,
    ),
    (
        "files_that_do_not_respond_block_no_other_request",
        files_that_do_not_respond_block_no_other_request,
    ),
    (
        "a_command_is_started_in_the_group_of_pid_one",
        a_command_is_started_in_the_group_of_pid_one,
    ),
];

/// Returns the CPU time of a process in hundredths of a second.
fn cpu_ticks(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = text.rsplit(") ").next().unwrap();
    let fields: Vec<&str> = after_name.split(' ').collect();
    // utime and stime; proc_pid_stat(5) counts from pid as 1, here the third is first.
    [11, 12]
        .map(|at: usize| fields[at].parse::<u64>().unwrap())
        .iter()
        .sum()
}

fn connections_wait_while_descriptors_are_exhausted() {
    let agent = Agent::after("ulimit -n 44").attach();
    let mut control = agent.control();
    let mut request = shell("while read line; do sleep 1; echo $line; done");
    request.stdin = true;
    let mut session = start_running(agent.path(), &request);
    let open = |_| Connection::open(agent.path(), "exec");
    let mut others: Vec<Connection> = (0..60).map(open).collect();
    for other in &mut others {
        other.hello();
    }
    // Earlier clients are served, and the agent is otherwise idle although connections
    // wait. (An agent that retried continuously would use all the CPU.)
    others[0].next_kind(FrameType::Control);
    let before = cpu_ticks(agent.pid());
    for _ in 0..2 {
        session.send(FrameType::Stdin, b"on\n");
        assert_eq!(session.next_kind(FrameType::Stdout), b"on\n");
    }
    let used = cpu_ticks(agent.pid()) - before;
    assert!(used < 30, "{used} ticks in two seconds");
    let stats = control.ask(&stats_request());
    assert!(!matches!(stats, ControlReply::Done), "{stats:?}");
    // A command for which there are no descriptors is refused.
    let request = serde_json::to_vec(&shell("true")).unwrap();
    others[1].send(FrameType::Request, &request);
    let refused = others[1].collect();
    assert_eq!(refused.status, Some(125));
    assert!(refused.error.unwrap().contains("Too many open files"));
    // All other connections are served once descriptors are available again.
    let mut last = others.pop().unwrap();
    drop(others);
    last.next_kind(FrameType::Control);
    last.send(FrameType::Request, &request);
    assert_eq!(last.collect().status, Some(0));
    assert_eq!(run(agent.path(), &shell("echo new")).text(), "new\n");
    session.send(FrameType::Stdin, b"");
    assert_eq!(session.collect().status, Some(0));
}

/// Without a kernel log, lines go to standard error, which fails here.
fn nowhere_to_log_to_ends_nothing() {
    let agent = Agent::after(
        "mount -t tmpfs none /dev
         mknod -m 666 /dev/null c 1 3
         mknod -m 666 /dev/full c 1 7
         mknod -m 666 /dev/urandom c 1 9
         exec 2>/dev/full",
    )
    .attach();
    // An unexpected exit of PID 1 is logged.
    let init = rustix::process::Pid::from_raw(children(agent.pid())[0].cast_signed()).unwrap();
    rustix::process::kill_process(init, rustix::process::Signal::KILL).unwrap();
    let mut control = agent.control();
    let off = ControlRequest::PowerOff { grace_ms: 0 };
    assert_eq!(control.ask(&off), ControlReply::Done);
}

fn report(control: &mut ControlClient) -> IdentityReport {
    match control.ask(&identity_request()) {
        ControlReply::IdentityReport(identity_report) => identity_report,
        other => panic!("{other:?}"),
    }
}

/// devtmpfs is one instance, so a workload's changes of its `/dev` also affect the
/// agent's. Here `/dev` is a tmpfs with the same devices, to protect this machine.
fn nothing_below_a_replaced_dev_is_opened() {
    let mut agent = Agent::after(
        "mount -t tmpfs none /dev
         mknod -m 666 /dev/null c 1 3
         mknod -m 666 /dev/urandom c 1 9
         mknod -m 644 /dev/kmsg c 1 11",
    )
    .attach();
    let dev = format!("/proc/{}/root/dev", agent.pid());
    let entries = || {
        let entries = fs::read_dir(&dev).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let names = entries();
    for name in ["null", "urandom", "kmsg"] {
        assert!(names.iter().any(|entry| entry == name), "{names:?}");
        let path = format!("{dev}/{name}");
        fs::remove_file(&path).unwrap();
        // Opening a FIFO blocks.
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
    }
    let mut control = agent.control();
    let machine_id = "0123456789abcdef0123456789abcdef";
    let refreshed = control.ask(&ControlRequest::Refresh(Refresh {
        entropy: vec![7; 64],
        machine_id: machine_id.into(),
        ..Refresh::default()
    }));
    assert!(
        matches!(refreshed, ControlReply::Refreshed(_)),
        "{refreshed:?}"
    );
    // A command without input, which gets the null device.
    let output = run(agent.path(), &shell("cat; echo ran"));
    assert_eq!((output.text().as_str(), output.status), ("ran\n", Some(0)));
    let mut request = shell("tty");
    request.tty = true;
    assert_eq!(run(agent.path(), &request).status, Some(0));
    for request in [
        ControlRequest::Freeze,
        ControlRequest::PrepareSnapshot,
        ControlRequest::Thaw,
    ] {
        assert_eq!(control.ask(&request), ControlReply::Done);
    }
    assert_eq!(report(&mut control).machine_id, machine_id);
    // An unexpected exit of PID 1 is reported in the kernel log.
    let init = rustix::process::Pid::from_raw(children(agent.pid())[0].cast_signed()).unwrap();
    rustix::process::kill_process(init, rustix::process::Signal::KILL).unwrap();
    // Commands that are started meanwhile fail in one way or another.
    let ended = (0..10_000).any(|_| {
        let error = run(agent.path(), &shell("true")).error;
        error.is_some_and(|error| error == "the workload has ended")
    });
    assert!(ended);
    assert_eq!(entries(), names);
    let off = ControlRequest::PowerOff { grace_ms: 0 };
    assert_eq!(control.ask(&off), ControlReply::Done);
    drop(control);
    assert!(agent.wait());
}

fn files_that_do_not_respond_block_no_other_request() {
    let agent = Agent::attached();
    // A file system that does not respond, served by a process of the workload.
    let script = "exec 3<>/dev/fuse
        mount -i -t fuse -o fd=3,rootmode=100000,user_id=0,group_id=0 none /etc/machine-id
        echo mounted; exec sleep 1000";
    let mut server = start_running(agent.path(), &shell(script));
    assert_eq!(server.next_kind(FrameType::Stdout), b"mounted\n");
    let mut asking = agent.control();
    asking.send(&identity_request());
    let mut control = agent.control();
    // The first report is in progress when this is answered.
    let again = control.ask(&identity_request());
    let ControlReply::Error { message } = again else {
        panic!("{again:?}");
    };
    assert!(message.contains("already being read"), "{message}");
    assert_eq!(run(agent.path(), &shell("echo beside")).text(), "beside\n");
    let stats = control.ask(&stats_request());
    assert!(matches!(stats, ControlReply::Stats(_)), "{stats:?}");
    let machine_id = "0123456789abcdef0123456789abcdef";
    let refreshed = control.ask(&ControlRequest::Refresh(Refresh {
        machine_id: machine_id.into(),
        ..Refresh::default()
    }));
    assert!(
        matches!(refreshed, ControlReply::Refreshed(_)),
        "{refreshed:?}"
    );
    // The report has a deadline.
    let ControlReply::Error { message } = asking.reply() else {
        panic!("no report of what did not answer");
    };
    assert!(message.contains("took too long"), "{message}");
    // Without its server, reading fails, which counts as an answer.
    server.send(FrameType::Signal, &[9]);
    assert_eq!(server.collect().status, Some(137));
    let identity_report = report(&mut control);
    assert_eq!(identity_report.machine_id, "");
    run(agent.path(), &shell("umount /etc/machine-id"));
    let identity_report = report(&mut control);
    assert_eq!(identity_report.machine_id, machine_id);
}

/// systemd and other init systems enable controllers for the groups below their own, in
/// which no process can be started then.
fn a_command_is_started_in_the_group_of_pid_one() {
    let agent = Agent::bare();
    let mount = cgroup_mount().unwrap();
    let controllers = fs::read_to_string(mount.join("cgroup.controllers")).unwrap();
    let controller = controllers.split_whitespace().next();
    let controller = controller.expect("a controller in the cgroup2 hierarchy");
    // The agent creates it soon after it listens, if it does not exist.
    let containers = PathBuf::from(agent.cgroup()).join("containers");
    fs::create_dir_all(&containers).unwrap();
    let parents = [
        mount.clone(),
        mount.join("sm-agent-test"),
        agent.cgroup().into(),
        containers,
    ];
    for parent in &parents {
        fs::write(
            parent.join("cgroup.subtree_control"),
            format!("+{controller}"),
        )
        .unwrap();
    }
    let agent = agent.attach();
    let before = run(agent.path(), &shell("cat /proc/self/cgroup"));
    assert!(before.text().ends_with("0::/\n"), "{before:?}");
    let mut request = shell(&format!(
        "cd /sys/fs/cgroup; mkdir init.scope; echo 0 >init.scope/cgroup.procs
         echo +{controller} >cgroup.subtree_control && echo ready; read line"
    ));
    request.role = Role::Main;
    request.stdin = true;
    let mut main = start_running(agent.path(), &request);
    assert_eq!(main.next_kind(FrameType::Stdout), b"ready\n");
    let beside = run(agent.path(), &shell("cat /proc/self/cgroup"));
    assert!(beside.text().ends_with("0::/init.scope\n"), "{beside:?}");
    // It is a process of the workload in any case.
    let mut control = agent.control();
    assert_eq!(control.ask(&ControlRequest::Freeze), ControlReply::Done);
    assert_eq!(control.ask(&ControlRequest::Thaw), ControlReply::Done);
    main.send(FrameType::Stdin, b"\n");
    assert_eq!(main.collect().status, Some(0));
}
