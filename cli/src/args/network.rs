//! Arguments about a VM's network.

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::Args;
use sm_runtime::network::{GuestMac, HostLine, NetRule, NetworkMode, NetworkOptions};

use crate::units::parse_size;

/// Options of the network of a new VM.
#[derive(Debug, Args)]
pub(crate) struct NetworkArgs {
    /// Network of the guest: user, in which its connections are those of the VM's process, or
    /// none [default: user, or the snapshot's]
    #[arg(long, alias = "net", value_name = "NETWORK", value_parser = parse_network)]
    pub(crate) network: Option<NetworkMode>,
    /// Let the guest reach only this, and what further rules allow: a host name, *.DOMAIN (all
    /// names below it), an address, ADDRESS/BITS, public, private, host, metadata or all
    /// [default: public]
    #[arg(long, value_name = RULE, value_delimiter = ',')]
    pub(crate) allow_net: Vec<NetRule>,
    /// Do not let the guest reach this, even if another rule allows it
    #[arg(long, value_name = RULE, value_delimiter = ',')]
    pub(crate) deny_net: Vec<NetRule>,
    /// Name server that answers the guest's questions [default: those of the host]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) dns: Vec<IpAddr>,
    /// Domain in which the guest searches short names, or . for none [default: those of the
    /// host]
    #[arg(long, value_name = "DOMAIN")]
    pub(crate) dns_search: Vec<String>,
    /// Option of the guest's resolver, such as ndots:2 [default: those of the host]
    #[arg(long, alias = "dns-opt", value_name = "OPTION")]
    pub(crate) dns_option: Vec<String>,
    /// Add a line to the guest's /etc/hosts
    #[arg(long, value_name = "NAME:ADDRESS|NAME:host-gateway")]
    pub(crate) add_host: Vec<HostLine>,
    /// MAC address of the guest [default: another one at each start]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) mac_address: Option<GuestMac>,
    /// Largest packet of the network in bytes [default: 1500]
    #[arg(long, value_name = "BYTES")]
    pub(crate) mtu: Option<u16>,
    /// Bytes that the guest may send in a second, such as 10m, and as many that it may receive
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    pub(crate) net_rate: Option<NonZeroU64>,
    /// Write the guest's packets to a file, for tcpdump or Wireshark; it is overwritten at each
    /// start, and at most 1 GiB long
    #[arg(long, value_name = "FILE", value_parser = parse_absolute)]
    pub(crate) pcap: Option<PathBuf>,
}

/// The form of a rule.
pub(super) const RULE: &str = "[tcp:|udp:|icmp:]TARGET[:PORT|:FIRST-LAST]";

impl NetworkArgs {
    /// Returns the options for the library.
    pub(crate) fn options(&self) -> NetworkOptions {
        let mut options = NetworkOptions::default();
        options.mode = self.network;
        options.allow.clone_from(&self.allow_net);
        options.deny.clone_from(&self.deny_net);
        options.dns.clone_from(&self.dns);
        options.dns_search.clone_from(&self.dns_search);
        options.dns_options.clone_from(&self.dns_option);
        options.hosts.clone_from(&self.add_host);
        options.mac = self.mac_address;
        options.mtu = self.mtu;
        options.rate = self.net_rate;
        options.capture.clone_from(&self.pcap);
        options
    }
}

/// Parses a number of bytes in a second.
fn parse_rate(text: &str) -> Result<NonZeroU64, String> {
    let rate = parse_size(text)?;
    NonZeroU64::new(rate)
        .ok_or_else(|| "with 0, nothing could be sent: write --network none".into())
}

/// Parses a path, relative to the current directory.
fn parse_absolute(text: &str) -> Result<PathBuf, String> {
    std::path::absolute(text).map_err(|error| format!("\"{text}\" is no path: {error}"))
}

/// Parses the kind of a network, also by Docker's names for that of a container.
fn parse_network(text: &str) -> Result<NetworkMode, String> {
    match text {
        "user" | "bridge" | "default" => Ok(NetworkMode::User),
        "none" => Ok(NetworkMode::None),
        "host" => Err(
            "a VM has a kernel of its own and cannot use the interfaces of the host: leave the \
             option out, reach the host by --allow-net host, and publish ports with -p"
                .to_owned(),
        ),
        _ if text.starts_with("container:") => Err(
            "a VM has a kernel of its own and shares no network namespace with another: publish \
             ports with -p"
                .to_owned(),
        ),
        _ => Err("networks of several VMs are not there yet: write user or none".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_not_zero() {
        assert_eq!(parse_rate("10m"), Ok(NonZeroU64::new(10 << 20).unwrap()));
        assert!(parse_rate("0").is_err() && parse_rate("fast").is_err());
        assert!(parse_absolute("x.pcap").unwrap().is_absolute());
    }

    #[test]
    fn networks_have_dockers_names() {
        for text in ["user", "bridge", "default"] {
            assert_eq!(parse_network(text), Ok(NetworkMode::User));
        }
        assert_eq!(parse_network("none"), Ok(NetworkMode::None));
        for (text, words) in [
            ("host", "--allow-net host"),
            ("container:web", "namespace"),
            ("backend", "not there yet"),
        ] {
            let error = parse_network(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
