//! Thousands of streams, and streams of gigabytes, between host and guest: no byte is
//! lost, whichever side ends first.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use sm_e2e::{Home, Reaped, TIMEOUT, Vm, binary, image, lanes, unique, until};

/// Answers every connection to port 80 with its bytes, after their end.
const ECHO: &str = "nc -ll -p 80 -e cat";

fn serving<'a>(home: &'a Home, options: &[&str], script: &str) -> Vm<'a> {
    let busybox = image("busybox");
    let mut arguments = vec!["-m", "192m"];
    arguments.extend_from_slice(options);
    arguments.extend_from_slice(&[&busybox, "sh", "-c", script]);
    home.detached(&arguments)
}

/// Returns the host address of a published port.
fn address(home: &Home, vm: &str, port: &str) -> SocketAddr {
    let line = home.sm(&["port", vm, port]).exits(0).out();
    line.trim().parse().unwrap()
}

/// Returns the counters of a port's connections.
fn connections(vm: &Vm<'_>) -> serde_json::Value {
    vm.inspect()["state"]["published"][0]["connections"].clone()
}

/// A connection to the echo server.
struct Echo(TcpStream);

impl Echo {
    fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        Self(stream)
    }

    /// Sends bytes and receives them back.
    fn says(&mut self, sent: &[u8]) -> std::io::Result<()> {
        self.0.write_all(sent)?;
        let mut received = vec![0; sent.len()];
        self.0.read_exact(&mut received)?;
        assert!(received == sent);
        Ok(())
    }
}

/// Returns the MiB sent each way by [`a_large_stream_arrives_whole_each_way`].
fn large() -> u64 {
    let asked = std::env::var("SM_TEST_STREAM_MIB");
    asked.map_or(96, |text| text.parse().expect("a number of MiB"))
}

#[test]
fn a_large_stream_arrives_whole_each_way() {
    const BLOCK: u64 = 8;
    let home = Home::shared();
    let count = large() / BLOCK;
    let blocks = format!("i=0; while [ $i -lt {count} ]; do cat /block; i=$((i+1)); done");
    let script = format!(
        "head -c {BLOCK}m /dev/urandom > /block
         (nc -l -p 80 | sha256sum > /sum; mv /sum /received) &
         ({blocks}) | nc -l -p 81 &
         wait"
    );
    let vm = serving(
        home,
        &["-p", "80", "-p", "81", "--publish-wait", "60s"],
        &script,
    );
    // Direction to the guest.
    let begun = Instant::now();
    let mut to_guest = TcpStream::connect(address(home, &vm.name, "80")).unwrap();
    let block: Vec<u8> = (0..251_u8).cycle().take(1 << 20).collect();
    let mut sum = Sha256::new();
    for _ in 0..count * BLOCK {
        to_guest.write_all(&block).unwrap();
        sum.update(&block);
    }
    to_guest.shutdown(Shutdown::Write).unwrap();
    until("the guest has got everything", || {
        vm.exec(&["test", "-e", "/received"]).code == Some(0)
    });
    let received = vm.exec(&["cat", "/received"]).exits(0).out();
    assert!(received.starts_with(&hex(sum)), "{received}");
    println!("{} MiB to the guest in {:?}", large(), begun.elapsed());
    // Direction from the guest.
    let summed = format!("({blocks}) | sha256sum");
    let sent = vm.exec(&["sh", "-c", &summed]).exits(0).out();
    let begun = Instant::now();
    let mut from_guest = TcpStream::connect(address(home, &vm.name, "81")).unwrap();
    let (mut sum, mut len) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from_guest.read(&mut buffer).unwrap() {
            0 => break,
            count => {
                sum.update(&buffer[..count]);
                len += count as u64;
            }
        }
    }
    assert_eq!(len, (count * BLOCK) << 20);
    assert!(sent.starts_with(&hex(sum)), "{sent}");
    println!("{} MiB from the guest in {:?}", large(), begun.elapsed());
}

fn hex(sum: Sha256) -> String {
    let digest = sum.finalize();
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_listener_is_waited_for_as_long_as_was_asked() {
    let home = Home::shared();
    let script = format!("until [ -e /go ]; do sleep 0.1; done; {ECHO}");
    let vm = serving(home, &["-p", "80", "--publish-wait", "10m"], &script);
    let mut early = Echo::open(address(home, &vm.name, "80"));
    early.0.write_all(b"early").unwrap();
    // The wait exceeds the default of one second.
    early
        .0
        .set_read_timeout(Some(Duration::from_secs(3)))
        .unwrap();
    let nothing = early.0.read(&mut [0; 1]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    assert_eq!(connections(&vm)["active"], 1);
    vm.exec(&["touch", "/go"]).exits(0);
    early.0.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut said = [0; 5];
    early.0.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"early");
}

#[test]
fn a_port_without_a_listener_or_with_a_closed_one_ends_the_connection() {
    let home = Home::shared();
    // The server accepts one connection only.
    let script = "nc -l -p 80 -e cat; touch /over; sleep 1000";
    let options = ["-p", "80", "-p", "81", "--publish-wait", "0"];
    let vm = serving(home, &options, script);
    let gone = |port: &str| {
        let mut stream = TcpStream::connect(address(home, &vm.name, port)).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        matches!(stream.read(&mut [0; 1]), Ok(0))
    };
    assert!(gone("81"));
    let mut served = None;
    until("the guest listens", || {
        let mut echo = Echo::open(address(home, &vm.name, "80"));
        let answered = echo.says(b"once").is_ok();
        served = Some(echo);
        answered
    });
    served.unwrap().0.shutdown(Shutdown::Write).unwrap();
    until("the server has closed", || {
        vm.exec(&["test", "-e", "/over"]).code == Some(0)
    });
    let before = connections(&vm)["unanswered"].as_u64().unwrap();
    assert!(gone("80"));
    assert_eq!(connections(&vm)["unanswered"], before + 1);
}

#[test]
fn a_hundred_sessions_at_once_keep_apart() {
    let home = Home::shared();
    let vm = serving(home, &[], "sleep 1000");
    let script = "echo ready; read x; echo got $x; exit 3";
    let mut sessions: Vec<_> = (0..100)
        .map(|_| {
            let arguments = ["exec", "-i", &vm.name, "sh", "-c", script];
            let session = home.command(&arguments).stdin(Stdio::piped()).spawn();
            Reaped(session.unwrap())
        })
        .collect();
    // All sessions are started before any of them continues.
    for Reaped(session) in &mut sessions {
        let mut ready = [0; 6];
        session
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut ready)
            .unwrap();
        assert_eq!(&ready, b"ready\n");
    }
    for (n, Reaped(session)) in sessions.iter_mut().enumerate() {
        let mut stdin = session.stdin.take().unwrap();
        writeln!(stdin, "{n}").unwrap();
    }
    for (n, Reaped(session)) in sessions.iter_mut().enumerate() {
        let mut said = String::new();
        let stdout = session.stdout.as_mut().unwrap();
        stdout.read_to_string(&mut said).unwrap();
        assert_eq!(said, format!("got {n}\n"));
        assert_eq!(session.wait().unwrap().code(), Some(3));
    }
}

#[test]
fn a_hundred_connections_end_in_a_clone_and_go_on_in_the_original() {
    let home = Home::shared();
    let vm = serving(home, &["-p", "80", "--publish-wait", "60s"], ECHO);
    let original = address(home, &vm.name, "80");
    let mut open: Vec<_> = (0..100).map(|_| Echo::open(original)).collect();
    for echo in &mut open {
        echo.says(b"before").unwrap();
    }
    let name = unique("hundred");
    home.sm(&["snapshot", "create", &vm.name, &name]).exits(0);
    for echo in &mut open {
        echo.says(b"after").unwrap();
    }
    let clone = unique("clone");
    home.sm(&["run", "-d", "--name", &clone, "--from", &name, "-p", "80"])
        .exits(0);
    // The servers in the clone detect that their clients are gone, and exit.
    let serving = ["exec", &clone, "sh", "-c", "pidof cat | wc -w"];
    until("the clone's connections end", || {
        home.sm(&serving).out().trim() == "0"
    });
    let mut fresh = Echo::open(address(home, &clone, "80"));
    fresh.says(b"a clone's own").unwrap();
    for echo in &mut open {
        echo.says(b"still").unwrap();
    }
    home.sm(&["rm", "-f", &clone]).exits(0);
    home.sm(&["snapshot", "rm", &name]).exits(0);
}

#[test]
fn the_last_bytes_of_a_workload_arrive() {
    let home = Home::shared();
    // The workload exits with its only connection.
    let script = "nc -l -p 80 -e head -c 200000 /dev/zero";
    for _ in 0..3 {
        let vm = serving(home, &["-p", "80", "--publish-wait", "60s"], script);
        let mut client = TcpStream::connect(address(home, &vm.name, "80")).unwrap();
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        assert_eq!(said.len(), 200_000);
        assert_eq!(vm.wait()["state"]["exit_code"], 0);
    }
}

#[test]
fn stopping_closes_the_ports_and_lets_connections_end() {
    let home = Home::shared();
    let script = format!(
        "trap 'touch /stopping' TERM
         {ECHO} &
         while ! [ -e /done ]; do sleep 0.1; done"
    );
    let vm = serving(home, &["-p", "80", "--publish-wait", "60s"], &script);
    let address = address(home, &vm.name, "80");
    let mut open = Echo::open(address);
    open.says(b"before").unwrap();
    let mut stopping = Reaped(
        home.command(&["stop", "-t", "100", &vm.name])
            .spawn()
            .unwrap(),
    );
    until("the port is closed", || {
        TcpStream::connect(address).is_err()
    });
    until("the workload is asked", || {
        vm.exec(&["test", "-e", "/stopping"]).code == Some(0)
    });
    open.says(b"during").unwrap();
    vm.exec(&["touch", "/done"]).exits(0);
    assert!(stopping.0.wait().unwrap().success());
    assert!(matches!(open.0.read(&mut [0; 1]), Ok(0) | Err(_)));
    assert_eq!(vm.inspect()["state"]["exit_code"], 0);
}

#[test]
fn a_vm_with_few_descriptors_can_still_be_entered() {
    let home = Home::shared();
    let program = lanes();
    let image = format!("rootfs:{}", program.path().display());
    let name = unique("few");
    // Both limits are set: the soft limit alone would be raised.
    let run = "ulimit -n 700; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", run, "sh"]).arg(binary());
    command.args(["run", "-d", "--name", &name, "-m", "192m", "-p", "80"]);
    command.args(["--publish-wait", "60s", &image, "/lanes", "echo", "80"]);
    let started = command
        .env("XDG_DATA_HOME", home.data())
        .env("XDG_RUNTIME_DIR", home.run_dir())
        .output()
        .unwrap();
    assert!(started.status.success(), "{started:?}");
    let address = address(home, &name, "80");
    let mut clients: Vec<_> = (0..300).map(|_| Echo::open(address)).collect();
    clients[0].says(b"among the first").unwrap();
    // There are more clients than descriptors: the others wait, and everything else
    // works.
    let port = || home.sm(&["inspect", &name]).exits(0).json()[0]["state"]["published"][0].clone();
    until("there is no more room", || {
        let active = port()["connections"]["active"].as_u64();
        active.is_some_and(|active| (100..300).contains(&active))
    });
    home.sm(&["exec", &name, "/lanes", "true"]).exits(0);
    let snapshot = unique("few");
    home.sm(&["snapshot", "create", &name, &snapshot]).exits(0);
    assert_eq!(port()["connections"]["refused"], 0);
    // Each client is served in turn.
    for mut client in clients.drain(..) {
        client.says(b"in turn").unwrap();
    }
    home.sm(&["rm", "-f", &name]).exits(0);
    home.sm(&["snapshot", "rm", &snapshot]).exits(0);
}

#[test]
fn a_low_soft_limit_is_raised() {
    let home = Home::shared();
    let busybox = image("busybox");
    let name = unique("soft");
    let run = "ulimit -Sn 64; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", run, "sh"]).arg(binary());
    command.args([
        "run", "-d", "--name", &name, "-m", "192m", &busybox, "sleep", "1000",
    ]);
    let started = command
        .env("XDG_DATA_HOME", home.data())
        .env("XDG_RUNTIME_DIR", home.run_dir())
        .output()
        .unwrap();
    assert!(started.status.success(), "{started:?}");
    let pid = home.sm(&["inspect", &name]).exits(0).json()[0]["state"]["pid"].clone();
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let mut words = line.unwrap().split_whitespace().skip(3);
    assert_eq!(words.next(), words.next(), "{limits}");
    home.sm(&["rm", "-f", &name]).exits(0);
}
