//! Ports of the guest, accessed from the host.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use sha2::{Digest as _, Sha256};
use sm_e2e::{Home, TIMEOUT, Vm, image, unique};
use sm_frontends::HandoffSender;

/// Answers every connection to port 80 with its bytes, after their end.
const ECHO: &str = "nc -ll -p 80 -e cat";

/// Returns the host address of a published port.
fn address(home: &Home, vm: &str, port: &str) -> SocketAddr {
    let line = home.sm(&["port", vm, port]).exits(0).out();
    line.trim().parse().unwrap()
}

/// Sends bytes, ends the sending direction, and reads to the end of the stream.
fn exchange(mut stream: TcpStream, sent: &[u8]) -> Vec<u8> {
    let mut sender = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The reader detects a closed connection.
            let _ = sender.write_all(sent);
            let _ = sender.shutdown(Shutdown::Write);
        });
        let mut received = Vec::new();
        let _ = stream.read_to_end(&mut received);
        received
    })
}

fn serving<'a>(home: &'a Home, publish: &[&str], script: &str) -> Vm<'a> {
    let mut arguments = vec!["-m", "128m"];
    arguments.extend_from_slice(publish);
    let busybox = image("busybox");
    arguments.extend_from_slice(&[&busybox, "sh", "-c", script]);
    home.detached(&arguments)
}

/// Connects until the guest answers.
fn echo(address: SocketAddr, sent: &[u8]) -> Vec<u8> {
    let begun = Instant::now();
    loop {
        let received = exchange(TcpStream::connect(address).unwrap(), sent);
        if !received.is_empty() || begun.elapsed() > TIMEOUT {
            return received;
        }
    }
}

#[test]
fn bytes_go_both_ways_and_half_close_is_kept() {
    let home = Home::shared();
    let vm = serving(home, &["-p", "80"], ECHO);
    let address = address(home, &vm.name, "80");
    assert!(address.ip().is_loopback() && address.port() != 0);
    assert_eq!(echo(address, b"hello"), b"hello");
    let large: Vec<u8> = (0..5_000_000_u32).map(|n| (n % 253) as u8).collect();
    let received = exchange(TcpStream::connect(address).unwrap(), &large);
    assert_eq!(Sha256::digest(received), Sha256::digest(&large));
    // Concurrent connections are independent.
    std::thread::scope(|scope| {
        for n in 0..20_u8 {
            scope.spawn(move || {
                let sent = vec![n; 50_000];
                let begun = Instant::now();
                let received = exchange(TcpStream::connect(address).unwrap(), &sent);
                let (length, took) = (received.len(), begun.elapsed());
                assert!(received == sent, "{n}: {length} bytes came after {took:?}");
            });
        }
    });
    let table = home.sm(&["ps"]).exits(0).out();
    assert!(table.contains(&format!("{address}->80/tcp")), "{table}");
    let json = home.sm(&["port", "--json", &vm.name]).exits(0).json();
    assert_eq!(json[0]["guest"], 80);
    let error = home.sm(&["port", &vm.name, "81"]).exits(1).err();
    assert!(error.contains("not published"), "{error}");
    drop(vm);
    assert!(
        TcpStream::connect(address).is_err(),
        "the port is given back"
    );
}

#[test]
fn connections_wait_for_a_late_listener_and_close_without_one() {
    let home = Home::shared();
    let script = format!("sleep 0.5; {ECHO}");
    let vm = serving(home, &["-p", "80", "-p", "81"], &script);
    // The client connects before a server in the guest listens.
    assert_eq!(echo(address(home, &vm.name, "80"), b"early"), b"early");
    let nobody = TcpStream::connect(address(home, &vm.name, "81")).unwrap();
    assert_eq!(exchange(nobody, b"anybody?"), b"");
}

#[test]
fn the_first_listener_is_found_by_itself() {
    let home = Home::shared();
    let vm = serving(home, &["-p", "auto"], "nc -ll -p 4321 -e cat");
    let list = home.sm(&["port", &vm.name]).exits(0).out();
    let address = list.trim().strip_prefix("auto/tcp -> ").unwrap();
    assert_eq!(echo(address.parse().unwrap(), b"found"), b"found");
}

#[test]
fn a_unix_socket_is_private_and_removed_with_its_machine() {
    use std::os::unix::fs::PermissionsExt as _;
    let home = Home::shared();
    let path = home.run_dir().join(unique("socket"));
    let publish = format!("{}:80", path.display());
    let vm = serving(home, &["--publish-unix", &publish], ECHO);
    let mode = path.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let begun = Instant::now();
    let mut received = Vec::new();
    while received.is_empty() && begun.elapsed() < TIMEOUT {
        let mut stream = UnixStream::connect(&path).unwrap();
        // The reader detects a closed connection.
        let _ = stream.write_all(b"by path");
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_to_end(&mut received);
    }
    assert_eq!(received, b"by path");
    drop(vm);
    assert!(!path.exists());
}

#[test]
fn a_connection_is_handed_over_with_the_bytes_read_from_it() {
    let home = Home::shared();
    let path = home.run_dir().join(unique("handoff"));
    let handoff = format!("{}:80", path.display());
    let _vm = serving(home, &["--handoff", &handoff], ECHO);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let begun = Instant::now();
    loop {
        let mut client = TcpStream::connect(address).unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        client.write_all(b"GET ").unwrap();
        let mut read = [0; 4];
        accepted.read_exact(&mut read).unwrap();
        let mut router = HandoffSender::connect(&path).unwrap();
        router.send(&accepted, &read).unwrap();
        drop(accepted);
        let received = exchange(client, b"and the rest");
        if !received.is_empty() || begun.elapsed() > TIMEOUT {
            assert_eq!(received, b"GET and the rest");
            return;
        }
    }
}

/// Listens on vsock port 5000 and echoes, and connects to the host's port 6000.
const VSOCK: &str = "sub at { pack 'SSLLL', 40, 0, $_[0], $_[1], 0 } \
                     socket(S, 40, 1, 0) && bind(S, at(5000, 0xffffffff)) && listen(S, 5) or die $!; \
                     while (accept(C, S)) { socket(D, 40, 1, 0); connect(D, at(6000, 2)) or die $!; \
                     sysread(C, $b, 100); syswrite(D, $b); sysread(D, $b, 100); syswrite(C, $b); \
                     close C; close D }";

#[test]
fn vsock_ports_are_reached_both_ways_as_firecracker_has_it() {
    let home = Home::shared();
    let path = home.run_dir().join(unique("vsock"));
    let text = path.to_str().unwrap();
    let debian = image("debian");
    let arguments = [
        "-m",
        "192m",
        "--hybrid-vsock",
        text,
        &debian,
        "perl",
        "-e",
        VSOCK,
    ];
    let vm = home.detached(&arguments);
    let beside = UnixListener::bind(format!("{text}_6000")).unwrap();
    let begun = Instant::now();
    let mut client = loop {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"CONNECT 5000\n").unwrap();
        let mut answer = [0; 3];
        // The connection is closed while no server listens.
        if client.read_exact(&mut answer).is_ok() {
            assert_eq!(&answer, b"OK ");
            break client;
        }
        assert!(begun.elapsed() < TIMEOUT, "{:?}", vm.inspect());
    };
    // Reads the rest of the line.
    let mut byte = [0; 1];
    while byte != *b"\n" {
        client.read_exact(&mut byte).unwrap();
    }
    client.write_all(b"ping").unwrap();
    let (mut inside, _) = beside.accept().unwrap();
    let mut said = [0; 4];
    inside.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"ping");
    inside.write_all(b"pong").unwrap();
    client.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"pong");
}

#[test]
fn a_clone_publishes_ports_of_its_own() {
    let home = Home::shared();
    let vm = serving(home, &["-p", "80"], ECHO);
    let original = address(home, &vm.name, "80");
    assert_eq!(echo(original, b"original"), b"original");
    // A connection that is open at the snapshot ends in the clone only.
    let mut open = TcpStream::connect(original).unwrap();
    open.write_all(b"before ").unwrap();
    let name = unique("served");
    home.sm(&["snapshot", "create", &vm.name, &name]).exits(0);
    open.write_all(b"after").unwrap();
    assert_eq!(exchange(open, b""), b"before after");
    let clone = unique("clone");
    home.sm(&["run", "-d", "--name", &clone, "--from", &name, "-p", "80"])
        .exits(0);
    let other = address(home, &clone, "80");
    assert_ne!(other, original);
    assert_eq!(echo(other, b"clone"), b"clone");
    assert_eq!(echo(original, b"still"), b"still");
    home.sm(&["rm", "-f", &clone]).exits(0);
    home.sm(&["snapshot", "rm", &name]).exits(0);
}

#[test]
fn a_file_at_the_path_of_a_socket_is_not_replaced() {
    let home = Home::shared();
    let path = home.run_dir().join(unique("data"));
    std::fs::write(&path, "precious").unwrap();
    let place = path.to_str().unwrap();
    let published = format!("{place}:80");
    for options in [
        ["--publish-unix", &published],
        ["--handoff", &published],
        ["--hybrid-vsock", place],
    ] {
        let busybox = image("busybox");
        let mut arguments = vec!["run", "--rm"];
        arguments.extend_from_slice(&options);
        arguments.extend_from_slice(&[&busybox, "true"]);
        let error = home.sm(&arguments).exits(125).err();
        assert!(
            error.contains(place) && error.contains("not a socket"),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}

#[test]
fn ranges_are_published_and_shown_as_docker_does() {
    let home = Home::shared();
    let vm = serving(home, &["-p", "80-81/tcp", "-p", "82"], ECHO);
    let list = home.sm(&["port", &vm.name]).exits(0).out();
    let lines: Vec<_> = list.lines().collect();
    assert_eq!(lines.len(), 3, "{list}");
    for (line, port) in lines.iter().zip(80..) {
        let (guest, host) = line.split_once(" -> ").unwrap();
        assert_eq!(guest, format!("{port}/tcp"));
        let shown = home.sm(&["port", &vm.name, guest]).exits(0).out();
        assert_eq!(shown.trim(), host);
    }
    assert_eq!(
        echo(address(home, &vm.name, "80"), b"in a range"),
        b"in a range"
    );
    let error = home.sm(&["port", &vm.name, "80/udp"]).exits(1).err();
    assert!(error.contains("only TCP"), "{error}");
    let busybox = image("busybox");
    let refused = home.sm(&["run", "--rm", "-p", "53:53/udp", &busybox, "true"]);
    let error = refused.exits(125).err();
    assert!(
        error.contains("53:53/udp") && error.contains("only TCP"),
        "{error}"
    );
}

#[test]
fn a_port_in_use_is_reported() {
    let home = Home::shared();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let publish = format!("{}:80", address.port());
    let refused = home.sm(&["run", "--rm", "-p", &publish, &image("busybox"), "true"]);
    let error = refused.exits(125).err();
    assert!(
        error.contains(&address.to_string()) && error.contains("in use"),
        "{error}"
    );
    assert!(error.contains("another port"), "{error}");
    assert_eq!(home.sm(&["ps", "-aq", "--no-trunc"]).exits(0).err(), "");
}
