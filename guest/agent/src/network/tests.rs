//! Tests with real interfaces, each in a network namespace of its own.

use std::process::Command;

use serde_json::Value;
use sm_guest_proto::control::{GuestAddress, GuestNetwork};

use super::*;
use crate::sys;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Runs a test in a new network namespace with the interfaces `eth0` and, at its other end,
/// `peer`.
fn in_namespace(test: fn(u32)) {
    if !sm_test_needs::root() || !sm_test_needs::programs(&["ip"]) {
        return;
    }
    // Threads have namespaces of their own.
    let thread = std::thread::spawn(move || {
        sys::unshare(libc::CLONE_NEWNET).unwrap();
        ip("link add eth0 type veth peer name peer");
        ip("link set peer up");
        test(index("eth0"));
    });
    thread.join().unwrap();
}

fn try_ip(command: &str) -> Option<String> {
    let output = Command::new("ip")
        .args(command.split(' '))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    output.status.success().then_some(text)
}

fn ip(command: &str) -> String {
    try_ip(command).unwrap_or_else(|| panic!("ip {command}"))
}

fn json(command: &str) -> Vec<Value> {
    let text = ip(&format!("-json -details {command}"));
    serde_json::from_str(&text).unwrap_or_default()
}

fn index(name: &str) -> u32 {
    let index = json(&format!("link show {name}"))[0]["ifindex"].as_u64();
    u32::try_from(index.unwrap()).unwrap()
}

/// Returns a configuration in networks that end in `number`.
fn config(number: u8) -> NetworkConfig {
    let to = |address: String, prefix, gateway: String| GuestAddress {
        address: address.parse().unwrap(),
        prefix,
        gateway: Some(gateway.parse().unwrap()),
    };
    let network = GuestNetwork {
        mtu: 1400 + u16::from(number),
        addresses: vec![
            to(
                format!("100.96.{number}.2"),
                30,
                format!("100.96.{number}.1"),
            ),
            to(format!("fd73:{number}::2"), 64, format!("fd73:{number}::1")),
        ],
        gateway_mac: "02:00:00:00:00:01".into(),
    };
    NetworkConfig::new(&network, Some(MAC)).unwrap()
}

fn set_up(index: u32, number: u8) -> Result<(), NetworkError> {
    let interface = Interface {
        index,
        name: String::new(),
    };
    configure(&interface, &config(number))
}

/// Returns addresses with their prefixes.
fn addresses(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for address in json(&format!("addr show {name}"))[0]["addr_info"]
        .as_array()
        .unwrap()
    {
        assert_eq!(address.get("tentative"), None, "{address}");
        let local = address["local"].as_str().unwrap();
        found.push(format!("{local}/{}", address["prefixlen"]));
    }
    found.sort();
    found
}

fn default_routes(family: &str) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let routes = json(&format!("{family} route show default"));
    let routes = routes
        .iter()
        .map(|route| (text(&route["gateway"]), text(&route["dev"])));
    routes.collect()
}

/// Checks that interface `name` has the configuration `number` and no other.
fn check(name: &str, number: u8) {
    let link = &json(&format!("link show {name}"))[0];
    assert_eq!(link["address"], "02:00:00:00:00:02");
    assert_eq!(link["mtu"], 1400 + u64::from(number));
    assert_eq!(link["master"], Value::Null);
    let flags: Vec<_> = link["flags"].as_array().unwrap().iter().collect();
    assert!(
        flags.contains(&&"UP".into()) && !flags.contains(&&"NOARP".into()),
        "{flags:?}"
    );
    let (v4, v6) = (format!("100.96.{number}.1"), format!("fd73:{number}::1"));
    let expected = [
        format!("100.96.{number}.2/30"),
        format!("fd73:{number}::2/64"),
        "fe80::ff:fe00:2/64".to_owned(),
    ];
    assert_eq!(addresses(name), expected);
    for (family, gateway) in [("-4", v4), ("-6", v6)] {
        assert_eq!(default_routes(family), [(gateway.clone(), name.to_owned())]);
        let neighbours = json(&format!("{family} neigh show dev {name} nud permanent"));
        let [neighbour] = neighbours.as_slice() else {
            panic!("{neighbours:?}");
        };
        assert_eq!(neighbour["dst"], gateway);
        assert_eq!(neighbour["lladdr"], "02:00:00:00:00:01");
        assert_eq!(neighbour["state"][0], "PERMANENT");
    }
}

#[test]
fn an_interface_is_configured_and_configured_again() {
    in_namespace(|index| {
        set_up(index, 1).unwrap();
        check("eth0", 1);
        set_up(index, 1).unwrap();
        check("eth0", 1);
        set_up(index, 2).unwrap();
        check("eth0", 2);
    });
}

/// No state that a workload can leave keeps the next configuration from being complete.
#[test]
fn changes_of_a_workload_do_not_remain() {
    in_namespace(|index| {
        set_up(index, 1).unwrap();
        for command in [
            "link set eth0 down",
            "link set eth0 name net9",
            "link set net9 address 02:00:00:00:00:77 mtu 9000 arp off",
            "link set net9 up",
            "addr add 10.0.0.1/8 dev net9",
            "addr add 10.0.0.2/8 dev net9",
            "addr add 100.96.2.2/24 dev net9",
            "addr add fd00::5/64 dev net9",
            "neigh add 100.96.2.1 lladdr 02:00:00:00:00:99 dev net9",
            "route add 192.0.2.0/24 via 10.0.0.9 dev net9",
            // Another interface has its name, and the default route.
            "link add eth0 type veth peer name other",
            "link set other up",
            "link set eth0 up",
            "addr add 10.9.0.1/24 dev eth0",
            "route replace default via 10.9.0.2 dev eth0",
            "-6 route replace default dev eth0 metric 1024",
        ] {
            ip(command);
        }
        set_up(index, 2).unwrap();
        check("net9", 2);
        assert!(json("route show 192.0.2.0/24").is_empty());
        // The workload's other interfaces are its own.
        assert!(ip("addr show eth0").contains("inet 10.9.0.1/24"));
    });
}

#[test]
fn a_port_of_a_bridge_is_an_interface_again() {
    in_namespace(|index| {
        if try_ip("link add br0 type bridge").is_none() {
            return assert!(!sm_test_needs::met(
                "bridge",
                Some("the kernel has no bridges")
            ));
        }
        ip("link set eth0 master br0");
        set_up(index, 3).unwrap();
        check("eth0", 3);
    });
}

#[test]
fn a_workload_may_switch_ipv6_off() {
    in_namespace(|index| {
        std::fs::write(
            "/proc/thread-self/net/../../sys/net/ipv6/conf/all/disable_ipv6",
            "1",
        )
        .ok();
        let set = "net.ipv6.conf.all.disable_ipv6=1";
        assert!(
            Command::new("sysctl")
                .args(["-q", "-w", set])
                .status()
                .unwrap()
                .success()
        );
        set_up(index, 1).unwrap();
        assert_eq!(addresses("eth0"), ["100.96.1.2/30"]);
        assert_eq!(default_routes("-4").len(), 1);
    });
}

#[test]
fn an_interface_with_countless_addresses_is_not_emptied_one_by_one() {
    in_namespace(|index| {
        for number in 0..=MAX_OLD {
            ip(&format!("addr add 10.0.{number}.1/32 dev eth0"));
        }
        assert!(matches!(set_up(index, 1), Err(NetworkError::Crowded)));
    });
}

#[test]
fn an_interface_that_is_gone_is_an_error() {
    in_namespace(|index| {
        ip("link del eth0");
        let error = set_up(index, 1).unwrap_err().to_string();
        assert!(error.contains("No such device"), "{error}");
    });
}

#[test]
fn a_link_is_awaited() {
    in_namespace(|index| {
        ip("link set peer down");
        set_up(index, 1).unwrap();
        let has_link = || !ip("link show eth0").contains("NO-CARRIER");
        let soon = Duration::from_millis(10);
        assert!(!LinkEvents::open().unwrap().wait(has_link, soon).unwrap());
        let events = LinkEvents::open().unwrap();
        ip("link set peer up");
        assert!(events.wait(has_link, Duration::from_secs(60)).unwrap());
    });
}
