//! Arguments that concern a VM's life, and of the commands that change it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use sm_runtime::RestartPolicy;
use sm_runtime::network::NetRule;

use super::network::RULE;
use crate::units::{parse_duration, parse_size};

/// Options of new VMs.
#[derive(Debug, Args)]
pub(crate) struct LifeArgs {
    /// Add a label
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) label: Vec<String>,
    /// Read labels from a file
    #[arg(long, value_name = "FILE")]
    pub(crate) label_file: Vec<PathBuf>,
    /// Condition for starting the VM again after its end: no, on-failure[:N], always or
    /// unless-stopped
    #[arg(long, value_name = "POLICY", default_value = "no")]
    pub(crate) restart: RestartPolicy,
    /// Stop the VM when it has run for this time, such as 90s, 30m or 12h
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(crate) expire: Option<Duration>,
    /// Write the VM's ID to a file, which must not exist
    #[arg(long, value_name = "FILE")]
    pub(crate) cidfile: Option<PathBuf>,
    /// Command line that shows by its status whether the workload is healthy
    #[arg(long, value_name = "COMMAND")]
    pub(crate) health_cmd: Option<String>,
    /// Time between two health checks [default: the image's, else 30s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(crate) health_interval: Option<Duration>,
    /// Time limit of a health check [default: the image's, else 30s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(crate) health_timeout: Option<Duration>,
    /// Time after the start in which failures do not count [default: the image's, else 0s]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(crate) health_start_period: Option<Duration>,
    /// Consecutive failures after which the workload is unhealthy [default: the image's,
    /// else 3]
    #[arg(long, value_name = "N")]
    pub(crate) health_retries: Option<u32>,
    /// Do not run the image's health check
    #[arg(long, conflicts_with_all = ["health_cmd", "health_interval", "health_timeout", "health_start_period", "health_retries"])]
    pub(crate) no_healthcheck: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// Attach to the output, and exit with the workload's status
    #[arg(short, long)]
    pub(crate) attach: bool,
    /// Attach, and forward standard input
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) vms: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RestartArgs {
    /// Seconds between the stop signal and SIGKILL [default: the VM's own]
    #[arg(short = 't', long = "time", alias = "timeout", value_name = "SECONDS")]
    pub(crate) time: Option<u64>,
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) vms: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RenameArgs {
    /// Name or ID
    pub(crate) vm: String,
    /// The new name
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// Condition for starting the VM again after its end: no, on-failure[:N], always or
    /// unless-stopped
    #[arg(long, value_name = "POLICY")]
    pub(crate) restart: Option<RestartPolicy>,
    /// Seconds between the stop signal and SIGKILL
    #[arg(long, value_name = "SECONDS")]
    pub(crate) stop_timeout: Option<u64>,
    /// Guest memory that the VM may use, such as 256m: at least 64m, and at most what it was
    /// created with. The guest returns the rest to the host
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory: Option<u64>,
    /// Let the guest reach only this from now on, instead of what it was allowed before (see
    /// "sm run --help")
    #[arg(long, value_name = RULE, value_delimiter = ',')]
    pub(crate) allow_net: Vec<NetRule>,
    /// Do not let the guest reach this, instead of what was denied before
    #[arg(long, value_name = RULE, value_delimiter = ',')]
    pub(crate) deny_net: Vec<NetRule>,
    /// Remove all rules of the network before others are set
    #[arg(long)]
    pub(crate) clear_net: bool,
    /// Add a label, or change its value
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) label: Vec<String>,
    /// Remove a label
    #[arg(long, value_name = "NAME")]
    pub(crate) remove_label: Vec<String>,
    /// Names or IDs
    #[arg(required = true)]
    pub(crate) vms: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// Show events since this time: an age, such as 90s or 1h30m, or a time, such as
    /// 2026-01-31T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = crate::moment::parse)]
    pub(crate) since: Option<u64>,
    /// End at this time
    #[arg(long, value_name = "TIME", value_parser = crate::moment::parse)]
    pub(crate) until: Option<u64>,
    /// Show only events that match: event, image, label, name, snapshot, type or vm
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) filter: Vec<String>,
    /// Print a line of JSON for each event
    #[arg(long)]
    pub(crate) json: bool,
    /// Output format: json, or a template such as '{{.action}} {{.name}}'
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
}
