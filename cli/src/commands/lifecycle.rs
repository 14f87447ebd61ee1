//! `sm stop`, `kill`, `pause`, `unpause`, `reset`, `wait`, `rename`, `update` and `rm`.

use std::time::Duration;

use sm_runtime::signal;
use sm_runtime::{Error, Force, RecordError, Sm, Vm, VmUpdate};

use crate::args::{KillArgs, RenameArgs, RmArgs, StopArgs, UpdateArgs, VmArgs};
use crate::failure::{FAILED, Failure};
use crate::printer::Printer;
use crate::units::parse_label;

/// Applies an operation to each VM, and prints on success the text that it returns, or the
/// name as given. All are tried; the exit status is [`FAILED`] if one fails.
pub(super) fn each(
    sm: &Sm,
    vms: &[String],
    printer: &Printer,
    mut act: impl FnMut(Vm) -> Result<Option<String>, Failure>,
) -> Result<u32, Failure> {
    each_named(vms, printer, |query| act(sm.vm(query)?))
}

fn each_named(
    vms: &[String],
    printer: &Printer,
    mut act: impl FnMut(&str) -> Result<Option<String>, Failure>,
) -> Result<u32, Failure> {
    let mut status = 0;
    for query in vms {
        match act(query) {
            Ok(text) => printer.line(text.as_ref().unwrap_or(query)),
            Err(failure) => {
                printer.error(&failure);
                status = FAILED;
            }
        }
    }
    Ok(status)
}

pub(crate) fn stop(sm: &Sm, args: &StopArgs, printer: &Printer) -> Result<u32, Failure> {
    let grace = args.time.map(Duration::from_secs);
    each(sm, &args.vms, printer, |mut vm| {
        vm.stop(grace)?;
        Ok(None)
    })
}

pub(crate) fn kill(sm: &Sm, args: &KillArgs, printer: &Printer) -> Result<u32, Failure> {
    let signal = signal::parse(&args.signal)?;
    each(sm, &args.vms, printer, |vm| {
        vm.kill(signal)?;
        Ok(None)
    })
}

pub(crate) fn pause(
    sm: &Sm,
    args: &VmArgs,
    pause: bool,
    printer: &Printer,
) -> Result<u32, Failure> {
    each(sm, &args.vms, printer, |vm| {
        if pause { vm.pause() } else { vm.resume() }?;
        Ok(None)
    })
}

pub(crate) fn reset(sm: &Sm, args: &VmArgs, printer: &Printer) -> Result<u32, Failure> {
    each(sm, &args.vms, printer, |vm| {
        vm.reset()?;
        Ok(None)
    })
}

pub(crate) fn wait(sm: &Sm, args: &VmArgs, printer: &Printer) -> Result<u32, Failure> {
    each(sm, &args.vms, printer, |mut vm| {
        Ok(Some(vm.wait()?.status.to_string()))
    })
}

pub(crate) fn rename(sm: &Sm, args: &RenameArgs) -> Result<u32, Failure> {
    sm.vm(&args.vm)?.rename(&args.name)?;
    Ok(0)
}

pub(crate) fn update(sm: &Sm, args: &UpdateArgs, printer: &Printer) -> Result<u32, Failure> {
    let mut update = VmUpdate::new();
    if let Some(policy) = args.restart {
        update = update.restart(policy);
    }
    if let Some(seconds) = args.stop_timeout {
        update = update.stop_timeout(Duration::from_secs(seconds));
    }
    if let Some(bytes) = args.memory {
        update = update.memory(bytes);
    }
    update = update
        .clear_net(args.clear_net)
        .allow_net(args.allow_net.iter().cloned())
        .deny_net(args.deny_net.iter().cloned());
    for label in &args.label {
        let (name, value) = parse_label(label)?;
        update = update.label(name, value);
    }
    for name in &args.remove_label {
        update = update.remove_label(name.as_str());
    }
    each(sm, &args.vms, printer, |mut vm| {
        vm.update(&update)?;
        Ok(None)
    })
}

pub(crate) fn rm(sm: &Sm, args: &RmArgs, printer: &Printer) -> Result<u32, Failure> {
    let force = if args.force { Force::Yes } else { Force::No };
    each_named(&args.vms, printer, |query| {
        match sm.vm(query) {
            Ok(mut vm) if args.volumes => vm.remove_with_volumes(force)?,
            Ok(mut vm) => vm.remove(force)?,
            Err(Error::Record(RecordError::Damaged { .. })) => sm.vms().remove_damaged(query)?,
            Err(error) => return Err(error.into()),
        }
        Ok(None)
    })
}
