//! Disks of layers compared with raw files, without a VM: alternating in one run, with
//! medians of the ratios of each round.
//!
//! Contents are in the page cache, so a difference is the work of this program and of the
//! file system: it is measured as the CPU time of this thread, which other processes do not
//! change much. Requests with a flush are measured as time.

mod disks;
mod freeze;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use sm_vmm_core::virtio::disk::Disk;

use self::disks::{Bench, CAPACITY, Layout, Scatter};
use self::freeze::Freeze;

#[derive(Debug, Default, Serialize)]
struct DiskReport {
    rows: Vec<Row>,
    freeze: Vec<Freeze>,
}

/// One kind of request to one disk.
#[derive(Debug, Serialize)]
struct Row {
    access: &'static str,
    bytes: u32,
    disk: &'static str,
    mb_s: f64,
    /// Times the raw file's rate.
    ratio: f64,
    goal: Option<f64>,
}

/// The kind of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DiskAccess {
    Read,
    /// Writes to what was written before.
    Write,
    /// Writes to clusters that the file does not have yet.
    FirstWrite,
    /// Writes to what was written before, each with a flush.
    Flushed,
    /// The same to clusters that the file does not have yet.
    FirstFlushed,
    /// The same in order, as to a log.
    AppendFlushed,
}

impl DiskAccess {
    const ALL: [Self; 6] = [
        Self::Read,
        Self::Write,
        Self::FirstWrite,
        Self::Flushed,
        Self::FirstFlushed,
        Self::AppendFlushed,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::FirstWrite => "first write",
            Self::Flushed => "write, flush",
            Self::FirstFlushed => "first write, flush",
            Self::AppendFlushed => "append, flush",
        }
    }

    /// Sizes of requests: small ones anywhere, and large ones in order.
    fn sizes(self) -> &'static [u32] {
        match self {
            Self::Read | Self::Write | Self::FirstWrite => &[4 << 10, 1 << 20],
            Self::Flushed | Self::FirstFlushed | Self::AppendFlushed => &[4 << 10],
        }
    }

    /// Bytes of a round.
    fn amount(self) -> u64 {
        match self {
            Self::Read | Self::Write => CAPACITY,
            Self::FirstWrite => CAPACITY / 4,
            Self::Flushed | Self::FirstFlushed | Self::AppendFlushed => 16 * 4096,
        }
    }

    fn is_first(self) -> bool {
        matches!(
            self,
            Self::FirstWrite | Self::FirstFlushed | Self::AppendFlushed
        )
    }

    /// The rate of a raw file that a disk should reach.
    fn goal(self, layout: Layout) -> Option<f64> {
        match (self, layout) {
            (_, Layout::Raw | Layout::Scattered)
            | (Self::Flushed | Self::FirstFlushed | Self::AppendFlushed, _) => None,
            (_, Layout::Deep) => Some(0.85),
            (Self::Read, Layout::Fresh) => Some(0.95),
            (Self::Write | Self::FirstWrite, Layout::Fresh) => Some(0.9),
        }
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

struct DiskOptions {
    json: Option<PathBuf>,
    directory: PathBuf,
    rounds: usize,
    /// A part of the names of measurements.
    only: Option<String>,
}

fn parse_args() -> Result<DiskOptions> {
    use lexopt::prelude::*;
    let mut options = DiskOptions {
        json: None,
        directory: std::env::temp_dir(),
        rounds: 15,
        only: None,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("json") => options.json = Some(parser.value()?.into()),
            Long("directory") => options.directory = parser.value()?.into(),
            Long("only") => options.only = Some(parser.value()?.string()?),
            Long("rounds") => options.rounds = parser.value()?.parse()?,
            other => bail!("{}", other.unexpected()),
        }
    }
    Ok(options)
}

fn main() -> Result<()> {
    let options = parse_args()?;
    let mut bench = Bench::new(options.directory)?;
    let mut report = DiskReport::default();
    println!(
        "disks of {} MiB, medians of {} rounds, ratios to a raw file",
        CAPACITY >> 20,
        options.rounds
    );
    println!("  requests            bytes   disk              MB/s   ratio   goal");
    for access in DiskAccess::ALL {
        if options
            .only
            .as_deref()
            .is_some_and(|only| !access.name().contains(only))
        {
            continue;
        }
        for bytes in access.sizes() {
            compare(&mut bench, &mut report, access, *bytes, options.rounds)?;
        }
    }
    if options.only.as_deref().is_none_or(|only| only == "freeze") {
        report.freeze = freeze::measure(&mut bench, 5 * options.rounds)?;
    }
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {path:?}"))?;
    }
    Ok(())
}

/// Measures all disks in turn.
fn compare(
    bench: &mut Bench,
    report: &mut DiskReport,
    access: DiskAccess,
    bytes: u32,
    rounds: usize,
) -> Result<()> {
    let mut disks = Vec::new();
    for layout in Layout::ALL {
        disks.push((layout, bench.written(layout)?, Vec::new()));
    }
    let mut scatter = Scatter::new();
    // The first round is not counted.
    for round in 0..=rounds {
        let offsets: Vec<u64> = offsets(access, bytes, &mut scatter).collect();
        for (layout, disk, rates) in &mut disks {
            let rate = match (access.is_first(), disk.layers()) {
                (false, _) => requests(bench, disk, access, bytes, &offsets)?,
                (true, Some(layers)) if *layout != Layout::Fresh => {
                    let above = Disk::layered(bench.above(layers)?);
                    requests(bench, &above, access, bytes, &offsets)?
                }
                (true, _) => {
                    let empty = bench.empty(*layout)?;
                    requests(bench, &empty, access, bytes, &offsets)?
                }
            };
            if round > 0 {
                rates.push(rate);
            }
        }
    }
    let raw = disks.first().map(|(_, _, rates)| rates.clone());
    let raw = raw.unwrap_or_default();
    for (layout, _, rates) in &mut disks {
        let ratios = rates.iter().zip(&raw).map(|(rate, raw)| rate / raw);
        let ratio = median(&mut ratios.collect::<Vec<_>>());
        let goal = access.goal(*layout);
        let row = Row {
            access: access.name(),
            bytes,
            disk: layout.name(),
            mb_s: median(rates) / 1e6,
            ratio,
            goal,
        };
        let goal = match goal {
            Some(goal) if ratio < goal => format!("{goal:.2}  MISSED"),
            Some(goal) => format!("{goal:.2}"),
            None => String::new(),
        };
        println!(
            "  {:<18} {bytes:>7}   {:<12} {:>9.1} {ratio:>7.3}   {goal}",
            row.access, row.disk, row.mb_s
        );
        report.rows.push(row);
    }
    Ok(())
}

/// Returns the offsets of the requests of a round.
fn offsets(access: DiskAccess, bytes: u32, scatter: &mut Scatter) -> impl Iterator<Item = u64> {
    let bytes = u64::from(bytes);
    let is_anywhere = bytes < 1 << 20 && access != DiskAccess::AppendFlushed;
    (0..access.amount() / bytes).map(move |number| match is_anywhere {
        true => scatter.below(CAPACITY / bytes) * bytes,
        false => number * bytes,
    })
}

/// Executes requests; returns bytes per second of CPU time, or with flushes of time.
fn requests(
    bench: &Bench,
    disk: &Disk,
    access: DiskAccess,
    bytes: u32,
    offsets: &[u64],
) -> Result<f64> {
    let begun = Instant::now();
    let cpu = cpu_time();
    for offset in offsets {
        match access {
            DiskAccess::Read => bench.read(disk, *offset, bytes)?,
            DiskAccess::Write | DiskAccess::FirstWrite => bench.write(disk, *offset, bytes)?,
            DiskAccess::Flushed | DiskAccess::FirstFlushed | DiskAccess::AppendFlushed => {
                bench.write(disk, *offset, bytes)?;
                disk.flush()?;
            }
        }
    }
    let amount = offsets.len() as f64 * f64::from(bytes);
    let took = match access {
        DiskAccess::Flushed | DiskAccess::FirstFlushed | DiskAccess::AppendFlushed => {
            begun.elapsed()
        }
        DiskAccess::Read | DiskAccess::Write | DiskAccess::FirstWrite => cpu_time() - cpu,
    };
    Ok(amount / took.as_secs_f64())
}

/// The CPU time of this thread.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}
