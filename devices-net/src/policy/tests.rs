use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn rules(text: &str) -> Vec<NetRule> {
    text.split_whitespace()
        .map(|it| it.parse().unwrap())
        .collect()
}

struct Setting {
    policy: NetPolicy,
    host: HostAddresses,
    pins: DnsPins,
    now: Instant,
}

impl Setting {
    fn new(allow: &str, deny: &str) -> Self {
        let now = Instant::now();
        let mut pins = DnsPins::new(100);
        for (name, address) in [
            ("www.example.com", "198.51.100.7"),
            ("example.com", "198.51.100.8"),
            ("internal.example.com", "10.1.2.3"),
            ("evil.example.com", "127.0.0.1"),
            ("evil.example.com", "169.254.169.254"),
        ] {
            pins.pin(name, address.parse().unwrap(), 60, now);
        }
        Self {
            policy: NetPolicy::new(rules(allow), rules(deny)),
            host: HostAddresses::new(vec!["203.0.113.9".parse().unwrap()]),
            pins,
            now,
        }
    }

    fn judge(&self, flow: &str) -> PolicyVerdict {
        let (protocol, address) = flow.split_once(' ').unwrap();
        let (protocol, address) = match protocol {
            "tcp" => (FlowProtocol::Tcp, address.parse().unwrap()),
            "udp" => (FlowProtocol::Udp, address.parse().unwrap()),
            _ => (
                FlowProtocol::Echo,
                (address.parse::<IpAddr>().unwrap(), 0).into(),
            ),
        };
        (self.policy).judge(protocol, address, &self.host, &self.pins, self.now)
    }
}

/// Policies, and flows that they allow and do not allow.
#[test]
fn policies_allow_what_they_say() {
    for (allow, deny, allowed, denied) in [
        (
            "",
            "",
            "tcp 1.1.1.1:80, udp [2600::1]:53, icmp 1.1.1.1, tcp [64:ff9b::1.1.1.1]:80",
            "tcp 10.0.0.1:80, tcp 127.0.0.1:22, tcp 0.0.0.0:22, tcp 203.0.113.9:22, tcp [::1]:22, \
             tcp [::]:22, tcp [::ffff:127.0.0.1]:22, tcp [64:ff9b::203.0.113.9]:22, \
             tcp [2002:7f00:1::]:22, tcp 169.254.169.254:80, icmp 192.168.0.1, udp 224.0.0.1:1, \
             tcp 255.255.255.255:1, tcp [fe80::1]:1",
        ),
        (
            "public private",
            "",
            "tcp 1.1.1.1:1, tcp 10.0.0.1:1, icmp fd12::1",
            "tcp 127.0.0.1:1",
        ),
        (
            "host",
            "",
            "tcp 127.0.0.1:1, tcp 203.0.113.9:1, tcp 0.0.0.0:1",
            "tcp 1.1.1.1:1",
        ),
        (
            "all",
            "",
            "tcp 127.0.0.1:1, tcp 10.0.0.1:1, tcp 1.1.1.1:1",
            "tcp 169.254.169.254:80, tcp [fd00:ec2::254]:80, tcp [::ffff:169.254.169.254]:80, \
             udp 239.0.0.1:1",
        ),
        (
            "all metadata",
            "",
            "tcp 169.254.169.254:80, tcp 168.63.129.16:1",
            "tcp 224.0.0.1:80",
        ),
        // The range alone does not open a metadata service.
        (
            "169.254.0.0/16 0.0.0.0/0",
            "",
            "tcp 1.1.1.1:1",
            "tcp 169.254.169.254:80",
        ),
        (
            "tcp:10.0.0.0/8:8000-8999 udp:[fd12::]:53",
            "",
            "tcp 10.9.9.9:8000, tcp 10.0.0.0:8999, tcp [::ffff:10.1.1.1]:8500, udp [fd12::]:53",
            "tcp 10.9.9.9:7999, tcp 10.9.9.9:9000, udp 10.9.9.9:8000, icmp 10.9.9.9, \
             tcp 11.0.0.1:8000, udp [fd12::1]:53, tcp [fd12::]:53, tcp 1.1.1.1:8000",
        ),
        (
            "icmp:public",
            "",
            "icmp 1.1.1.1",
            "tcp 1.1.1.1:1, udp 1.1.1.1:1, icmp 10.0.0.1",
        ),
        (
            "*.example.com",
            "",
            "tcp 198.51.100.7:443, icmp 198.51.100.7, tcp 10.1.2.3:1",
            "tcp 198.51.100.8:443, tcp 198.51.100.9:443, tcp 127.0.0.1:1, tcp 169.254.169.254:80",
        ),
        (
            "example.com:443",
            "",
            "tcp 198.51.100.8:443",
            "tcp 198.51.100.8:80, tcp 198.51.100.7:443",
        ),
        // Denying rules win.
        (
            "all",
            "tcp:1.1.1.0/24",
            "tcp 1.1.2.1:1, udp 1.1.1.1:1",
            "tcp 1.1.1.1:1",
        ),
        (
            "",
            "www.example.com",
            "tcp 198.51.100.8:1",
            "tcp 198.51.100.7:1",
        ),
        (
            "metadata host",
            "metadata",
            "tcp 127.0.0.1:1",
            "tcp 169.254.169.254:80",
        ),
        ("198.51.100.7", "public", "", "tcp 198.51.100.7:1"),
        // Also over metadata services, and about a form of an address.
        (
            "metadata",
            "169.254.170.0/24",
            "tcp 169.254.169.254:80",
            "tcp 169.254.170.2:80, tcp [::ffff:169.254.170.2]:80",
        ),
        ("metadata", "all", "", "tcp 169.254.169.254:80"),
        (
            "",
            "64:ff9b::/96 2002::/16",
            "tcp 1.1.1.1:1",
            "tcp [64:ff9b::1.1.1.1]:1, tcp [2002:101:101::1]:1",
        ),
        // A form of an address is not allowed by a rule about the form.
        (
            "64:ff9b::/96",
            "",
            "",
            "tcp [64:ff9b::127.0.0.1]:1, tcp [64:ff9b::1.1.1.1]:1",
        ),
    ] {
        let setting = Setting::new(allow, deny);
        for flow in allowed.split(", ").filter(|it| !it.is_empty()) {
            let verdict = setting.judge(flow.trim());
            assert!(verdict.is_allowed(), "{allow} - {deny}: {flow}: {verdict}");
        }
        for flow in denied.split(", ") {
            let verdict = setting.judge(flow.trim());
            assert!(!verdict.is_allowed(), "{allow} - {deny}: {flow}: {verdict}");
        }
    }
}

#[test]
fn a_refusal_names_the_rule_that_would_allow_it() {
    let setting = Setting::new("tcp:*.example.org", "udp:public");
    for (flow, expected) in [
        (
            "tcp 198.51.100.7:443",
            "not allowed; \"tcp:www.example.com:443\" would allow it",
        ),
        (
            "tcp [2600::1]:80",
            "not allowed; \"tcp:[2600::1]:80\" would allow it",
        ),
        (
            "tcp [::ffff:1.2.3.4]:80",
            "not allowed; \"tcp:1.2.3.4:80\" would allow it",
        ),
        (
            "icmp 1.1.1.1",
            "not allowed; \"icmp:1.1.1.1\" would allow it",
        ),
        (
            "tcp 203.0.113.9:22",
            "not allowed; \"tcp:host:22\" would allow it",
        ),
        (
            "tcp 169.254.169.254:80",
            "not allowed; \"tcp:metadata:80\" would allow it",
        ),
        ("udp 1.1.1.1:53", "denied by \"udp:public\""),
        ("udp 224.0.0.1:53", "not the address of one host"),
    ] {
        let verdict = setting.judge(flow);
        assert_eq!(verdict.to_string(), expected);
        // It really would.
        if let PolicyVerdict::NotAllowed(rule) = verdict {
            let mut setting = Setting::new("", "");
            setting.policy = NetPolicy::new(vec![rule], Vec::new());
            assert!(setting.judge(flow).is_allowed(), "{flow}");
        }
    }
}

#[test]
fn a_name_counts_as_long_as_its_answer() {
    let mut setting = Setting::new("www.example.com", "");
    assert!(setting.judge("tcp 198.51.100.7:443").is_allowed());
    setting.now += Duration::from_secs(61);
    assert!(!setting.judge("tcp 198.51.100.7:443").is_allowed());
    // Also for a rule that denies it.
    let mut setting = Setting::new("", "www.example.com");
    assert!(!setting.judge("tcp 198.51.100.7:443").is_allowed());
    setting.now += Duration::from_secs(61);
    assert!(setting.judge("tcp 198.51.100.7:443").is_allowed());
}

#[test]
fn names_are_resolved_if_they_can_be_of_use() {
    for (allow, deny, resolved, refused) in [
        ("", "", "example.com a.b", ""),
        (
            "public",
            "*.evil.com",
            "evil.com",
            "a.evil.com A.EVIL.COM. b.a.evil.com",
        ),
        // A rule about one port leaves the name.
        ("public", "evil.com:25", "evil.com", ""),
        (
            "*.example.com",
            "",
            "www.example.com WWW.Example.COM.",
            "example.com xexample.com",
        ),
        (
            "example.com:443 10.0.0.0/8",
            "",
            "example.com other.example",
            "",
        ),
    ] {
        let policy = NetPolicy::new(rules(allow), rules(deny));
        for name in resolved.split_whitespace() {
            assert!(policy.may_resolve(name), "{allow} - {deny}: {name}");
        }
        for name in refused.split_whitespace() {
            assert!(!policy.may_resolve(name), "{allow} - {deny}: {name}");
        }
    }
}

#[test]
fn answers_of_name_servers_do_not_open_other_networks() {
    let host = HostAddresses::new(vec!["203.0.113.9".parse().unwrap()]);
    for (allow, accepted, dropped) in [
        (
            "",
            "1.1.1.1 2600::1",
            "10.0.0.1 127.0.0.1 203.0.113.9 169.254.1.1 224.0.0.1 ::ffff:10.0.0.1 0.0.0.0",
        ),
        ("intranet.example", "1.1.1.1", "10.0.0.1 127.0.0.1"),
        (
            "public 10.0.0.0/8",
            "1.1.1.1 10.0.0.1",
            "192.168.0.1 127.0.0.1",
        ),
        ("all", "10.0.0.1 127.0.0.1", "169.254.169.254 224.0.0.1"),
    ] {
        let policy = NetPolicy::new(rules(allow), Vec::new());
        for address in accepted.split_whitespace() {
            assert!(
                policy.may_answer(address.parse().unwrap(), &host),
                "{allow}: {address}"
            );
        }
        for address in dropped.split_whitespace() {
            assert!(
                !policy.may_answer(address.parse().unwrap(), &host),
                "{allow}: {address}"
            );
        }
    }
}

#[test]
fn rules_are_read_and_written() {
    for (text, written) in [
        ("all", "all"),
        ("tcp:public", "tcp:public"),
        ("udp:private:53", "udp:private:53"),
        ("host:8000-8080", "host:8000-8080"),
        ("1.2.3.4", "1.2.3.4"),
        ("1.2.3.4:80-80", "1.2.3.4:80"),
        ("10.0.0.0/8:1", "10.0.0.0/8:1"),
        ("2600::1", "[2600::1]"),
        ("2600::/16", "[2600::/16]"),
        ("icmp:2600::", "icmp:[2600::]"),
        ("[2600::1]:443", "[2600::1]:443"),
        ("tcp:[2600::/16]:443", "tcp:[2600::/16]:443"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("Example.COM.", "example.com"),
        ("*.Example.com:443", "*.example.com:443"),
        ("localhost", "localhost"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("1and1.com", "1and1.com"),
        ("metadata", "metadata"),
    ] {
        let rule: NetRule = text.parse().unwrap();
        assert_eq!(rule.to_string(), written);
        assert_eq!(written.parse::<NetRule>(), Ok(rule));
    }
    for text in [
        "",
        "tcp:",
        ":80",
        "1.2.3",
        "1.2.3.4.5",
        "300.1.1.1",
        "1.2.3.4/33",
        "1.2.3.4/8",
        "10.0.0.0/x",
        "2600::/129",
        "2600::1/16",
        "host:0",
        "host:65536",
        "host:80-70",
        "host:",
        "host:x",
        "host:+80",
        "icmp:host:1",
        "b\u{fc}cher.example",
        "a..b",
        "-a.example",
        "*",
        "*.",
        "a.*.b",
        "*example.com",
        "exa mple.com",
        "[1.2.3.4",
        "sctp:host",
        "example.com:80:90",
    ] {
        assert!(text.parse::<NetRule>().is_err(), "\"{text}\"");
    }
}

proptest! {
    #[test]
    fn any_text_is_a_rule_or_an_error(text in "[a-z0-9:./*\\[\\]-]{0,40}") {
        if let Ok(rule) = text.parse::<NetRule>() {
            prop_assert_eq!(rule.to_string().parse::<NetRule>(), Ok(rule));
        }
    }

    #[test]
    fn a_range_has_the_addresses_with_its_prefix(
        address: [u8; 4],
        other: [u8; 4],
        prefix in 0u8..=32,
        near in 0u32..64,
    ) {
        let address = u32::from_be_bytes(address);
        let mask = u32::MAX.checked_shl(u32::from(32 - prefix)).unwrap_or(0);
        let range = AddressRange::new(IpAddr::from((address & mask).to_be_bytes()), prefix).unwrap();
        for other in [u32::from_be_bytes(other), (address & mask).wrapping_add(near)] {
            let contains = range.contains(IpAddr::from(other.to_be_bytes()));
            prop_assert_eq!(contains, other & mask == address & mask);
        }
        prop_assert!(!range.contains(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)) );
    }

    #[test]
    fn a_pattern_has_the_names_below_it(labels in prop::collection::vec("[a-z]{1,4}", 1..4), above in "[a-z]{1,3}") {
        let name = labels.join(".");
        let pattern: NamePattern = format!("*.{name}").parse().unwrap();
        let below = format!("{above}.{name}");
        let beside = format!("{above}{name}");
        prop_assert!(pattern.matches(&below));
        prop_assert!(!pattern.matches(&name));
        prop_assert!(!pattern.matches(&beside));
        prop_assert!(NamePattern::exact(&name).unwrap().matches(&name));
    }
}

#[test]
fn flows_that_hide_names_need_a_rule_of_their_own() {
    let now = Instant::now();
    let mut pins = DnsPins::new(10);
    let address = IpAddr::from([198, 51, 100, 7]);
    pins.pin("www.example.com", address, 60, now);
    let judge = |allow: &str, deny: &str, protocol, port| {
        let rules = |text: &str| {
            text.split_whitespace()
                .map(|it| it.parse().unwrap())
                .collect()
        };
        let policy = NetPolicy::new(rules(allow), rules(deny));
        let host = HostAddresses::default();
        policy.judge(protocol, (address, port).into(), &host, &pins, now)
    };
    for (protocol, port, expected) in [
        (FlowProtocol::Udp, 443, "udp:www.example.com:443"),
        (FlowProtocol::Udp, 853, "udp:www.example.com:853"),
        (FlowProtocol::Tcp, 853, "tcp:www.example.com:853"),
        (FlowProtocol::Udp, 5353, "udp:www.example.com:5353"),
        (FlowProtocol::Udp, 5355, "udp:www.example.com:5355"),
    ] {
        for (allow, deny) in [
            ("*.example.com", ""),
            ("www.example.com:443 public", ""),
            ("", "ads.example.com"),
            ("all", "ads.example.com"),
        ] {
            let verdict = judge(allow, deny, protocol, port);
            let PolicyVerdict::HidesNames(rule) = &verdict else {
                panic!("{allow} {deny} {port}: {verdict}");
            };
            assert_eq!(rule.to_string(), expected);
            let allow = format!("{allow} {rule}");
            assert!(judge(&allow, deny, protocol, port).is_allowed());
        }
        // Without names there is nothing to hide.
        assert!(judge("", "", protocol, port).is_allowed());
        assert!(judge("all", "", protocol, port).is_allowed());
        let verdict = judge("tcp:www.example.org:443", "", protocol, port);
        assert!(matches!(verdict, PolicyVerdict::NotAllowed(_)), "{verdict}");
    }
    assert!(judge("*.example.com", "", FlowProtocol::Tcp, 443).is_allowed());
}
