//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

mod image;
mod snapshot;

pub(crate) use image::{
    HistoryArgs, ImageCommand, ImageNames, ImagesArgs, ImportArgs, LoadArgs, PruneArgs, PullArgs,
    PushArgs, RmiArgs, SaveArgs, TagArgs, VerifyArgs,
};
pub(crate) use snapshot::{ForkArgs, SnapshotCommand};

use sm_runtime::Publication;
use sm_runtime::image::Platform;
use sm_runtime::publish::Ports;

use crate::units::{parse_publish_wait, parse_size};

/// What an image argument can be.
const IMAGE_HELP: &str = "The image: NAME[:TAG][@DIGEST] in a registry, oci:DIR[:TAG], \
                          oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], \
                          docker-daemon:NAME, containers-storage:NAME, rootfs:DIR, \
                          or a name or ID from \"sm images\"";

const PLATFORM: &str = "OS/ARCH[/VARIANT]";
const PLATFORM_HELP: &str = "Which of an image's platforms to take (default: this host's)";

/// Run OCI images as microVMs.
#[derive(Debug, Parser)]
#[command(name = "sm", version, max_term_width = 100, propagate_version = true)]
pub(crate) struct Cli {
    /// Say more about what happens (repeat for even more); -v before the subcommand
    #[arg(long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// The same; after some subcommands, -v is something else.
    #[arg(short = 'v', action = clap::ArgAction::Count, hide = true)]
    short_verbose: u8,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// How much to say.
    pub(crate) fn verbose(&self) -> u8 {
        self.verbose.saturating_add(self.short_verbose)
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new VM
    Run(Box<RunArgs>),
    /// Run a command in a running VM
    Exec(ExecArgs),
    /// Attach to a running VM's workload
    Attach(AttachArgs),
    /// List VMs
    Ps(PsArgs),
    /// List the published ports of a VM
    Port(PortArgs),
    /// Show what a VM's workload wrote
    Logs(LogsArgs),
    /// Stop VMs: ask their workloads to end, then end them
    Stop(StopArgs),
    /// Signal the workloads of VMs
    Kill(KillArgs),
    /// Hold all vCPUs of VMs
    Pause(VmArgs),
    /// Let the vCPUs of paused VMs run again
    Unpause(VmArgs),
    /// Wait until VMs have ended, and print their exit statuses
    Wait(VmArgs),
    /// Remove VMs that have ended
    Rm(RmArgs),
    /// Show everything about VMs, as JSON
    Inspect(VmArgs),
    /// Show usage figures of a running VM
    Stats(StatsArgs),
    /// Manage images in the local store
    #[command(subcommand)]
    Image(ImageCommand),
    /// List images in the local store
    Images(ImagesArgs),
    /// Bring an image into the local store
    Pull(PullArgs),
    /// Remove images from the local store
    Rmi(RmiArgs),
    /// Bring an image into the registry that its name says
    Push(PushArgs),
    /// Give an image another name
    Tag(TagArgs),
    /// Show how an image was made
    History(HistoryArgs),
    /// Write images to an archive, for "docker load", "podman load" or "sm load"
    Save(SaveArgs),
    /// Bring the images of an archive into the local store
    Load(LoadArgs),
    /// Make an image of a root file system in a tar archive
    Import(ImportArgs),
    /// Clone a running VM, which goes on
    Fork(ForkArgs),
    /// Put clones back to the snapshot that they were started from
    Reset(VmArgs),
    /// Make, list, check, compare and remove snapshots
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Manage guest kernels
    #[command(subcommand)]
    Kernel(KernelCommand),
    /// Check whether this host can run VMs, and say what to do if not
    Doctor(DoctorArgs),
    /// Print a completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the version
    Version,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Run in the background and print the VM's ID
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Remove the VM when it ends
    #[arg(long)]
    pub(crate) rm: bool,
    /// When to ask a registry for the image
    #[arg(long, value_name = "WHEN", value_enum, default_value = "missing")]
    pub(crate) pull: Pull,
    #[arg(long, value_name = PLATFORM, help = PLATFORM_HELP)]
    pub(crate) platform: Option<Platform>,
    /// Name of the VM
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Set an environment variable (NAME=VALUE, or NAME to pass on this one's)
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
    /// Add a group, by name or number
    #[arg(long, value_name = "GROUP")]
    pub(crate) group_add: Vec<String>,
    /// Program to run instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// Host name of the guest
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// Add a line to the guest's /etc/hosts
    #[arg(long, value_name = "NAME:ADDRESS")]
    pub(crate) add_host: Vec<String>,
    /// Name server of the guest
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) dns: Vec<String>,
    /// Publish a port of the guest on the host, on 127.0.0.1 unless an address is
    /// given, on a port of the system's choice unless one is; auto publishes the
    /// first port on which the guest listens. Ranges: 8000-8010:9000-9010
    #[arg(short, long, value_name = "[[IP:]HOST:]GUEST[/tcp]")]
    pub(crate) publish: Vec<Ports>,
    /// How long a connection waits for somebody in the guest to listen, such as 500ms,
    /// 30s or 2m
    #[arg(long, value_name = "DURATION", value_parser = parse_publish_wait, default_value = "1s")]
    pub(crate) publish_wait: Duration,
    /// Publish a port of the guest to TLS clients; the guest gets plain bytes.
    /// Options: cert=FILE and key=FILE (PEM; without them the VM signs its own
    /// certificate, see "sm port"), name=NAME (for such a certificate),
    /// alpn=PROTOCOL, sni=NAME:GUEST (another port for that server name)
    #[arg(long, value_name = "[[IP:]HOST:]GUEST[,OPTION=VALUE]...", value_parser = Publication::tls)]
    pub(crate) publish_tls: Vec<Publication>,
    /// Publish a port of the guest as a unix socket
    #[arg(long, value_name = "PATH:GUEST", value_parser = Publication::unix)]
    pub(crate) publish_unix: Vec<Publication>,
    /// Take connections that a router hands over on a unix socket, for a port of the
    /// guest or the first on which it listens
    #[arg(long, value_name = "PATH[:GUEST]", value_parser = Publication::handoff)]
    pub(crate) handoff: Vec<Publication>,
    /// Make the guest's vsock ports reachable on a unix socket, by the protocol of
    /// Firecracker and Cloud Hypervisor
    #[arg(long, value_name = "PATH", value_parser = Publication::hybrid)]
    pub(crate) hybrid_vsock: Option<Publication>,
    // Known in order to be refused with a sentence.
    #[arg(short, long, value_name = "SOURCE:TARGET", hide = true)]
    pub(crate) volume: Vec<String>,
    #[arg(long, value_name = "MOUNT", hide = true)]
    pub(crate) mount: Vec<String>,
    /// Guest memory, such as 256m or 1g; at least 64m
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size, default_value = "512m")]
    pub(crate) memory: u64,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) cpus: u32,
    /// Guest kernel to boot
    #[arg(long, value_name = "PATH")]
    pub(crate) kernel: Option<PathBuf>,
    /// Words added to the guest kernel's command line
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) kernel_args: String,
    /// Boot, even where a snapshot could be restored
    #[arg(long)]
    pub(crate) cold: bool,
    /// How memory is restored from a snapshot: mapped, mapped and read at once, or
    /// copied when touched (needs root)
    #[arg(long, value_name = "HOW", value_enum, default_value = "map")]
    pub(crate) paging: Paging,
    /// No writable layer over the image
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Size of /dev/shm
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "64m")]
    pub(crate) shm_size: u64,
    /// Limit of the writable layer, which is guest memory [default: half of it]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) tmpfs_size: Option<u64>,
    /// Resource limit of the command
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    pub(crate) ulimit: Vec<String>,
    /// Signal that asks the command to end [default: the image's, else SIGTERM]
    #[arg(long, value_name = "SIGNAL")]
    pub(crate) stop_signal: Option<String>,
    /// Seconds between the stop signal and SIGKILL
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) stop_timeout: u64,
    /// Seconds that the guest may take to get ready
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub(crate) start_timeout: u64,
    /// Print how long each phase took
    #[arg(long)]
    pub(crate) timings: bool,
    /// Print a JSON object about the VM: when detached its identity to standard
    /// output, else identity, exit status and timings to standard error at the end
    #[arg(long)]
    pub(crate) json: bool,
    /// Go on with the workload of a snapshot instead of starting an image
    #[arg(long, value_name = "SNAPSHOT", conflicts_with_all = ["image", "interactive", "tty", "cold", "kernel"])]
    pub(crate) from: Option<String>,
    #[arg(help = IMAGE_HELP, required_unless_present = "from", default_value = "", hide_default_value = true)]
    pub(crate) image: String,
    /// Command and arguments [default: the image's]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// When a registry is asked for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Pull {
    /// At each start
    Always,
    /// When the store does not have it
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
    /// Keep standard input open
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Set an environment variable (NAME=VALUE, or NAME to pass on this one's)
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
    /// End the command after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u64>,
    /// Name or ID
    pub(crate) vm: String,
    /// Command and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Do not pass standard input on
    #[arg(long)]
    pub(crate) no_stdin: bool,
    /// Name or ID
    pub(crate) vm: String,
}

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Show VMs that have ended, too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Print IDs only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Do not shorten IDs and commands
    #[arg(long)]
    pub(crate) no_trunc: bool,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PortArgs {
    /// Name or ID
    pub(crate) vm: String,
    /// Show where this port of the guest is published only
    #[arg(value_name = "GUEST[/tcp]")]
    pub(crate) port: Option<String>,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct FormatArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Output format
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Table,
    Json,
}

impl FormatArgs {
    pub(crate) fn json(&self) -> bool {
        self.json || self.format == Format::Json
    }
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Go on until the VM ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Show the guest's console instead
    #[arg(long)]
    pub(crate) console: bool,
    /// Show the last N lines only
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) tail: Option<usize>,
    /// Show what was written from then on: so long ago, such as 90s or 1h30m, or a
    /// moment, such as 2026-01-31T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = crate::moment::parse)]
    pub(crate) since: Option<u64>,
    /// Show what was written until then
    #[arg(long, value_name = "TIME", value_parser = crate::moment::parse)]
    pub(crate) until: Option<u64>,
    /// Begin each line with the time it was written
    #[arg(short = 't', long)]
    pub(crate) timestamps: bool,
    /// Name or ID
    pub(crate) vm: String,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Seconds between the stop signal and SIGKILL [default: the VM's own]
    #[arg(short = 't', long = "time", value_name = "SECONDS")]
    pub(crate) time: Option<u64>,
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) vms: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Signal to send
    #[arg(short, long, default_value = "KILL")]
    pub(crate) signal: String,
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) vms: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct VmArgs {
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) vms: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// End running VMs first, without asking their workloads
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) vms: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    /// Measure where the time of its connections goes, stage by stage, and print
    /// that instead
    #[arg(long)]
    pub(crate) profile: bool,
    /// How long to measure, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "5", requires = "profile", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) interval: u64,
    /// Name or ID
    pub(crate) vm: String,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Print IDs only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KernelCommand {
    /// Build a tuned guest kernel; to be run in the source tree of sm
    Build,
    /// List kernels found on this host
    List(ListArgs),
    /// Choose the kernel that VMs boot
    Use {
        /// A path, or a name from the list
        kernel: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_after_the_image_belong_to_the_command() {
        let line = ["sm", "run", "-it", "--rm", "IMG", "sh", "-c", "x", "--rm"];
        let Command::Run(run) = Cli::parse_from(line).command else {
            panic!("run");
        };
        assert!(run.interactive && run.tty && run.rm);
        assert_eq!(run.command, ["sh", "-c", "x", "--rm"]);
        assert_eq!(run.memory, 512 << 20);
    }

    #[test]
    fn a_run_is_of_an_image_or_from_a_snapshot() {
        let parse = |line: &[&str]| Cli::try_parse_from(line).map(|cli| cli.command);
        assert!(parse(&["sm", "run"]).is_err());
        assert!(parse(&["sm", "run", "--from", "warm", "IMG"]).is_err());
        assert!(parse(&["sm", "run", "--from", "warm", "-it"]).is_err());
        let Ok(Command::Run(run)) = parse(&["sm", "run", "-d", "--from", "warm"]) else {
            panic!("run");
        };
        assert_eq!(run.from.as_deref(), Some("warm"));
    }
}
