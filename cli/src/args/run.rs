//! Arguments of `sm run` and `sm exec`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use sm_runtime::image::Platform;
use sm_runtime::publish::Ports;
use sm_runtime::volumes::Mount;
use sm_runtime::{Publication, RootStorage};

use super::life::LifeArgs;
use super::network::NetworkArgs;
use super::privileges::PrivilegeArgs;
use super::{IMAGE_HELP, PLATFORM, PLATFORM_HELP};
use crate::units::{self, parse_cpus, parse_publish_wait, parse_size};

/// Options of a command in a guest, either the workload or an exec.
#[derive(Debug, Args)]
pub(crate) struct ProcessArgs {
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Set an environment variable (NAME=VALUE, or NAME for the value in this environment)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory in the guest
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
}

impl ProcessArgs {
    /// Returns the entries of environment files and options.
    ///
    /// # Errors
    /// A file that cannot be read, or an invalid line.
    pub(crate) fn environment(&self) -> anyhow::Result<Vec<String>> {
        let mut environment = Vec::new();
        for path in &self.env_file {
            environment.extend(units::read_env_file(path)?);
        }
        for entry in &self.env {
            environment.extend(units::env_entry(entry)?);
        }
        Ok(environment)
    }
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Run in the background and print the VM's ID
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Print the duration of each phase
    #[arg(long)]
    pub(crate) timings: bool,
    /// Write the ID of the VM's process on the host to a file
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) create: CreateArgs,
}

/// Options of a new VM.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    pub(crate) life: LifeArgs,
    #[command(flatten)]
    pub(crate) privileges: PrivilegeArgs,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    /// Remove the VM when it exits
    #[arg(long)]
    pub(crate) rm: bool,
    /// Condition for asking a registry for the image
    #[arg(long, value_name = "WHEN", value_enum, default_value = "missing")]
    pub(crate) pull: Pull,
    #[arg(long, value_name = PLATFORM, help = PLATFORM_HELP)]
    pub(crate) platform: Option<Platform>,
    /// Name of the VM
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Add a group, by name or number
    #[arg(long, value_name = "GROUP")]
    pub(crate) group_add: Vec<String>,
    /// Program to run instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// Host name of the guest
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    #[command(flatten)]
    pub(crate) network: NetworkArgs,
    /// Publish a port of the guest on the host: on 127.0.0.1 unless an address is given,
    /// on a port that the system chooses unless one is given; auto publishes the first
    /// port on which the guest listens. Ranges: 8000-8010:9000-9010
    #[arg(short, long, value_name = "[[IP:]HOST:]GUEST[/tcp]")]
    pub(crate) publish: Vec<Ports>,
    /// Time that a connection waits for a listener in the guest, such as 500ms, 30s or 2m
    #[arg(long, value_name = "DURATION", value_parser = parse_publish_wait, default_value = "1s")]
    pub(crate) publish_wait: Duration,
    /// Publish a port of the guest to TLS clients; the guest receives plain bytes.
    /// Options: cert=FILE and key=FILE (PEM; without them the VM creates a self-signed
    /// certificate, see "sm port"), name=NAME (of that certificate), alpn=PROTOCOL,
    /// sni=NAME:GUEST (another port for that server name)
    #[arg(long, value_name = "[[IP:]HOST:]GUEST[,OPTION=VALUE]...", value_parser = Publication::tls)]
    pub(crate) publish_tls: Vec<Publication>,
    /// Publish a port of the guest as a unix socket
    #[arg(long, value_name = "PATH:GUEST", value_parser = Publication::unix)]
    pub(crate) publish_unix: Vec<Publication>,
    /// Accept connections that a router hands over on a unix socket, for a port of the
    /// guest or the first on which it listens
    #[arg(long, value_name = "PATH[:GUEST]", value_parser = Publication::handoff)]
    pub(crate) handoff: Vec<Publication>,
    /// Make the guest's vsock ports reachable through a unix socket, with the protocol of
    /// Firecracker and Cloud Hypervisor
    #[arg(long, value_name = "PATH", value_parser = Publication::hybrid)]
    pub(crate) hybrid_vsock: Option<Publication>,
    /// Mount a directory or file of the host (a source with /), or a volume, which is created
    /// if it does not exist; without a source, an anonymous volume, which --rm and "sm rm -v"
    /// remove. Options: ro; nocopy (leave an empty volume empty); for a path of the host,
    /// owner=squash|keep|UID:GID, chown=xattr|ignore|deny and watch (notify programs in the
    /// guest of changes)
    #[arg(short, long, value_name = "[SOURCE:]TARGET[:OPTION[,OPTION]...]", value_parser = Mount::from_volume_option)]
    pub(crate) volume: Vec<Mount>,
    /// Mount a volume, a path of the host or guest memory: type=volume|bind|tmpfs,target=PATH,
    /// and source=NAME or source=PATH, readonly, volume-nocopy, owner=OWNER, chown=EFFECT, watch,
    /// tmpfs-size=SIZE or tmpfs-mode=MODE
    #[arg(long, value_name = "OPTION=VALUE[,OPTION=VALUE]...", value_parser = Mount::from_mount_option)]
    pub(crate) mount: Vec<Mount>,
    /// Mount the volumes and host directories of another VM, read-only with ro
    #[arg(long, value_name = "VM[:ro]", value_parser = parse_volumes_from)]
    pub(crate) volumes_from: Vec<(String, bool)>,
    /// Mount guest memory. Options: size=SIZE, mode=MODE, ro
    #[arg(long, value_name = "TARGET[:OPTION[,OPTION]...]", value_parser = Mount::from_tmpfs_option)]
    pub(crate) tmpfs: Vec<Mount>,
    /// Guest memory, such as 256m or 1g; at least 64m [default: 512m]
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory: Option<u64>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N", value_parser = parse_cpus)]
    pub(crate) cpus: Option<u32>,
    /// Guest kernel to boot
    #[arg(long, value_name = "PATH")]
    pub(crate) kernel: Option<PathBuf>,
    /// Words to append to the guest kernel's command line
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) kernel_args: String,
    /// Boot the kernel, even if a snapshot could be restored
    #[arg(long)]
    pub(crate) cold: bool,
    /// Way of restoring memory from a snapshot: mapped, mapped and read at once, or
    /// copied on access (needs root)
    #[arg(long, value_name = "HOW", value_enum, default_value = "map")]
    pub(crate) paging: Paging,
    /// Mount the image read-only, without a writable layer
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Size of /dev/shm [default: 64m]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) shm_size: Option<u64>,
    /// Storage for changes to the root: a disk, which stays until the VM is removed, or
    /// guest memory [default: disk]
    #[arg(long, value_name = "STORAGE", value_enum)]
    pub(crate) root: Option<Root>,
    /// Option of that storage: size=SIZE limits changes [default: size=64g for a disk, half
    /// of the memory for tmpfs]
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_storage_size)]
    pub(crate) storage_opt: Option<u64>,
    /// Resource limit of the command
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub(crate) ulimit: Vec<String>,
    /// Signal that asks the command to exit [default: the image's, else SIGTERM]
    #[arg(long, value_name = "SIGNAL")]
    pub(crate) stop_signal: Option<String>,
    /// Seconds between the stop signal and SIGKILL [default: 10, or the snapshot's]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) stop_timeout: Option<u64>,
    /// Time limit for the start of the guest, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub(crate) start_timeout: u64,
    /// Print a JSON object about the VM: its identity to standard output, or, when its
    /// command runs in the foreground, identity, exit status and timings to standard
    /// error at the exit
    #[arg(long)]
    pub(crate) json: bool,
    /// Continue the workload of a snapshot instead of starting an image
    #[arg(long, value_name = "SNAPSHOT", conflicts_with_all = ["image", "interactive", "tty", "cold", "kernel", "pull", "platform"])]
    pub(crate) from: Option<String>,
    #[arg(help = IMAGE_HELP, required_unless_present = "from", default_value = "", hide_default_value = true)]
    pub(crate) image: String,
    /// Command and arguments [default: the image's]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// Condition for asking a registry for an image.
/// Storage for changes to the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Root {
    /// A sparse disk
    Disk,
    /// Guest memory
    Tmpfs,
}

impl CreateArgs {
    /// Returns the storage for changes to the root; `None` if no option was given.
    pub(crate) fn root_storage(&self) -> Option<RootStorage> {
        match (self.root, self.storage_opt) {
            (None, None) => None,
            (Some(Root::Tmpfs), limit) => Some(RootStorage::Memory { limit }),
            (Some(Root::Disk) | None, Some(bytes)) => Some(RootStorage::Disk {
                bytes: bytes.next_multiple_of(4096),
            }),
            (Some(Root::Disk), None) => Some(RootStorage::default()),
        }
    }
}

/// Parses `VM`, `VM:ro` or `VM:rw`: the VM, and whether it is read-only.
fn parse_volumes_from(text: &str) -> Result<(String, bool), String> {
    match text.split_once(':') {
        None => Ok((text.to_owned(), false)),
        Some((vm, "rw" | "z" | "Z")) => Ok((vm.to_owned(), false)),
        Some((vm, "ro")) => Ok((vm.to_owned(), true)),
        Some((_, other)) => Err(format!("\"{other}\" is no mode: write ro or rw")),
    }
}

/// Parses `size=SIZE`.
fn parse_storage_size(text: &str) -> Result<u64, String> {
    match text.split_once('=') {
        Some(("size", size)) => parse_size(size),
        _ => Err("the only option is size=SIZE".to_owned()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Pull {
    /// At each start
    Always,
    /// If the store does not have it
    Missing,
    /// Never
    Never,
}

/// See [`sm_runtime::Paging`].
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Paging {
    Map,
    Prefault,
    Userfault,
}

impl From<Paging> for sm_runtime::Paging {
    fn from(paging: Paging) -> Self {
        match paging {
            Paging::Map => Self::Map,
            Paging::Prefault => Self::Prefault,
            Paging::Userfault => Self::Userfault,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    /// Run in the background, without input and output
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Give the command all capabilities, even if the workload does not have them
    #[arg(long)]
    pub(crate) privileged: bool,
    /// Kill the command after this time, in seconds
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u64>,
    /// Name or ID
    pub(crate) vm: String,
    /// Command and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub(crate) command: Vec<String>,
}
