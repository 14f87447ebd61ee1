//! `sm image` with its short forms, and opening an image for a run.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::anyhow;
use sm_runtime::image::{Fetch, Image, LayerStep, Platform, Progress, PruneOptions, PullOptions};
use sm_runtime::{ErrorKind, Sm};

use super::archive;
use super::listed_images::{self, age, short};
use crate::args::{
    FormatArgs, HistoryArgs, ImageCommand, ImageNames, PruneArgs, Pull, PullArgs, PushArgs,
    RmiArgs, TagArgs, VerifyArgs,
};
use crate::failure::{FAILED, Failure};
use crate::printer::Printer;
use crate::progress::Bars;
use crate::table;
use crate::units::{format_size, parse_size};

/// Characters of a command in the history.
const SHORT_COMMAND: usize = 45;
/// Exit status for damaged data.
const DAMAGED: u32 = 1;
/// Variable with the maximum size of the store, which is enforced by removing the least
/// recently used images.
const QUOTA: &str = "SM_IMAGE_QUOTA";

pub(crate) fn run(sm: &Sm, command: ImageCommand, printer: &Printer) -> Result<u32, Failure> {
    match command {
        ImageCommand::Ls(args) => listed_images::list(sm, &args, printer),
        ImageCommand::Pull(args) => pull(sm, &args, printer),
        ImageCommand::Push(args) => push(sm, &args, printer),
        ImageCommand::Tag(args) => tag(sm, &args),
        ImageCommand::Rm(args) => remove(sm, &args, printer),
        ImageCommand::Inspect(args) => inspect(sm, &args, printer),
        ImageCommand::History(args) => history(sm, &args, printer),
        ImageCommand::Verify(args) => verify(sm, &args, printer),
        ImageCommand::Save(args) => archive::save(sm, &args, printer),
        ImageCommand::Load(args) => archive::load(sm, &args, printer),
        ImageCommand::Import(args) => archive::import(sm, &args, printer),
        ImageCommand::Prune(args) => prune(sm, &args, printer),
        ImageCommand::Du(args) => usage(sm, &args, printer),
    }
}

/// Opens an image for a run. Pulls and converts it first if the store does not have it.
/// Progress is shown on a terminal only: elsewhere, it would mix with the command's
/// output.
pub(super) fn open(
    sm: &Sm,
    reference: &str,
    pull: Pull,
    platform: Option<&Platform>,
    printer: &Printer,
) -> Result<Image, Failure> {
    if pull == Pull::Never && !sm.images().contains(reference, platform)? {
        return Err(anyhow!(
            "image \"{reference}\" is not in the store, and --pull never was given: \
             bring it there with \"sm pull {reference}\""
        )
        .into());
    }
    let bars = Bars::new(printer, false, READING);
    let options = PullOptions::new().platform(platform.cloned());
    fetch(sm, reference, pull == Pull::Always, options, &bars)
}

const READING: &str = "Reading";

fn fetch(
    sm: &Sm,
    reference: &str,
    refresh: bool,
    options: PullOptions<'_>,
    bars: &Bars<'_>,
) -> Result<Image, Failure> {
    let quota = quota()?;
    let grown = AtomicBool::new(false);
    let report = |progress: Progress<'_>| {
        if let Progress::Layer {
            step: LayerStep::Done,
            ..
        } = progress
        {
            grown.store(true, Ordering::Relaxed);
        }
        bars.show(progress);
    };
    let fetch = Fetch::new(options.report(&report)).refresh(refresh);
    let image = sm.image_with(reference, &fetch);
    bars.clear();
    let image = image?;
    if grown.into_inner()
        && let Some(quota) = quota
        && let Some(reason) = enforce_quota(sm, quota)
    {
        bars.show(Progress::Message(&reason));
    }
    Ok(image)
}

/// Returns the maximum size of the store, if the variable is set. It is enforced after
/// the store has grown, when the image that was just opened is in use.
fn quota() -> Result<Option<u64>, Failure> {
    let Some(quota) = std::env::var_os(QUOTA).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let quota = parse_size(&quota.to_string_lossy());
    Ok(Some(quota.map_err(|error| anyhow!("{QUOTA}: {error}"))?))
}

/// Enforces the maximum size of the store. A failure becomes a warning: the requested
/// image can be used nevertheless.
fn enforce_quota(sm: &Sm, quota: u64) -> Option<String> {
    match sm.images().prune_to(quota) {
        Ok(pruned) => pruned?.notes.into_iter().next(),
        Err(error) => Some(Failure::from(error).to_string()),
    }
}

pub(crate) fn pull(sm: &Sm, args: &PullArgs, printer: &Printer) -> Result<u32, Failure> {
    let bars = Bars::new(printer, !args.quiet, READING);
    let options = PullOptions::new()
        .platform(args.platform.clone())
        .store_compressed(!args.discard_compressed);
    let image = fetch(sm, &args.image, true, options, &bars)?;
    if !args.quiet {
        printer.note(format_args!("Stored \"{}\"", image.reference()));
    }
    printer.line(image.digest());
    Ok(0)
}

pub(crate) fn push(sm: &Sm, args: &PushArgs, printer: &Printer) -> Result<u32, Failure> {
    let bars = Bars::new(printer, !args.quiet, "Sending");
    let report = |progress: Progress<'_>| bars.show(progress);
    let options = PullOptions::new().report(&report);
    let pushed = sm.images().push(&args.name, &options);
    bars.clear();
    printer.line(pushed?);
    Ok(0)
}

pub(crate) fn tag(sm: &Sm, args: &TagArgs) -> Result<u32, Failure> {
    sm.images().tag(&args.image, &args.name)?;
    Ok(0)
}

pub(crate) fn remove(sm: &Sm, args: &RmiArgs, printer: &Printer) -> Result<u32, Failure> {
    let mut status = 0;
    for query in &args.images {
        match sm.images().remove(query) {
            Ok(_) => printer.line(query),
            Err(error) if args.force && error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                printer.error(&error.into());
                status = FAILED;
            }
        }
    }
    Ok(status)
}

fn inspect(sm: &Sm, args: &ImageNames, printer: &Printer) -> Result<u32, Failure> {
    let details = args
        .images
        .iter()
        .map(|query| sm.images().inspect(query))
        .collect::<Result<Vec<_>, _>>()?;
    printer.json(&details)?;
    Ok(0)
}

/// A step of an image's history.
#[derive(serde::Serialize)]
struct HistoryStep {
    /// The layer that it created, if any.
    layer: Option<String>,
    created: Option<String>,
    created_by: String,
    /// Bytes of the layer in the store.
    size: u64,
    comment: String,
}

pub(crate) fn history(sm: &Sm, args: &HistoryArgs, printer: &Printer) -> Result<u32, Failure> {
    let details = sm.images().inspect(&args.image)?;
    let mut layers = details.layers.iter();
    let entries = details.config.history.iter().flatten();
    let mut steps: Vec<_> = entries
        .map(|entry| {
            let empty = entry.empty_layer.unwrap_or(false);
            let layer = if empty { None } else { layers.next() };
            HistoryStep {
                layer: layer.map(|layer| layer.diff_id.to_string()),
                created: entry.created.clone(),
                created_by: entry.created_by.clone().unwrap_or_default(),
                size: layer.map_or(0, |layer| layer.size),
                comment: entry.comment.clone().unwrap_or_default(),
            }
        })
        .collect();
    // Some tools write no history.
    steps.extend(layers.map(|layer| HistoryStep {
        layer: Some(layer.diff_id.to_string()),
        created: None,
        created_by: String::new(),
        size: layer.size,
        comment: String::new(),
    }));
    steps.reverse();
    if args.format.json() {
        printer.json(&steps)?;
        return Ok(0);
    }
    if args.quiet {
        for step in &steps {
            printer.line(step.layer.as_deref().unwrap_or("<missing>"));
        }
        return Ok(0);
    }
    let rows: Vec<_> = steps
        .into_iter()
        .map(|step| {
            let id = step
                .layer
                .as_deref()
                .and_then(|id| id.strip_prefix("sha256:"));
            let command = step
                .created_by
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ");
            [
                id.map_or_else(|| "-".to_owned(), |id| short(id, args.no_trunc)),
                step.created.unwrap_or_else(|| "-".to_owned()),
                match args.no_trunc {
                    true => command,
                    false => truncated(&command),
                },
                format_size(step.size),
                step.comment,
            ]
        })
        .collect();
    let header = ["LAYER", "CREATED", "CREATED BY", "SIZE", "COMMENT"];
    printer.line(table::render(header, &rows));
    Ok(0)
}

fn truncated(text: &str) -> String {
    match text.char_indices().nth(SHORT_COMMAND) {
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()),
        None => text.to_owned(),
    }
}

fn verify(sm: &Sm, args: &VerifyArgs, printer: &Printer) -> Result<u32, Failure> {
    let queries = match args.images.is_empty() {
        true => sm
            .images()
            .list()?
            .into_iter()
            .map(|image| image.reference)
            .collect(),
        false => args.images.clone(),
    };
    let mut status = 0;
    let mut all = BTreeMap::new();
    for query in queries {
        let verified = match args.repair {
            true => sm.images().repair(&query),
            false => sm.images().verify(&query),
        }?;
        if !verified.problems.is_empty() {
            status = DAMAGED;
        }
        if !args.format.json() {
            match verified.problems.as_slice() {
                [] => printer.line(format_args!(
                    "{query}: sound ({} checked)",
                    format_size(verified.bytes)
                )),
                problems => {
                    for problem in problems {
                        printer.line(format_args!("{query}: {problem}"));
                    }
                    printer.note(match verified.repaired {
                        true => "The damaged data was removed: run or pull the image again.",
                        false => {
                            "\"sm image verify --repair\" removes the damaged data (unless a VM \
                             or a snapshot uses it), so that it is pulled or converted again."
                        }
                    });
                }
            }
        }
        all.insert(query, verified);
    }
    if args.format.json() {
        printer.json(&all)?;
    }
    Ok(status)
}

fn prune(sm: &Sm, args: &PruneArgs, printer: &Printer) -> Result<u32, Failure> {
    if args.all && !args.force {
        let question = "This removes all images that no VM and no snapshot uses. Continue?";
        match printer.confirm(question) {
            Some(true) => {}
            Some(false) => return Ok(0),
            None => {
                return Err(anyhow!(
                    "\"sm image prune --all\" asks before it removes images, and there is no \
                     terminal to ask at: add --force"
                )
                .into());
            }
        }
    }
    let mut options = PruneOptions::new()
        .all(args.all)
        .compressed(args.compressed);
    options.max_bytes = args.max_size;
    let pruned = sm.images().prune(options)?;
    if args.format.json() {
        printer.json(&pruned)?;
        return Ok(0);
    }
    for note in &pruned.notes {
        printer.note(note);
    }
    for name in &pruned.images {
        printer.line(format_args!("Removed: {name}"));
    }
    printer.line(format_args!("Freed: {}", format_size(pruned.bytes)));
    Ok(0)
}

fn usage(sm: &Sm, args: &FormatArgs, printer: &Printer) -> Result<u32, Failure> {
    let usage = sm.images().usage()?;
    if args.json() {
        printer.json(&usage)?;
        return Ok(0);
    }
    let rows: Vec<_> = usage
        .images
        .iter()
        .map(|image| {
            let used = image
                .used_ns
                .map(|ns| UNIX_EPOCH + Duration::from_nanos(ns));
            [
                match image.names.as_slice() {
                    [] => "-".to_owned(),
                    names => names.join(", "),
                },
                short(&image.digest.hex(), false),
                format_size(image.size),
                format_size(image.shared),
                format_size(image.compressed),
                used.map_or_else(|| "-".to_owned(), age),
                if image.in_use { "yes" } else { "no" }.to_owned(),
            ]
        })
        .collect();
    let header = [
        "IMAGE",
        "ID",
        "SIZE",
        "SHARED",
        "AS PULLED",
        "USED",
        "IN USE",
    ];
    printer.line(table::render(header, &rows));
    printer.line(format_args!(
        "Together: {}, of which {} are layers as they were pulled (\"sm image prune --compressed\")",
        format_size(usage.total),
        format_size(usage.compressed)
    ));
    Ok(0)
}
