//! `sm`: OCI images as microVMs.
//!
//! This crate parses arguments and prints; everything else is `sm-runtime`.

mod args;
mod commands;
mod failure;
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

use crate::args::Cli;
use crate::failure::{Failure, OUR_FAILURE};
use crate::printer::Printer;

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
    log_to_stderr(cli.verbose);
    commands::run(begin, cli, printer)
}

fn log_to_stderr(verbose: u8) {
    let default = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("SM_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(filter)
        .without_time()
        .init();
}

/// Docker's statuses fit in a byte; a guest could report any number.
fn exit_code(status: u32) -> ExitCode {
    ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX))
}
