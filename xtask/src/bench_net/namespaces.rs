//! Network namespaces of a benchmark: servers, the measured program, and a client.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{cmd, paths};

/// Address of the servers.
pub(super) const SERVER: &str = "192.0.2.1";
/// Address of the measured program for the client's namespace.
pub(super) const NEAR: &str = "198.51.100.1";
const HOST: &str = "192.0.2.2/24";
const CLIENT: &str = "198.51.100.2/24";

/// Namespaces that exist until this is dropped.
pub(super) struct Namespaces {
    pub(super) server: String,
    /// The one of the measured program, which has a way to the server.
    pub(super) host: String,
    /// The one of a client whose only way is to the measured program.
    pub(super) client: String,
    /// A device node of TAPs that an ordinary user may open.
    pub(super) tun: PathBuf,
}

impl Namespaces {
    pub(super) fn create() -> Result<Self> {
        let name = |part| format!("sm-bench-net-{}-{part}", std::process::id());
        let directory = paths::target().join("bench-net");
        fs::create_dir_all(&directory)?;
        let tun = directory.join(format!("tun-{}", std::process::id()));
        let all = Self {
            server: name("server"),
            host: name("host"),
            client: name("client"),
            tun,
        };
        for namespace in [&all.server, &all.host, &all.client] {
            ip(&format!("netns add {namespace}"))?;
            ip(&format!("-n {namespace} link set lo up"))?;
        }
        pair((&all.server, &format!("{SERVER}/24")), (&all.host, HOST))?;
        pair((&all.client, CLIENT), (&all.host, &format!("{NEAR}/24")))?;
        // A rival needs one.
        ip(&format!("-n {} route add default via {SERVER}", all.host))?;
        let mut mknod = cmd::command("mknod", ["-m", "666"]);
        cmd::check(mknod.arg(&all.tun).args(["c", "10", "200"]))?;
        Ok(all)
    }

    /// Returns `command` in the server's namespace.
    pub(super) fn in_server(&self, command: &Command) -> Command {
        within(&self.server, command)
    }

    /// Returns `command` in the measured program's namespace.
    pub(super) fn in_host(&self, command: &Command) -> Command {
        within(&self.host, command)
    }

    /// Returns `command` in the client's namespace.
    pub(super) fn in_client(&self, command: &Command) -> Command {
        within(&self.client, command)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for namespace in [&self.server, &self.host, &self.client] {
            let _ = ip(&format!("netns delete {namespace}"));
        }
        let _ = fs::remove_file(&self.tun);
    }
}

/// Connects two namespaces, each with an address.
fn pair((one, address): (&str, &str), (other, other_address): (&str, &str)) -> Result<()> {
    // The longest name of an interface is 15 characters.
    let name = |namespace: &str| namespace.rsplit('-').next().unwrap_or("peer").to_owned();
    let (first, second) = (name(other), name(one));
    ip(&format!(
        "link add {first} netns {one} type veth peer name {second} netns {other}"
    ))?;
    for (namespace, device, address) in [(one, &first, address), (other, &second, other_address)] {
        ip(&format!(
            "-n {namespace} address add {address} dev {device}"
        ))?;
        ip(&format!("-n {namespace} link set {device} up"))?;
    }
    Ok(())
}

fn ip(arguments: &str) -> Result<()> {
    cmd::check(&mut cmd::command("ip", arguments.split(' '))).context("cannot set up a namespace")
}

fn within(namespace: &str, command: &Command) -> Command {
    let mut inner = cmd::command("ip", ["netns", "exec", namespace]);
    inner.arg(command.get_program()).args(command.get_args());
    inner
}
