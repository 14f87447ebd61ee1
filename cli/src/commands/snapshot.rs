//! `sm snapshot`.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use indicatif::ProgressBar;
use serde_json::json;
use sm_runtime::snapshots::{Layer, ListedSnapshot};
use sm_runtime::{AfterSnapshot, RunOptions, Sm, SnapshotReport};

use crate::args::{ForkArgs, ListArgs, SnapshotCommand};
use crate::failure::{FAILED, Failure};
use crate::filter::Filters;
use crate::listing::Listing;
use crate::printer::Printer;
use crate::units::{format_age, format_size};

/// Size of a page of guest memory in bytes.
const PAGE: u64 = 4096;

pub(crate) fn run(sm: &Sm, command: SnapshotCommand, printer: &Printer) -> Result<u32, Failure> {
    match command {
        SnapshotCommand::Ls { filter, list: args } => list(sm, &filter, &args, printer),
        SnapshotCommand::Create {
            stop,
            json,
            vm,
            name,
        } => {
            let then = match stop {
                true => AfterSnapshot::End,
                false => AfterSnapshot::Continue,
            };
            let report = sm.vm(&vm)?.snapshot(&name, then)?;
            if json {
                printer.json(&report)?;
            } else {
                printer.line(&report.name);
                printer.note(cost(&report));
                for warning in &report.warnings {
                    printer.note(format_args!("sm: {warning}"));
                }
            }
            Ok(0)
        }
        SnapshotCommand::ProveDistinct { count, json, name } => {
            prove_distinct(sm, &name, count, json, printer)
        }
        SnapshotCommand::Inspect { name } => {
            let mut shown = serde_json::to_value(sm.snapshots().inspect(&name)?)?;
            if let (Some(members), Ok(snapshot)) = (shown.as_object_mut(), sm.snapshot(&name))
                && !snapshot.shares().is_empty()
            {
                members.insert(
                    "shares".to_owned(),
                    serde_json::to_value(snapshot.shares())?,
                );
            }
            printer.json(&shown)?;
            Ok(0)
        }
        SnapshotCommand::Verify { names } => each(&names, printer, |name| {
            let verified = sm.snapshots().verify(name)?;
            let (memory, disks) = (verified.memory, verified.disks);
            let layers = match disks.layers {
                0 => String::new(),
                layers => format!(", {} in {layers} layers of disks", format_size(disks.bytes)),
            };
            printer.line(format_args!(
                "{name}: sound ({} pages in {} snapshots{layers})",
                memory.pages, memory.snapshots
            ));
            Ok(())
        }),
        SnapshotCommand::Diff { a, b, json } => {
            let difference = sm.snapshots().diff(&a, &b)?;
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
        SnapshotCommand::Flatten { name, copy } => {
            let snapshots = sm.snapshots();
            let manifest = match &copy {
                Some(copy) => snapshots.flatten_to(&name, copy)?,
                None => snapshots.flatten(&name)?,
            };
            printer.line(copy.as_ref().unwrap_or(&name));
            printer.note(format_args!(
                "It contains {} of memory and needs no parent.",
                format_size(manifest.memory.data_pages * PAGE)
            ));
            Ok(0)
        }
        SnapshotCommand::Rm { names } => each(&names, printer, |name| {
            sm.snapshots().remove(name)?;
            printer.line(name);
            Ok(())
        }),
    }
}

/// Describes the cost of a snapshot for the VM.
fn cost(report: &SnapshotReport) -> String {
    let ms = |micros: u64| micros.div_ceil(1000);
    let parent = match &report.parent {
        Some(parent) => format!(", over \"{parent}\""),
        None => String::new(),
    };
    format!(
        "The vCPUs were paused for {} ms, the workload was frozen for {} ms; {} of memory \
         stored{parent}.",
        ms(report.paused_us),
        ms(report.frozen_us),
        format_size(report.pages * PAGE),
    )
}

/// Clones a running VM (`sm fork`).
pub(crate) fn fork(sm: &Sm, args: &ForkArgs, printer: &Printer) -> Result<u32, Failure> {
    let mut options = RunOptions::new()
        .auto_remove(args.rm)
        .share_binds(args.share_binds);
    if let Some(name) = &args.name {
        options = options.name(name.as_str());
    }
    let vm = sm.vm(&args.vm)?;
    let forked = vm.fork(args.count, &options)?;
    let clones = forked.vms;
    for warning in &forked.warnings {
        printer.note(format_args!("sm: {warning}"));
    }
    if args.json {
        let clones: Vec<_> = clones
            .iter()
            .map(|vm| json!({"id": vm.id().as_str(), "name": vm.name()}))
            .collect();
        printer.json(&clones)?;
    } else {
        for clone in &clones {
            printer.line(clone.id());
        }
    }
    // Running clones were printed: they belong to the user.
    forked.error.map_or(Ok(0), |error| Err(error.into()))
}

fn prove_distinct(
    sm: &Sm,
    name: &str,
    count: usize,
    json: bool,
    printer: &Printer,
) -> Result<u32, Failure> {
    let bar = ProgressBar::new(u64::try_from(count).unwrap_or(u64::MAX));
    let proof = sm.snapshots().prove_distinct(name, count, |_| bar.inc(1))?;
    bar.finish_and_clear();
    if json {
        printer.json(&proof)?;
    } else {
        for twins in &proof.twins {
            printer.line(format_args!(
                "SAME {} \"{}\" in clones {:?}",
                twins.what, twins.value, twins.clones
            ));
        }
        for clone in &proof.wrong_clocks {
            printer.line(format_args!("WRONG CLOCK in clone {clone}"));
        }
        if proof.is_distinct() {
            let worst = proof.clones.iter().map(|c| c.clock_error_ns).max();
            printer.line(format_args!(
                "{count} clones of \"{name}\", {} at the same time: getrandom, uuid, machine-id, boot_id, \
                 epoch{} differ in all; no clock is more than {} ms off",
                proof.at_once,
                match proof.clones.iter().all(|c| c.identity_report.mac.is_some()) {
                    true => ", hostname and MAC",
                    false => " and hostname (there is no network interface)",
                },
                worst.unwrap_or(0).div_ceil(1_000_000)
            ));
        }
    }
    Ok(u32::from(!proof.is_distinct()))
}

/// Applies an operation to each snapshot; the status is that of the first failure.
fn each(
    names: &[String],
    printer: &Printer,
    mut action: impl FnMut(&str) -> Result<(), Failure>,
) -> Result<u32, Failure> {
    let mut status = 0;
    for name in names {
        if let Err(failure) = action(name) {
            printer.error(&failure);
            status = FAILED;
        }
    }
    Ok(status)
}

fn list(sm: &Sm, filter: &[String], args: &ListArgs, printer: &Printer) -> Result<u32, Failure> {
    let filters = Filters::parse(filter, &["holds", "image", "name"])?;
    let mut listed = sm.snapshots().list().context("cannot list snapshots")?;
    listed.retain(|snapshot| {
        let layer = match snapshot.layer {
            Some(Layer::Base) => "base",
            Some(Layer::Image) => "image",
            Some(Layer::App) => "app",
            None => "damaged",
        };
        filters.hold("name", |value| snapshot.name.contains(value))
            && filters.hold("holds", |value| layer == value)
            && filters.hold("image", |value| snapshot.image.as_deref() == Some(value))
    });
    let listing = Listing {
        header: &[
            "NAME", "HOLDS", "IMAGE", "MEMORY", "CPUS", "MADE", "ON DISK",
        ],
        name: &|snapshot: &ListedSnapshot| snapshot.name.clone(),
        cells: &|snapshot| row(snapshot).into(),
        members: &|snapshot| {
            let [name, holds, image, memory, cpus, since, size] = row(snapshot);
            json!({
                "Name": name, "Holds": holds, "Image": image, "Memory": memory, "CPUs": cpus,
                "CreatedSince": since, "Size": size,
                "Parent": snapshot.parent, "Problem": snapshot.problem,
            })
        },
    };
    listing.print(&listed, &args.form()?, printer)?;
    Ok(0)
}

fn row(snapshot: &ListedSnapshot) -> [String; 7] {
    let holds = match snapshot.layer {
        Some(Layer::Base) => "kernel and agent",
        Some(Layer::Image) => "an image",
        Some(Layer::App) => "a running workload",
        None => "damaged",
    };
    let created = snapshot.created.unwrap_or(UNIX_EPOCH);
    let age = SystemTime::now()
        .duration_since(created)
        .unwrap_or_default();
    [
        snapshot.name.clone(),
        holds.to_owned(),
        snapshot.image.clone().unwrap_or_default(),
        format_size(snapshot.memory_bytes.unwrap_or(0)),
        snapshot.vcpus.unwrap_or(0).to_string(),
        format!("{} ago", format_age(age)),
        format_size(snapshot.disk_bytes),
    ]
}
