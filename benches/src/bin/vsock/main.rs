//! The vsock device with a model of a Linux guest's driver, compared with pumps between
//! two sockets: alternating in one run, with medians and ratios.

mod device;
mod guest;
mod pump;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

/// Bytes per measurement of throughput.
const AMOUNT: usize = 64 << 20;
/// Connections in the comparison with threads per connection.
const MANY: usize = 1000;
/// Busy neighbours of the connection whose latency is measured.
const NEIGHBOURS: usize = 100;

#[derive(Debug, Default, Serialize)]
struct VsockReport {
    throughput: Vec<Throughput>,
    many: Vec<Many>,
    latency: Vec<Latency>,
    profiling: Vec<Profiling>,
    guest: Vec<guest::GuestPath>,
}

/// One stream, one direction.
#[derive(Debug, Serialize)]
struct Throughput {
    direction: &'static str,
    /// Bytes that the device moves at once: in a receive buffer, or in a packet.
    device_bytes: u32,
    device_gb_s: f64,
    pump_bytes: usize,
    pump_gb_s: f64,
    ratio: f64,
    /// True if the pump's buffer is as large as the device's, which makes the ratio fair.
    same_size: bool,
}

/// Echo of a message on each of many connections, in rounds.
#[derive(Debug, Serialize)]
struct Many {
    connections: usize,
    message: usize,
    device_mb_s: f64,
    /// Two threads per connection between sockets, without a device.
    threads_mb_s: f64,
    ratio: f64,
    /// Two threads per connection between the host's sockets and the device, the design
    /// of a VMM with frontends of a thread per connection.
    before_device_mb_s: f64,
    ratio_before_device: f64,
}

/// Round trips of 64 bytes while others are busy.
#[derive(Debug, Serialize)]
struct Latency {
    subject: &'static str,
    neighbours: usize,
    p50_us: f64,
    p99_us: f64,
    ratio: f64,
    /// Round trips of neighbours during one of these.
    others_p50: usize,
    others_p99: usize,
}

#[derive(Debug, Serialize)]
struct Profiling {
    measures: &'static str,
    gb_s: f64,
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn rate(bytes: usize, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64()
}

/// Returns the duration of `work`.
fn timed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed())
}

struct VsockOptions {
    json: Option<PathBuf>,
    rounds: usize,
    only: Option<String>,
    guest: Option<PathBuf>,
    image: String,
    mib: usize,
}

fn parse_args() -> Result<VsockOptions> {
    use lexopt::prelude::*;
    let mut options = VsockOptions {
        json: None,
        rounds: 7,
        only: None,
        guest: None,
        image: String::new(),
        mib: 64,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("json") => options.json = Some(parser.value()?.into()),
            Long("rounds") => options.rounds = parser.value()?.parse()?,
            Long("only") => options.only = Some(parser.value()?.string()?),
            // The path of `sm`, to measure a real guest only.
            Long("guest") => options.guest = Some(parser.value()?.into()),
            Long("image") => options.image = parser.value()?.string()?,
            Long("mib") => options.mib = parser.value()?.parse()?,
            other => bail!("{}", other.unexpected()),
        }
    }
    Ok(options)
}

fn main() -> Result<()> {
    let options = parse_args()?;
    let mut report = VsockReport::default();
    match &options.guest {
        Some(sm) => {
            report.guest = guest::measure(&guest::TransferOptions {
                sm: sm.clone(),
                image: options.image.clone(),
                mib: options.mib,
                rounds: options.rounds,
            })?;
        }
        None => harness(&mut report, &options)?,
    }
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {path:?}"))?;
    }
    Ok(())
}

/// Measures the device with a model of a guest.
fn harness(report: &mut VsockReport, options: &VsockOptions) -> Result<()> {
    let is = |part: &str| options.only.as_deref().is_none_or(|only| only == part);
    raise_descriptor_limit();
    if is("throughput") {
        throughput(report, options.rounds)?;
    }
    if is("many") {
        many(report, options.rounds)?;
    }
    if is("latency") {
        latency(report)?;
    }
    if is("profiling") {
        profiling(report, options.rounds)?;
    }
    Ok(())
}

fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: now.maximum,
        maximum: now.maximum,
    };
    // On failure, the current limit may suffice.
    let _ = setrlimit(Resource::Nofile, raised);
}

fn throughput(report: &mut VsockReport, rounds: usize) -> Result<()> {
    println!(
        "one stream, {} MiB, medians of {rounds} (GB/s)",
        AMOUNT >> 20
    );
    println!("  direction      device moves   device   pump buffer     pump   ratio");
    let pumps = [4 << 10, 16 << 10, 64 << 10];
    let receive = [3732, 16 << 10, 64 << 10];
    let send = [4 << 10, 16 << 10, 64 << 10];
    let mut pumped = vec![Vec::new(); pumps.len()];
    let mut received = vec![Vec::new(); receive.len()];
    let mut sent = vec![Vec::new(); send.len()];
    for _ in 0..rounds {
        for ((pump, rates), (receive, into)) in pumps
            .iter()
            .zip(&mut pumped)
            .zip(receive.iter().zip(&mut received))
        {
            rates.push(rate(AMOUNT, pump::stream(*pump, AMOUNT)?) / 1e9);
            into.push(rate(AMOUNT, device::to_guest(*receive, AMOUNT, false)?) / 1e9);
        }
        for (send, rates) in send.iter().zip(&mut sent) {
            rates.push(rate(AMOUNT, device::to_host(*send, AMOUNT)?) / 1e9);
        }
    }
    let pumped: Vec<f64> = pumped.iter_mut().map(|rates| median(rates)).collect();
    let directions = [
        ("host to guest", receive, &mut received),
        ("guest to host", send, &mut sent),
    ];
    for (direction, sizes, rates) in directions {
        for (size, rates) in sizes.iter().zip(rates) {
            let device_gb_s = median(rates);
            for (index, (&pump_bytes, &pump_gb_s)) in pumps.iter().zip(&pumped).enumerate() {
                let same_size = sizes.get(index) == Some(size);
                let row = Throughput {
                    direction,
                    device_bytes: *size,
                    device_gb_s,
                    pump_bytes,
                    pump_gb_s,
                    ratio: device_gb_s / pump_gb_s,
                    same_size,
                };
                println!(
                    "  {direction}  {size:>9} B  {device_gb_s:>7.2}   {pump_bytes:>9} B  {pump_gb_s:>7.2}  {:>6.2}{}",
                    row.ratio,
                    if same_size { "  <- same size" } else { "" }
                );
                report.throughput.push(row);
            }
        }
    }
    Ok(())
}

fn many(report: &mut VsockReport, rounds: usize) -> Result<()> {
    println!(
        "{MANY} connections, a message echoed on each in turn, medians of {rounds} (MB/s both ways)"
    );
    println!("             device   two threads each   ratio   these, and the device   ratio");
    for message in [64, 1 << 10, 4 << 10, 16 << 10] {
        // The amount of work is similar for all sizes.
        let turns = ((128 << 20) / (message + 2048) / MANY).max(2);
        let bytes = 2 * message * MANY * turns;
        let mut device = device::GuestEcho::new(MANY)?;
        let mut threads = pump::HostEcho::new(MANY)?;
        let mut behind = device::GuestEcho::behind_threads(MANY)?;
        let (mut of_device, mut of_threads) = (Vec::new(), Vec::new());
        let mut of_both = Vec::new();
        for _ in 0..rounds {
            of_device.push(rate(bytes, device.turns(message, turns)?) / 1e6);
            of_threads.push(rate(bytes, threads.turns(message, turns)?) / 1e6);
            of_both.push(rate(bytes, behind.turns(message, turns)?) / 1e6);
        }
        let (device_mb_s, threads_mb_s) = (median(&mut of_device), median(&mut of_threads));
        let before_device_mb_s = median(&mut of_both);
        let row = Many {
            connections: MANY,
            message,
            device_mb_s,
            threads_mb_s,
            ratio: device_mb_s / threads_mb_s,
            before_device_mb_s,
            ratio_before_device: device_mb_s / before_device_mb_s,
        };
        println!(
            "  {message:>6} B {device_mb_s:>8.1}   {threads_mb_s:>16.1}  {:>6.2}   \
             {before_device_mb_s:>21.1}  {:>6.2}",
            row.ratio, row.ratio_before_device
        );
        report.many.push(row);
    }
    Ok(())
}

fn latency(report: &mut VsockReport) -> Result<()> {
    println!("round trips of 64 bytes (microseconds)");
    println!(
        "  subject               neighbours      p50      p99   p99/p50   neighbours' meanwhile: p50   p99"
    );
    for (subject, neighbours) in [
        ("device", 0),
        ("device", NEIGHBOURS),
        ("two threads each", NEIGHBOURS),
    ] {
        let count = if neighbours == 0 { 20_000 } else { 4000 };
        let trips = match subject {
            "device" => device::latency(neighbours, count)?,
            _ => pump::HostEcho::new(neighbours + 1)?.latency(count)?,
        };
        let mut times: Vec<_> = trips.iter().map(|trip| trip.time).collect();
        times.sort_unstable();
        let at = |percent: usize| {
            let time = times.get(times.len() * percent / 100);
            time.map_or(0.0, |time| time.as_secs_f64() * 1e6)
        };
        let mut others: Vec<_> = trips.iter().map(|trip| trip.others).collect();
        others.sort_unstable();
        let others = |percent: usize| {
            let count = others.get(others.len() * percent / 100);
            count.copied().unwrap_or(0)
        };
        let row = Latency {
            subject,
            neighbours,
            p50_us: at(50),
            p99_us: at(99),
            ratio: at(99) / at(50),
            others_p50: others(50),
            others_p99: others(99),
        };
        println!(
            "  {subject:<20}  {neighbours:>10}  {:>7.1}  {:>7.1}  {:>8.2}   {:>27} {:>5}",
            row.p50_us, row.p99_us, row.ratio, row.others_p50, row.others_p99
        );
        report.latency.push(row);
    }
    Ok(())
}

fn profiling(report: &mut VsockReport, rounds: usize) -> Result<()> {
    let (mut off, mut on) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        off.push(rate(AMOUNT, device::to_guest(3732, AMOUNT, false)?) / 1e9);
        on.push(rate(AMOUNT, device::to_guest(3732, AMOUNT, true)?) / 1e9);
    }
    let checks = device::cost_of_a_stage_that_is_off();
    println!(
        "profile of stages: host to guest {:.2} GB/s off, {:.2} GB/s on; a stage that is off costs {checks:.2} ns",
        median(&mut off),
        median(&mut on)
    );
    for (measures, mut rates) in [("off", off), ("on", on)] {
        let gb_s = median(&mut rates);
        report.profiling.push(Profiling { measures, gb_s });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The count is independent of the machine's speed.
    #[test]
    fn a_message_waits_for_each_busy_neighbour_once() {
        let mut trips = device::latency(NEIGHBOURS, 400).unwrap();
        trips.sort_unstable_by_key(|trip| trip.others);
        let at = |percent: usize| trips[trips.len() * percent / 100].others;
        assert!(at(50) <= NEIGHBOURS + 1, "{} for most", at(50));
        assert!(at(99) * 10 <= at(50) * 13, "{} for some", at(99));
    }
}
