//! The subcommands, one module for each group.

mod archive;
mod events;
mod exec;
mod files;
mod images;
mod kernel;
mod lifecycle;
mod list;
mod listed_images;
mod logs;
mod run;
mod shown_vm;
mod snapshot;
mod start;
mod system;
mod top;
mod volume;

use clap::CommandFactory as _;
use sm_runtime::Sm;
use sm_runtime::timings::Phase;

use crate::args::{Cli, Command};
use crate::failure::Failure;
use crate::printer::Printer;

/// Runs a subcommand and returns the exit status.
pub(crate) fn run(begin: Phase, cli: Cli, printer: &Printer) -> Result<u32, Failure> {
    let sm = || Sm::new().map_err(Failure::from);
    match cli.command {
        Command::Run(args) => run::run(begin, &sm()?, *args, printer),
        Command::Create(args) => run::create(begin, &sm()?, &args, printer),
        Command::Start(args) => start::start(begin, &sm()?, &args, printer),
        Command::Restart(args) => start::restart(&sm()?, &args, printer),
        Command::Exec(args) => exec::exec(&sm()?, args, printer),
        Command::Attach(args) => exec::attach(&sm()?, &args, printer),
        Command::Ps(args) => list::ps(&sm()?, &args, printer),
        Command::Port(args) => list::port(&sm()?, &args, printer),
        Command::Logs(args) => logs::logs(&sm()?, &args),
        Command::Stop(args) => lifecycle::stop(&sm()?, &args, printer),
        Command::Kill(args) => lifecycle::kill(&sm()?, &args, printer),
        Command::Pause(args) => lifecycle::pause(&sm()?, &args, true, printer),
        Command::Unpause(args) => lifecycle::pause(&sm()?, &args, false, printer),
        Command::Wait(args) => lifecycle::wait(&sm()?, &args, printer),
        Command::Events(args) => events::events(&sm()?, &args, printer),
        Command::Rename(args) => lifecycle::rename(&sm()?, &args),
        Command::Update(args) => lifecycle::update(&sm()?, &args, printer),
        Command::Rm(args) => lifecycle::rm(&sm()?, &args, printer),
        Command::Inspect(args) => list::inspect(&sm()?, &args, printer),
        Command::Top(args) => top::top(&sm()?, &args, printer),
        Command::System(command) => system::run(&sm()?, &command, printer),
        Command::Stats(args) => list::stats(&sm()?, &args, printer),
        Command::Cp(args) => files::cp(&sm()?, &args, printer),
        Command::Diff(args) => files::diff(&sm()?, &args, printer),
        Command::Export(args) => files::export(&sm()?, &args),
        Command::Commit(args) => files::commit(&sm()?, &args, printer),
        Command::Image(command) => images::run(&sm()?, command, printer),
        Command::Images(args) => listed_images::list(&sm()?, &args, printer),
        Command::Pull(args) => images::pull(&sm()?, &args, printer),
        Command::Rmi(args) => images::remove(&sm()?, &args, printer),
        Command::Push(args) => images::push(&sm()?, &args, printer),
        Command::Tag(args) => images::tag(&sm()?, &args),
        Command::History(args) => images::history(&sm()?, &args, printer),
        Command::Save(args) => archive::save(&sm()?, &args, printer),
        Command::Load(args) => archive::load(&sm()?, &args, printer),
        Command::Import(args) => archive::import(&sm()?, &args, printer),
        Command::Fork(args) => snapshot::fork(&sm()?, &args, printer),
        Command::Reset(args) => lifecycle::reset(&sm()?, &args, printer),
        Command::Snapshot(command) => snapshot::run(&sm()?, command, printer),
        Command::Volume(command) => volume::run(&sm()?, command, printer),
        Command::Kernel(command) => kernel::run(&sm()?, command, printer),
        Command::Doctor(args) => kernel::doctor(&sm()?, &args, printer),
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
