//! Commands: output, statuses, users, terminals, limits.

use std::io::Write as _;

use sm_guest_proto::exec::{ExecRequest, Rlimit, Role, StageFile};
use sm_guest_proto::frame::{BULK_PAYLOAD, ExitStatus, FrameType, encode, resize_payload};

use crate::client::{
    Connection, run, shell, signal_beside, start, start_running, start_running_with_pid,
};
use crate::{Agent, Test};

pub(crate) const TESTS: &[Test] = &[
    (
        "output_status_and_environment",
        output_status_and_environment,
    ),
    ("docker_statuses", docker_statuses),
    (
        "a_hundred_megabytes_through_cat",
        a_hundred_megabytes_through_cat,
    ),
    ("signals_and_timeouts", signals_and_timeouts),
    (
        "a_signal_beside_does_not_wait_behind_input",
        a_signal_beside_does_not_wait_behind_input,
    ),
    ("terminals", terminals),
    ("chains_and_staged_files", chains_and_staged_files),
    (
        "a_chain_holds_no_descriptors_of_the_agent",
        a_chain_holds_no_descriptors_of_the_agent,
    ),
    ("a_client_disconnects", a_client_disconnects),
    ("a_detached_command_continues", a_detached_command_continues),
    (
        "left_behind_children_do_not_hold_the_exit",
        left_behind_children_do_not_hold_the_exit,
    ),
    ("protocol_errors", protocol_errors),
    ("many_at_once", many_at_once),
];

fn output_status_and_environment() {
    let agent = Agent::attached();
    let output = run(agent.path(), &shell("echo out; echo err >&2; exit 7"));
    assert_eq!(output.text(), "out\n");
    assert_eq!(output.stderr, b"err\n");
    assert_eq!(output.status, Some(7));
    assert!(output.peak_rss_kib.is_some_and(|kib| kib > 0));
    assert!(output.pid.is_some());

    let mut request = shell("echo $A:$HOME:$PWD:$(id -u):$(id -g):$(id -G):$(ulimit -n); cat");
    request.env = vec!["A=b c".into()];
    request.cwd = "/usr".into();
    request.user = "65534:4".into();
    request.groups = vec!["9".into()];
    request.rlimits = vec![Rlimit {
        name: "nofile".into(),
        soft: 77,
        hard: 88,
    }];
    let output = run(agent.path(), &request);
    let home = "/nonexistent";
    assert_eq!(output.text(), format!("b c:{home}:/usr:65534:4:4 9:77\n"));
    assert_eq!(
        output.status,
        Some(0),
        "without stdin, cat sees an empty one"
    );

    let script = "ls -l /proc/self/fd | grep -c -e socket: -e anon_inode; cat /proc/self/oom_score_adj; grep Sig[BI] /proc/self/status; umask; \
        cat /proc/self/cgroup";
    let output = run(agent.path(), &shell(script)).text();
    let lines: Vec<_> = output.lines().collect();
    assert_eq!(lines[0], "0", "descriptors of the agent leaked");
    assert_eq!(lines[1], "0");
    // The C library reserves the first signals above 31 and refuses to change them.
    assert!(
        lines[2].ends_with("00000000") && lines[3].ends_with("0000000"),
        "{output}"
    );
    assert_eq!(lines[4], "0022");
    assert!(lines.contains(&"0::/"), "{output}");
}

fn docker_statuses() {
    let agent = Agent::attached();
    let fails = |argv: &[&str], change: &dyn Fn(&mut ExecRequest)| {
        let mut request = ExecRequest {
            argv: argv.iter().map(ToString::to_string).collect(),
            ..ExecRequest::default()
        };
        change(&mut request);
        let output = run(agent.path(), &request);
        assert!(output.pid.is_none(), "never started");
        (output.status.unwrap(), output.error.unwrap())
    };
    let keep = |_: &mut ExecRequest| {};
    let (status, error) = fails(&["no-such-command"], &keep);
    assert_eq!(
        (status, error.as_str()),
        (
            127,
            "exec: \"no-such-command\": executable file not found in $PATH"
        )
    );
    assert_eq!(fails(&["/no/such"], &keep).0, 127);
    assert_eq!(fails(&["/etc/passwd"], &keep).0, 126);
    assert_eq!(fails(&["/etc"], &keep).0, 126);
    assert_eq!(fails(&[], &keep).0, 125);
    let (status, error) = fails(&["true"], &|request| request.user = "nobody-at-all".into());
    assert_eq!(status, 125);
    assert_eq!(
        error,
        "unable to find user nobody-at-all: no matching entries in passwd file"
    );
    assert_eq!(
        fails(&["true"], &|request| request.cwd = "/no/such/dir".into()).0,
        127
    );
    let script = StageFile {
        path: "/tmp/garbage".into(),
        mode: 0o755,
        data: b"\x7fnothing".to_vec(),
    };
    let (status, error) = fails(&["/tmp/garbage"], &|request| {
        request.stage_files = vec![script.clone()]
    });
    assert_eq!(
        (status, error.as_str()),
        (126, "exec /tmp/garbage: exec format error")
    );
}

fn a_hundred_megabytes_through_cat() {
    const TOTAL: usize = 100 << 20;
    let agent = Agent::attached();
    let mut request = shell("cat");
    request.stdin = true;
    let connection = start_running(agent.path(), &request);
    let mut sender = Connection::open(agent.path(), "control");
    sender.stream = connection.stream.try_clone().unwrap();
    let pattern = |at: usize| u8::try_from((at * 31 + at / 251) % 256).unwrap();
    let begin = std::time::Instant::now();
    let writer = std::thread::spawn(move || {
        let mut at = 0;
        while at < TOTAL {
            let len = BULK_PAYLOAD.min(TOTAL - at);
            let payload: Vec<_> = (at..at + len).map(pattern).collect();
            sender.send(FrameType::Stdin, &payload);
            at += len;
        }
        sender.send(FrameType::Stdin, &[]);
    });
    let output = { connection }.collect();
    writer.join().unwrap();
    println!("  100 MiB in {:?}", begin.elapsed());
    assert_eq!(output.status, Some(0));
    assert_eq!(output.stdout.len(), TOTAL);
    assert!(
        output
            .stdout
            .iter()
            .enumerate()
            .all(|(at, byte)| *byte == pattern(at))
    );
}

fn signals_and_timeouts() {
    let agent = Agent::attached();
    let mut connection = start_running(agent.path(), &shell("exec sleep 1000"));
    connection.send(FrameType::Signal, &[15]);
    assert_eq!(connection.collect().status, Some(128 + 15));

    let mut connection = start_running(
        agent.path(),
        &shell("trap 'exit 5' USR1; echo ready; while :; do sleep 1000 & wait; done"),
    );
    connection.next_kind(FrameType::Stdout);
    connection.send(FrameType::Signal, &[10]);
    assert_eq!(connection.collect().status, Some(5));

    let mut request = shell("sleep 1000; true");
    request.timeout_ms = 100;
    assert_eq!(run(agent.path(), &request).status, Some(124));
}

fn terminals() {
    let agent = Agent::attached();
    let mut request = shell(
        "tty; stty size; trap 'stty size; exit 3' WINCH; read line; echo got $line; echo go; \
         while :; do sleep 1000 & wait; done",
    );
    request.tty = true;
    request.cols = 101;
    request.rows = 33;
    request.env = vec!["TERM=dumb".into()];
    let mut connection = start_running(agent.path(), &request);
    connection.send(FrameType::Stdin, b"hello\n");
    let mut seen = String::new();
    while !seen.ends_with("go\r\n") {
        seen += &String::from_utf8(connection.next_kind(FrameType::Stdout)).unwrap();
    }
    // The echo of the input can appear between any of these.
    assert!(seen.contains("/dev/pts/0\r\n"), "{seen:?}");
    assert!(seen.contains("33 101\r\n"), "{seen:?}");
    assert!(seen.contains("got hello\r\n"), "{seen:?}");
    connection.send(FrameType::Resize, &resize_payload(90, 40));
    let output = connection.collect();
    assert!(output.text().contains("40 90\r\n"), "{:?}", output.text());
    assert_eq!(output.status, Some(3));

    // ^C reaches the foreground process, and the output of a command that exits
    // immediately is complete. One program does both, because a shell between two
    // programs may ignore ^C when the first one exits as if it had not received it.
    let mut request =
        shell("exec awk 'BEGIN { for (i = 1; i <= 20000; i++) print i; fflush(); getline line }'");
    request.tty = true;
    let mut connection = start_running(agent.path(), &request);
    let mut seen = String::new();
    while !seen.ends_with("20000\r\n") {
        seen += &String::from_utf8(connection.next_kind(FrameType::Stdout)).unwrap();
    }
    connection.send(FrameType::Stdin, &[3]);
    assert_eq!(connection.collect().status, Some(130));
    let mut request = shell("seq 1 20000");
    request.tty = true;
    let output = run(agent.path(), &request);
    assert!(output.text().ends_with("20000\r\n"));
    assert_eq!(output.text().lines().count(), 20000);
}

fn chains_and_staged_files() {
    let agent = Agent::attached();
    let script = StageFile {
        path: "/srv/a/b/run.sh".into(),
        mode: 0o700,
        data: b"#!/bin/sh\necho one $1\n".to_vec(),
    };
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mut request = ExecRequest {
        argv: words("/srv/a/b/run.sh x"),
        chain: vec![words("echo two"), words("false"), words("echo never")],
        user: "65534".into(),
        stage_files: vec![script],
        ..ExecRequest::default()
    };
    let output = run(agent.path(), &request);
    assert_eq!(output.text(), "one x\ntwo\n", "{output:?}");
    assert_eq!(output.status, Some(1));

    request.argv = words("nothing-here");
    let output = run(agent.path(), &request);
    assert_eq!((output.status, output.pid), (Some(127), None));

    request.argv = words("true");
    request.chain = vec![words("nothing-here")];
    let output = run(agent.path(), &request);
    assert_eq!(output.status, Some(127));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing-here"));

    request.chain = vec![words("sleep 1000")];
    let mut connection = start_running(agent.path(), &request);
    connection.send(FrameType::Signal, &[15]);
    assert_eq!(connection.collect().status, Some(143));
}

/// The parent of a chain is a fork of the agent that executes no program.
fn a_chain_holds_no_descriptors_of_the_agent() {
    let agent = Agent::attached();
    let mut request = shell("cat");
    request.stdin = true;
    let mut reader = start_running(agent.path(), &request);
    let kinds = "ls -l /proc/$PPID/fd | grep -c -e socket: -e eventpoll -e mnt: -e cgroup:";
    let mut request = shell("true");
    request.chain = vec![shell(&format!("{kinds}; exec sleep 1000")).argv];
    let mut chain = start_running(agent.path(), &request);
    assert_eq!(chain.next_kind(FrameType::Stdout), b"0\n");
    // The agent has the only writing end of this pipe.
    reader.send(FrameType::Stdin, b"");
    assert_eq!(reader.collect().status, Some(0));
    chain.send(FrameType::Signal, &[15]);
    assert_eq!(chain.collect().status, Some(143));
}

fn a_client_disconnects() {
    let agent = Agent::attached();
    let fifo = "rm -f /tmp/f; mkfifo /tmp/f";
    assert_eq!(run(agent.path(), &shell(fifo)).status, Some(0));
    let script =
        "trap 'echo gone > /tmp/f; exit' HUP; echo ready; while :; do sleep 1000 & wait; done";
    let mut connection = start_running(agent.path(), &shell(script));
    connection.next_kind(FrameType::Stdout);
    let watcher = start(agent.path(), &shell("cat /tmp/f"));
    drop(connection);
    assert_eq!({ watcher }.collect().text(), "gone\n");

    // A command that ignores the hang-up is killed after the grace period.
    let mut connection = start_running(
        agent.path(),
        &shell("exec 9>/tmp/f; trap '' HUP; echo ready; while :; do sleep 1000; done"),
    );
    let watcher = start(agent.path(), &shell("cat /tmp/f; echo ended"));
    connection.next_kind(FrameType::Stdout);
    drop(connection);
    assert_eq!({ watcher }.collect().text(), "ended\n");
}

fn a_detached_command_continues() {
    let agent = Agent::attached();
    let fifo = "rm -f /tmp/d; mkfifo /tmp/d";
    assert_eq!(run(agent.path(), &shell(fifo)).status, Some(0));
    // More output than a pipe holds, after its client has gone.
    let script = "trap 'exit 1' HUP; read line < /tmp/d; seq 1 100000; \
                  readlink /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2 > /tmp/d";
    let mut request = shell(script);
    request.detached = true;
    request.tty = true;
    drop(start_running(agent.path(), &request));
    let told = run(agent.path(), &shell("echo go > /tmp/d; cat /tmp/d"));
    assert_eq!(told.text(), "/dev/null\n/tmp/d\n/dev/null\n");
    // One that a client waits for ends with its status, and without output.
    let mut request = shell("echo text; exit 3");
    request.detached = true;
    let output = run(agent.path(), &request);
    assert_eq!((output.text(), output.status), (String::new(), Some(3)));
    request.argv = vec!["/missing".into()];
    assert_eq!(run(agent.path(), &request).status, Some(127));
}

fn left_behind_children_do_not_hold_the_exit() {
    let agent = Agent::attached();
    let output = run(
        agent.path(),
        &shell("sleep 1000 & yes & seq 1 5000; exit 4"),
    );
    assert_eq!(output.status, Some(4));
    let lines: Vec<_> = output.text().lines().map(str::to_owned).collect();
    assert!(lines.iter().any(|line| line == "5000"));
}

fn protocol_errors() {
    let agent = Agent::attached();
    let refused = |frames: &[(FrameType, &[u8])]| {
        let mut connection = Connection::open(agent.path(), "exec");
        for (kind, payload) in frames {
            connection.send(*kind, payload);
        }
        let output = connection.collect();
        assert_eq!(output.status, Some(125));
        output.error.unwrap()
    };
    let old: &[u8] = br#"{"hello":{"protocol":999}}"#;
    let good: &[u8] = br#"{"hello":{"protocol":3}}"#;
    assert!(refused(&[(FrameType::Control, old)]).contains("protocol 3, the host 999"));
    assert!(refused(&[(FrameType::Request, b"{}")]).contains("first frame"));
    assert!(refused(&[(FrameType::Control, b"\xff")]).contains("first frame"));
    assert!(
        refused(&[(FrameType::Control, good), (FrameType::Request, b"{")]).contains("malformed")
    );
    assert!(
        refused(&[(FrameType::Control, good), (FrameType::Stdin, b"x")])
            .contains("expected a request")
    );
    let mut connection = Connection::open(agent.path(), "exec");
    std::io::Write::write_all(&mut connection.stream, b"GET / HTTP/1.1\r\n").unwrap();
    assert_eq!(connection.collect().status, Some(125));
}

fn many_at_once() {
    let agent = Agent::attached();
    let mut running: Vec<_> = (0..100)
        .map(|number| {
            start(
                agent.path(),
                &shell(&format!("echo {number}; exit {}", number % 50)),
            )
        })
        .collect();
    for (number, connection) in running.iter_mut().enumerate() {
        let output = connection.collect();
        assert_eq!(output.text(), format!("{number}\n"));
        assert_eq!(output.status, Some(u32::try_from(number % 50).unwrap()));
    }
    assert_eq!(ExecRequest::default().role, Role::Exec);
}

fn a_signal_beside_does_not_wait_behind_input() {
    let agent = Agent::attached();
    let mut request = shell("trap 'exit 42' USR1; echo ready; while :; do sleep 0.05; done");
    request.stdin = true;
    let mut command = start_running_with_pid(agent.path(), &request);
    command.0.next_kind(FrameType::Stdout);
    // Fill all buffers between client and a command that does not read. The length of the
    // timeout only affects how full they become.
    let timeout = std::time::Duration::from_millis(300);
    command.0.stream.set_write_timeout(Some(timeout)).unwrap();
    let mut bytes = Vec::new();
    encode(FrameType::Stdin, &[b'x'; BULK_PAYLOAD], &mut bytes).unwrap();
    let error = loop {
        if let Err(error) = command.0.stream.write_all(&bytes) {
            break error;
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    let nobody = signal_beside(agent.path(), 1 << 30, 10);
    assert_eq!(nobody.status, Some(1));
    assert!(nobody.error.is_some());
    assert_eq!(signal_beside(agent.path(), command.1, 10).status, Some(0));
    let exit = ExitStatus::parse(&command.0.next_kind(FrameType::Exit)).unwrap();
    assert_eq!(exit.status, 42);
}
