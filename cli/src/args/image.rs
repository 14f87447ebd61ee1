//! Arguments of `sm image` and of its short forms.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use sm_runtime::image::Platform;

use super::{FormatArgs, IMAGE_HELP, ListArgs, PLATFORM, PLATFORM_HELP};
use crate::units::parse_size;

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// List images in the local store
    Ls(ImagesArgs),
    /// Pull an image into the local store
    Pull(PullArgs),
    /// Push an image to the registry in its name
    Push(PushArgs),
    /// Give an image another name
    Tag(TagArgs),
    /// Remove images from the local store
    Rm(RmiArgs),
    /// Show the details of images, as JSON
    Inspect(ImageNames),
    /// Show the history of an image
    History(HistoryArgs),
    /// Verify images against their digests (status 1 if anything is damaged)
    Verify(VerifyArgs),
    /// Write images to an archive, for "docker load", "podman load" or "sm load"
    Save(SaveArgs),
    /// Load the images of an archive into the local store
    Load(LoadArgs),
    /// Create an image from a root file system in a tar archive
    Import(ImportArgs),
    /// Remove data that no image needs, and optionally more
    Prune(PruneArgs),
    /// Show the disk usage of images
    Du(FormatArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ImagesArgs {
    /// Show manifest digests of the names
    #[arg(long)]
    pub(crate) digests: bool,
    /// Show whole IDs
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Accepted for Docker's sake: every image has a name
    #[arg(short, long, hide = true)]
    pub(crate) all: bool,
    /// Show only images that match: before, dangling, id, label, reference or since
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) filter: Vec<String>,
    #[command(flatten)]
    pub(crate) list: ListArgs,
    /// Show only images with this name, with or without a tag
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Print nothing but the image's ID
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[arg(long, value_name = PLATFORM, help = PLATFORM_HELP)]
    pub(crate) platform: Option<Platform>,
    /// Do not store the compressed layers of the registry; without them, the image can
    /// only be pushed elsewhere while the registry is reachable
    #[arg(long)]
    pub(crate) discard_compressed: bool,
    #[arg(help = IMAGE_HELP)]
    pub(crate) image: String,
}

#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    /// Print nothing but the digest
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[arg(help = "Name of the image: [HOST[:PORT]/]NAME[:TAG]; \"sm tag\" gives it one")]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct TagArgs {
    /// Name or ID
    pub(crate) image: String,
    #[arg(help = "The other name: [HOST[:PORT]/]NAME[:TAG]")]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// Ignore images that do not exist
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ImageNames {
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    /// Print IDs of layers only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Show whole commands
    #[arg(long)]
    pub(crate) no_trunc: bool,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    /// Name or ID
    pub(crate) image: String,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Remove damaged data, so that it is pulled or converted again
    #[arg(long)]
    pub(crate) repair: bool,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
    /// Names or IDs [default: all]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Remove all images that no VM and no snapshot uses
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Remove the compressed layers of registries, which are stored for pushing and
    /// saving
    #[arg(long)]
    pub(crate) compressed: bool,
    /// Remove the least recently used images until the store has at most this size
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) max_size: Option<u64>,
    /// Do not ask for confirmation
    #[arg(short, long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) format: FormatArgs,
}

#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    /// Write to a file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) images: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Read from a file instead of standard input
    #[arg(short, long, value_name = "FILE")]
    pub(crate) input: Option<PathBuf>,
    /// Print nothing but the images' IDs
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[arg(long, value_name = PLATFORM, help = PLATFORM_HELP)]
    pub(crate) platform: Option<Platform>,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// Set a field of the image's configuration: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL,
    /// STOPSIGNAL, USER, VOLUME or WORKDIR, as in a Containerfile
    #[arg(short, long, value_name = "INSTRUCTION")]
    pub(crate) change: Vec<String>,
    /// Comment in the image's history
    #[arg(short, long, default_value = "imported by sm")]
    pub(crate) message: String,
    #[arg(long, value_name = PLATFORM, help = "Platform of its programs [default: this host's]")]
    pub(crate) platform: Option<Platform>,
    /// The archive, plain or compressed by gzip or Zstandard; - is standard input
    pub(crate) file: PathBuf,
    #[arg(help = "Name of the image: [HOST[:PORT]/]NAME[:TAG]")]
    pub(crate) name: Option<String>,
}
