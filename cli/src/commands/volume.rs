//! `sm volume`.

use std::collections::BTreeMap;
use std::time::SystemTime;

use anyhow::{Context as _, anyhow};
use serde::Serialize;
use serde_json::{Value, json};
use sm_runtime::volumes::Volumes;
use sm_runtime::{Error, ErrorKind, Sm, Volume, VolumeOptions};

use crate::args::{VolumeCommand, VolumeLsArgs, VolumePruneArgs};
use crate::failure::{FAILED, Failure};
use crate::filter::{Filters, has_label};
use crate::listing::{Listing, joined};
use crate::printer::Printer;
use crate::units::{format_age, format_size};

pub(crate) fn run(sm: &Sm, command: VolumeCommand, printer: &Printer) -> Result<u32, Failure> {
    let volumes = sm.volumes();
    match command {
        VolumeCommand::Create {
            kind,
            size,
            label,
            name,
        } => {
            let mut options = VolumeOptions::new().kind(kind.into());
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
        VolumeCommand::Ls(args) => list(&volumes, &args, printer),
        VolumeCommand::Prune(args) => prune(&volumes, &args, printer),
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

/// The conditions for volumes.
const OF_VOLUMES: &[&str] = &["dangling", "driver", "label", "name", "type"];
/// Members for which no volume is opened.
const OF_NAMES: &[&str] = &["Name", "Driver", "Scope"];

/// A volume of which only the name is known.
#[derive(Serialize)]
struct Named(String);

fn list(volumes: &Volumes, args: &VolumeLsArgs, printer: &Printer) -> Result<u32, Failure> {
    let filters = Filters::parse(&args.filter, OF_VOLUMES)?;
    let form = args.list.form()?;
    let used = match filters.has("dangling") {
        true => volumes.users().context("cannot list VMs")?,
        false => BTreeMap::new(),
    };
    let mut names = Vec::new();
    for name in volumes.names().context("cannot list volumes")? {
        let matches = filters.hold("name", |value| name.contains(value))
            && filters.hold("driver", |value| value == DRIVER)
            && filters.is("dangling", || !used.contains_key(&name))?;
        if matches {
            names.push(name);
        }
    }
    if form.needs_only(OF_NAMES) && !filters.has("label") && !filters.has("type") {
        let names: Vec<Named> = names.into_iter().map(Named).collect();
        let listing = Listing {
            header: &[],
            name: &|volume: &Named| volume.0.clone(),
            cells: &|_| Vec::new(),
            members: &|volume| json!({"Name": volume.0, "Driver": DRIVER, "Scope": DRIVER}),
        };
        listing.print(&names, &form, printer)?;
        return Ok(0);
    }
    let (mut rows, mut status) = (Vec::new(), 0);
    for name in names {
        match volumes.get(&name) {
            Ok(volume) => rows.push(volume),
            // It was removed meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                printer.error(&error.into());
                status = FAILED;
            }
        }
    }
    rows.retain(|volume| {
        filters.all_hold("label", |label| has_label(volume.labels(), label))
            && filters.hold("type", |value| volume.kind().as_str() == value)
    });
    let now = SystemTime::now();
    let listing = Listing {
        header: &["NAME", "TYPE", "SIZE", "ON DISK", "CREATED"],
        name: &|volume: &Volume| volume.name().to_owned(),
        cells: &|volume| {
            vec![
                volume.name().to_owned(),
                volume.kind().as_str().to_owned(),
                size(volume.size_bytes()),
                size(volume.disk_bytes()),
                age(volume, now),
            ]
        },
        members: &|volume| members(volume, now),
    };
    listing.print(&rows, &form, printer)?;
    Ok(status)
}

/// Docker's name for volumes that are on this host.
const DRIVER: &str = "local";

fn members(volume: &Volume, now: SystemTime) -> Value {
    json!({
        "Name": volume.name(), "Driver": DRIVER, "Scope": DRIVER,
        "Mountpoint": volume.path(),
        "Labels": joined(volume.labels()), "LabelMap": volume.labels(),
        "Type": volume.kind().as_str(),
        "Size": size(volume.size_bytes()),
        "OnDisk": size(volume.disk_bytes()),
        "CreatedSince": age(volume, now),
        "Anonymous": volume.is_anonymous(),
    })
}

fn size(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".to_owned(), format_size)
}

fn age(volume: &Volume, now: SystemTime) -> String {
    let age = now.duration_since(volume.created()).unwrap_or_default();
    format!("{} ago", format_age(age))
}

fn prune(volumes: &Volumes, args: &VolumePruneArgs, printer: &Printer) -> Result<u32, Failure> {
    let filters = Filters::parse(&args.filter, &["all", "label", "label!"])?;
    let all = args.all || (filters.has("all") && filters.is("all", || true)?);
    if !args.force {
        let question = match all {
            true => "Remove all volumes that no VM needs?",
            false => "Remove all anonymous volumes that no VM needs?",
        };
        match printer.confirm(question) {
            Some(true) => {}
            Some(false) => return Ok(FAILED),
            None => return Err(anyhow!("this is not a terminal to ask at: add --force").into()),
        }
    }
    let pruned = volumes.prune(|volume| {
        let labels = volume.labels();
        (all || volume.is_anonymous())
            && filters.all_hold("label", |label| has_label(labels, label))
            && filters.all_hold("label!", |label| !has_label(labels, label))
    })?;
    for name in &pruned.names {
        printer.line(name);
    }
    printer.line(format_args!("Freed {}", format_size(pruned.bytes)));
    Ok(0)
}
