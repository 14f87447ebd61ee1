//! `cargo xtask bench-net`: the network engine against those of other programs, on this host.
//!
//! All have the same way: a client in a network namespace, the program in the next one, and
//! the servers in a third, behind a pair of virtual interfaces.

mod namespaces;
mod subjects;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use self::namespaces::Namespaces;
use self::subjects::Subject;
use crate::apt::{self, Apt};
use crate::build::cargo;
use crate::{cmd, paths};

const PACKAGES: [&str; 5] = ["iperf3", "iproute2", "passt", "slirp4netns", "util-linux"];
const IPERF_PORT: u16 = 5201;
const ECHO_PORT: u16 = 7;
/// Numbers of connections with messages.
const CONNECTIONS: [u32; 2] = [10, 1000];
const MESSAGES: u32 = 20_000;

/// Measurements to take, and the path of the report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BenchNetOptions {
    pub(crate) rounds: Option<usize>,
    /// Seconds of each stream.
    pub(crate) seconds: Option<u32>,
    /// A part of the names of subjects.
    pub(crate) only: Option<String>,
    pub(crate) json: Option<PathBuf>,
}

/// The values of a measurement, by its name and subject.
type Samples = BTreeMap<(&'static str, Subject), Vec<f64>>;

pub(crate) fn run(apt: &Apt, options: &BenchNetOptions) -> Result<()> {
    if !apt::is_root() {
        bail!("bench-net creates network namespaces, which only root can do");
    }
    apt.ensure(&PACKAGES)?;
    cmd::step("building the benchmark");
    let mut build = cargo(["build", "--locked", "--release", "-p", "sm-benches"]);
    cmd::check(build.args(["--bin", "net"]))?;
    let mut build = cargo(["build", "--locked", "--release", "-p", "sm-devices-net"]);
    cmd::check(build.args(["--example", "tap"]))?;
    let bench = Bench {
        namespaces: Namespaces::create()?,
        tap: paths::target().join("release/examples/tap"),
        net: paths::target().join("release/net"),
        seconds: options.seconds.unwrap_or(2),
    };
    let wanted = |subject: &Subject| match &options.only {
        Some(part) => subject.name().contains(part.as_str()),
        None => true,
    };
    let mut subjects: Vec<_> = Subject::ALL.into_iter().filter(wanted).collect();
    if subjects.is_empty() {
        bail!("no subject of the benchmark has that name");
    }
    let mut samples = Samples::new();
    let rounds = options.rounds.unwrap_or(5);
    for round in 1..=rounds {
        cmd::step(format!("round {round} of {rounds}"));
        for subject in &subjects {
            bench.streams(*subject, &mut samples)?;
            bench.messages(*subject, &mut samples)?;
        }
        subjects.rotate_left(1);
    }
    report(&samples);
    if let Some(path) = &options.json {
        let rows = samples.iter().map(|((measurement, subject), values)| {
            serde_json::json!({
                "measurement": measurement, "subject": subject.name(), "values": values,
            })
        });
        let text = serde_json::to_string_pretty(&rows.collect::<Vec<_>>())?;
        fs::write(path, text).with_context(|| format!("cannot write {path:?}"))?;
    }
    Ok(())
}

/// The programs and namespaces of a measurement.
struct Bench {
    namespaces: Namespaces,
    tap: PathBuf,
    net: PathBuf,
    seconds: u32,
}

impl Bench {
    /// Measures a stream in each direction, in gigabits per second.
    fn streams(&self, subject: Subject, samples: &mut Samples) -> Result<()> {
        let mut server = Command::new("iperf3");
        server.args([
            "--server",
            "--forceflush",
            "--port",
            &IPERF_PORT.to_string(),
        ]);
        let _server = self.serve(&server)?;
        let _pump = self.pump(subject, IPERF_PORT)?;
        for (name, reverse) in [
            ("guest to host", None),
            ("host to guest", Some("--reverse")),
        ] {
            let target = subject.target().to_string();
            let seconds = self.seconds.to_string();
            let port = IPERF_PORT.to_string();
            let mut client = vec![
                "iperf3", "--client", &target, "--port", &port, "--time", &seconds, "--json",
            ];
            client.extend(reverse);
            let text = cmd::text(&mut subject.command(&self.namespaces, &self.tap, &client))
                .with_context(|| format!("{}, {name}", subject.name()))?;
            let rate = received(&text).with_context(|| format!("{}, {name}", subject.name()))?;
            samples.entry((name, subject)).or_default().push(rate);
        }
        Ok(())
    }

    /// Measures messages and their answers over many connections, in microseconds each.
    fn messages(&self, subject: Subject, samples: &mut Samples) -> Result<()> {
        let mut server = Command::new(&self.net);
        server.args(["echo", &format!("0.0.0.0:{ECHO_PORT}")]);
        let _server = self.serve(&server)?;
        let _pump = self.pump(subject, ECHO_PORT)?;
        for connections in CONNECTIONS {
            let name = match connections {
                10 => "message, 10 connections",
                _ => "message, 1000 connections",
            };
            let target = format!("{}:{ECHO_PORT}", subject.target());
            let (count, messages) = (connections.to_string(), MESSAGES.to_string());
            let program = self.net.to_string_lossy();
            let client = [&program, "ask", &target, &count, &messages];
            let text = cmd::text(&mut subject.command(&self.namespaces, &self.tap, &client))
                .with_context(|| format!("{}, {name}", subject.name()))?;
            let nanoseconds: f64 = text.trim().parse().context("no number of nanoseconds")?;
            let value = nanoseconds / 1000.0;
            samples.entry((name, subject)).or_default().push(value);
        }
        Ok(())
    }

    /// Starts a server, and waits until it listens.
    fn serve(&self, server: &Command) -> Result<Server> {
        Self::start(self.namespaces.in_server(server))
    }

    fn pump(&self, subject: Subject, port: u16) -> Result<Option<Server>> {
        if subject != Subject::Pump {
            return Ok(None);
        }
        let mut pump = Command::new(&self.net);
        pump.arg("pump")
            .arg(format!("{}:{port}", subject.target()))
            .arg(format!("{}:{port}", namespaces::SERVER));
        Self::start(self.namespaces.in_host(&pump)).map(Some)
    }

    fn start(mut command: Command) -> Result<Server> {
        // A server also reports each client that has its results and does not say goodbye.
        command.stderr(Stdio::null()).stdin(Stdio::null());
        let child = command.stdout(Stdio::piped()).spawn();
        let mut server = Server(child.context("cannot run `ip`")?);
        // It prints this when it listens; the rest of its output fits the pipe.
        let output = server.0.stdout.as_mut().context("no output")?;
        let mut lines = BufReader::with_capacity(1, output).lines();
        while !lines
            .next()
            .context("a server has ended")??
            .contains("listening")
        {}
        Ok(server)
    }
}

/// A program that is ended when it is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the rate of a stream in gigabits per second.
fn received(json: &str) -> Result<f64> {
    let report: Value = serde_json::from_str(json).context("iperf3 prints no JSON")?;
    if let Some(error) = report.get("error") {
        bail!("iperf3: {error}");
    }
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(rate.context("iperf3 prints no rate")? / 1e9)
}

fn report(samples: &Samples) {
    let mut last = "";
    for ((measurement, subject), values) in samples {
        if *measurement != last {
            let unit = match measurement.starts_with("message") {
                true => "microseconds",
                false => "Gbit/s",
            };
            println!("\n{measurement} ({unit}, medians)");
            last = measurement;
        }
        let value = median(values);
        let engine = samples.get(&(*measurement, Subject::Engine));
        let ratio = match engine.map(|values| median(values)) {
            Some(engine) if *subject != Subject::Engine && value > 0.0 => {
                format!("   the engine: {:.2} times", engine / value)
            }
            _ => String::new(),
        };
        println!("  {:<22} {value:>8.2}{ratio}", subject.name());
    }
    for subject in Subject::ALL {
        let of = |name| samples.get(&(name, subject)).map(|values| median(values));
        let few = of("message, 10 connections");
        if let (Some(few), Some(many)) = (few, of("message, 1000 connections"))
            && few > 0.0
        {
            let name = subject.name();
            println!(
                "{name}: a message with 1000 connections takes {:.2} times",
                many / few
            );
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_what_arrived() {
        let json = r#"{"end":{"sum_sent":{"bits_per_second":9e9},
            "sum_received":{"bits_per_second":2.5e9}}}"#;
        assert_eq!(received(json).unwrap(), 2.5);
        let error = received(r#"{"error":"unable to connect"}"#).unwrap_err();
        assert!(error.to_string().contains("unable to connect"));
    }

    #[test]
    fn the_median_is_one_of_the_values() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[]), 0.0);
    }
}
