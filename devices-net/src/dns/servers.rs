//! The host's configuration of its resolver (resolv.conf(5)).

use std::net::{IpAddr, Ipv4Addr};

/// Maximum number of name servers, as of the C library.
const MAX_SERVERS: usize = 3;
/// Maximum number of domains in the search list.
const MAX_SEARCH: usize = 6;

/// The part of `resolv.conf` that a guest's resolver needs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResolvConf {
    /// The name servers, in order; never empty.
    pub servers: Vec<IpAddr>,
    /// The domains in which a short name is searched.
    pub search: Vec<String>,
    /// The options, as they are.
    pub options: Vec<String>,
}

impl ResolvConf {
    /// Parses the text of the file. Lines that are not understood are left out, as the C
    /// library does. Without a server, the one on the host itself is used.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut parsed = Self {
            servers: Vec::new(),
            search: Vec::new(),
            options: Vec::new(),
        };
        for line in text.lines() {
            if line.starts_with(['#', ';']) {
                continue;
            }
            let mut words = line.split_whitespace();
            let keyword = words.next().unwrap_or_default();
            let words = words.take_while(|word| !word.starts_with(['#', ';']));
            match keyword {
                "nameserver" => {
                    // A zone is of the host's interfaces; a link-local server needs one.
                    let server = words.take(1).find_map(|word| word.parse().ok());
                    let is_new = |it: &IpAddr| !parsed.servers.contains(it);
                    if parsed.servers.len() < MAX_SERVERS {
                        let new = server.filter(is_new);
                        parsed.servers.extend(new);
                    }
                }
                // The last of them counts.
                "search" | "domain" => {
                    parsed.search = words.take(MAX_SEARCH).map(str::to_owned).collect();
                }
                "options" => parsed.options.extend(words.map(str::to_owned)),
                _ => {}
            }
        }
        if parsed.servers.is_empty() {
            parsed.servers.push(Ipv4Addr::LOCALHOST.into());
        }
        parsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_read_as_the_c_library_does() {
        let text = "# nameserver 9.9.9.9\n; comment\nnameserver 127.0.0.53 # local\n\
                    nameserver\t2600::1\nnameserver fe80::1%eth0\nnameserver 127.0.0.53\n\
                    domain old.example\nsearch a.example b.example ; all\n\
                    options edns0 trust-ad\noptions ndots:2\nsortlist 1.2.3.4\nnameserver\n\
                    nameserver 1.1.1.1\nnameserver 1.0.0.1\n";
        let parsed = ResolvConf::parse(text);
        let servers = ["127.0.0.53", "2600::1", "1.1.1.1"];
        assert_eq!(
            parsed.servers,
            servers.map(|it| it.parse::<IpAddr>().unwrap())
        );
        assert_eq!(parsed.search, ["a.example", "b.example"]);
        assert_eq!(parsed.options, ["edns0", "trust-ad", "ndots:2"]);
    }

    #[test]
    fn without_a_server_there_is_the_host() {
        for text in ["", "search a.example", "nameserver x", "nameserver"] {
            assert_eq!(ResolvConf::parse(text).servers, [Ipv4Addr::LOCALHOST]);
        }
    }
}
