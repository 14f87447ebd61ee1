//! Contents of `/etc/hosts` and `/etc/resolv.conf`, with every part checked: a line break in
//! one would add lines of its own.

use std::fmt::Write as _;
use std::net::IpAddr;

use sm_guest_proto::control::GuestDns;

/// Maximum number of further lines of `/etc/hosts`.
const MAX_HOSTS: usize = 1024;
/// Maximum number of name servers; resolvers of libc use three.
const MAX_NAMESERVERS: usize = 16;
/// Maximum number of domains to search, and of options.
const MAX_WORDS: usize = 32;
/// Maximum length of a name in bytes (RFC 1035 section 2.3.4, as text).
const MAX_NAME: usize = 253;
/// Maximum length of a line in bytes; parsers of `/etc/hosts` truncate longer ones.
const MAX_LINE: usize = 1000;

/// Returns true if `name` can be a host name of Linux.
pub(crate) fn is_hostname(name: &str) -> bool {
    name.len() <= 64 && is_name(name)
}

fn is_name(name: &str) -> bool {
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(valid)
}

fn is_option(option: &str) -> bool {
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b':');
    (1..=64).contains(&option.len()) && option.bytes().all(valid)
}

/// Returns true if `hosts` can be lines of `/etc/hosts`.
pub(crate) fn are_hosts(hosts: &[(String, String)]) -> bool {
    let line = |(address, names): &(String, String)| {
        address.parse::<IpAddr>().is_ok()
            && names.len() <= MAX_LINE
            && names.split(' ').all(is_name)
    };
    hosts.len() <= MAX_HOSTS && hosts.iter().all(line)
}

/// Returns the contents of `/etc/hosts`. Both addresses of `localhost` are always in it: some
/// programs ask name servers otherwise.
pub(crate) fn hosts_file(hostname: &str, hosts: &[(String, String)]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n",
    );
    let _ = writeln!(text, "127.0.1.1\t{hostname}");
    for (address, names) in hosts {
        let _ = writeln!(text, "{address}\t{names}");
    }
    text
}

/// Returns the contents of `/etc/resolv.conf`; `None` if a part is malformed or there are too
/// many.
pub(crate) fn resolv_conf(dns: &GuestDns) -> Option<String> {
    let lists = [&dns.search, &dns.options];
    if dns.nameservers.len() > MAX_NAMESERVERS || lists.iter().any(|list| list.len() > MAX_WORDS) {
        return None;
    }
    let mut text = String::new();
    for server in &dns.nameservers {
        let _ = writeln!(text, "nameserver {server}");
    }
    type Check = fn(&str) -> bool;
    let lines: [(&str, &[String], Check); 2] = [
        ("search", &dns.search, is_name),
        ("options", &dns.options, is_option),
    ];
    for (keyword, words, is_valid) in lines {
        if !words.iter().all(|word| is_valid(word)) {
            return None;
        }
        if !words.is_empty() {
            let _ = writeln!(text, "{keyword} {}", words.join(" "));
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_names_the_guest_and_further_hosts() {
        let text = hosts_file("box", &[("10.0.0.1".into(), "db db.local".into())]);
        assert!(text.starts_with("127.0.0.1\tlocalhost\n::1\tlocalhost "));
        assert!(text.contains("127.0.1.1\tbox\n"));
        assert!(text.ends_with("10.0.0.1\tdb db.local\n"));
    }

    #[test]
    fn hosts_are_addresses_and_names() {
        let hosts = |address: &str, names: &str| are_hosts(&[(address.into(), names.into())]);
        assert!(hosts("fd00::1", "a b.c"));
        for (address, names) in [
            ("10.0.0", "a"),
            ("10.0.0.1", ""),
            ("10.0.0.1", "a  b"),
            ("10.0.0.1", "a\n10.0.0.2 b"),
            ("10.0.0.1", "a\tb"),
            ("10.0.0.1\n", "a"),
        ] {
            assert!(!hosts(address, names), "{address} {names}");
        }
        assert!(!hosts("10.0.0.1", &"a ".repeat(600)));
        let many = vec![("10.0.0.1".to_owned(), "a".to_owned()); MAX_HOSTS + 1];
        assert!(!are_hosts(&many) && are_hosts(&many[1..]));
    }

    #[test]
    fn resolv_conf_has_what_there_is() {
        assert_eq!(resolv_conf(&GuestDns::default()).unwrap(), "");
        let dns = GuestDns {
            nameservers: vec![
                "100.96.0.1".parse().unwrap(),
                "fd73:6d00::1".parse().unwrap(),
            ],
            search: vec!["corp.example".into(), ".".into()],
            options: vec!["ndots:2".into(), "edns0".into()],
        };
        assert_eq!(
            resolv_conf(&dns).unwrap(),
            "nameserver 100.96.0.1\nnameserver fd73:6d00::1\nsearch corp.example .\n\
             options ndots:2 edns0\n"
        );
    }

    #[test]
    fn resolv_conf_has_no_foreign_lines() {
        let search = |domain: &str| GuestDns {
            search: vec![domain.into()],
            ..GuestDns::default()
        };
        let options = |option: &str| GuestDns {
            options: vec![option.into()],
            ..GuestDns::default()
        };
        for dns in [
            search("a\nnameserver 10.0.0.1"),
            search("a b"),
            search(""),
            search(&"a".repeat(MAX_NAME + 1)),
            options("edns0\n"),
            options(""),
            options("ndots:1 debug"),
            GuestDns {
                search: vec!["a".into(); MAX_WORDS + 1],
                ..GuestDns::default()
            },
            GuestDns {
                nameservers: vec!["10.0.0.1".parse().unwrap(); MAX_NAMESERVERS + 1],
                ..GuestDns::default()
            },
        ] {
            assert_eq!(resolv_conf(&dns), None, "{dns:?}");
        }
    }
}
