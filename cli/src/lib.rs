//! `sm`: OCI images as microVMs.
//!
//! This crate parses arguments and prints; everything else is in `sm-runtime`. It is a
//! library so that the reference manual and the tests of documents use the parser of
//! `sm`.

mod args;
mod commands;
mod docker_options;
mod failure;
mod filter;
mod listing;
mod moment;
mod printer;
mod progress;
pub mod reference;
mod shown;
mod stream;
mod table;
mod template;
mod terminal;
mod timings;
mod units;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory as _, Parser as _};
use sm_runtime::timings::Phase;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::args::Cli;
use crate::failure::{FAILED, Failure, OUR_FAILURE};
use crate::printer::Printer;

/// Runs the command line of this process and returns the exit status of `sm`.
pub fn main() -> ExitCode {
    let begin = Phase::now("command started");
    sm_runtime::run_vmm_if_asked();
    let printer = Printer::new();
    match run(begin, std::env::args_os(), &printer) {
        Ok(status) => exit_code(status),
        Err((failure, status)) => {
            printer.error(&failure);
            exit_code(status)
        }
    }
}

/// Returns the definition of the command line.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses a command line, `sm` included, like [`main`], without running it.
///
/// # Errors
/// The message of `sm` for an invalid line, or the requested help.
pub fn check<I>(arguments: I) -> Result<(), clap::Error>
where
    I: IntoIterator,
    I::Item: Into<OsString> + Clone,
{
    Cli::try_parse_from(arguments).map(drop)
}

fn run(
    begin: Phase,
    arguments: impl Iterator<Item = OsString>,
    printer: &Printer,
) -> Result<u32, (Failure, u32)> {
    let arguments: Vec<_> = arguments.collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(mut error) => {
            remove_value_tip(&mut error);
            // Requested help and version go to standard output.
            let status = usage_status(&error);
            let command = arguments.get(1).and_then(|command| command.to_str());
            if let Some(reason) = docker_options::reason(command, &error) {
                return Err((Failure::new(anyhow::Error::msg(reason)), status));
            }
            return match error.print() {
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                    Err((Failure::new(error.into()), status))
                }
                // A reader that is gone does not want the rest.
                _ => Ok(status),
            };
        }
    };
    log_to_stderr(cli.verbose());
    let is_run = matches!(
        cli.command,
        args::Command::Run(_) | args::Command::Create(_)
    );
    commands::run(begin, cli, printer).map_err(|failure| match is_run {
        true => {
            let status = failure.status_of_run();
            (failure, status)
        }
        false => (failure, FAILED),
    })
}

/// Removes the tip to pass an unknown option as a value: it is a mistake. Other tips stay.
fn remove_value_tip(error: &mut clap::Error) {
    if let Some(ContextValue::StyledStrs(mut tips)) = error.remove(ContextKind::Suggested) {
        tips.retain(|tip| !tip.to_string().contains(" as a value"));
        if !tips.is_empty() {
            error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
        }
    }
}

/// Returns Docker's status for an invalid command line: 125 for an option, 1 for an
/// unknown command or missing arguments.
fn usage_status(error: &clap::Error) -> u32 {
    match error.kind() {
        _ if !error.use_stderr() => 0,
        ErrorKind::InvalidSubcommand
        | ErrorKind::MissingSubcommand
        | ErrorKind::MissingRequiredArgument
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => FAILED,
        _ => OUR_FAILURE,
    }
}

fn log_to_stderr(verbose: u8) {
    let default = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // The variable applies to the VMM process as well (see `vmm.log` in the VM's
    // directory).
    let filter = std::env::var("SM_LOG").ok();
    let filter = filter.and_then(|filter| filter.parse::<Targets>().ok());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(shown::LogLines::default)
        .without_time();
    tracing_subscriber::registry()
        .with(lines)
        .with(filter.unwrap_or_else(|| Targets::new().with_default(default)))
        .init();
}

/// Docker's statuses fit in a byte; a guest can report any number.
fn exit_code(status: u32) -> ExitCode {
    ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX))
}

/// Compiles the programs on the page about embedding.
#[cfg(doctest)]
#[doc = include_str!("../../docs/src/embedding.md")]
struct Embedding;
