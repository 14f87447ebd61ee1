//! `sm volume`.

use std::time::SystemTime;

use anyhow::Context as _;
use sm_runtime::{Error, ErrorKind, Sm, Volume, VolumeOptions};

use crate::args::VolumeCommand;
use crate::failure::{FAILED, Failure};
use crate::printer::Printer;
use crate::table;
use crate::units::{format_age, format_size};

pub(crate) fn run(sm: &Sm, command: VolumeCommand, printer: &Printer) -> Result<u32, Failure> {
    let volumes = sm.volumes();
    match command {
        VolumeCommand::Create { size, label, name } => {
            let mut options = VolumeOptions::new();
            if let Some(size) = size {
                options = options.size(size);
            }
            for label in &label {
                let (name, value) = label.split_once('=').unwrap_or((label, ""));
                options = options.label(name, value);
            }
            let volume = volumes.create(name.as_deref(), &options)?;
            printer.line(volume.name());
            Ok(0)
        }
        VolumeCommand::Ls(args) => {
            let (listed, errors) = volumes.list().context("cannot list volumes")?;
            if args.quiet {
                for volume in &listed {
                    printer.line(volume.name());
                }
            } else if args.format.json() {
                printer.json(&listed)?;
            } else {
                let now = SystemTime::now();
                let rows: Vec<_> = listed.iter().map(|volume| row(volume, now)).collect();
                printer.line(table::render(["NAME", "SIZE", "ON DISK", "CREATED"], &rows));
            }
            let failed = !errors.is_empty();
            for error in errors {
                printer.error(&Error::from(error).into());
            }
            Ok(if failed { FAILED } else { 0 })
        }
        VolumeCommand::Inspect { names } => {
            let mut found = Vec::new();
            let status = each(&names, printer, |name| {
                found.push(volumes.get(name)?);
                Ok(())
            });
            printer.json(&found)?;
            Ok(status)
        }
        VolumeCommand::Clone { source, name } => {
            printer.line(volumes.copy(&source, &name)?.name());
            Ok(0)
        }
        VolumeCommand::Rm { force, names } => Ok(each(&names, printer, |name| {
            match volumes.remove(name) {
                Err(error) if force && error.kind() == ErrorKind::NotFound => {}
                removed => removed?,
            }
            printer.line(name);
            Ok(())
        })),
    }
}

/// Applies an operation to each volume; the status is 1 if one failed.
fn each(
    names: &[String],
    printer: &Printer,
    mut action: impl FnMut(&str) -> Result<(), Error>,
) -> u32 {
    let mut status = 0;
    for name in names {
        if let Err(error) = action(name) {
            printer.error(&error.into());
            status = FAILED;
        }
    }
    status
}

fn row(volume: &Volume, now: SystemTime) -> [String; 4] {
    let age = now.duration_since(volume.created()).unwrap_or_default();
    [
        volume.name().to_owned(),
        format_size(volume.size_bytes()),
        format_size(volume.disk_bytes()),
        format!("{} ago", format_age(age)),
    ]
}
