//! Measures the conversion of images to disks, compared with the usual tools.
//!
//! Each subject is a command that runs in a fresh directory, alternating with the others;
//! measured are its wall time and the peak memory of it and its children. `cargo xtask
//! bench-image` creates the images and calls this program.

mod contest;
mod registry;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use lexopt::prelude::*;
use sm_benches::report;
use sm_benches::samples::{BenchReport, Comparison};
use sm_image::{Compression, Config, LayoutBuilder, MemoryFile};

use crate::contest::{Contest, Subject, shell};
use crate::registry::BenchRegistry;

const HELP: &str = "\
bench-image measure --sm FILE --layer LAYOUT [--iterations N] [--json FILE] [--html FILE]
bench-image inflate FILE
";
const ITERATIONS: usize = 7;
/// Number of files in the second image, a typical one of small files.
const SMALL_FILES: usize = 60_000;

fn main() -> Result<()> {
    let mut parser = lexopt::Parser::from_env();
    let Some(Value(command)) = parser.next()? else {
        bail!("say what to do:\n{HELP}");
    };
    let (mut sm, mut layer, mut json, mut html) = (None, None, None, None);
    let (mut iterations, mut file) = (ITERATIONS, None);
    while let Some(argument) = parser.next()? {
        match argument {
            Long("sm") => sm = Some(PathBuf::from(parser.value()?)),
            Long("layer") => layer = Some(PathBuf::from(parser.value()?)),
            Long("iterations") => iterations = parser.value()?.parse()?,
            Long("json") => json = Some(PathBuf::from(parser.value()?)),
            Long("html") => html = Some(PathBuf::from(parser.value()?)),
            Value(value) => file = Some(PathBuf::from(value)),
            other => return Err(other.unexpected().into()),
        }
    }
    match command.string()?.as_str() {
        "inflate" => inflate(&file.context("which file?")?),
        "measure" => {
            let sm = sm.context("--sm is missing")?;
            let layer = layer.context("--layer is missing")?;
            let report = measure(&sm, &layer, iterations)?;
            print!("{}", report::text(&report));
            if let Some(path) = json {
                fs::write(path, serde_json::to_vec_pretty(&report)?)?;
            }
            if let Some(path) = html {
                fs::write(path, report::html("Images into disks", &report))?;
            }
            Ok(())
        }
        other => bail!("there is no {other:?}:\n{HELP}"),
    }
}

/// The floor: one pass of the decompressor of `sm`.
fn inflate(path: &Path) -> Result<()> {
    let file = io::BufReader::with_capacity(256 << 10, File::open(path)?);
    let mut plain = flate2::bufread::MultiGzDecoder::new(file);
    io::copy(&mut plain, &mut io::sink())?;
    Ok(())
}

fn measure(sm: &Path, layer: &Path, iterations: usize) -> Result<BenchReport> {
    let work = tempfile::tempdir_in(".")?;
    let work = work.path().canonicalize()?;
    let small = work.join("small");
    small_files(&small)?;
    let mut report = BenchReport::default();
    for (what, layout) in [
        ("a Debian layer", layer.to_owned()),
        ("60,000 small files", small),
    ] {
        let blob = layer_of(&layout)?;
        let title = format!(
            "{what}: {:.0} MB of gzip, {:.0} MB of tar, {iterations} runs each",
            megabytes(blob.metadata()?.len()),
            megabytes(tar_size(&blob)?),
        );
        let contest = Contest::new(&work, iterations);
        let (comparison, notes) = contest.run(&title, &conversions(sm, &layout, &blob)?)?;
        report.comparisons.push(comparison);
        report.notes.extend(notes);
    }
    let registry = BenchRegistry::start(&work, layer)?;
    let contest = Contest::new(&work, iterations);
    let title = format!("pulling the Debian image from a registry on this host, {iterations} runs");
    let (comparison, notes) = contest.run(&title, &pulls(sm, &registry))?;
    report.comparisons.push(comparison);
    report.notes.extend(notes);
    report
        .comparisons
        .push(second(sm, layer, &work, iterations)?);
    Ok(report)
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Commands from a layer in a layout to a disk, or to the closest equivalent.
fn conversions(sm: &Path, layout: &Path, blob: &Path) -> Result<Vec<Subject>> {
    let (sm, layout, blob) = (shell(sm)?, shell(layout)?, shell(blob)?);
    let own = shell(&std::env::current_exe()?)?;
    Ok(vec![
        Subject::new("sm", format!("{sm} pull --quiet oci:{layout}:latest")),
        Subject::new("gunzip|sha256", format!("gunzip -c <{blob} | sha256sum")),
        Subject::new("one inflate", format!("{own} inflate {blob}")),
        Subject::new(
            "umoci+mkfs",
            format!("umoci unpack --image {layout}:latest b && mkfs.erofs disk b/rootfs"),
        ),
    ])
}

fn pulls(sm: &Path, registry: &BenchRegistry) -> Vec<Subject> {
    let image = registry.image();
    let sm = sm.display();
    vec![
        Subject::new("sm", format!("{sm} pull --quiet {image}")),
        Subject::new(
            "skopeo+umoci",
            format!(
                "skopeo copy --quiet --src-tls-verify=false docker://{image} oci:l:latest && \
                 umoci unpack --image l:latest b"
            ),
        ),
    ]
}

/// Pulls the same image again, which needs no conversion.
fn second(sm: &Path, layout: &Path, work: &Path, iterations: usize) -> Result<Comparison> {
    let (sm, layout) = (shell(sm)?, shell(layout)?);
    let command = format!("{sm} pull oci:{layout}:latest");
    let contest = Contest::new(work, iterations);
    contest.repeat(
        "the same image again",
        &Subject::new("sm", command),
        |log| {
            // The output mentions its only layer.
            log.contains("Stored") && !log.contains("Reading")
        },
    )
}

/// Returns the only layer of an image in a layout.
fn layer_of(layout: &Path) -> Result<PathBuf> {
    let blobs = fs::read_dir(layout.join("blobs/sha256"))?;
    blobs
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .max_by_key(|path| path.metadata().map_or(0, |meta| meta.len()))
        .context("the layout has no layer")
}

fn tar_size(blob: &Path) -> Result<u64> {
    let file = io::BufReader::new(File::open(blob)?);
    let mut plain = flate2::bufread::MultiGzDecoder::new(file);
    Ok(io::copy(&mut plain, &mut io::sink())?)
}

/// Creates an image of many small files, with sizes and words as in a `node_modules`.
fn small_files(layout: &Path) -> Result<()> {
    let mut state = 7u64;
    let mut random = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 40).unwrap_or(0)
    };
    let words: Vec<String> = (0..5000)
        .map(|_| (0..2 + random() % 8).map(|_| letter(random())).collect())
        .collect();
    let names: Vec<String> = (0..SMALL_FILES)
        .map(|n| {
            format!(
                "srv/node_modules/p{}/lib/d{}/module-{n}.js",
                n / 60,
                n / 12 % 5
            )
        })
        .collect();
    let mut file = |_: &String| {
        // Most files have a few hundred words, some a few thousand.
        let scale = 1 << (random() % 6);
        let count = 20 + random() % (40 * scale);
        let text: Vec<&str> = (0..count)
            .map(|_| words[random() % 5000].as_str())
            .collect();
        MemoryFile::File(text.join(" ").into_bytes())
    };
    let files: Vec<_> = names
        .iter()
        .map(|name| (name.as_str(), 0o644, file(name)))
        .collect();
    let mut image = LayoutBuilder::new(layout, Compression::Gzip(6))?;
    image.memory_layer(&files)?;
    image.finish("latest", Config::default())?;
    Ok(())
}

fn letter(number: usize) -> char {
    char::from(b'a' + u8::try_from(number % 26).unwrap_or(0))
}
