//! `cargo xtask bench-life`: times of `sm` commands that disks make longer, against the
//! same without them, and the rate of `sm cp` against that of a published port. All are
//! measured alternately.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use sm_benches::samples::PhaseSamples;

/// Name of the VM that is stopped and started.
const KEPT: &str = "bench-life-kept";
/// Name of the VM whose start is measured with a disk that stays.
const NEW: &str = "bench-life-new";
/// Name of the VM that files are copied to and from.
const COPIES: &str = "bench-life-copies";
/// Guest ports: one reads and discards, the other sends the copied file.
const SINK: &str = "9001";
const SOURCE: &str = "9002";

/// The command line.
struct LifeOptions {
    sm: PathBuf,
    image: String,
    rounds: usize,
    mib: usize,
}

fn options() -> Result<LifeOptions> {
    use lexopt::Arg::Long;
    use lexopt::ValueExt as _;

    let (mut sm, mut image, mut rounds, mut mib) = (None, None, 15, 64);
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("sm") => sm = Some(parser.value()?.into()),
            Long("image") => image = Some(parser.value()?.string()?),
            Long("rounds") => rounds = parser.value()?.parse()?,
            Long("mib") => mib = parser.value()?.parse()?,
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(LifeOptions {
        sm: sm.context("--sm is missing")?,
        image: image.context("--image is missing")?,
        rounds,
        mib,
    })
}

/// Two subjects that are measured alternately.
struct Contest {
    title: &'static str,
    /// The first is compared with the second.
    subjects: [PhaseSamples; 2],
}

impl Contest {
    fn new(title: &'static str, subjects: [&str; 2]) -> Self {
        let subjects = subjects.map(|name| PhaseSamples {
            name: name.to_owned(),
            micros: Vec::new(),
        });
        Self { title, subjects }
    }

    fn add(&mut self, times: [Duration; 2]) {
        for (subject, time) in self.subjects.iter_mut().zip(times) {
            subject.micros.push(time.as_secs_f64() * 1e6);
        }
    }

    fn print(&self) -> Result<()> {
        let medians = self
            .subjects
            .iter()
            .map(|subject| subject.summary().map(|summary| summary.p50 / 1e3));
        let medians: Option<Vec<f64>> = medians.collect();
        let medians = medians.context("nothing was measured")?;
        let [first, second] = &self.subjects;
        println!(
            "{}: {} {:.1} ms, {} {:.1} ms: {:.3} times",
            self.title,
            first.name,
            medians[0],
            second.name,
            medians[1],
            medians[0] / medians[1]
        );
        Ok(())
    }
}

/// Runs `sm`, and returns the time that it took.
fn sm(options: &LifeOptions, arguments: &[&str], output: Stdio) -> Result<Duration> {
    let started = Instant::now();
    let ended = Command::new(&options.sm)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .context("cannot run sm")?;
    let time = started.elapsed();
    if !ended.status.success() {
        let message = String::from_utf8_lossy(&ended.stderr);
        bail!("sm {arguments:?}: {}: {message}", ended.status);
    }
    Ok(time)
}

/// VMs that are removed at the end.
struct Vms<'a>(&'a LifeOptions);

impl Drop for Vms<'_> {
    fn drop(&mut self) {
        for name in [KEPT, NEW, COPIES] {
            // Those that exist; a failure of the bench is reported already.
            let _ = sm(self.0, &["rm", "-f", name], Stdio::null());
        }
    }
}

/// Starts of VMs. The first round is not counted: it makes snapshots and templates.
fn starts(options: &LifeOptions) -> Result<()> {
    let image = options.image.as_str();
    let run = |arguments: &[&str]| sm(options, arguments, Stdio::null());
    let mut root = Contest::new("sm run --rm true", ["a root disk", "a root in memory"]);
    let mut again = Contest::new("true", ["sm start of a stopped VM", "sm run"]);
    run(&["create", "--name", KEPT, image, "true"])?;
    for round in 0..=options.rounds {
        let times = [
            run(&["run", "--rm", image, "true"])?,
            run(&["run", "--rm", "--root", "tmpfs", image, "true"])?,
        ];
        let started = run(&["start", "-a", KEPT])?;
        let first = run(&["run", "--name", NEW, image, "true"])?;
        run(&["rm", NEW])?;
        if round > 0 {
            root.add(times);
            again.add([started, first]);
        }
    }
    root.print()?;
    again.print()
}

/// Sends a file to a port of the guest, and waits until it is read.
fn send(socket: &Path, file: &Path) -> Result<Duration> {
    let started = Instant::now();
    let mut stream = UnixStream::connect(socket)?;
    std::io::copy(&mut File::open(file)?, &mut stream)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.trim() != "done" {
        bail!("the guest says {answer:?}");
    }
    Ok(started.elapsed())
}

/// Receives a file from a port of the guest.
fn receive(socket: &Path, file: &Path, length: u64) -> Result<Duration> {
    let started = Instant::now();
    let got = std::io::copy(&mut UnixStream::connect(socket)?, &mut File::create(file)?)?;
    if got != length {
        bail!("{got} bytes of {length} came");
    }
    Ok(started.elapsed())
}

/// Copies of one file.
fn copies(options: &LifeOptions) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let [file, back, sink, source] =
        ["file", "back", "sink", "source"].map(|name| directory.path().join(name));
    let mut written = File::create(&file)?;
    // No two pieces are equal, and none is zeros.
    for piece in 0..options.mib {
        written.write_all(&vec![u8::try_from(piece % 251)? + 1; 1 << 20])?;
    }
    let length = fs::metadata(&file)?.len();
    let script = format!(
        "nc -ll -p {SINK} -e sh -c 'cat >/dev/null; echo done' & exec nc -ll -p {SOURCE} -e cat /file"
    );
    let text = |path: &Path| path.to_str().map(str::to_owned).context("not UTF-8");
    let (sink_port, source_port) = (
        format!("{}:{SINK}", text(&sink)?),
        format!("{}:{SOURCE}", text(&source)?),
    );
    let started = [
        "run",
        "-d",
        "--name",
        COPIES,
        "-m",
        "512m",
        "--publish-unix",
        &sink_port,
        "--publish-unix",
        &source_port,
        &options.image,
        "sh",
        "-c",
        &script,
    ];
    sm(options, &started, Stdio::null())?;
    let (from, to, inside) = (text(&file)?, text(&back)?, format!("{COPIES}:/file"));
    let mut inward = Contest::new("a file to the guest", ["sm cp", "a published port"]);
    let mut outward = Contest::new("a file from the guest", ["sm cp", "a published port"]);
    for round in 0..=options.rounds {
        let to_guest = [
            sm(options, &["cp", &from, &inside], Stdio::null())?,
            send(&sink, &file)?,
        ];
        let to_host = [
            sm(options, &["cp", &inside, &to], Stdio::null())?,
            receive(&source, &back, length)?,
        ];
        if round > 0 {
            inward.add(to_guest);
            outward.add(to_host);
        }
    }
    inward.print()?;
    outward.print()
}

fn main() -> Result<()> {
    let options = options()?;
    let _vms = Vms(&options);
    println!(
        "medians of {}; files of {} MiB",
        options.rounds, options.mib
    );
    starts(&options)?;
    copies(&options)
}
