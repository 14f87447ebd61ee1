//! Arguments of commands on the files of VMs.

use std::path::PathBuf;

use clap::Args;

use super::FormatArgs;

#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// Copy owners and groups; without it, files belong to root in the VM, and to you on
    /// this host
    #[arg(short, long)]
    pub(crate) archive: bool,
    /// Copy the file that the source leads to, if it is a symbolic link
    #[arg(short = 'L', long)]
    pub(crate) follow_link: bool,
    /// Do not print the size of what was copied
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// VM:PATH, a path of this host, or - for a tar archive on standard input
    #[arg(value_name = "SOURCE")]
    pub(crate) source: String,
    /// VM:PATH, a path of this host, or - for a tar archive on standard output
    #[arg(value_name = "DESTINATION")]
    pub(crate) destination: String,
}

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    /// Name or ID
    pub(crate) vm: String,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Write to a file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Name or ID
    pub(crate) vm: String,
}

#[derive(Debug, Args)]
pub(crate) struct CommitArgs {
    /// Author of the image, such as "Ada <ada@example.com>"
    #[arg(short, long)]
    pub(crate) author: Option<String>,
    /// Set a field of the image's configuration: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL,
    /// ONBUILD, STOPSIGNAL, USER, VOLUME or WORKDIR, as in a Containerfile
    #[arg(short, long, value_name = "INSTRUCTION")]
    pub(crate) change: Vec<String>,
    /// Comment in the image's history
    #[arg(short, long)]
    pub(crate) message: Option<String>,
    /// Pause the VM's processes meanwhile
    #[arg(
        short,
        long,
        default_value_t = true,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    pub(crate) pause: bool,
    /// Name or ID
    pub(crate) vm: String,
    #[arg(help = "Name of the image: [HOST[:PORT]/]NAME[:TAG]")]
    pub(crate) name: Option<String>,
}
