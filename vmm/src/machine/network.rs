//! The network of a machine: an engine on an event loop of its own, which exists only if the
//! machine has a network.

mod addresses;
mod log;

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use sm_control::config::{HOST_GATEWAY, NetworkConfigV1, NetworkMode};
use sm_control::with_causes;
use sm_devices_net::dns::ResolvConf;
use sm_devices_net::engine::{
    EgressRequest, EgressVerdict, EngineBackend, EngineConfig, EngineLimits, FrameCapture,
    NameServers, NetEngine, NetRate,
};
use sm_devices_net::policy::{NetPolicy, NetRule, PolicyGate, PolicyHandle};
use sm_devices_net::wire::MacAddress;
use sm_devices_net::{Net, NetConfig};
use sm_event_loop::EventLoop;
use sm_guest_proto::control::{GuestAddress, GuestDns, GuestNetwork, Refresh};
use sm_vmm_core::devices::DeviceConfig;
use sm_vmm_core::layout::SLOT_NET;

use self::log::NetworkLog;
use super::failed;

/// MAC address of the device when the machine is made. The agent sets another one, which is no
/// other machine's, with the guest's identity.
const MAC: [u8; 6] = [2, 0x73, 0x6d, 0, 0, 1];
/// That of the gateway.
const GATEWAY_MAC: MacAddress = MacAddress([2, 0x73, 0x6d, 0, 0, 2]);
/// Smallest MTU of a network in bytes: IPv6 needs it (RFC 8200 5).
pub const MIN_MTU: u16 = 1280;
/// Largest MTU of a network in bytes. The driver never uses a larger one than the device has announced, so that of
/// all machines is this one, and the agent sets that of the VM: base snapshots are common.
pub const MAX_MTU: u16 = 65_520;
/// Name server of the host's configuration (resolv.conf(5)).
const RESOLV_CONF: &str = "/etc/resolv.conf";
const MAX_RESOLV_CONF: u64 = 64 << 10;
const DNS_PORT: u16 = 53;
/// Most bytes of captured frames.
const MAX_CAPTURE: u64 = 1 << 30;
/// Most search domains and options that a guest gets.
const MAX_WORDS: usize = 16;
/// Longest search domain and option.
const MAX_NAME: usize = 253;
const MAX_OPTION: usize = 64;
/// Names by which a guest finds the host.
const HOST_NAMES: [&str; 2] = ["host.sm.internal", "host.docker.internal"];

/// The network of a machine.
pub(super) struct Network {
    user: Option<UserNetwork>,
    /// The event loop of a device that ends connections only.
    _ending: Option<EventLoop>,
}

/// A network of the machine's process.
struct UserNetwork {
    event_loop: EventLoop,
    addresses: EngineConfig,
    /// The guest has an IPv6 address.
    has_v6: bool,
    policy: PolicyHandle,
}

impl Network {
    /// Starts the network of a configuration, which may have this many descriptors and has its
    /// log in a directory, and returns it with its device. A workload that `is_continued` may
    /// have connections, which end also if there is no network any more.
    ///
    /// # Errors
    /// A sentence about the configuration, or about the host.
    pub(super) fn start(
        config: &NetworkConfigV1,
        descriptors: usize,
        directory: &Path,
        is_continued: bool,
    ) -> Result<(Self, DeviceConfig), String> {
        let device = NetConfig::new(MAC).mtu(MAX_MTU);
        let in_slot = |device| DeviceConfig::new(SLOT_NET, Arc::new(Mutex::new(device)));
        match config.mode {
            NetworkMode::None if is_continued => {
                // Nothing is allowed; the guest gets resets, and then takes its driver off.
                let refuse = |_: &EgressRequest| EgressVerdict::Prohibit;
                let engine = NetEngine::new(EngineConfig::default(), Box::new(refuse));
                let backend = Box::new(EngineBackend::new(engine));
                let event_loop = start_event_loop()?;
                let device = in_slot(Net::with_backend(device, backend));
                let device = device.on(event_loop.handle());
                let network = Self {
                    user: None,
                    _ending: Some(event_loop),
                };
                Ok((network, device))
            }
            NetworkMode::None => {
                let network = Self {
                    user: None,
                    _ending: None,
                };
                Ok((network, in_slot(Net::new(device))))
            }
            NetworkMode::User => {
                let addresses = free_addresses(config, descriptors);
                let gate = PolicyGate::following_host(policy(config)?, &addresses)
                    .map_err(failed("follow the addresses of the host"))?;
                let user = UserNetwork {
                    event_loop: start_event_loop()?,
                    addresses,
                    has_v6: addresses::has_v6_route(),
                    policy: gate.handle(),
                };
                let mut engine = NetEngine::new(addresses, Box::new(gate));
                engine.set_name_servers(name_servers(config));
                if let Some(rate) = config.rate {
                    engine.set_rate(NetRate::both(rate));
                }
                if let Some(path) = &config.capture {
                    engine.set_capture(Some(capture(path)?));
                }
                let mut log = NetworkLog::new(directory);
                engine.set_event_sink(Box::new(move |event| log.note(event)));
                let backend = Box::new(EngineBackend::new(engine));
                let device = in_slot(Net::with_backend(device, backend));
                let device = device.on(user.event_loop.handle());
                let network = Self {
                    user: Some(user),
                    _ending: None,
                };
                Ok((network, device))
            }
            other => Err(format!("this program does not know the network {other:?}")),
        }
    }

    /// Replaces the rules by those of a configuration.
    ///
    /// # Errors
    /// One of them is invalid; a sentence.
    pub(super) fn set_rules(&self, config: &NetworkConfigV1) -> Result<(), String> {
        let policy = policy(config)?;
        if let Some(user) = &self.user {
            user.policy.set_policy(policy);
        }
        Ok(())
    }

    /// Adds the network to the identity of a guest.
    pub(super) fn describe(&self, config: &NetworkConfigV1, refresh: &mut Refresh) {
        let host = self.user.as_ref().map(|_| resolv_conf());
        refresh.dns = guest_dns(config, host);
        refresh.hosts = config.hosts.clone();
        if let Some(user) = &self.user {
            refresh.network = Some(user.guest_network(config.mtu));
            let gateway = IpAddr::from(user.addresses.gateway_v4);
            refresh.dns.nameservers = vec![gateway];
            let names = HOST_NAMES.iter().filter(|name| {
                let mut given = config.hosts.iter();
                !given.any(|(_, given)| given.split_whitespace().any(|it| it == **name))
            });
            let names: Vec<_> = names.copied().collect();
            if !names.is_empty() {
                let line = (HOST_GATEWAY.to_owned(), names.join(" "));
                refresh.hosts.push(line);
            }
            for (address, _) in &mut refresh.hosts {
                if address == HOST_GATEWAY {
                    *address = gateway.to_string();
                }
            }
        }
        // Without a network, the host is nowhere.
        refresh.hosts.retain(|(address, _)| address != HOST_GATEWAY);
    }
}

impl UserNetwork {
    fn guest_network(&self, mtu: u16) -> GuestNetwork {
        let EngineConfig {
            gateway_v4,
            guest_v4,
            gateway_v6,
            guest_v6,
            ..
        } = self.addresses;
        let mut addresses = vec![GuestAddress {
            address: guest_v4.into(),
            prefix: addresses::PREFIX_V4,
            gateway: Some(gateway_v4.into()),
        }];
        // A guest that had an address would try those of names, and wait.
        if self.has_v6 {
            addresses.push(GuestAddress {
                address: guest_v6.into(),
                prefix: 64,
                gateway: Some(gateway_v6.into()),
            });
        }
        GuestNetwork {
            mtu,
            addresses,
            gateway_mac: self.addresses.gateway_mac.to_string(),
        }
    }
}

fn start_event_loop() -> Result<EventLoop, String> {
    EventLoop::spawn("sm-network").map_err(failed("start the network's event loop"))
}

/// Returns addresses that are free on this host, and limits.
fn free_addresses(config: &NetworkConfigV1, descriptors: usize) -> EngineConfig {
    let mut engine = EngineConfig::default();
    (engine.gateway_v4, engine.guest_v4) = addresses::free_subnet();
    engine.gateway_mac = GATEWAY_MAC;
    engine.mtu = config.mtu;
    engine.limits = limits(descriptors);
    engine
}

/// Divides descriptors among the flows of an engine.
fn limits(descriptors: usize) -> EngineLimits {
    let all = EngineLimits::default();
    let part = |most: usize, of: usize| most.min((descriptors * of / 100).max(1));
    let mut limits = all;
    limits.tcp_flows = part(all.tcp_flows, 75);
    limits.tcp_connecting = part(all.tcp_connecting, 20);
    limits.udp_flows = part(all.udp_flows, 18);
    limits.echoes = part(all.echoes, 2);
    limits.lookups = part(all.lookups, 5);
    limits
}

/// Returns the rules of a configuration.
fn policy(config: &NetworkConfigV1) -> Result<NetPolicy, String> {
    let parse = |rules: &[String]| -> Result<Vec<NetRule>, String> {
        let rules = rules.iter().map(|rule| {
            rule.parse().map_err(|error| {
                format!("a rule of the network is invalid: {}", with_causes(&error))
            })
        });
        rules.collect()
    };
    Ok(NetPolicy::new(parse(&config.allow)?, parse(&config.deny)?))
}

/// Begins a capture of the guest's frames.
fn capture(path: &Path) -> Result<FrameCapture, String> {
    let mut options = OpenOptions::new();
    let file = options.create(true).write(true).truncate(true).mode(0o600);
    let begun = file
        .open(path)
        .and_then(|file| FrameCapture::new(file, MAX_CAPTURE));
    begun.map_err(|error| format!("cannot write packets to {path:?}: {error}"))
}

/// Returns the name servers that the guest's questions are passed on to.
fn name_servers(config: &NetworkConfigV1) -> NameServers {
    if config.dns.is_empty() {
        return NameServers::File(RESOLV_CONF.into());
    }
    let servers = config.dns.iter();
    NameServers::Fixed(servers.map(|ip| SocketAddr::new(*ip, DNS_PORT)).collect())
}

/// Returns the host's configuration of its resolver.
fn resolv_conf() -> ResolvConf {
    let mut text = Vec::new();
    if let Ok(file) = File::open(RESOLV_CONF) {
        // A part of the file is better than nothing.
        let _ = file.take(MAX_RESOLV_CONF).read_to_end(&mut text);
    }
    ResolvConf::parse(&String::from_utf8_lossy(&text))
}

/// Returns the settings of the guest's resolver, with those of the host where the configuration
/// has none.
fn guest_dns(config: &NetworkConfigV1, host: Option<ResolvConf>) -> GuestDns {
    let (mut search, mut options) =
        host.map_or_else(Default::default, |it| (it.search, it.options));
    // The agent refuses others, and the host's file may have anything.
    search.retain(|word| is_word(word, "-._", MAX_NAME));
    options.retain(|word| is_word(word, "-_:", MAX_OPTION));
    let given = |given: &[String], host: Vec<String>| {
        let mut words = if given.is_empty() {
            host
        } else {
            given.to_vec()
        };
        words.truncate(MAX_WORDS);
        words
    };
    let mut search = given(&config.dns_search, search);
    search.retain(|domain| domain != ".");
    GuestDns {
        nameservers: config.dns.clone(),
        search,
        options: given(&config.dns_options, options),
    }
}

/// Returns true for a word of letters, digits and `others`.
fn is_word(word: &str, others: &str, longest: usize) -> bool {
    let is_valid = |it: char| it.is_ascii_alphanumeric() || others.contains(it);
    (1..=longest).contains(&word.len()) && word.chars().all(is_valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(config: &NetworkConfigV1) -> Refresh {
        let (network, _device) = Network::start(config, 1000, Path::new("/"), false).unwrap();
        let mut refresh = Refresh::default();
        network.describe(config, &mut refresh);
        refresh
    }

    #[test]
    fn a_guest_gets_the_addresses_of_its_network() {
        let mut config = NetworkConfigV1::default();
        config.mtu = 1400;
        config.dns = vec!["192.0.2.1".parse().unwrap()];
        config.dns_search = vec![".".into()];
        config.dns_options = vec!["ndots:3".into()];
        config.hosts = vec![
            ("192.0.2.9".into(), "db".into()),
            (HOST_GATEWAY.into(), "me host.docker.internal".into()),
        ];
        let refresh = described(&config);
        let network = refresh.network.unwrap();
        assert_eq!(
            (network.mtu, network.gateway_mac.as_str()),
            (1400, "02:73:6d:00:00:02")
        );
        let v4 = &network.addresses[0];
        assert_eq!(v4.prefix, 30);
        let gateway = v4.gateway.unwrap();
        // Its name server is the gateway, which asks the one that was given.
        assert_eq!(refresh.dns.nameservers, [gateway]);
        assert_eq!(refresh.dns.search, [""; 0]);
        assert_eq!(refresh.dns.options, ["ndots:3"]);
        assert_eq!(
            refresh.hosts,
            [
                ("192.0.2.9".to_owned(), "db".to_owned()),
                (gateway.to_string(), "me host.docker.internal".to_owned()),
                (gateway.to_string(), "host.sm.internal".to_owned()),
            ]
        );
        assert_eq!(
            name_servers(&config),
            NameServers::Fixed(vec!["192.0.2.1:53".parse().unwrap()])
        );
    }

    #[test]
    fn a_guest_without_a_network_gets_what_was_given() {
        let mut config = NetworkConfigV1::none();
        config.dns = vec!["192.0.2.1".parse().unwrap()];
        config.hosts = vec![
            (HOST_GATEWAY.into(), "me".into()),
            ("192.0.2.9".into(), "db".into()),
        ];
        let refresh = described(&config);
        assert_eq!(refresh.network, None);
        assert_eq!(refresh.dns.nameservers, config.dns);
        assert_eq!(refresh.dns.search, [""; 0]);
        assert_eq!(refresh.hosts, [("192.0.2.9".to_owned(), "db".to_owned())]);
    }

    #[test]
    fn a_guest_gets_what_it_understands_of_the_hosts_resolver() {
        let host = ResolvConf::parse("search a.example b/c d_e.example\noptions ndots:2 x=y\n");
        let dns = guest_dns(&NetworkConfigV1::default(), Some(host));
        assert_eq!(dns.search, ["a.example", "d_e.example"]);
        assert_eq!(dns.options, ["ndots:2"]);
    }

    #[test]
    fn frames_are_written_to_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = NetworkConfigV1::default();
        config.capture = Some(directory.path().join("p"));
        std::fs::write(directory.path().join("p"), [0; 100]).unwrap();
        drop(Network::start(&config, 1000, Path::new("/"), false).unwrap());
        let written = std::fs::read(directory.path().join("p")).unwrap();
        assert_eq!(
            (written.len(), &written[..4]),
            (24, &[0xd4, 0xc3, 0xb2, 0xa1][..])
        );
        config.capture = Some(directory.path().to_owned());
        let error = Network::start(&config, 1000, Path::new("/"), false)
            .err()
            .unwrap();
        assert!(error.contains("cannot write packets"), "{error}");
    }

    #[test]
    fn a_rule_that_is_none_is_named() {
        let mut config = NetworkConfigV1::default();
        config.deny = vec!["tcp:".into()];
        let error = Network::start(&config, 1000, Path::new("/"), false)
            .err()
            .unwrap();
        assert!(error.contains("\"tcp:\""), "{error}");
    }

    #[test]
    fn flows_fit_in_the_descriptors() {
        for descriptors in [100, 1000, 5440, 1 << 20] {
            let limits = limits(descriptors);
            let sum = limits.tcp_flows + limits.udp_flows + limits.echoes + limits.lookups;
            assert!(sum <= descriptors, "{descriptors}: {sum}");
        }
        assert_eq!(limits(1 << 20).tcp_flows, EngineLimits::default().tcp_flows);
        assert!(limits(0).tcp_flows > 0);
    }
}
