//! Real guests: throughput of published ports, with alternating measurements.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use super::pump::{self, CHUNK};
use super::{median, rate, timed};

/// Ports of the guest: one reads and discards, the other writes.
const SINK: u16 = 9001;
const SOURCE: u16 = 9002;

/// Parameters of the measurement.
pub(crate) struct TransferOptions {
    pub(crate) sm: PathBuf,
    pub(crate) image: String,
    pub(crate) mib: usize,
    pub(crate) rounds: usize,
}

/// One path into a guest, in one direction.
#[derive(Debug, Serialize)]
pub(crate) struct GuestPath {
    by: &'static str,
    direction: &'static str,
    mb_s: f64,
    /// A pump between two sockets with 64 KiB, on the same machine.
    pump_mb_s: f64,
    ratio: f64,
}

trait ConnectionEnd: Read + Write {
    fn end_writing(&self) -> std::io::Result<()>;
}

impl ConnectionEnd for UnixStream {
    fn end_writing(&self) -> std::io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl ConnectionEnd for TcpStream {
    fn end_writing(&self) -> std::io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// A guest that is stopped when this is dropped.
struct RunningGuest<'a> {
    sm: &'a Path,
    directory: tempfile::TempDir,
    /// The published ports on the host.
    sink: String,
    source: String,
}

const NAME: &str = "bench-vsock";

impl<'a> RunningGuest<'a> {
    fn new(options: &'a TransferOptions) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let script = format!(
            "nc -ll -p {SINK} -e sh -c 'cat >/dev/null; echo done' & \
             exec nc -ll -p {SOURCE} -e dd if=/dev/zero bs=65536 count={}",
            options.mib * 16
        );
        let mut run = Command::new(&options.sm);
        run.args(["run", "-d", "--name", NAME, "-m", "256m"]);
        for port in [SINK, SOURCE] {
            let path = directory.path().join(port.to_string());
            run.arg("--publish-unix")
                .arg(format!("{}:{port}", path.display()))
                .args(["-p", &port.to_string()]);
        }
        run.arg(&options.image).args(["sh", "-c", &script]);
        output(&mut run)?;
        let mut running = Self {
            sm: &options.sm,
            directory,
            sink: String::new(),
            source: String::new(),
        };
        let ports = output(Command::new(&options.sm).args(["port", NAME]))?;
        for line in ports.lines() {
            let Some((guest, host)) = line.split_once(" -> ") else {
                continue;
            };
            match guest.split('/').next().and_then(|port| port.parse().ok()) {
                Some(SINK) if host.contains("127.0.0.1") => running.sink = host.to_owned(),
                Some(SOURCE) if host.contains("127.0.0.1") => running.source = host.to_owned(),
                _ => {}
            }
        }
        Ok(running)
    }

    fn unix(&self, port: u16) -> Result<UnixStream> {
        let path = self.directory.path().join(port.to_string());
        Ok(UnixStream::connect(path)?)
    }
}

impl Drop for RunningGuest<'_> {
    fn drop(&mut self) {
        let _ = Command::new(self.sm).args(["rm", "-f", NAME]).output();
    }
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot run sm")?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Writes all bytes, and waits for the guest's confirmation.
fn to_guest(mut end: impl ConnectionEnd, amount: usize) -> Result<Duration> {
    timed(|| {
        let chunk = vec![7; CHUNK];
        for _ in 0..amount / CHUNK {
            end.write_all(&chunk)?;
        }
        end.end_writing()?;
        let mut answer = String::new();
        end.read_to_string(&mut answer)?;
        if answer.trim() != "done" {
            bail!("the guest says {answer:?}");
        }
        Ok(())
    })
}

fn to_host(mut end: impl ConnectionEnd, amount: usize) -> Result<Duration> {
    timed(|| {
        let mut chunk = vec![0; CHUNK];
        let mut got = 0;
        loop {
            match end.read(&mut chunk)? {
                0 => break,
                count => got += count,
            }
        }
        if got != amount {
            bail!("{got} bytes of {amount} came");
        }
        Ok(())
    })
}

pub(crate) fn measure(options: &TransferOptions) -> Result<Vec<GuestPath>> {
    let amount = options.mib << 20;
    let guest = RunningGuest::new(options)?;
    let mut rates: [Vec<f64>; 5] = Default::default();
    // The first round is not counted.
    for round in 0..=options.rounds {
        let took = [
            to_guest(guest.unix(SINK)?, amount)?,
            to_host(guest.unix(SOURCE)?, amount)?,
            to_guest(TcpStream::connect(&guest.sink)?, amount)?,
            to_host(TcpStream::connect(&guest.source)?, amount)?,
            pump::stream(CHUNK, amount)?,
        ];
        if round > 0 {
            for (rates, took) in rates.iter_mut().zip(took) {
                rates.push(rate(amount, took) / 1e6);
            }
        }
    }
    let [unix_in, unix_out, tcp_in, tcp_out, pump_mb_s] = rates.map(|mut rates| median(&mut rates));
    println!(
        "a real guest, {} MiB, medians of {} (MB/s); a pump in the same place: {pump_mb_s:.0}",
        options.mib, options.rounds
    );
    println!("  by     direction         MB/s   of the pump");
    let rows = [
        ("unix", "host to guest", unix_in),
        ("unix", "guest to host", unix_out),
        ("tcp", "host to guest", tcp_in),
        ("tcp", "guest to host", tcp_out),
    ];
    Ok(rows
        .into_iter()
        .map(|(by, direction, mb_s)| {
            let ratio = mb_s / pump_mb_s;
            println!("  {by:<5}  {direction}  {mb_s:>8.1}   {ratio:>11.3}");
            GuestPath {
                by,
                direction,
                mb_s,
                pump_mb_s,
                ratio,
            }
        })
        .collect())
}
