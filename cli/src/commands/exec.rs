//! `sm exec` and `sm attach`.

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use anyhow::anyhow;
use sm_runtime::session::{Event, Session, SessionWriter};
use sm_runtime::{Input, Sm};

use super::run::{EXIT_VM_ENDED, Workload};
use crate::args::{AttachArgs, ExecArgs};
use crate::failure::Failure;
use crate::printer::Printer;
use crate::stream::{self, End, Remote, Wiring};
use crate::terminal;

/// A command beside the workload, with its own connection.
#[derive(Clone)]
struct RemoteCommand(SessionWriter);

impl Remote for RemoteCommand {
    fn signal(&self, signal: u8) {
        // An error means that the command has just ended.
        let _ = self.0.signal(signal);
    }

    fn abandon(&self) {
        // The agent kills commands whose client has disconnected.
        self.0.hang_up();
    }
}

pub(crate) fn exec(sm: &Sm, args: ExecArgs, printer: &Printer) -> Result<u32, Failure> {
    if args.process.tty && args.process.interactive && !args.detach && !io::stdin().is_terminal() {
        return Err(anyhow!(
            "standard input is not a terminal: leave out -t, or run this from a terminal"
        )
        .into());
    }
    let vm = sm.vm(&args.vm)?;
    let process = args.process;
    let mut builder = vm
        .exec(args.command)
        .stdin(process.interactive)
        .privileged(args.privileged)
        .detached(args.detach)
        .env(process.environment()?);
    if let Some(directory) = process.workdir {
        builder = builder.cwd(directory);
    }
    if let Some(user) = process.user {
        builder = builder.user(user);
    }
    if let Some(seconds) = args.timeout {
        builder = builder.timeout(Duration::from_secs(seconds));
    }
    if process.tty {
        let (columns, rows) = terminal::size().unwrap_or((80, 24));
        builder = builder.tty(columns, rows);
    }
    let mut session = builder.start()?;
    if args.detach {
        return until_started(&mut session, printer);
    }
    let command = RemoteCommand(session.writer());
    let wiring = Wiring {
        stdin: process.interactive,
        tty: process.tty,
    };
    Ok(
        match stream::run(session, wiring, &command, &mut Vec::new())? {
            End::Exited { status, .. } => status,
            End::Detached => 0,
            // The VM has ended, and the command with it.
            End::Lost => EXIT_VM_ENDED,
        },
    )
}

/// Waits until a command in the background runs.
fn until_started(session: &mut Session, printer: &Printer) -> Result<u32, Failure> {
    while let Some(event) = session.next_event()? {
        match event {
            Event::Started { .. } => return Ok(0),
            Event::Error(text) => printer.note(format_args!("sm: {text}")),
            Event::Exit(status) => return Ok(status),
            _ => {}
        }
    }
    Ok(EXIT_VM_ENDED)
}

pub(crate) fn attach(sm: &Sm, args: &AttachArgs, printer: &Printer) -> Result<u32, Failure> {
    let vm = sm.vm(&args.vm)?;
    let workload = &vm.config().workload;
    let wiring = Wiring {
        stdin: workload.stdin && !args.no_stdin,
        tty: workload.tty,
    };
    let input = match wiring.stdin {
        true => Input::Stdin,
        false => Input::None,
    };
    let session = vm.attach(input)?;
    Ok(
        match stream::run(session, wiring, &Workload::of(&vm), &mut Vec::new())? {
            End::Exited { status, .. } => status,
            End::Detached => {
                printer.note(format_args!("Detached from \"{}\"", vm.name()));
                0
            }
            End::Lost => EXIT_VM_ENDED,
        },
    )
}
