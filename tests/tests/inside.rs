//! The workload against the agent: vsock ports that a process of the guest can reach.

use std::io::Write as _;
use std::os::unix::net::UnixListener;

use sm_e2e::{Home, lanes};

/// The agent's ports for commands, forwarded connections and control.
const PORTS: &str = "1028,1029,1030";
/// A port on which the host listens.
const OPEN: &str = "4000";
/// `VMADDR_CID_LOCAL`.
const LOOPBACK: &str = "1";
const HOST: &str = "2";

#[test]
fn processes_in_the_guest_cannot_reach_the_agents_ports() {
    let home = Home::shared();
    let program = lanes();
    let image = format!("rootfs:{}", program.path().display());
    let sockets = tempfile::tempdir().unwrap();
    let hybrid = sockets.path().join("vsock");
    let listener = UnixListener::bind(sockets.path().join(format!("vsock_{OPEN}"))).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.and_then(|mut stream| stream.write_all(b"!"));
        }
    });
    let arguments = ["-m", "128m", "--hybrid-vsock", hybrid.to_str().unwrap()];
    let vm = home.detached(&[&arguments[..], &[&image, "/lanes", "timers", "1000"]].concat());
    let knock = |user: &str, cids: &str, ports: &str| {
        let arguments = ["exec", "-u", user, &vm.name, "/lanes", "knock", cids, ports];
        let said = home.sm(&arguments).exits(0).out();
        eprint!("{user}: {said}");
        said
    };
    let own = vm.exec(&["/lanes", "cid"]).exits(0).out();
    let own: u32 = own.trim().parse().unwrap();
    assert!(own > 2, "{own}");
    let here = format!("{LOOPBACK},{own}");
    for user in ["1000:1000", "0:0"] {
        // The line of a successful connection.
        let greeting = knock(user, HOST, OPEN);
        let connected = format!("stream {HOST} {OPEN}: connected, Ok([33])");
        assert!(greeting.lines().any(|line| line == connected), "{greeting}");

        let said = knock(user, &here, PORTS);
        assert_eq!(said.lines().count(), 2 * 2 * 3, "{said}");
        assert!(!said.contains("connected"), "{said}");
        // The host sends nothing on the ports of the agent's own connections.
        let said = knock(user, HOST, PORTS);
        assert_eq!(said.lines().count(), 2 * 3, "{said}");
        let greeted = |line: &str| line.contains("connected") && !line.ends_with("Ok([])");
        assert!(!said.lines().any(greeted), "{said}");
    }
}
