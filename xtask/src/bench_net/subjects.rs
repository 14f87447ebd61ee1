//! The measured programs.

use std::path::Path;
use std::process::Command;

use super::namespaces::{NEAR, Namespaces, SERVER};

/// A way from a client to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    /// The engine behind a TAP, with an MTU of 1500.
    Engine,
    /// pasta as an ordinary user, with this MTU.
    Pasta(u32),
    /// slirp4netns as an ordinary user, with this MTU.
    Slirp(u32),
    /// A program that copies between two sockets.
    Pump,
    /// No program.
    Direct,
}

/// Runs pasta, which makes the client's namespace. It is given the device node, the MTU and
/// the client.
const PASTA: &str = r#"
mount --bind "$1" /dev/net/tun && cd / && mtu=$2 && shift 2
exec setpriv --reuid 65534 --regid 65534 --clear-groups \
    env HOME=/ pasta --quiet --config-net --no-map-gw --mtu "$mtu" -- "$@" 2>/dev/null
"#;

/// Runs slirp4netns for a namespace that another process makes, which continues as the client
/// when the interface is ready. It is given the same.
const SLIRP: &str = r#"
mount --bind "$1" /dev/net/tun && cd / && mtu=$2 && shift 2
user='setpriv --reuid 65534 --regid 65534 --clear-groups'
ways=$(mktemp -d) && chmod 755 "$ways" && mkfifo -m 666 "$ways/made" "$ways/ready"
trap 'rm -rf "$ways"' EXIT
$user unshare --user --map-root-user --net sh -c '
    ways=$1 && shift
    echo $$ >"$ways/made" && head -c 1 "$ways/ready" >/dev/null && exec "$@"' sh "$ways" "$@" &
client=$!
read inside <"$ways/made"
$user sh -c 'exec 3>"$3/ready" && exec slirp4netns --configure --mtu="$1" --ready-fd=3 \
    "$2" tap0' sh "$mtu" "$inside" "$ways" >/dev/null 2>&1 &
program=$!
wait "$client"
status=$?
kill "$program"
exit $status
"#;

impl Subject {
    pub(super) const ALL: [Self; 7] = [
        Self::Engine,
        Self::Pasta(1500),
        Self::Pasta(65520),
        Self::Slirp(1500),
        Self::Slirp(65520),
        Self::Pump,
        Self::Direct,
    ];

    pub(super) fn name(self) -> String {
        match self {
            Self::Engine => "the engine".to_owned(),
            Self::Pasta(mtu) => format!("pasta, MTU {mtu}"),
            Self::Slirp(mtu) => format!("slirp4netns, MTU {mtu}"),
            Self::Pump => "pump of two sockets".to_owned(),
            Self::Direct => "no program".to_owned(),
        }
    }

    /// Returns the address to which a client connects.
    pub(super) fn target(self) -> &'static str {
        match self {
            Self::Pump => NEAR,
            _ => SERVER,
        }
    }

    /// Returns the command that runs a client.
    pub(super) fn command(self, all: &Namespaces, tap: &Path, client: &[&str]) -> Command {
        let script = |script: &str, mtu: u32| {
            let mut shell = Command::new("sh");
            shell.args(["-c", script, "sh"]).arg(&all.tun);
            shell.arg(mtu.to_string());
            shell
        };
        let mut program = match self {
            // It prints its counters at the end.
            Self::Engine => {
                let mut shell = Command::new("sh");
                shell
                    .args(["-c", r#"exec "$@" 2>/dev/null"#, "sh"])
                    .arg(tap);
                shell
            }
            Self::Pasta(mtu) => script(PASTA, mtu),
            Self::Slirp(mtu) => script(SLIRP, mtu),
            Self::Pump | Self::Direct => Command::new("env"),
        };
        program.args(client);
        match self {
            Self::Pump => all.in_client(&program),
            _ => all.in_host(&program),
        }
    }
}
