//! `sm images`, `pull` and `rmi`, and opening an image for a run.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::anyhow;
use sm_runtime::home::Home;
use sm_runtime::image::{self, Fetch, Image, Platform};

use crate::args::{ListArgs, Pull, PullArgs, RmiArgs};
use crate::failure::{Failure, OUR_FAILURE};
use crate::printer::Printer;
use crate::progress::Bars;
use crate::table;
use crate::units::{format_age, format_size};

/// Digits of an image's ID that a table shows.
const SHORT_ID: usize = 12;

/// Opens an image for a run, converting it first if it is not in the store yet.
/// Only a terminal sees progress: what is not the command's output would be in
/// the way elsewhere.
pub(super) fn open(
    home: &Home,
    reference: &str,
    pull: Pull,
    platform: Option<&Platform>,
    printer: &Printer,
) -> Result<Image, Failure> {
    if pull == Pull::Never && !image::is_stored(home, reference, platform)? {
        return Err(anyhow!(
            "image \"{reference}\" is not in the store, and --pull never was given: \
             bring it there with \"sm pull {reference}\""
        )
        .into());
    }
    let how = Fetch {
        platform: platform.cloned(),
        anew: pull == Pull::Always,
    };
    fetch(home, reference, &how, Bars::new(printer, false))
}

fn fetch(home: &Home, reference: &str, how: &Fetch, mut bars: Bars<'_>) -> Result<Image, Failure> {
    let mut show = |progress: image::Progress<'_>| bars.show(&progress);
    let image = Image::fetch_in(home, reference, how, &mut show);
    bars.clear();
    Ok(image?)
}

pub(crate) fn pull(home: &Home, args: &PullArgs, printer: &Printer) -> Result<u32, Failure> {
    let how = Fetch {
        platform: args.platform.clone(),
        anew: true,
    };
    let image = fetch(home, &args.image, &how, Bars::new(printer, !args.quiet))?;
    if !args.quiet {
        printer.note(format_args!("Stored \"{}\"", image.reference()));
    }
    printer.line(image.digest());
    Ok(0)
}

pub(crate) fn list(home: &Home, args: &ListArgs, printer: &Printer) -> Result<u32, Failure> {
    let images = image::list(home)?;
    if args.quiet {
        for image in &images {
            printer.line(image.digest);
        }
    } else if args.format.json() {
        printer.json(&images)?;
    } else {
        let now = SystemTime::now();
        let rows: Vec<_> = images
            .iter()
            .map(|image| {
                let stored = UNIX_EPOCH + Duration::from_nanos(image.stored_ns);
                let age = now.duration_since(stored).unwrap_or_default();
                let digits = image.digest.hex();
                [
                    image.reference.clone(),
                    digits.get(..SHORT_ID).unwrap_or(&digits).to_owned(),
                    format!("{} ago", format_age(age)),
                    format_size(image.size),
                ]
            })
            .collect();
        printer.line(table::render(["IMAGE", "ID", "STORED", "SIZE"], &rows));
    }
    Ok(0)
}

pub(crate) fn remove(home: &Home, args: &RmiArgs, printer: &Printer) -> Result<u32, Failure> {
    let mut status = 0;
    for query in &args.images {
        match image::remove(home, query) {
            Ok(()) => printer.line(query),
            Err(error) => {
                printer.error(&error.into());
                status = OUR_FAILURE;
            }
        }
    }
    Ok(status)
}
