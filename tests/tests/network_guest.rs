//! The guest's side of its network: addresses, routes and names, and what programs do with
//! sockets.
//!
//! Tests that need addresses and routes of the host are run in a network namespace of their
//! own, by another process of this program.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use sm_e2e::{Home, TIMEOUT, Vm, image, unique};

/// Environment variable of a process in a namespace of its own.
const INSIDE: &str = "SM_TEST_NAMESPACE";

/// The host's addresses in such a namespace. Connections to 203.0.113.0/24 are never answered,
/// those to 198.51.100.0/24 and `2001:db8:dead::/48` fail at once.
const NAMESPACE: [&str; 8] = [
    "link set lo up",
    "addr add 192.0.2.1/32 dev lo",
    "addr add 2001:db8::1/128 dev lo",
    "route add 203.0.113.0/24 dev lo",
    "route add unreachable 198.51.100.0/24",
    "route add default dev lo",
    "-6 route add default dev lo",
    "-6 route add unreachable 2001:db8:dead::/48",
];

/// The name server of a namespace.
const NAME_SERVER: &str = "127.0.0.77";
/// A name with an address that nothing answers for and one of the host.
const DUAL: &str = "dual.example";

/// Returns true in a process that is in a namespace of its own. Otherwise runs the test `name`
/// in such a process.
fn in_namespace(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        for command in NAMESPACE {
            let status = Command::new("ip").args(command.split(' ')).status();
            assert!(status.unwrap().success(), "ip {command}");
        }
        return true;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it takes root to make a network namespace");
        return false;
    }
    let mut unshare = Command::new("unshare");
    unshare
        .args(["--net", "--"])
        .arg(std::env::current_exe().unwrap());
    unshare
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1");
    assert!(unshare.status().unwrap().success(), "{name} in a namespace");
    false
}

fn idle<'a>(home: &'a Home, image: &str, options: &[&str]) -> Vm<'a> {
    home.detached(&[options, &[image, "sleep", "36000"]].concat())
}

#[track_caller]
fn shell(vm: &Vm<'_>, script: &str) -> String {
    vm.exec(&["sh", "-c", script]).exits(0).out()
}

/// Returns the addresses of an interface, with their prefixes.
fn addresses(vm: &Vm<'_>, interface: &str) -> Vec<String> {
    let text = shell(vm, &format!("ip -o addr show dev {interface}"));
    assert!(!text.contains("tentative"), "{text}");
    let words = |line: &str| line.split_whitespace().nth(3).map(str::to_owned);
    text.lines().filter_map(words).collect()
}

/// Returns the gateway of IPv4, and the interface to it.
fn gateway(vm: &Vm<'_>) -> (Ipv4Addr, String) {
    let text = shell(vm, "ip route | grep ^default");
    let words: Vec<_> = text.split_whitespace().collect();
    let ["default", "via", gateway, "dev", interface, ..] = words.as_slice() else {
        panic!("{text}");
    };
    (gateway.parse().unwrap(), (*interface).to_owned())
}

fn mac(vm: &Vm<'_>, interface: &str) -> String {
    shell(vm, &format!("cat /sys/class/net/{interface}/address"))
}

#[test]
fn addresses_and_names_are_those_of_the_network() {
    let home = Home::shared();
    let vm = idle(
        home,
        &image("busybox"),
        &["-m", "128m", "--hostname", "box"],
    );
    let (gateway, interface) = gateway(&vm);
    assert_eq!(interface, "eth0");
    let own = Ipv4Addr::from_bits(gateway.to_bits() + 1);
    assert_eq!(addresses(&vm, "eth0")[0], format!("{own}/30"));
    let neighbours = shell(&vm, "ip neigh show");
    assert!(neighbours.contains("PERMANENT"), "{neighbours}");
    let resolv_conf = shell(&vm, "cat /etc/resolv.conf");
    assert!(
        resolv_conf.starts_with(&format!("nameserver {gateway}\n")),
        "{resolv_conf}"
    );
    let hosts = shell(&vm, "cat /etc/hosts");
    for line in ["127.0.0.1\tlocalhost", "::1\tlocalhost", "127.0.1.1\tbox"] {
        assert!(hosts.contains(line), "{line}: {hosts}");
    }
    assert!(hosts.contains(&format!("{gateway}\thost.")), "{hosts}");
    shell(
        &vm,
        &format!("ping -c 2 {gateway} && ping -c 1 host.sm.internal"),
    );
    // Any user may.
    let ranges = shell(&vm, "cat /proc/sys/net/ipv4/ping_group_range");
    assert_eq!(
        ranges.split_whitespace().collect::<Vec<_>>(),
        ["0", "2147483647"]
    );
    // The kernel accepts nothing that others announce.
    let settings = "cd /proc/sys/net/ipv6/conf/eth0; cat accept_ra autoconf";
    assert_eq!(shell(&vm, settings), "0\n0\n");
}

/// A clone's network is complete, no matter what the workload did to its own before.
#[test]
fn changes_of_a_workload_do_not_reach_its_clones() {
    let home = Home::shared();
    let scripts = [
        "ip link set eth0 down; ip link set eth0 name wan; ip link set wan up; \
         ip addr add 10.1.1.1/8 dev wan; ip route add default via 10.9.9.9 dev wan",
        // Only privileged processes can do this.
        "cd /sys/bus/virtio/drivers/virtio_net; for device in virtio*; do \
         echo $device > unbind; done; ! test -e /sys/class/net/eth0",
        "unshare -n sleep 3600 & sleep 1; ip link set eth0 netns $!; \
         ! test -e /sys/class/net/eth0",
    ];
    let mut macs = Vec::new();
    for script in scripts {
        let busybox = image("busybox");
        let vm = idle(home, &busybox, &["-m", "128m", "--privileged"]);
        let (expected, gateway) = (addresses(&vm, "eth0"), gateway(&vm).0);
        macs.push(mac(&vm, "eth0"));
        let changes = ["exec", "-d", &vm.name, "sh", "-c"];
        let script = format!("{script}; echo \"changed $?\" > /changed; sleep 3600");
        home.sm(&[&changes[..], &[&script]].concat()).exits(0);
        sm_e2e::until("the network is changed", || {
            vm.exec(&["cat", "/changed"]).out() == "changed 0\n"
        });
        let name = unique("changed");
        home.sm(&["snapshot", "create", &vm.name, &name]).exits(0);
        let clone = home.clone_of(&name, "clone");
        for again in [false, true] {
            if again {
                home.sm(&["reset", &clone.name]).exits(0);
            }
            let (found, interface) = self::gateway(&clone);
            assert_eq!(found, gateway, "{script}");
            assert_eq!(addresses(&clone, &interface), expected, "{script}");
            macs.push(mac(&clone, &interface));
            shell(&clone, &format!("ping -c 1 {gateway}"));
        }
        drop((vm, clone));
        home.sm(&["snapshot", "rm", &name]).exits(0);
    }
    let count = macs.len();
    macs.sort_unstable();
    macs.dedup();
    assert_eq!(macs.len(), count, "{macs:?}");
}

/// Answers requests of HTTP with `body`, as long as the test lives.
fn serve(address: IpAddr, body: &'static str) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let length = body.len();
            let _ = write!(
                stream,
                "HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n{body}"
            );
        }
    });
    port
}

/// Answers questions for the addresses of [`DUAL`], as long as the test lives.
fn name_server() {
    let socket = UdpSocket::bind((NAME_SERVER, 53)).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            if let Some(answer) = buffer.get(..length).and_then(name_answer) {
                let _ = socket.send_to(&answer, from);
            }
        }
    });
}

fn name_answer(question: &[u8]) -> Option<Vec<u8>> {
    let end = question.get(12..)?.iter().position(|byte| *byte == 0)?;
    // The name, its type and its class.
    let asked = question.get(12..12 + end + 5)?;
    let (record, address): (u8, Vec<u8>) = match asked.get(end + 1..end + 3)? {
        [0, 1] => (1, Ipv4Addr::new(192, 0, 2, 1).octets().into()),
        [0, 28] => (
            28,
            "2001:db8:dead::1".parse::<Ipv6Addr>().ok()?.octets().into(),
        ),
        _ => (0, Vec::new()),
    };
    let is_known = record != 0
        && asked
            .get(..end)?
            .eq_ignore_ascii_case(b"\x04dual\x07example");
    let mut answer = question.get(..2)?.to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_known), 0, 0, 0, 0]);
    answer.extend(asked);
    if is_known {
        let length = u8::try_from(address.len()).ok()?;
        answer.extend([0xc0, 12, 0, record, 0, 1, 0, 0, 0, 60, 0, length]);
        answer.extend(address);
    }
    Some(answer)
}

/// The options of guests that may reach everything in a namespace.
const ALL: [&str; 6] = ["-m", "192m", "--allow-net", "all", "--dns", NAME_SERVER];

#[test]
fn both_families_work_at_once() {
    if !in_namespace("both_families_work_at_once") {
        return;
    }
    let home = Home::new();
    let port_v6 = serve("2001:db8::1".parse().unwrap(), "by six\n");
    let port = serve("192.0.2.1".parse().unwrap(), "by four\n");
    // The first command of the guest uses addresses that it has just got.
    let script = format!(
        "wget -q -O - http://[2001:db8::1]:{port_v6}/; ip -o -6 addr show dev eth0; \
         ip -6 route show default"
    );
    let busybox = image("busybox");
    let run = [&["run", "--rm"], &ALL[..], &[&busybox, "sh", "-c", &script]].concat();
    for _ in 0..2 {
        let text = home.sm(&run).exits(0).out();
        assert!(text.starts_with("by six\n"), "{text}");
        assert!(
            text.contains(" scope global ") && text.contains(" scope link "),
            "{text}"
        );
        assert!(!text.contains("tentative"), "{text}");
        assert!(text.contains("default via fd"), "{text}");
    }
    let vm = idle(&home, &busybox, &ALL);
    let gateway = shell(&vm, "ip -6 route show default | cut -d ' ' -f 3");
    shell(&vm, &format!("ping -6 -c 2 {gateway}"));
    // A system may switch it off, and is left so in its clones.
    let sysctl = ["--sysctl", "net.ipv6.conf.all.disable_ipv6=1"];
    let vm = idle(&home, &busybox, &[&ALL[..], &sysctl].concat());
    assert_eq!(addresses(&vm, "eth0").len(), 1);
    home.sm(&["snapshot", "create", &vm.name, "four"]).exits(0);
    let clone = home.clone_of("four", "clone");
    assert_eq!(addresses(&clone, "eth0"), addresses(&vm, "eth0"));
    let url = format!("http://192.0.2.1:{port}/");
    let done = clone.exec(&["wget", "-q", "-O", "-", &url]);
    assert_eq!(done.exits(0).out(), "by four\n");
}

/// A VM with Python, and what its scripts begin with.
struct Peer<'a>(Vm<'a>);

impl Peer<'_> {
    /// Runs a script that has `port`, a port of the host.
    #[track_caller]
    fn runs(&self, address: SocketAddr, script: &str) {
        let begin = format!(
            "import socket, select, struct, time\n\
             from socket import *\n\
             setdefaulttimeout(300)\n\
             host, port = '192.0.2.1', {}\n",
            address.port()
        );
        self.0.exec(&["python3", "-c", &(begin + script)]).exits(0);
    }
}

/// Accepts one connection and has `serve` do the rest.
fn once(
    serve: fn(TcpStream) -> io::Result<()>,
) -> (SocketAddr, thread::JoinHandle<io::Result<()>>) {
    let listener = TcpListener::bind("192.0.2.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let thread = thread::spawn(move || {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        serve(stream)
    });
    (address, thread)
}

#[test]
fn full_sockets_of_a_guest_behave_as_those_of_the_host() {
    if !in_namespace("full_sockets_of_a_guest_behave_as_those_of_the_host") {
        return;
    }
    let home = Home::new();
    name_server();
    let peer = Peer(idle(&home, &image("python"), &ALL));
    dead_family(&peer);
    datagrams(&peer);
    half_closes(&peer);
    resets(&peer);
    failures(&peer);
}

/// A dead address of a name fails at once, so that programs use the other one.
fn dead_family(peer: &Peer<'_>) {
    let (address, served) = once(|mut stream| stream.write_all(b"here"));
    peer.runs(
        address,
        &format!(
            "begun = time.monotonic()\n\
             found = getaddrinfo('{DUAL}', port, 0, SOCK_STREAM)\n\
             [dead] = [info[4] for info in found if info[0] == AF_INET6]\n\
             try: assert False, socket(AF_INET6).connect(dead)\n\
             except OSError as e: assert e.errno in (101, 113), e\n\
             s = create_connection(('{DUAL}', port))\n\
             assert s.recv(4) == b'here'\n\
             took = time.monotonic() - begun\n\
             assert took < 5, took\n"
        ),
    );
    served.join().unwrap().unwrap();
}

/// Datagrams of 9,000 bytes are fragmented by the guest, and put together again.
fn datagrams(peer: &Peer<'_>) {
    let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let echo = thread::spawn(move || -> io::Result<()> {
        socket.set_read_timeout(Some(TIMEOUT))?;
        let mut buffer = [0; 10_000];
        for _ in 0..20 {
            let (length, from) = socket.recv_from(&mut buffer)?;
            socket.send_to(buffer.get(..length).unwrap_or_default(), from)?;
        }
        Ok(())
    });
    peer.runs(
        address,
        "s = socket(AF_INET, SOCK_DGRAM)\n\
         for i in range(20):\n\
         \x20   sent = bytes((i + j * j) % 251 for j in range(9000 + i))\n\
         \x20   s.sendto(sent, (host, port))\n\
         \x20   got, of = s.recvfrom(65536)\n\
         \x20   assert got == sent, (len(got), len(sent))\n\
         \x20   assert of == (host, port), of\n",
    );
    echo.join().unwrap().unwrap();
}

/// Each side ends its own direction, and the other one goes on with a megabyte.
fn half_closes(peer: &Peer<'_>) {
    let (address, served) = once(|mut stream| {
        let mut text = Vec::new();
        stream.read_to_end(&mut text)?;
        assert_eq!(text, b"question");
        stream.write_all(&vec![7; 1 << 20])
    });
    peer.runs(
        address,
        "s = create_connection((host, port))\n\
         s.sendall(b'question')\n\
         s.shutdown(SHUT_WR)\n\
         assert s.makefile('rb').read() == bytes([7]) * (1 << 20)\n",
    );
    served.join().unwrap().unwrap();
    let (address, served) = once(|mut stream| {
        stream.write_all(b"question")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        assert_eq!(bytes, vec![9; 1 << 20]);
        Ok(())
    });
    peer.runs(
        address,
        "s = create_connection((host, port))\n\
         assert s.makefile('rb').read() == b'question'\n\
         s.sendall(bytes([9]) * (1 << 20))\n\
         s.close()\n",
    );
    served.join().unwrap().unwrap();
}

/// A reset of one side reaches the other.
fn resets(peer: &Peer<'_>) {
    let (address, served) = once(|mut stream| {
        stream.read_exact(&mut [0; 2])?;
        // It is closed with a reset.
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
        Ok(())
    });
    peer.runs(
        address,
        "s = create_connection((host, port))\n\
         s.sendall(b'go')\n\
         try:\n\
         \x20   assert False, s.recv(1)\n\
         except ConnectionResetError: pass\n",
    );
    served.join().unwrap().unwrap();
    let (address, served) = once(|mut stream| {
        stream.write_all(b"go")?;
        let error = stream.read(&mut [0; 2]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        Ok(())
    });
    peer.runs(
        address,
        "s = create_connection((host, port))\n\
         assert s.recv(2) == b'go'\n\
         s.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack('ii', 1, 0))\n\
         s.close()\n",
    );
    served.join().unwrap().unwrap();
}

/// Connections fail as they do on the host, and those without an answer delay no others.
fn failures(peer: &Peer<'_>) {
    let closed = TcpListener::bind("192.0.2.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    peer.runs(
        closed,
        "try: assert False, create_connection((host, port))\n\
         except ConnectionRefusedError: pass\n\
         s = socket(AF_INET, SOCK_DGRAM)\n\
         s.connect((host, port))\n\
         s.send(b'?')\n\
         try: assert False, s.recv(1)\n\
         except ConnectionRefusedError: pass\n\
         try: assert False, create_connection(('198.51.100.1', port))\n\
         except OSError as e: assert e.errno in (101, 113), e\n",
    );
    let (address, served) = once(|mut stream| stream.write_all(b"here"));
    peer.runs(
        address,
        "holes = [socket() for i in range(10)]\n\
         for i, s in enumerate(holes):\n\
         \x20   s.setblocking(False)\n\
         \x20   s.connect_ex(('203.0.113.%d' % (i + 1), 80))\n\
         begun = time.monotonic()\n\
         s = create_connection((host, port))\n\
         assert s.recv(4) == b'here'\n\
         took = time.monotonic() - begun\n\
         assert took < 5, took\n\
         ended = select.select([], holes, [], 0)[1]\n\
         assert not ended, ended\n",
    );
    served.join().unwrap().unwrap();
}
