//! Arguments of `sm volume`.

use clap::{Args, Subcommand};
use sm_runtime::VolumeKind;

use super::ListArgs;
use crate::units::parse_size;

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume, and print its name
    Create {
        /// Storage: a disk, to which one VM at a time writes, or a directory of this host, which
        /// several VMs share
        #[arg(long = "type", value_name = "TYPE", value_enum, default_value = "disk")]
        kind: VolumeType,
        /// Size of a disk, such as 10g; only what is written takes space [default: 64g]
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        size: Option<u64>,
        /// Add a label
        #[arg(long, value_name = "NAME[=VALUE]")]
        label: Vec<String>,
        /// Name [default: a generated one]
        name: Option<String>,
    },
    /// List volumes
    Ls(VolumeLsArgs),
    /// Show volumes, as JSON
    Inspect {
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove anonymous volumes that no VM needs
    Prune(VolumePruneArgs),
    /// Create a volume with the content of another one, which is shared until it changes
    Clone {
        /// Name of the volume
        source: String,
        /// Name of the new volume
        name: String,
    },
    /// Remove volumes with their content, unless a VM needs them
    Rm {
        /// Ignore volumes that do not exist
        #[arg(short, long)]
        force: bool,
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

/// See [`VolumeKind`].
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum VolumeType {
    Disk,
    Dir,
}

impl From<VolumeType> for VolumeKind {
    fn from(kind: VolumeType) -> Self {
        match kind {
            VolumeType::Disk => Self::Disk,
            VolumeType::Dir => Self::Directory,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct VolumeLsArgs {
    /// Show only volumes that match: dangling (no VM needs it), driver, label, name or type
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) filter: Vec<String>,
    #[command(flatten)]
    pub(crate) list: ListArgs,
}

#[derive(Debug, Args)]
pub(crate) struct VolumePruneArgs {
    /// Remove volumes with a given name, too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Remove only volumes that match: all (true for --all), label or label!
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) filter: Vec<String>,
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
}
