//! `sm start` and `sm restart`.

use std::time::Duration;

use anyhow::anyhow;
use sm_runtime::timings::Phase;
use sm_runtime::{Input, Sm, StartOptions, Vm};

use super::lifecycle::each;
use super::run::{EXIT_VM_ENDED, Workload};
use crate::args::{RestartArgs, StartArgs};
use crate::failure::Failure;
use crate::printer::Printer;
use crate::stream::{self, End, Wiring};
use crate::terminal;

pub(crate) fn start(
    begin: Phase,
    sm: &Sm,
    args: &StartArgs,
    printer: &Printer,
) -> Result<u32, Failure> {
    if !args.attach && !args.interactive {
        return each(sm, &args.vms, printer, |mut vm| {
            vm.start(StartOptions::new().phases(vec![begin.clone()]))?;
            warn(&vm, printer);
            Ok(None)
        });
    }
    let [query] = args.vms.as_slice() else {
        return Err(anyhow!("only one VM can be attached to: start the others without -a").into());
    };
    let mut vm = sm.vm(query)?;
    let (columns, rows) = terminal::size().unwrap_or((80, 24));
    let options = StartOptions::new()
        .attach(true)
        .terminal_size(columns, rows);
    vm.start(options.phases(vec![begin]))?;
    warn(&vm, printer);
    let workload = &vm.config().workload;
    let wiring = Wiring {
        stdin: workload.stdin && args.interactive,
        tty: workload.tty,
    };
    let session = match vm.take_session() {
        Some(session) => session,
        // It was running already.
        None if wiring.stdin => vm.attach(Input::Stdin)?,
        None => vm.attach(Input::None)?,
    };
    let end = stream::run(session, wiring, &Workload::of(&vm), &mut Vec::new())?;
    Ok(match end {
        End::Exited { status, .. } => status,
        End::Detached => {
            printer.note(format_args!("Detached from \"{}\"", vm.name()));
            0
        }
        End::Lost => EXIT_VM_ENDED,
    })
}

pub(crate) fn restart(sm: &Sm, args: &RestartArgs, printer: &Printer) -> Result<u32, Failure> {
    let grace = args.time.map(Duration::from_secs);
    each(sm, &args.vms, printer, |mut vm| {
        vm.restart(grace, StartOptions::new())?;
        warn(&vm, printer);
        Ok(None)
    })
}

fn warn(vm: &Vm, printer: &Printer) {
    for warning in vm.warnings() {
        printer.note(format_args!("sm: {warning}"));
    }
}
