//! Arguments of `sm volume`.

use clap::Subcommand;

use super::ListArgs;
use crate::units::parse_size;

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume, and print its name
    Create {
        /// Size, such as 10g; only what is written takes space [default: 64g]
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        size: Option<u64>,
        /// Add a label
        #[arg(long, value_name = "NAME[=VALUE]")]
        label: Vec<String>,
        /// Name [default: a generated one]
        name: Option<String>,
    },
    /// List volumes
    Ls(ListArgs),
    /// Show volumes, as JSON
    Inspect {
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Create a volume with the content of another one, which is shared until it changes
    Clone {
        /// Name of the volume
        source: String,
        /// Name of the new volume
        name: String,
    },
    /// Remove volumes with their content
    Rm {
        /// Ignore volumes that do not exist
        #[arg(short, long)]
        force: bool,
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
}
