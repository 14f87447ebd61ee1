//! `sm`: OCI images as microVMs.
//!
//! This crate parses arguments and prints; everything else is `sm-runtime`.

mod args;
mod commands;
mod failure;
mod moment;
mod printer;
mod progress;
mod stream;
mod table;
mod terminal;
mod timings;
mod units;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;
use sm_runtime::timings::Phase;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::args::Cli;
use crate::failure::{Failure, OUR_FAILURE};
use crate::printer::Printer;

/// musl's own gives memory back to the system at every turn: starting takes half as
/// long again with it.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    let begin = Phase::now("command started");
    sm_runtime::run_vmm_if_asked();
    let printer = Printer::new();
    match run(begin, std::env::args_os(), &printer) {
        Ok(status) => exit_code(status),
        Err(failure) => {
            printer.error(&failure);
            exit_code(failure.status)
        }
    }
}

fn run(
    begin: Phase,
    arguments: impl Iterator<Item = OsString>,
    printer: &Printer,
) -> Result<u32, Failure> {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are asked for, and go to standard output.
            let status = if error.use_stderr() { OUR_FAILURE } else { 0 };
            error.print().map_err(|error| Failure::new(error.into()))?;
            return Ok(status);
        }
    };
    log_to_stderr(cli.verbose());
    commands::run(begin, cli, printer)
}

fn log_to_stderr(verbose: u8) {
    let default = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // Of the VMM process, too (see `vmm.log` in the VM's directory).
    let wanted = std::env::var("SM_LOG").ok();
    let wanted = wanted.and_then(|wanted| wanted.parse::<Targets>().ok());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .without_time();
    tracing_subscriber::registry()
        .with(lines)
        .with(wanted.unwrap_or_else(|| Targets::new().with_default(default)))
        .init();
}

/// Docker's statuses fit in a byte; a guest could report any number.
fn exit_code(status: u32) -> ExitCode {
    ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX))
}
