//! Containers in the guest: the kernel's options for them, and Docker itself.
#![expect(clippy::expect_used, reason = "a failed expectation is a failed test")]

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use sm_e2e::{Home, Reaped, image, unique, until};

/// The kernel's build is checked against the same list.
const REQUIRED: &str = include_str!("../../guest/kernel/containers.required");

/// The controllers with which Docker and Kubernetes set limits.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

#[test]
fn full_the_running_kernel_has_all_that_containers_need() {
    let home = Home::shared();
    let script = "cat /sys/fs/cgroup/cgroup.controllers; zcat /proc/config.gz";
    let arguments = [
        "run",
        "--rm",
        "-m",
        "128m",
        &image("busybox"),
        "sh",
        "-c",
        script,
    ];
    let said = home.sm(&arguments).exits(0).out();
    let (controllers, config) = said.split_once('\n').unwrap();
    let controllers: Vec<_> = controllers.split(' ').collect();
    for controller in CONTROLLERS {
        assert!(controllers.contains(&controller), "{controllers:?}");
    }
    let on: HashSet<_> = config
        .lines()
        .filter_map(|line| line.strip_suffix("=y"))
        .collect();
    let missing: Vec<_> = REQUIRED
        .lines()
        .filter(|line| line.starts_with("CONFIG_") && !on.contains(line))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
    // Through the loopback, any process of the guest would reach the agent's ports.
    assert!(on.contains("CONFIG_VIRTIO_VSOCKETS"));
    for absent in ["CONFIG_VSOCKETS_LOOPBACK", "CONFIG_VSOCKETS_DIAG"] {
        assert!(!on.contains(absent), "{absent}");
    }
}

/// Runs an engine and prints results; an image archive is its input.
const SCRIPT: &str = r#"
set -eu
said() { echo "== $*"; }

# As Docker's own image for this has it: a group with processes in it cannot offer
# controllers to others.
cd /sys/fs/cgroup
mkdir init
for pid in $(cat cgroup.procs); do echo $pid >init/cgroup.procs || true; done
sed 's/ / +/g; s/^/+/' cgroup.controllers >cgroup.subtree_control
cd /

# The root is an overlay itself, so this directory is a volume.
grep -q ' /var/lib/docker ext4 ' /proc/mounts
# The engine gives a containerd of its own 15 s, of which an emulated processor needs more.
perl -MSocket -e '
    sub start {
        my ($path, $log) = ("/run/$_[0].ready", "/run/$_[0].log");
        socket(my $ready, AF_UNIX, SOCK_DGRAM, 0) or die $!;
        bind($ready, sockaddr_un($path)) or die $!;
        $SIG{CHLD} = sub { system("cat", $log); exit 1 };
        if (!fork) {
            $ENV{NOTIFY_SOCKET} = $path;
            open(STDOUT, ">", $log);
            open(STDERR, ">&", \*STDOUT);
            exec(@_);
        }
        defined(recv($ready, my $word, 4096, 0)) or die $!;
        print "== notified: $word\n";
    }
    start("containerd");
    start("dockerd", "--containerd", "/run/containerd/containerd.sock");
'
said "driver $(docker info --format '{{.Driver}} {{.CgroupVersion}} {{.Warnings}}')"
docker load
docker network create inner >/dev/null
docker run -d --name web --network inner -p 8080:80 --memory 64m --cpus 0.5 --pids-limit 50 busybox sh -c '
    mkdir /www && echo served by $HOSTNAME >/www/index.html && httpd -f -p 80 -h /www' >/dev/null
said "limits $(docker exec web cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max | xargs)"
# The engine resolves the name; this program cannot itself, as it is static. The server
# may not listen yet.
docker run --rm --network inner busybox sh -c '
    address=$(nslookup web 127.0.0.11 | sed -n "/^Name:/,\$s/^Address.*: //p" | head -n 1)
    for try in $(seq 50); do
        printf "GET / HTTP/1.0\r\n\r\n" | nc $address 80 >/tmp/answer && tail -n 1 /tmp/answer && exit
    done
    exit 1'
exec 3<>/dev/tcp/127.0.0.1/8080
printf 'GET / HTTP/1.0\r\n\r\n' >&3
said "by loopback: $(tail -n 1 <&3)"
gateway=$(docker network inspect inner --format '{{(index .IPAM.Config 0).Gateway}}')
exec 3<>/dev/tcp/$gateway/8080
printf 'GET / HTTP/1.0\r\n\r\n' >&3
said "by gateway: $(tail -n 1 <&3)"

said "iptables $(iptables -t nat -S DOCKER | grep -c 8080)"
for tool in iptables iptables-legacy ip6tables ip6tables-legacy; do
    $tool -L -n >/dev/null && said "$tool"
done
ip6tables -t nat -A POSTROUTING -j MASQUERADE
iptables-legacy -t nat -A POSTROUTING -s 10.99.0.0/24 -m comment --comment x -j MASQUERADE
said "nft $(nft list ruleset | grep -c 'chain DOCKER')"
nft add table inet own
nft add chain inet own in '{ type filter hook input priority 0; }'
nft add rule inet own in fib daddr type local ct state established numgen random mod 2 0 accept
ipvsadm -A -t 10.99.0.1:80 -s rr
ipvsadm -a -t 10.99.0.1:80 -r 10.99.0.2:80 -m
said "ipvs $(ipvsadm -L -n | grep -c 10.99.0)"
ip link add wg0 type wireguard
wg genkey >/run/key
wg set wg0 private-key /run/key listen-port 51820
said "wg $(wg show wg0 listen-port)"
ip link add vx0 type vxlan id 42 dstport 4789 && said vxlan
ip link add ve0 type veth peer name ve1
ip link add link ve0 name mv0 type macvlan mode bridge && said macvlan
ip link add link ve1 name iv0 type ipvlan mode l2 && said ipvlan
docker network create -d macvlan -o parent=ve0 outer >/dev/null && said network macvlan
said all
docker wait web
"#;

fn layout() -> String {
    let images = PathBuf::from(std::env::var_os("SM_DOCKER").expect("SM_DOCKER is set"));
    format!("oci:{}", images.join("docker").display())
}

#[test]
fn full_docker_runs_containers_that_reach_each_other() {
    let home = Home::shared();
    let fixtures = std::env::var_os("SM_FIXTURES").expect("SM_FIXTURES is set");
    let archive = std::fs::read(Path::new(&fixtures).join("busybox.docker.tar")).unwrap();
    let name = unique("docker");
    let layout = layout();
    home.sm(&["volume", "create", "--size", "4g", &name])
        .exits(0);
    let volume = format!("{name}:/var/lib/docker");
    let mut arguments = vec!["run", "-i", "--rm", "--name", &name, "-m", "1536m"];
    arguments.extend(["-v", &volume, "-p", "8080", &layout, "bash", "-c", SCRIPT]);
    let mut command = home.command(&arguments);
    command.stdin(Stdio::piped()).stderr(Stdio::inherit());
    let mut sm = Reaped(command.spawn().unwrap());
    let mut input = sm.0.stdin.take().unwrap();
    let feeding = std::thread::spawn(move || input.write_all(&archive));
    let mut said = Vec::new();
    for line in BufReader::new(sm.0.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        eprintln!("{line}");
        let last = line == "== all";
        said.push(line);
        if last {
            break;
        }
    }
    feeding.join().unwrap().unwrap();
    let has = |line: &str| assert!(said.iter().any(|said| said == line), "{line}: {said:#?}");
    has("== driver overlay2 2 []");
    has("Loaded image: busybox:latest");
    has("== limits 67108864 50");
    let served = said.iter().find(|line| line.starts_with("served by "));
    let served = served.expect("one container has reached the other by its name");
    has(&format!("== by loopback: {served}"));
    has(&format!("== by gateway: {served}"));
    for tool in [
        "iptables",
        "iptables-legacy",
        "ip6tables",
        "ip6tables-legacy",
    ] {
        has(&format!("== {tool}"));
    }
    has("== wg 51820");
    for link in ["vxlan", "macvlan", "ipvlan", "network macvlan", "ipvs 2"] {
        has(&format!("== {link}"));
    }
    // Docker's rules, as its iptables creates them and as nft lists them.
    for rules in ["== iptables ", "== nft "] {
        let line = said.iter().find_map(|line| line.strip_prefix(rules));
        assert_ne!(line.expect(rules), "0", "{rules}");
    }

    // The VM publishes the port that a container publishes.
    let line = home.sm(&["port", &name, "8080"]).exits(0).out();
    let mut stream = TcpStream::connect(line.trim()).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with(&format!("{served}\n")), "{answer}");
    home.sm(&["rm", "-f", &name]).exits(0);
    until("its volume is not in use", || {
        home.sm(&["volume", "rm", &name]).code == Some(0)
    });
}
