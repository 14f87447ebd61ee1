//! Networks of virtual machines, and rules about what a guest may reach.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::str::FromStr;

use sm_control::config::HOST_GATEWAY;
pub use sm_control::config::{NetworkConfigV1, NetworkMode};
pub use sm_vmm::network::{NetRule, NetRuleError, RuleTarget};
use thiserror::Error;

use crate::OptionError;

/// Smallest MTU: IPv6 needs it (RFC 8200 5).
pub const MIN_MTU: u16 = sm_vmm::network::MIN_MTU;
/// Largest MTU.
pub const MAX_MTU: u16 = sm_vmm::network::MAX_MTU;
/// Most entries of each list.
const MAX_ENTRIES: usize = 1000;
/// Most name servers, domains and options of a guest's resolver.
const MAX_RESOLVER: usize = 16;

/// Longest name, and longest option of the resolver.
const MAX_NAME: usize = 253;
const MAX_OPTION: usize = 64;

/// Options of a VM's network. A clone of a snapshot has what its snapshot has where nothing is
/// set here.
///
/// ```
/// use sm_runtime::network::NetworkOptions;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut network = NetworkOptions::default();
/// network.allow.push("tcp:*.example.com:443".parse()?);
/// network.hosts.push("db:192.0.2.7".parse()?);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetworkOptions {
    /// Its kind; [`NetworkMode::User`] by default.
    pub mode: Option<NetworkMode>,
    /// Rules about addresses that the guest may reach; without one, public addresses.
    pub allow: Vec<NetRule>,
    /// Rules about addresses that it may not reach, even if another rule allows them.
    pub deny: Vec<NetRule>,
    /// Name servers instead of those of the host.
    pub dns: Vec<IpAddr>,
    /// Domains in which short names are searched, instead of those of the host; `.` for none.
    pub dns_search: Vec<String>,
    /// Options of the resolver (resolv.conf(5)), instead of those of the host.
    pub dns_options: Vec<String>,
    /// Further lines of `/etc/hosts`.
    pub hosts: Vec<HostLine>,
    /// MAC address. Without one, the guest gets another at each start.
    pub mac: Option<GuestMac>,
    /// Maximum length of an IP packet in bytes, from [`MIN_MTU`] to [`MAX_MTU`]; 1500 by
    /// default.
    pub mtu: Option<u16>,
    /// Bytes in a second that the guest may send, and as many that it may receive.
    pub rate: Option<NonZeroU64>,
    /// File to which the guest's frames are written, at most 1 GiB, in the format of tcpdump(8).
    /// It is created or overwritten at each start; a clone has its own.
    pub capture: Option<PathBuf>,
}

impl NetworkOptions {
    /// Returns a configuration with these changes.
    pub(crate) fn applied_to(&self, config: &NetworkConfigV1) -> NetworkConfigV1 {
        fn set<T: ToString>(to: &mut Vec<String>, given: &[T]) {
            if !given.is_empty() {
                *to = given.iter().map(ToString::to_string).collect();
            }
        }
        let mut config = config.clone();
        config.mode = self.mode.unwrap_or(config.mode);
        config.mtu = self.mtu.unwrap_or(config.mtu);
        // No two VMs have one by themselves.
        config.mac = self.mac.map(|mac| mac.to_string());
        config.capture.clone_from(&self.capture);
        config.rate = self.rate.or(config.rate);
        set(&mut config.allow, &self.allow);
        set(&mut config.deny, &self.deny);
        set(&mut config.dns_search, &self.dns_search);
        set(&mut config.dns_options, &self.dns_options);
        if !self.dns.is_empty() {
            config.dns.clone_from(&self.dns);
        }
        if !self.hosts.is_empty() {
            let lines = self.hosts.iter();
            let lines = lines.map(|line| (line.address.to_string(), line.name.clone()));
            config.hosts = lines.collect();
        }
        config
    }

    /// Checks what the types do not.
    pub(crate) fn check(&self) -> Result<(), OptionError> {
        if self.mode == Some(NetworkMode::None) && (self.rate.is_some() || self.capture.is_some()) {
            return Err(OptionError::NoNetwork);
        }
        if let Some(path) = self.capture.as_ref().filter(|path| !path.is_absolute()) {
            return Err(OptionError::CapturePath(path.clone()));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| !(MIN_MTU..=MAX_MTU).contains(mtu)) {
            return Err(OptionError::Mtu {
                mtu,
                minimum: MIN_MTU,
                maximum: MAX_MTU,
            });
        }
        let is_option = |word: &str| is_word(word, "-_:", MAX_OPTION);
        let malformed = (self.dns_search.iter().filter(|word| !is_name(word)))
            .chain(self.dns_options.iter().filter(|word| !is_option(word)));
        if let Some(word) = malformed.into_iter().next() {
            return Err(OptionError::ResolverWord(word.clone()));
        }
        for (what, count, maximum) in [
            ("rules of the network", self.allow.len(), MAX_ENTRIES),
            ("rules of the network", self.deny.len(), MAX_ENTRIES),
            ("lines of /etc/hosts", self.hosts.len(), MAX_ENTRIES),
            ("name servers", self.dns.len(), MAX_RESOLVER),
            ("search domains", self.dns_search.len(), MAX_RESOLVER),
            (
                "options of the resolver",
                self.dns_options.len(),
                MAX_RESOLVER,
            ),
        ] {
            if count > maximum {
                return Err(OptionError::TooMany {
                    what,
                    count,
                    maximum,
                });
            }
        }
        Ok(())
    }
}

/// Returns true for a host name, which may have underscores, and for `.`.
fn is_name(text: &str) -> bool {
    is_word(text, "-._", MAX_NAME)
}

/// Returns true for a word of letters, digits and `others`.
fn is_word(text: &str, others: &str, longest: usize) -> bool {
    let is_valid = |it: char| it.is_ascii_alphanumeric() || others.contains(it);
    (1..=longest).contains(&text.len()) && text.chars().all(is_valid)
}

/// An address of a [`HostLine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HostAddress {
    /// This address.
    Address(IpAddr),
    /// The host of the VM. Rules decide whether the guest may reach it.
    Gateway,
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Gateway => f.write_str(HOST_GATEWAY),
        }
    }
}

/// A line of `/etc/hosts`: `NAME:ADDRESS` or `NAME:host-gateway`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct HostLine {
    /// The name.
    pub name: String,
    /// Its address.
    pub address: HostAddress,
}

/// The text is none of the form that was expected.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NetworkOptionError {
    /// It is not `NAME:ADDRESS`.
    #[error("\"{0}\" is not a host: write NAME:ADDRESS or NAME:host-gateway")]
    Host(String),
    /// It is not the address of a station.
    #[error(
        "\"{0}\" is not a MAC address of one station: write six hexadecimal numbers, the first \
         one even, as in 02:00:00:00:00:07"
    )]
    Mac(String),
}

impl FromStr for HostLine {
    type Err = NetworkOptionError;

    fn from_str(text: &str) -> Result<Self, NetworkOptionError> {
        let malformed = || NetworkOptionError::Host(text.to_owned());
        // Docker permits both; colons are also of addresses.
        let (name, address) = text.split_once([':', '=']).ok_or_else(malformed)?;
        let bare = address
            .strip_prefix('[')
            .and_then(|it| it.strip_suffix(']'));
        let address = match bare.unwrap_or(address) {
            HOST_GATEWAY => HostAddress::Gateway,
            address => HostAddress::Address(address.parse().map_err(|_| malformed())?),
        };
        if !is_name(name) {
            return Err(malformed());
        }
        Ok(Self {
            name: name.to_owned(),
            address,
        })
    }
}

/// MAC address of a guest, which is that of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestMac([u8; 6]);

impl GuestMac {
    /// Returns an address; `None` if it is a group's, or all zero.
    #[must_use]
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        let [first, ..] = bytes;
        (first & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// Returns its bytes.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for GuestMac {
    type Err = NetworkOptionError;

    fn from_str(text: &str) -> Result<Self, NetworkOptionError> {
        let digits = |part: &str| {
            let is_byte = part.len() == 2 && part.bytes().all(|it| it.is_ascii_hexdigit());
            is_byte.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        };
        let parts: Option<Vec<u8>> = text.split([':', '-']).map(digits).collect();
        let bytes = parts.and_then(|parts| parts.try_into().ok());
        let mac = bytes.and_then(Self::new);
        mac.ok_or_else(|| NetworkOptionError::Mac(text.to_owned()))
    }
}

impl fmt::Display for GuestMac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_parsed_as_docker_does() {
        for (text, name, address) in [
            ("db:192.0.2.1", "db", "192.0.2.1"),
            ("db=192.0.2.1", "db", "192.0.2.1"),
            ("db:::1", "db", "::1"),
            ("db:[fd00::1]", "db", "fd00::1"),
            ("db=fd00::1", "db", "fd00::1"),
            ("me:host-gateway", "me", "host-gateway"),
        ] {
            let line: HostLine = text.parse().unwrap();
            assert_eq!(
                (line.name.as_str(), line.address.to_string().as_str()),
                (name, address)
            );
        }
        for text in [
            "",
            "db",
            "db:",
            ":1.1.1.1",
            "a b:1.1.1.1",
            "a\n:1.1.1.1",
            "db:1.1.1",
            "a#:::1",
        ] {
            assert!(text.parse::<HostLine>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn macs_are_of_one_station() {
        let mac: GuestMac = "02:00:aB-00-00:07".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:ab:00:00:07");
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "01:00:00:00:00:01",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "02:0:00:00:00:07",
            "+2:00:00:00:00:07",
        ] {
            assert!(text.parse::<GuestMac>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_clone_keeps_what_is_not_set() {
        let mut made_of = NetworkConfigV1::none();
        made_of.deny = vec!["10.0.0.0/8".into()];
        made_of.mac = Some("02:00:00:00:00:07".into());
        made_of.mtu = 9000;
        made_of.rate = NonZeroU64::new(7);
        made_of.capture = Some("/p".into());
        let mut expected = made_of.clone();
        // Two VMs with one address would be one.
        expected.mac = None;
        expected.capture = None;
        assert_eq!(NetworkOptions::default().applied_to(&made_of), expected);
        let options = NetworkOptions {
            mode: Some(NetworkMode::User),
            allow: vec!["private".parse().unwrap()],
            hosts: vec!["me:host-gateway".parse().unwrap()],
            ..NetworkOptions::default()
        };
        expected.mode = NetworkMode::User;
        expected.allow = vec!["private".into()];
        expected.hosts = vec![("host-gateway".into(), "me".into())];
        assert_eq!(options.applied_to(&made_of), expected);
    }

    #[test]
    fn without_a_network_nothing_is_captured() {
        let mut options = NetworkOptions {
            mode: Some(NetworkMode::None),
            capture: Some("/p".into()),
            ..NetworkOptions::default()
        };
        assert_eq!(options.check(), Err(OptionError::NoNetwork));
        options.mode = None;
        options.check().unwrap();
        options.capture = Some("p".into());
        assert_eq!(options.check(), Err(OptionError::CapturePath("p".into())));
    }

    #[test]
    fn limits_are_checked() {
        let check = |change: &dyn Fn(&mut NetworkOptions)| {
            let mut options = NetworkOptions::default();
            change(&mut options);
            options.check()
        };
        check(&|it| it.mtu = Some(1280)).unwrap();
        assert!(matches!(
            check(&|it| it.mtu = Some(1279)),
            Err(OptionError::Mtu { mtu: 1279, .. })
        ));
        assert!(check(&|it| it.mtu = Some(u16::MAX)).is_err());
        let search = |word: &str| check(&|it| it.dns_search = vec![word.to_owned()]);
        search(".").unwrap();
        for word in ["", "a b", "a\nnameserver 1.1.1.1", "a#", "a:1"] {
            assert_eq!(
                search(word),
                Err(OptionError::ResolverWord(word.to_owned()))
            );
        }
        let many = |count| check(&|it| it.dns = vec![IpAddr::from([1, 1, 1, 1]); count]);
        many(16).unwrap();
        assert!(matches!(
            many(17),
            Err(OptionError::TooMany { count: 17, .. })
        ));
    }
}
