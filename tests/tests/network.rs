//! The network of guests: what they reach, what is refused, and what clones have in common.
//!
//! Servers are on the host of the test, which a guest reaches only by rules about it.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use serde_json::Value;
use sm_e2e::{Home, TIMEOUT, Vm, image, unique, until};

/// Answers requests of HTTP with these bytes, as long as the test lives.
fn serve(body: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = answer(stream, body);
        }
    });
    address
}

fn answer(mut stream: TcpStream, body: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    while lines
        .next()
        .transpose()?
        .is_some_and(|line| !line.is_empty())
    {}
    let length = body.len();
    write!(
        stream,
        "HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

/// Returns the events of a kind that the network of a VM has logged.
fn events(home: &Home, vm: &str, kind: &str) -> Vec<Value> {
    let lines = home.sm(&["logs", "--net", vm]).exits(0).out();
    let lines = lines.lines();
    let lines = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["event"] == kind).collect()
}

fn idle<'a>(home: &'a Home, options: &[&str]) -> Vm<'a> {
    let busybox = image("busybox");
    home.detached(&[options, &["-m", "128m", &busybox, "sleep", "3600"]].concat())
}

#[test]
fn a_guest_reaches_the_host_by_a_rule() {
    let home = Home::shared();
    let port = serve("from the host\n").port();
    let rule = format!("tcp:host:{port}");
    let url = format!("http://host.docker.internal:{port}/");
    let busybox = image("busybox");
    let run = ["run", "--rm", "-m", "128m", "--allow-net", &rule, &busybox];
    let done = home.sm(&[&run[..], &["wget", "-q", "-O", "-", &url]].concat());
    assert_eq!(done.exits(0).out(), "from the host\n");

    let vm = idle(
        home,
        &[
            "--net",
            "bridge",
            "--allow-net",
            &rule,
            "--add-host",
            "me:host-gateway",
        ],
    );
    let url = format!("http://me:{port}/");
    let done = vm.exec(&["wget", "-q", "-O", "-", &url]).exits(0);
    assert_eq!(done.out(), "from the host\n");
    let shown = vm.inspect();
    assert_eq!(shown["HostConfig"]["NetworkMode"], "user");
    assert_eq!(shown["network"]["allow"], serde_json::json!([rule]));
    assert_eq!(events(home, &vm.name, "refused"), [Value::Null; 0]);
    let ended = events(home, &vm.name, "ended");
    assert_eq!(ended.len(), 1, "{ended:?}");
    assert_eq!(
        (&ended[0]["end"], &ended[0]["rule"]),
        (&"closed".into(), &rule.into())
    );
    assert!(ended[0]["to_guest"].as_u64() > Some(14), "{ended:?}");
}

#[test]
fn what_is_refused_is_logged_with_the_rule_that_would_allow_it() {
    let home = Home::shared();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let vm = idle(home, &[]);
    for host in ["host.sm.internal", "169.254.169.254"] {
        let url = format!("http://{host}:{port}/");
        let done = vm.exec(&["wget", "-O", "-", &url]).exits(1);
        // Not a time-out, and not a refusal by the host.
        let text = done.err();
        assert!(
            text.contains("Host is unreachable") || text.contains("No route to host"),
            "{text}"
        );
    }
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    let refusals = events(home, &vm.name, "refused");
    let allow: Vec<_> = refusals
        .iter()
        .map(|line| line["allow"].as_str().unwrap())
        .collect();
    assert_eq!(
        allow,
        [format!("tcp:host:{port}"), format!("tcp:metadata:{port}")]
    );
    // The rule that it names is one.
    home.sm(&[
        "create",
        "--rm",
        "--allow-net",
        &allow.join(","),
        &image("busybox"),
    ])
    .exits(0);
}

#[test]
fn without_a_network_there_is_only_the_loopback_interface() {
    let home = Home::shared();
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let vm = idle(home, &["--network", "none", "--allow-net", "all"]);
    let interfaces = vm.exec(&["ls", "/sys/class/net"]).exits(0).out();
    assert_eq!(interfaces, "lo\n");
    for host in ["100.96.0.1", "192.0.2.1"] {
        let url = format!("http://{host}:{port}/");
        let text = vm.exec(&["wget", "-O", "-", &url]).exits(1).err();
        assert!(text.contains("Network is unreachable"), "{text}");
    }
    let names = vm.exec(&["nslookup", "example.com"]).code;
    assert_ne!(names, Some(0));
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    let shown = vm.inspect();
    assert_eq!(shown["HostConfig"]["NetworkMode"], "none");
}

/// Answers questions for addresses of IPv4 with one.
fn name_server(address: &str) {
    let socket = UdpSocket::bind(address).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let question = &buffer[..len];
            let Some(end) = question
                .get(12..)
                .and_then(|it| it.iter().position(|byte| *byte == 0))
            else {
                continue;
            };
            // The name, its type and its class.
            let asked = &question[12..12 + end + 5];
            let is_v4 = asked[end + 1..end + 3] == [0, 1];
            let mut answer = question[..2].to_vec();
            answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_v4), 0, 0, 0, 0]);
            answer.extend(asked);
            if is_v4 {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 55]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
}

#[test]
fn names_are_answered_by_the_name_server_that_was_chosen() {
    let home = Home::shared();
    name_server("127.0.0.77:53");
    let options = [
        "--dns",
        "127.0.0.77",
        "--dns-search",
        "sm.example",
        "--dns-option",
        "ndots:2",
    ];
    let vm = idle(home, &options);
    let resolv_conf = vm.exec(&["cat", "/etc/resolv.conf"]).exits(0).out();
    assert!(resolv_conf.contains("search sm.example"), "{resolv_conf}");
    assert!(resolv_conf.contains("ndots:2"), "{resolv_conf}");
    assert!(
        !resolv_conf.contains("127.0.0.77"),
        "the gateway asks it: {resolv_conf}"
    );
    let answer = vm.exec(&["nslookup", "www.example.com"]).out();
    assert!(answer.contains("192.0.2.55"), "{answer}");
}

fn mac(vm: &Vm<'_>) -> String {
    let path = "/sys/class/net/eth0/address";
    vm.exec(&["cat", path]).exits(0).out().trim().to_owned()
}

#[test]
fn a_connection_ends_in_clones_and_continues_in_the_original() {
    let home = Home::shared();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let rule = format!("tcp:host:{port}");
    let script = format!("echo begun; nc host.sm.internal {port}; echo ended; sleep 3600");
    let busybox = image("busybox");
    let options = [
        "-m",
        "128m",
        "--allow-net",
        &rule,
        &busybox,
        "sh",
        "-c",
        &script,
    ];
    let original = home.detached(&options);
    let (mut stream, _) = listener.accept().unwrap();
    original.until_it_says("begun");
    stream.write_all(b"one\n").unwrap();
    original.until_it_says("one");

    let name = unique("connected");
    home.sm(&["snapshot", "create", &original.name, &name])
        .exits(0);
    let clones = ["a", "b", "c"].map(|prefix| home.clone_of(&name, prefix));
    for clone in &clones {
        clone.until_it_says("ended");
        assert_eq!(clone.inspect()["network"]["allow"][0], rule.as_str());
    }
    let mut macs: Vec<_> = clones.iter().chain([&original]).map(mac).collect();
    macs.sort_unstable();
    macs.dedup();
    assert_eq!(macs.len(), 4, "{macs:?}");
    // Only the original has the connection.
    stream.write_all(b"two\n").unwrap();
    original.until_it_says("two");
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);

    // A clone has a network of its own: another kind, if the options say so.
    let lonely = home.clone_with(&name, "lonely", &["--network", "none"]);
    let interfaces = lonely.exec(&["ls", "/sys/class/net"]).exits(0).out();
    assert_eq!(interfaces, "lo\n");
    lonely.until_it_says("ended");

    // A reset is a restore in place.
    home.sm(&["reset", &clones[0].name]).exits(0);
    assert!(!macs[..].contains(&String::new()));
    until("the clone's connection ends again", || {
        let logs = home.sm(&["logs", &clones[0].name]).exits(0).out();
        logs.matches("ended").count() == 2
    });
    drop((clones, lonely));
    drop(stream);
    original.until_it_says("ended");
    home.sm(&["snapshot", "rm", &name]).exits(0);
}

#[test]
fn rules_of_a_running_guest_are_replaced() {
    let home = Home::shared();
    let port = serve("now\n").port();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let held = listener.local_addr().unwrap().port();
    let rule = format!("tcp:host:{held}");
    let script = format!("nc host.sm.internal {held}; echo ended; sleep 3600");
    let busybox = image("busybox");
    let options = [
        "-m",
        "128m",
        "--allow-net",
        &rule,
        &busybox,
        "sh",
        "-c",
        &script,
    ];
    let vm = home.detached(&options);
    let (_held, _) = listener.accept().unwrap();
    let url = format!("http://host.sm.internal:{port}/");
    let wget = ["wget", "-q", "-O", "-", &url];
    vm.exec(&wget).exits(1);
    let rule = format!("tcp:host:{port}");
    home.sm(&["update", "--allow-net", &rule, &vm.name])
        .exits(0);
    assert_eq!(vm.exec(&wget).exits(0).out(), "now\n");
    // The connection that is not allowed any more.
    vm.until_it_says("ended");
    assert_eq!(vm.inspect()["network"]["allow"], serde_json::json!([rule]));
    home.sm(&["update", "--clear-net", &vm.name]).exits(0);
    vm.exec(&wget).exits(1);
}

/// Bytes of a file go through the network unchanged, in both directions at once.
#[test]
fn many_bytes_go_both_ways() {
    let home = Home::shared();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let rule = format!("tcp:host:{port}");
    let directory = tempfile::tempdir().unwrap();
    let pcap = directory.path().join("packets");
    let written = pcap.to_str().unwrap();
    let options = [
        "--allow-net",
        &rule,
        "--mtu",
        "9000",
        "--net-rate",
        "1g",
        "--pcap",
        written,
    ];
    let vm = idle(home, &options);
    let mtu = vm.exec(&["cat", "/sys/class/net/eth0/mtu"]).exits(0).out();
    assert_eq!(mtu.trim(), "9000");
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let (mut total, mut buffer) = (0, vec![0; 1 << 16]);
        loop {
            let count = stream.read(&mut buffer).unwrap();
            if count == 0 {
                return total;
            }
            stream.write_all(&buffer[..count]).unwrap();
            total += count;
        }
    });
    // The end of input is sent, and all that comes back is counted.
    let script = format!(
        "head -c 20000000 /dev/urandom > /tmp/sent; \
         nc host.sm.internal {port} < /tmp/sent > /tmp/received; cmp /tmp/sent /tmp/received"
    );
    vm.exec(&["sh", "-c", &script]).exits(0);
    assert_eq!(echo.join().unwrap(), 20_000_000);
    drop(vm);
    // Both directions, with headers.
    assert!(std::fs::metadata(&pcap).unwrap().len() > 40_000_000);
}
