//! Images in archives: `sm save`, `sm load`, `sm import`.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal as _, Read, Write as _};
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, anyhow};
use sm_runtime::home::Home;
use sm_runtime::image::{self, PullOptions};

mod change;

use crate::args::{ImportArgs, LoadArgs, SaveArgs};
use crate::failure::Failure;
use crate::printer::Printer;
use crate::progress::Bars;

pub(crate) fn save(home: &Home, args: &SaveArgs, printer: &Printer) -> Result<u32, Failure> {
    let bars = Bars::new(printer, args.output.is_some(), "Reading");
    let options = PullOptions {
        report: &|progress| bars.show(progress),
        ..PullOptions::default()
    };
    // Names are looked up first: a wrong one costs nobody a file.
    for query in &args.images {
        image::inspect(home, query)?;
    }
    let Some(path) = &args.output else {
        if io::stdout().is_terminal() {
            return Err(anyhow!(
                "an archive is not for a terminal: name a file with --output, or redirect \
                 standard output"
            )
            .into());
        }
        let mut out = BufWriter::with_capacity(1 << 20, io::stdout());
        image::save(home, &args.images, &mut out, &options)?;
        return Ok(0);
    };
    // What had the name stays until the archive is complete.
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => ".".as_ref(),
    };
    let cannot = || format!("cannot write {path:?}");
    // As any other file that a user asks for, not private as temporary ones.
    let permissions = std::fs::Permissions::from_mode(0o666);
    let file = tempfile::Builder::new()
        .permissions(permissions)
        .tempfile_in(directory)
        .with_context(cannot)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    image::save(home, &args.images, &mut out, &options)?;
    out.flush().with_context(cannot)?;
    let file = out.into_inner().with_context(cannot)?;
    file.persist(path).with_context(cannot)?;
    Ok(0)
}

pub(crate) fn load(home: &Home, args: &LoadArgs, printer: &Printer) -> Result<u32, Failure> {
    let quiet = args.quiet || args.json;
    let bars = Bars::new(printer, !quiet, "Reading");
    let options = PullOptions {
        platform: args.platform.clone(),
        report: &|progress| bars.show(progress),
        ..PullOptions::default()
    };
    let loaded = match &args.input {
        Some(path) => image::load_file(home, path, &options),
        None if io::stdin().is_terminal() => {
            return Err(anyhow!(
                "an archive is not typed in: name a file with --input, or redirect standard input"
            )
            .into());
        }
        None => image::load(home, io::stdin().lock(), "standard input", &options),
    };
    bars.clear();
    let loaded = loaded?;
    if args.json {
        printer.json(&loaded)?;
        return Ok(0);
    }
    for image in loaded {
        match args.quiet {
            true => printer.line(image.digest),
            // As Docker says it.
            false => image
                .names
                .iter()
                .for_each(|name| printer.line(format_args!("Loaded image: {name}"))),
        }
    }
    Ok(0)
}

pub(crate) fn import(home: &Home, args: &ImportArgs, printer: &Printer) -> Result<u32, Failure> {
    let config = change::apply(&args.change)?;
    let bars = Bars::new(printer, false, "Reading");
    let options = PullOptions {
        platform: args.platform.clone(),
        report: &|progress| bars.show(progress),
        ..PullOptions::default()
    };
    let stream: Box<dyn Read + Send> = if args.file.as_os_str() == "-" {
        Box::new(io::stdin())
    } else {
        let path = &args.file;
        Box::new(File::open(path).with_context(|| format!("cannot read {path:?}"))?)
    };
    let name = args.name.as_deref();
    let imported = image::import(home, stream, name, config, &args.message, &options);
    bars.clear();
    printer.line(imported?);
    Ok(0)
}
