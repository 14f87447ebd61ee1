//! `sm snapshot`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use serde_json::json;
use sm_runtime::home::Home;
use sm_runtime::snapshots::{self, Layer, Listed};

use crate::args::SnapshotCommand;
use crate::failure::{Failure, OUR_FAILURE};
use crate::printer::Printer;
use crate::table;
use crate::units::{format_age, format_size};

pub(crate) fn run(
    home: &Home,
    command: SnapshotCommand,
    printer: &Printer,
) -> Result<u32, Failure> {
    match command {
        SnapshotCommand::Ls(args) => {
            let listed = snapshots::list(home).context("cannot list snapshots")?;
            if args.quiet {
                for snapshot in &listed {
                    printer.line(&snapshot.name);
                }
            } else if args.format.json() {
                printer.json(&listed)?;
            } else {
                let rows: Vec<_> = listed.iter().map(row).collect();
                let head = ["NAME", "HOLDS", "MEMORY", "CPUS", "MADE", "ON DISK"];
                printer.line(table::render(head, &rows));
            }
            Ok(0)
        }
        SnapshotCommand::Inspect { name } => {
            printer.json(&snapshots::inspect(home, &name)?)?;
            Ok(0)
        }
        SnapshotCommand::Verify { names } => each(&names, printer, |name| {
            let verified = snapshots::verify(home, name)?;
            printer.line(format_args!(
                "{name}: sound ({} pages in {} snapshots)",
                verified.pages, verified.snapshots
            ));
            Ok(())
        }),
        SnapshotCommand::Diff { a, b, json } => {
            let difference = snapshots::diff(home, &a, &b)?;
            if json {
                printer.json(&json!({
                    "pages": difference.pages,
                    "different": difference.different,
                }))?;
            } else {
                printer.line(format_args!(
                    "{} of {} pages differ",
                    difference.different, difference.pages
                ));
            }
            Ok(u32::from(difference.different != 0))
        }
        SnapshotCommand::Rm { names } => each(&names, printer, |name| {
            snapshots::remove(home, name)?;
            printer.line(name);
            Ok(())
        }),
    }
}

/// Does all it can; the status says whether everything worked.
fn each(
    names: &[String],
    printer: &Printer,
    mut action: impl FnMut(&str) -> Result<(), Failure>,
) -> Result<u32, Failure> {
    let mut status = 0;
    for name in names {
        if let Err(failure) = action(name) {
            printer.error(&failure);
            status = OUR_FAILURE;
        }
    }
    Ok(status)
}

fn row(snapshot: &Listed) -> [String; 6] {
    let holds = match snapshot.layer {
        Some(Layer::Base) => "kernel and agent",
        Some(Layer::Image) => "an image",
        Some(Layer::App) => "a running workload",
        None => "damaged",
    };
    let made = UNIX_EPOCH + Duration::from_millis(snapshot.created_ms);
    let age = SystemTime::now().duration_since(made).unwrap_or_default();
    [
        snapshot.name.clone(),
        holds.to_owned(),
        format_size(snapshot.memory_bytes),
        snapshot.vcpus.to_string(),
        format!("{} ago", format_age(age)),
        format_size(snapshot.disk_bytes),
    ]
}
