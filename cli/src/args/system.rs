//! Arguments of `sm system` and `sm top`.

use clap::{Args, Subcommand};

use super::FormatArgs;

#[derive(Debug, Subcommand)]
pub(crate) enum SystemCommand {
    /// Start the VMs that should run by their restart policies, after a reboot
    Resume,
    /// Write a unit for the user's systemd that does so at boot
    InstallUnit(InstallUnitArgs),
    /// Show the disk usage of images, VMs, volumes and snapshots
    Df(FormatArgs),
    /// Remove VMs that do not run, and unneeded data of images
    Prune(SystemPruneArgs),
    /// Show numbers of VMs and images, and directories
    Info(FormatArgs),
}

#[derive(Debug, Args)]
pub(crate) struct InstallUnitArgs {
    /// Print the unit instead
    #[arg(long)]
    pub(crate) print: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SystemPruneArgs {
    /// Remove all images that no VM and no snapshot uses, too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Remove anonymous volumes that no VM needs, too
    #[arg(long)]
    pub(crate) volumes: bool,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    /// Name or ID
    pub(crate) vm: String,
    /// Options of ps: -o COLUMNS, aux or -ef
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PS OPTIONS"
    )]
    pub(crate) options: Vec<String>,
}
