//! The subcommands, one module for each group.

mod archive;
mod exec;
mod images;
mod kernel;
mod lifecycle;
mod list;
mod logs;
mod run;
mod snapshot;

use clap::CommandFactory as _;
use sm_runtime::home::Home;
use sm_runtime::timings::Phase;

use crate::args::{Cli, Command};
use crate::failure::Failure;
use crate::printer::Printer;

/// Runs a subcommand and returns the exit status.
pub(crate) fn run(begin: Phase, cli: Cli, printer: &Printer) -> Result<u32, Failure> {
    let home = || Home::from_env().map_err(Failure::from);
    match cli.command {
        Command::Run(args) => run::run(begin, &home()?, *args, printer),
        Command::Exec(args) => exec::exec(&home()?, args),
        Command::Attach(args) => exec::attach(&home()?, &args, printer),
        Command::Ps(args) => list::ps(&home()?, &args, printer),
        Command::Port(args) => list::port(&home()?, &args, printer),
        Command::Logs(args) => logs::logs(&home()?, &args),
        Command::Stop(args) => lifecycle::stop(&home()?, &args, printer),
        Command::Kill(args) => lifecycle::kill(&home()?, &args, printer),
        Command::Pause(args) => lifecycle::pause(&home()?, &args, true, printer),
        Command::Unpause(args) => lifecycle::pause(&home()?, &args, false, printer),
        Command::Wait(args) => lifecycle::wait(&home()?, &args, printer),
        Command::Rm(args) => lifecycle::rm(&home()?, &args, printer),
        Command::Inspect(args) => list::inspect(&home()?, &args, printer),
        Command::Stats(args) => list::stats(&home()?, &args, printer),
        Command::Image(command) => images::run(&home()?, command, printer),
        Command::Images(args) => images::list(&home()?, &args, printer),
        Command::Pull(args) => images::pull(&home()?, &args, printer),
        Command::Rmi(args) => images::remove(&home()?, &args, printer),
        Command::Push(args) => images::push(&home()?, &args, printer),
        Command::Tag(args) => images::tag(&home()?, &args),
        Command::History(args) => images::history(&home()?, &args, printer),
        Command::Save(args) => archive::save(&home()?, &args, printer),
        Command::Load(args) => archive::load(&home()?, &args, printer),
        Command::Import(args) => archive::import(&home()?, &args, printer),
        Command::Fork(args) => snapshot::fork(&home()?, &args, printer),
        Command::Reset(args) => lifecycle::reset(&home()?, &args, printer),
        Command::Snapshot(command) => snapshot::run(&home()?, command, printer),
        Command::Kernel(command) => kernel::run(&home()?, command, printer),
        Command::Doctor(args) => kernel::doctor(&home()?, &args, printer),
        Command::Completions { shell } => {
            // The script is buffered, because the generator panics on write errors.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "sm", &mut script);
            printer.line(String::from_utf8_lossy(&script));
            Ok(0)
        }
        Command::Version => {
            printer.line(format!("sm {}", env!("CARGO_PKG_VERSION")));
            Ok(0)
        }
    }
}
