//! `sm run` with real images: output, status, configuration, streams, SMP, memory.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::Stdio;

use sha2::{Digest as _, Sha256};
use sm_e2e::{Home, Reaped, binary, image, until};

fn sm(arguments: &[&str]) -> sm_e2e::Done {
    Home::shared().sm(arguments)
}

#[test]
fn output_and_status_come_back() {
    let done = sm(&[
        "run",
        "--rm",
        &image("busybox"),
        "sh",
        "-c",
        "echo hello; exit 7",
    ])
    .exits(7);
    assert_eq!(done.out(), "hello\n");
    assert_eq!(done.err(), "");
}

#[test]
fn stderr_is_kept_apart_from_stdout() {
    let done = sm(&[
        "run",
        "--rm",
        &image("busybox"),
        "sh",
        "-c",
        "echo a; echo b >&2",
    ])
    .exits(0);
    assert_eq!((done.out().as_str(), done.err().as_str()), ("a\n", "b\n"));
}

#[test]
fn a_hundred_megabytes_survive_the_round_trip() {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let input: Vec<u8> = (0..100 * 1024 * 1024 / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    let arguments = ["run", "--rm", "-i", &image("busybox"), "cat"];
    let done = Home::shared().sm_with_input(&arguments, &input).exits(0);
    assert_eq!(done.stdout.len(), input.len());
    assert_eq!(Sha256::digest(&done.stdout), Sha256::digest(&input));
}

#[test]
fn environment_user_and_directory_are_as_asked() {
    let script = "echo $GREETING; id -u; id -g; pwd; hostname";
    let done = sm(&[
        "run",
        "--rm",
        "-e",
        "GREETING=hi there",
        "-u",
        "1234:4321",
        "-w",
        "/tmp",
        "--hostname",
        "box",
        &image("busybox"),
        "sh",
        "-c",
        script,
    ])
    .exits(0);
    assert_eq!(done.out(), "hi there\n1234\n4321\n/tmp\nbox\n");
}

#[test]
fn a_user_is_found_by_name_with_its_groups() {
    let script = "id -un; id -Gn; echo $HOME";
    let done = sm(&[
        "run",
        "--rm",
        "-u",
        "www-data",
        &image("debian"),
        "sh",
        "-c",
        script,
    ])
    .exits(0);
    assert_eq!(done.out(), "www-data\nwww-data\n/var/www\n");
}

#[test]
fn entrypoint_replaces_the_images_own() {
    let done = sm(&[
        "run",
        "--rm",
        "--entrypoint",
        "echo",
        &image("busybox"),
        "x",
        "y",
    ])
    .exits(0);
    assert_eq!(done.out(), "x y\n");
}

#[test]
fn an_env_file_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("env");
    std::fs::write(&path, "# comment\nA=1\nB=two words\n").unwrap();
    let path = path.to_str().unwrap();
    let done = sm(&[
        "run",
        "--rm",
        "--env-file",
        path,
        &image("busybox"),
        "sh",
        "-c",
        "echo $A/$B",
    ]);
    assert_eq!(done.exits(0).out(), "1/two words\n");
}

#[test]
fn a_missing_command_is_127_and_a_directory_is_126() {
    let done = sm(&["run", "--rm", &image("busybox"), "no-such-command"]).exits(127);
    assert!(done.err().contains("no-such-command"), "{}", done.err());
    sm(&["run", "--rm", &image("busybox"), "/etc"]).exits(126);
    // The start of a detached VM can fail as well.
    let done = sm(&["run", "-d", "--rm", &image("busybox"), "no-such-command"]).exits(127);
    assert!(done.err().contains("no-such-command"), "{}", done.err());
}

#[test]
fn a_command_killed_by_a_signal_is_128_plus_n() {
    sm(&[
        "run",
        "--rm",
        &image("busybox"),
        "sh",
        "-c",
        "sh -c 'kill -TERM $$'; exit $?",
    ])
    .exits(143);
    // PID 1 of a namespace ignores signals that it sends to itself, but not those for its
    // own faults.
    // abort(3) relies on the same when its signal has no effect.
    let script = "import os; os.abort()";
    let image = image("python");
    sm(&["run", "--rm", &image, "python3", "-c", script]).exits(139);
    // Other commands are killed by signals, and the VM's own one by SIGKILL from outside.
    let vm = Home::shared().detached(&[&image, "sleep", "1000"]);
    for (signal, status) in [("TERM", 143), ("KILL", 137), ("USR1", 138)] {
        vm.exec(&["sh", "-c", &format!("kill -{signal} $$")])
            .exits(status);
    }
    Home::shared().sm(&["kill", &vm.name]).exits(0);
    assert_eq!(vm.wait()["state"]["exit_code"], 137);
}

#[test]
fn as_many_processors_as_asked_work_together() {
    let script = "nproc; for i in 1 2 3 4; do \
                  (i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo $i) & done; wait";
    let done = sm(&[
        "run",
        "--rm",
        "--cpus",
        "4",
        &image("busybox"),
        "sh",
        "-c",
        script,
    ])
    .exits(0);
    assert_eq!(done.out(), "4\n20000\n20000\n20000\n20000\n");
}

#[test]
fn a_real_interpreter_runs_a_real_script() {
    let script = "import hashlib, threading\n\
                  out = {}\n\
                  def work(n): out[n] = hashlib.sha256(bytes(n) * 100000).hexdigest()[:8]\n\
                  ts = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]\n\
                  [t.start() for t in ts]; [t.join() for t in ts]\n\
                  print(sorted(out))";
    let done = sm(&[
        "run",
        "--rm",
        "--cpus",
        "2",
        &image("python"),
        "python3",
        "-c",
        script,
    ])
    .exits(0);
    assert_eq!(done.out(), "[1, 2, 3, 4]\n");
}

#[test]
fn vector_extensions_are_visible() {
    let done = sm(&["run", "--rm", &image("busybox"), "cat", "/proc/cpuinfo"]).exits(0);
    let text = done.out();
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap();
    for flag in ["xsave", "avx2"] {
        assert!(
            flags.split_whitespace().any(|f| f == flag),
            "{flag} in {flags}"
        );
    }
}

#[test]
fn memory_is_as_large_as_asked() {
    for (size, least, most) in [("64m", 20_000, 64 << 10), ("6g", 5_700_000, 6 << 20)] {
        let done = sm(&[
            "run",
            "--rm",
            "-m",
            size,
            &image("busybox"),
            "cat",
            "/proc/meminfo",
        ])
        .exits(0);
        let text = done.out();
        let total: u64 = text
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|kib| kib.parse().ok())
            .unwrap();
        assert!((least..=most).contains(&total), "{size}: {total} KiB");
    }
}

#[test]
fn layers_are_stacked_with_their_whiteouts() {
    // The layers are created in xtask/src/fixtures.rs.
    let script = "cat /etc/os-release; ls -A /opaque; cat /opaque/new; ls -A /usr/share/doc; \
                  cat /usr/share/doc/again/README; ls -d /second-layer /opaque/old; test -x /bin/bash";
    let done = sm(&["run", "--rm", &image("debian"), "sh", "-c", script]).exits(0);
    assert_eq!(
        done.out(),
        "ID=fixture\nnew\nvisible\nagain\nback\n",
        "{}",
        done.err()
    );
    for gone in ["/second-layer", "/opaque/old"] {
        assert!(done.err().contains(gone), "{}", done.err());
    }
}

#[test]
fn the_root_is_writable_and_forgotten() {
    let script = "echo x > /new && cat /new && rm -r /etc/passwd && ls /etc/passwd";
    let done = sm(&["run", "--rm", &image("debian"), "sh", "-c", script]).exits(2);
    assert_eq!(done.out(), "x\n");
    sm(&["run", "--rm", &image("debian"), "ls", "/etc/passwd"]).exits(0);
}

#[test]
fn the_usual_file_systems_are_there() {
    let script = "test -c /dev/null && test -d /dev/pts && test -d /dev/shm && test -r /proc/self/status \
                  && test -d /sys/fs/cgroup && echo w > /dev/shm/f && echo ok";
    let done = sm(&["run", "--rm", &image("busybox"), "sh", "-c", script]).exits(0);
    assert_eq!(done.out(), "ok\n");
}

#[test]
fn input_ends_when_ours_ends() {
    let arguments = ["run", "--rm", "-i", &image("busybox"), "wc", "-c"];
    let done = Home::shared().sm_with_input(&arguments, b"12345").exits(0);
    assert_eq!(done.out().trim(), "5");
    let done = sm(&["run", "--rm", &image("busybox"), "wc", "-c"]).exits(0);
    assert_eq!(done.out().trim(), "0", "without -i there is no input");
}

#[test]
fn a_terminal_is_one_and_has_our_size() {
    let vm = Home::shared().detached(&[&image("busybox"), "sleep", "1000"]);
    let done = Home::shared().sm(&[
        "exec",
        "-t",
        &vm.name,
        "sh",
        "-c",
        "test -t 1 && stty size && tty",
    ]);
    let out = done.exits(0).out();
    assert!(out.contains("/dev/pts/"), "{out:?}");
}

#[test]
fn an_interrupt_reaches_the_workload() {
    let script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done";
    let mut child = Home::shared()
        .foreground(&["run", "--rm", &image("busybox"), "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut seen = Vec::new();
    let mut byte = [0];
    while !seen.ends_with(b"ready\n") {
        assert_eq!(stdout.read(&mut byte).unwrap(), 1, "ended early");
        seen.push(byte[0]);
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "caught\n");
    assert_eq!(child.wait().unwrap().code(), Some(9));
}

#[test]
fn oom_of_a_workload_is_reported() {
    // The memory is written in small pieces: a large allocation could be refused.
    let script = "x = []\nwhile True: x.append(b'x' * (1 << 20))";
    let (home, name) = (Home::shared(), sm_e2e::unique("oom"));
    let image = image("python");
    let run = ["run", "--name", &name, "-m", "128m", &image];
    let run = [&run[..], &["python3", "-c", script]].concat();
    let done = home.sm(&run).exits(137);
    for words in ["ran out of memory", "--memory", "Killed process"] {
        assert!(done.err().contains(words), "no {words:?}: {}", done.err());
    }
    let state = home.sm(&["inspect", &name]).exits(0).json()[0]["state"].clone();
    assert_eq!(state["exit"]["oom_killed"], true, "{state}");
    assert_eq!(state["exit_code"], 137, "{state}");
    home.sm(&["rm", &name]).exits(0);
}

/// The command beside the workload is killed with the PID namespace of the workload, and
/// exits first.
#[test]
fn oom_of_a_workload_beside_a_command_is_reported() {
    let script = "import signal\n\
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n\
        print('ready', flush=True)\n\
        signal.sigwait([signal.SIGUSR1])\n\
        x = []\n\
        while True: x.append(b'x' * (1 << 20))";
    let (home, name) = (Home::shared(), sm_e2e::unique("oom"));
    let image = image("python");
    let run = ["run", "--name", &name, "-m", "128m", &image];
    let mut run = home.command(&[&run[..], &["python3", "-c", script]].concat());
    let mut run = Reaped(run.stderr(Stdio::null()).spawn().unwrap());
    let mut ready = BufReader::new(run.0.stdout.take().unwrap()).lines();
    assert_eq!(ready.next().unwrap().unwrap(), "ready");
    let mut beside = home.command(&["exec", &name, "sh", "-c", "echo here; exec sleep 10000"]);
    let mut beside = Reaped(beside.spawn().unwrap());
    let mut here = BufReader::new(beside.0.stdout.take().unwrap()).lines();
    assert_eq!(here.next().unwrap().unwrap(), "here");
    home.sm(&["kill", "-s", "USR1", &name]).exits(0);
    assert_eq!(run.0.wait().unwrap().code(), Some(137));
    assert_eq!(beside.0.wait().unwrap().code(), Some(137));
    let state = home.sm(&["inspect", &name]).exits(0).json()[0]["state"].clone();
    assert_eq!(state["exit"]["oom_killed"], true, "{state}");
    home.sm(&["rm", &name]).exits(0);
}

#[test]
fn limits_and_names_are_as_asked() {
    let script = "ulimit -n; ulimit -Hn; grep -w db /etc/hosts; cat /etc/resolv.conf; \
                  df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2; \
                  dd if=/dev/zero of=/four bs=1M count=4 2> /dev/null && echo four; \
                  dd if=/dev/zero of=/forty bs=1M count=40 2>&1 | grep -o 'No space'";
    let image = image("busybox");
    let limits = ["--ulimit", "nofile=100:200", "--shm-size", "1m"];
    let room = ["--root", "tmpfs", "--storage-opt", "size=8m"];
    // With a network, the name server of the guest is its gateway.
    let lonely = ["--network", "none"];
    let names = ["--add-host", "db:10.1.2.3", "--dns", "192.0.2.53"];
    let command = [image.as_str(), "sh", "-c", script];
    let run = [
        &["run", "--rm"],
        &limits[..],
        &room,
        &lonely,
        &names,
        &command,
    ]
    .concat();
    let done = sm(&run);
    let out = done.out();
    let expected = [
        "100",
        "200",
        "10.1.2.3\tdb",
        "nameserver 192.0.2.53",
        "1024",
        "four",
        "No space",
    ];
    assert_eq!(out.lines().collect::<Vec<_>>(), expected, "{}", done.err());
}

#[test]
fn a_read_only_root_is_not_written() {
    let script = "touch /x; echo > /etc/passwd; touch /dev/shm/x && echo shm; cat /etc/hostname";
    let image = image("debian");
    let run = ["run", "--rm", "--read-only", "--hostname", "box", &image];
    let done = sm(&[&run[..], &["sh", "-c", script]].concat()).exits(0);
    assert_eq!(done.out(), "shm\nbox\n");
    assert_eq!(done.err().matches("Read-only").count(), 2, "{}", done.err());
}

#[test]
fn the_stop_signal_is_as_asked() {
    let home = Home::shared();
    let script = "trap 'echo usr1; exit 3' USR1; trap 'echo term; exit 4' TERM; \
                  echo up; while :; do sleep 0.1; done";
    let image = image("busybox");
    let vm = home.detached(&["--stop-signal", "USR1", &image, "sh", "-c", script]);
    vm.until_it_says("up");
    home.sm(&["stop", "-t", "60", &vm.name]).exits(0);
    assert_eq!(vm.inspect()["state"]["exit_code"], 3);
    assert_eq!(home.sm(&["logs", &vm.name]).exits(0).out(), "up\nusr1\n");
}

#[test]
fn a_run_is_described_in_json() {
    let (home, name) = (Home::shared(), sm_e2e::unique("json"));
    let run = ["run", "--rm", "--json", "--name", &name, &image("busybox")];
    let done = home.sm(&[&run[..], &["sh", "-c", "exit 5"]].concat());
    let done = done.exits(5);
    let report: serde_json::Value = serde_json::from_slice(&done.stderr).unwrap();
    assert_eq!(report["name"], name.as_str());
    assert_eq!(report["id"].as_str().map(str::len), Some(64), "{report}");
    assert_eq!(report["exit"]["status"], 5);
    assert_eq!(report["exit"]["reason"], "workload");
    let timings = report["timings"].as_array().unwrap();
    assert_eq!(timings[0]["name"], "command started", "{report}");
    assert_eq!(timings.last().unwrap()["name"], "command ends", "{report}");

    let run = ["run", "-d", "--json", "--name", &name, &image("busybox")];
    let done = home.sm(&[&run[..], &["sleep", "1000"]].concat()).exits(0);
    assert_eq!(done.json()["name"], name.as_str());
    home.sm(&["rm", "-f", &name]).exits(0);
}

#[test]
fn the_stock_kernel_boots_too() {
    let kernel = std::env::var("SM_STOCK_KERNEL").expect("SM_STOCK_KERNEL is set");
    let done = sm(&[
        "run",
        "--rm",
        "--kernel",
        &kernel,
        &image("busybox"),
        "uname",
        "-r",
    ])
    .exits(0);
    assert!(
        done.out().contains("cloud") || done.out().contains("amd64"),
        "{}",
        done.out()
    );
}

#[test]
fn timings_name_every_phase() {
    let done = sm(&["run", "--rm", "--timings", &image("busybox"), "true"]).exits(0);
    for phase in ["agent", "exit"] {
        assert!(done.err().contains(phase), "no {phase} in\n{}", done.err());
    }
}

/// A system without this one's C library stands for other and older distributions.
#[test]
fn sm_runs_without_a_c_library() {
    let program = std::fs::read(binary()).unwrap();
    let script = "cat >/tmp/sm && chmod +x /tmp/sm && exec /tmp/sm --version";
    let image = image("busybox");
    let arguments = ["run", "--rm", "-i", &image, "sh", "-c", script];
    let there = Home::shared().sm_with_input(&arguments, &program).exits(0);
    assert_eq!(there.out(), sm(&["--version"]).exits(0).out());
}

#[test]
fn the_doctor_finds_nothing_wrong() {
    let found = sm(&["doctor", "--json"]).exits(0).json();
    assert_eq!(found["works"], true, "{found}");
    let checks = found["checks"].as_array().unwrap();
    let making = checks.iter().find(|check| check["name"] == "creating a VM");
    let detail = making.unwrap()["detail"].as_str().unwrap();
    assert!(detail.starts_with("takes "), "{detail}");
}

/// Bounding and effective capabilities are what `man 7 capabilities` numbers.
#[test]
fn capabilities_and_privileges_are_as_asked() {
    let image = image("busybox");
    let status = |options: &[&str]| {
        let script = "grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status | tr -d ' \\t'";
        let run = [
            &["run", "--rm", "-m", "128m"],
            options,
            &[&image, "sh", "-c", script],
        ];
        sm(&run.concat()).exits(0).out()
    };
    let sets = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        u64::from_str_radix(line.expect("a set").trim_start_matches(':'), 16).expect("hexadecimal")
    };
    let (chown, net_raw, sys_time) = (1u64 << 0, 1u64 << 13, 1u64 << 25);
    let all = status(&[]);
    // The guest is the workload's own: it has everything that its kernel has.
    assert_eq!(sets(&all, "CapEff") & sys_time, sys_time, "{all}");
    assert!(all.contains("NoNewPrivs:0"), "{all}");
    let fewer = status(&["--cap-drop", "NET_RAW", "--cap-drop", "cap_chown"]);
    for set in ["CapEff", "CapBnd"] {
        assert_eq!(sets(&fewer, set) & (chown | net_raw), 0, "{fewer}");
        assert_eq!(sets(&fewer, set), sets(&all, set) & !(chown | net_raw));
    }
    let one = status(&["--cap-drop", "all", "--cap-add", "SYS_TIME"]);
    assert_eq!(sets(&one, "CapEff"), sys_time, "{one}");
    let none = status(&["--security-opt", "no-new-privileges"]);
    assert!(none.contains("NoNewPrivs:1"), "{none}");
    // Dropped capabilities have no effect, for further commands of the VM too.
    let home = Home::shared();
    let vm = home.detached(&["-m", "128m", "--cap-drop", "all", &image, "sleep", "100000"]);
    vm.exec(&["sh", "-c", "touch /f && ! chown 1:1 /f 2>/dev/null"])
        .exits(0);
    let exec = ["exec", "--privileged", &vm.name, "chown", "1:1", "/f"];
    home.sm(&exec).exits(0);
    sm(&["run", "--rm", "--cap-drop", "FLY", &image, "true"]).exits(125);
}

#[test]
fn a_detached_command_continues_without_its_client() {
    let home = Home::shared();
    let vm = home.detached(&["-m", "128m", &image("busybox"), "sleep", "100000"]);
    let script = "sleep 1; echo continued > /done";
    let started = home
        .sm(&["exec", "-d", &vm.name, "sh", "-c", script])
        .exits(0);
    assert_eq!(started.out(), "");
    until("it has continued", || {
        vm.exec(&["cat", "/done"]).out() == "continued\n"
    });
    let missing = home.sm(&["exec", "-d", &vm.name, "no-such-program"]);
    assert_eq!(missing.code, Some(127), "{}", missing.err());
    // It ends with the VM.
    home.sm(&["exec", "-d", &vm.name, "sleep", "100000"])
        .exits(0);
    home.sm(&["stop", "-t", "1", &vm.name]).exits(0);
}
