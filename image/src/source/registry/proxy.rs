//! Proxies, configured as in Docker and Podman by the environment: `HTTPS_PROXY`,
//! `HTTP_PROXY` and `NO_PROXY`, or their lower-case forms (the rules of Go's
//! `httpproxy`), and `ALL_PROXY` as a fallback.

use std::net::IpAddr;

use ureq::Proxy;
use ureq::http::Uri;

use super::url::port;

/// The configured proxies.
#[derive(Debug)]
pub(super) struct Proxies {
    /// Proxy for `https`, or the reason why it cannot be used.
    pub(super) secure: Result<Option<Proxy>, String>,
    /// Proxy for `http`, or the reason why it cannot be used.
    pub(super) http: Result<Option<Proxy>, String>,
    none_for: Vec<Exception>,
}

impl Default for Proxies {
    /// No proxies.
    fn default() -> Self {
        Self {
            secure: Ok(None),
            http: Ok(None),
            none_for: Vec::new(),
        }
    }
}

/// An entry of `NO_PROXY`.
#[derive(Debug, PartialEq, Eq)]
enum Exception {
    Everything,
    Network(IpAddr, u8),
    Host {
        /// Name without a leading dot.
        name: String,
        /// Matches only subdomains.
        below: bool,
        port: Option<u16>,
    },
}

impl Proxies {
    /// Reads the environment.
    pub(super) fn from_env() -> Self {
        Self::read(&|name| std::env::var(name).ok())
    }

    fn read(environment: &dyn Fn(&str) -> Option<String>) -> Self {
        let variable = |name: &str| {
            let lower = name.to_ascii_lowercase();
            [name, &lower]
                .iter()
                .find_map(|name| environment(name).filter(|value| !value.is_empty()))
        };
        let proxy = |name: &str| -> Result<Option<Proxy>, String> {
            match variable(name).or_else(|| variable("ALL_PROXY")) {
                None => Ok(None),
                Some(value) => parse(&value).map(Some).map_err(|reason| {
                    // The value may contain a password, so it is not shown.
                    format!("the proxy that {name} or ALL_PROXY names {reason}")
                }),
            }
        };
        let none_for = variable("NO_PROXY").unwrap_or_default();
        Self {
            secure: proxy("HTTPS_PROXY"),
            http: proxy("HTTP_PROXY"),
            none_for: none_for.split(',').filter_map(Exception::parse).collect(),
        }
    }

    /// Returns true if requests to `uri` bypass the proxies.
    pub(super) fn spare(&self, uri: &Uri) -> bool {
        let (Some(host), Some(port)) = (uri.host(), port(uri)) else {
            return false;
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let address = host.parse::<IpAddr>().ok();
        if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
            return true;
        }
        self.none_for
            .iter()
            .any(|exception| exception.matches(&host, address, port))
    }
}

fn parse(value: &str) -> Result<Proxy, &'static str> {
    let proxy = Proxy::new(value).map_err(|_| "cannot be understood")?;
    match proxy.protocol() {
        ureq::ProxyProtocol::Http | ureq::ProxyProtocol::Https => Ok(proxy),
        _ => Err("is a SOCKS proxy, which is not supported"),
    }
}

impl Exception {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_ascii_lowercase();
        if text.is_empty() {
            return None;
        }
        if text == "*" {
            return Some(Self::Everything);
        }
        if let Some((address, length)) = text.split_once('/') {
            return Some(Self::Network(address.parse().ok()?, length.parse().ok()?));
        }
        let bare = text.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Some(Self::Network(address, 128));
        }
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => (name, Some(port.parse().ok()?)),
            None => (text.as_str(), None),
        };
        let name = name.trim_start_matches('[').trim_end_matches(']');
        let bare = name.trim_start_matches('*').trim_start_matches('.');
        Some(Self::Host {
            name: bare.to_owned(),
            below: bare != name,
            port,
        })
    }

    fn matches(&self, host: &str, address: Option<IpAddr>, port: u16) -> bool {
        match self {
            Self::Everything => true,
            Self::Network(network, length) => {
                address.is_some_and(|address| is_in(address, *network, *length))
            }
            Self::Host {
                name,
                below,
                port: only,
            } => {
                let is_below = host
                    .strip_suffix(name.as_str())
                    .is_some_and(|rest| rest.ends_with('.'));
                only.is_none_or(|only| only == port) && (is_below || !below && host == name)
            }
        }
    }
}

fn is_in(address: IpAddr, network: IpAddr, length: u8) -> bool {
    let same = |one: u128, other: u128, bits: u32| {
        let fixed_bits = u32::from(length).min(bits);
        fixed_bits == 0 || (one ^ other) >> (bits - fixed_bits) == 0
    };
    match (address, network) {
        (IpAddr::V4(one), IpAddr::V4(other)) => {
            same(u128::from(one.to_bits()), u128::from(other.to_bits()), 32)
        }
        (IpAddr::V6(one), IpAddr::V6(other)) => same(one.to_bits(), other.to_bits(), 128),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Proxies {
        Proxies::read(&|name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    fn spared(none_for: &str, uri: &str) -> bool {
        let proxies = read(&[("NO_PROXY", none_for)]);
        proxies.spare(&uri.parse().unwrap())
    }

    #[test]
    fn each_protocol_has_its_own() {
        let host = |proxy: Result<Option<Proxy>, String>| {
            Ok::<_, String>(proxy?.map(|proxy| proxy.host().to_owned()))
        };
        let hosts = |variables: &[(&str, &str)]| {
            let proxies = read(variables);
            (host(proxies.secure), host(proxies.http))
        };
        let some = |name: &str| Ok(Some(name.to_owned()));
        let both = [
            ("https_proxy", "http://secure.example:3128"),
            ("HTTP_PROXY", "plain.example"),
        ];
        assert_eq!(
            hosts(&both),
            (some("secure.example"), some("plain.example"))
        );
        let all = [("ALL_PROXY", "http://a"), ("HTTPS_PROXY", "http://b")];
        assert_eq!(hosts(&all), (some("b"), some("a")));
        assert_eq!(hosts(&[("HTTPS_PROXY", "")]), (Ok(None), Ok(None)));
        let (error, plain) = hosts(&[("HTTPS_PROXY", "socks5://me:secret@x")]);
        let error = error.unwrap_err();
        assert!(
            error.contains("SOCKS") && !error.contains("secret"),
            "{error}"
        );
        assert_eq!(plain, Ok(None), "the other one is of use");
        assert!(hosts(&[("HTTPS_PROXY", "x y://")]).0.is_err());
    }

    #[test]
    fn proxy_exceptions_are_names_networks_and_this_host() {
        assert!(spared("", "http://localhost:5000/"));
        assert!(spared("", "https://127.9.9.9/"));
        assert!(spared("", "http://[::1]:5000/"));
        assert!(!spared("", "https://r.example/"));
        assert!(spared("*", "https://r.example/"));
        let hosts = "r.example, .below.example,*.star.example,10.0.0.0/8,192.168.1.1,fd00::/8,p.example:5000";
        for yes in [
            "https://r.example/",
            "https://R.EXAMPLE./",
            "https://a.r.example:5000/",
            "https://a.below.example/",
            "https://a.star.example/",
            "http://10.1.2.3/",
            "http://192.168.1.1:80/",
            "http://[fd00::1]/",
            "http://p.example:5000/",
        ] {
            assert!(spared(hosts, yes), "{yes}");
        }
        for no in [
            "https://other.example/",
            "https://bar.example/",
            "https://below.example/",
            "https://star.example/",
            "http://11.1.2.3/",
            "http://192.168.1.2/",
            "http://[fe00::1]/",
            "http://p.example/",
        ] {
            assert!(!spared(hosts, no), "{no}");
        }
    }

    proptest! {
        #[test]
        fn any_exception_is_parsed_without_panic(text in "[a-z0-9.:*/,\\[\\] \u{e9}]{0,60}") {
            spared(&text, "https://r.example:5000/");
            spared(&text, "http://10.0.0.1/");
        }
    }
}
