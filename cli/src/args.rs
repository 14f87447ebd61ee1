//! The command line.

use clap::{Args, Parser, Subcommand};

mod files;
mod image;
mod life;
mod network;
mod privileges;
mod run;
mod snapshot;
mod system;
mod volume;

pub(crate) use files::{CommitArgs, CpArgs, DiffArgs, ExportArgs};
pub(crate) use image::{
    HistoryArgs, ImageCommand, ImageNames, ImagesArgs, ImportArgs, LoadArgs, PruneArgs, PullArgs,
    PushArgs, RmiArgs, SaveArgs, TagArgs, VerifyArgs,
};
pub(crate) use life::{EventsArgs, LifeArgs, RenameArgs, RestartArgs, StartArgs, UpdateArgs};
pub(crate) use privileges::{PrivilegeArgs, SecurityOption};
pub(crate) use run::{CreateArgs, ExecArgs, Pull, RunArgs};
pub(crate) use snapshot::{ForkArgs, SnapshotCommand};
pub(crate) use system::{InstallUnitArgs, SystemCommand, SystemPruneArgs, TopArgs};
pub(crate) use volume::{VolumeCommand, VolumeLsArgs, VolumePruneArgs};

/// Help of an image argument.
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
    /// Log more (repeat for even more); -v before the subcommand
    #[arg(long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    /// The short form is valid before the subcommand only; some subcommands have another
    /// -v.
    #[arg(short = 'v', action = clap::ArgAction::Count, hide = true)]
    short_verbose: u8,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// Returns the number of times that --verbose was given.
    pub(crate) fn verbose(&self) -> u8 {
        self.verbose.saturating_add(self.short_verbose)
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new VM
    Run(Box<RunArgs>),
    /// Create a VM without starting it
    Create(Box<CreateArgs>),
    /// Start VMs that were created or have ended
    Start(StartArgs),
    /// Stop VMs, and start them
    Restart(RestartArgs),
    /// Run a command in a running VM
    Exec(ExecArgs),
    /// Attach to a running VM's workload
    Attach(AttachArgs),
    /// List VMs
    Ps(PsArgs),
    /// List the published ports of a VM
    Port(PortArgs),
    /// Show the output of a VM's workload
    Logs(LogsArgs),
    /// Stop VMs: send the stop signal to their workloads, then SIGKILL
    Stop(StopArgs),
    /// Send a signal to the workloads of VMs
    Kill(KillArgs),
    /// Pause all vCPUs of VMs
    Pause(VmArgs),
    /// Resume the vCPUs of paused VMs
    Unpause(VmArgs),
    /// Wait until VMs have ended, and print their exit statuses
    Wait(VmArgs),
    /// Give a VM another name
    Rename(RenameArgs),
    /// Change restart policy, stop timeout and labels of VMs
    Update(UpdateArgs),
    /// Remove VMs that have ended
    Rm(RmArgs),
    /// Show configuration and state of VMs, as JSON
    Inspect(InspectArgs),
    /// Show events as they happen, and earlier ones
    Events(EventsArgs),
    /// List the processes in a VM
    Top(TopArgs),
    /// Show the resource usage of a running VM
    Stats(StatsArgs),
    /// Copy files between a VM and this host
    Cp(CpArgs),
    /// List what a VM has changed in its root file system: A added, C changed,
    /// D deleted
    Diff(DiffArgs),
    /// Write the root file system of a VM to a tar archive
    Export(ExportArgs),
    /// Create an image from the changes of a VM
    Commit(CommitArgs),
    /// Manage images in the local store
    #[command(subcommand)]
    Image(ImageCommand),
    /// List images in the local store
    Images(ImagesArgs),
    /// Pull an image into the local store
    Pull(PullArgs),
    /// Remove images from the local store
    Rmi(RmiArgs),
    /// Push an image to the registry in its name
    Push(PushArgs),
    /// Give an image another name
    Tag(TagArgs),
    /// Show the history of an image
    History(HistoryArgs),
    /// Write images to an archive, for "docker load", "podman load" or "sm load"
    Save(SaveArgs),
    /// Load the images of an archive into the local store
    Load(LoadArgs),
    /// Create an image from a root file system in a tar archive
    Import(ImportArgs),
    /// Clone a running VM, which continues
    Fork(ForkArgs),
    /// Reset clones to the snapshot from which they were started
    Reset(VmArgs),
    /// Create, list, verify, compare and remove snapshots
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Manage volumes: disks that outlive VMs
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Manage guest kernels
    #[command(subcommand)]
    Kernel(KernelCommand),
    /// Start what should run, show disk usage, and remove what is not needed
    #[command(subcommand)]
    System(SystemCommand),
    /// Check whether this host can run VMs, and suggest remedies
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
pub(crate) struct AttachArgs {
    /// Do not forward standard input
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
    /// Do not shorten IDs and commands
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Show only VMs that match: ancestor, exited, health, id, label, name, publish, restart,
    /// status or volume
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) filter: Vec<String>,
    /// Show the last N VMs that were created, in any state
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) last: Option<usize>,
    /// Show the last VM that was created, in any state
    #[arg(short, long, conflicts_with = "last")]
    pub(crate) latest: bool,
    #[command(flatten)]
    pub(crate) list: ListArgs,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Print a template for each VM instead, such as '{{.State.Status}}'
    #[arg(short, long, value_name = "TEMPLATE")]
    pub(crate) format: Option<String>,
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) vms: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PortArgs {
    /// Name or ID
    pub(crate) vm: String,
    /// Show only the host end of this port of the guest
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
    /// Follow the output until the VM ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Show the guest's console instead
    #[arg(long, conflicts_with_all = ["follow", "since", "until", "timestamps"])]
    pub(crate) console: bool,
    /// Show the connections of the guest to its network instead, and what was refused with the
    /// rule that would allow it: a line of JSON each
    #[arg(long, conflicts_with_all = ["follow", "console", "timestamps"])]
    pub(crate) net: bool,
    /// Show the last N lines only
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) tail: Option<usize>,
    /// Show output since this time: an age, such as 90s or 1h30m, or a time, such as
    /// 2026-01-31T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = crate::moment::parse)]
    pub(crate) since: Option<u64>,
    /// Show output until this time
    #[arg(long, value_name = "TIME", value_parser = crate::moment::parse)]
    pub(crate) until: Option<u64>,
    /// Prefix each line with its time
    #[arg(short = 't', long)]
    pub(crate) timestamps: bool,
    /// Name or ID
    pub(crate) vm: String,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Seconds between the stop signal and SIGKILL [default: the VM's own]
    #[arg(short = 't', long = "time", alias = "timeout", value_name = "SECONDS")]
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
    /// Kill running VMs first, without notifying their workloads
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Remove the anonymous volumes that were created for them as well
    #[arg(short, long)]
    pub(crate) volumes: bool,
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) vms: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    /// Measure the stages of its connections and print their times instead
    #[arg(long)]
    pub(crate) profile: bool,
    /// Duration of the measurement, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "5", requires = "profile", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) interval: u64,
    /// Accepted for Docker's sake: figures are printed once
    #[arg(long, hide = true)]
    pub(crate) no_stream: bool,
    /// Names or IDs [default: all running VMs]
    #[arg(required_if_eq("profile", "true"))]
    pub(crate) vms: Vec<String>,
}

/// Options of every list.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Print IDs, or names, only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Output format: table, json, or a template such as '{{.Name}}' or
    /// 'table {{.ID}}\t{{.Status}}'
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub(crate) format: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KernelCommand {
    /// Build a tuned guest kernel; only in the source tree of sm
    Build,
    /// List kernels found on this host
    List {
        /// Show only kernels that match: name
        #[arg(short, long, value_name = "NAME=VALUE")]
        filter: Vec<String>,
        #[command(flatten)]
        list: ListArgs,
    },
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
        assert!(run.create.process.interactive && run.create.process.tty && run.create.rm);
        assert_eq!(run.create.command, ["sh", "-c", "x", "--rm"]);
        assert_eq!(run.create.memory, None);
    }

    #[test]
    fn options_that_conflict_with_console_are_refused() {
        let parse = |option: &[&str]| {
            let line = ["sm", "logs", "--console", "vm"].iter().chain(option);
            Cli::try_parse_from(line).map(|cli| cli.command)
        };
        for option in [&["-f"][..], &["-t"], &["--since", "1h"], &["--until", "1h"]] {
            assert!(parse(option).is_err(), "{option:?}");
        }
        assert!(parse(&["-n", "3"]).is_ok());
    }

    #[test]
    fn a_run_is_of_an_image_or_from_a_snapshot() {
        let parse = |line: &[&str]| Cli::try_parse_from(line).map(|cli| cli.command);
        assert!(parse(&["sm", "run"]).is_err());
        assert!(parse(&["sm", "run", "--from", "warm", "IMG"]).is_err());
        assert!(parse(&["sm", "run", "--from", "warm", "-it"]).is_err());
        assert!(parse(&["sm", "run", "--from", "warm", "--pull", "missing"]).is_err());
        let Ok(Command::Run(run)) = parse(&["sm", "run", "-d", "--from", "warm"]) else {
            panic!("run");
        };
        assert_eq!(run.create.from.as_deref(), Some("warm"));
    }
}
