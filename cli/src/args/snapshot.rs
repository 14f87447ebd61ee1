//! The command line of `sm snapshot` and `sm fork`.

use clap::{Args, Subcommand};

use super::ListArgs;

#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// Number of clones
    #[arg(short = 'n', long, default_value_t = 1, value_name = "N")]
    pub(crate) count: usize,
    /// Name of the clones, completed by a number
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Remove the clones when they end
    #[arg(long)]
    pub(crate) rm: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Name or ID of the VM
    pub(crate) vm: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Make a snapshot of a running VM, with its workload as it runs
    Create {
        /// End the VM afterwards
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
    Ls(ListArgs),
    /// Show the manifest of a snapshot
    Inspect {
        /// Name of the snapshot
        name: String,
    },
    /// Check every byte of snapshots, and of those they build on
    Verify {
        /// Names of snapshots
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Count the memory pages in which two snapshots differ (status 1 if any do)
    Diff {
        /// Name of a snapshot
        a: String,
        /// Name of another
        b: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Store everything that a snapshot builds on in itself, so that it builds on
    /// nothing
    Flatten {
        /// Name of the snapshot
        name: String,
        /// Make a copy of that name, and leave the snapshot as it is
        copy: Option<String>,
    },
    /// Start clones of a snapshot and show that they share no identity (status 1
    /// if any do)
    ProveDistinct {
        /// Number of clones
        #[arg(short = 'n', long, default_value_t = 100, value_name = "N")]
        count: usize,
        /// Print what each clone told, as JSON
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
