//! Arguments of `sm snapshot` and `sm fork`.

use clap::{Args, Subcommand};

use super::ListArgs;

#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// Number of clones
    #[arg(short = 'n', long, default_value_t = 1, value_name = "N")]
    pub(crate) count: usize,
    /// Name of the clones, to which a number is appended
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Remove the clones when they exit
    #[arg(long)]
    pub(crate) rm: bool,
    /// Let several clones write to directories of the host that are mounted
    #[arg(long)]
    pub(crate) share_binds: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Name or ID of the VM
    pub(crate) vm: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Create a snapshot of a running VM and its workload
    Create {
        /// Kill the VM afterwards
        #[arg(long)]
        stop: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Name or ID of the VM
        vm: String,
        /// Name of the snapshot
        name: String,
    },
    /// List snapshots
    Ls {
        /// Show only snapshots that match: holds (base, image or app), image or name
        #[arg(short, long, value_name = "NAME=VALUE")]
        filter: Vec<String>,
        #[command(flatten)]
        list: ListArgs,
    },
    /// Show the manifest of a snapshot
    Inspect {
        /// Name of the snapshot
        name: String,
    },
    /// Verify every byte of snapshots and of their parents
    Verify {
        /// Names of snapshots
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Count the memory pages in which two snapshots differ (status 1 if any do)
    Diff {
        /// Name of a snapshot
        a: String,
        /// Name of another snapshot
        b: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Store all data of its parents in a snapshot, so that it no longer needs them
    Flatten {
        /// Name of the snapshot
        name: String,
        /// Create a flat copy with this name instead
        copy: Option<String>,
    },
    /// Start clones of a snapshot and prove that they share no identity (status 1 if any
    /// do)
    ProveDistinct {
        /// Number of clones
        #[arg(short = 'n', long, default_value_t = 100, value_name = "N")]
        count: usize,
        /// Print the identity report of each clone, as JSON
        #[arg(long)]
        json: bool,
        /// Name of the snapshot
        name: String,
    },
    /// Remove snapshots
    Rm {
        /// Names of snapshots
        #[arg(required = true)]
        names: Vec<String>,
    },
}
