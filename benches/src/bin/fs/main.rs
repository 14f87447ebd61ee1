//! The file server without a guest: LOOKUP beside a server that opens each inode, and, on
//! `/dev/fuse`, beside the host's file system: small files, streams, and writes that wait for
//! the disk. Everything is in the caches of the host; "cold" is a kernel that has just mounted
//! the server. Mounting needs root.

mod lookup;

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use lexopt::prelude::*;
use sm_fs_server::dev_fuse::DevFuse;
use sm_fs_server::{FsConfig, Server, Share, ShareOptions};

const MIB: usize = 1 << 20;
/// Files in a directory.
const PER_DIRECTORY: usize = 100;
/// Bytes of a small file.
const SMALL: usize = 2048;
/// Writes of 4 KiB, each of which waits for the disk.
const SYNCED: usize = 100;

struct Options {
    files: usize,
    mib: usize,
    rounds: usize,
    directory: PathBuf,
    json: Option<PathBuf>,
    /// Nothing is mounted.
    lookups_only: bool,
}

/// Rounds of LOOKUPs, which take a millisecond each.
const LOOKUP_ROUNDS: usize = 101;

fn options() -> Result<Options> {
    let mut options = Options {
        files: 60_000,
        mib: 1024,
        rounds: 3,
        directory: std::env::temp_dir(),
        json: None,
        lookups_only: false,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("files") => options.files = parser.value()?.parse()?,
            Long("mib") => options.mib = parser.value()?.parse()?,
            Long("rounds") => options.rounds = parser.value()?.parse()?,
            Long("directory") => options.directory = parser.value()?.into(),
            Long("lookups") => options.lookups_only = true,
            Long("json") => options.json = Some(parser.value()?.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    if options.files == 0 || options.mib == 0 || options.rounds == 0 {
        bail!("a count is at least 1");
    }
    Ok(options)
}

/// A directory of the host, or the same through a server that is mounted anew at each step.
struct Medium {
    host: PathBuf,
    /// Mount point of the server.
    target: Option<PathBuf>,
}

impl Medium {
    /// Runs a step; returns its time.
    fn timed(&self, step: &dyn Fn(&Path) -> Result<()>) -> Result<Duration> {
        let Some(target) = &self.target else {
            let begun = Instant::now();
            step(&self.host)?;
            return Ok(begun.elapsed());
        };
        let share = Share::new("s", File::open(&self.host)?.into(), ShareOptions::default())?;
        let mounted = DevFuse::mount(Server::new(FsConfig::default().share(share))?, target)?;
        let begun = Instant::now();
        step(&target.join("s"))?;
        let took = begun.elapsed();
        mounted.unmount()?;
        Ok(took)
    }
}

fn each_file(directory: &Path, action: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        match path.symlink_metadata()?.is_dir() {
            true => each_file(&path, action)?,
            false => action(&path)?,
        }
    }
    Ok(())
}

fn create(root: &Path, files: usize) -> Result<()> {
    for number in 0..files {
        let directory = root.join(format!("tree/{}", number / PER_DIRECTORY));
        if number % PER_DIRECTORY == 0 {
            fs::create_dir_all(&directory)?;
        }
        fs::write(directory.join(format!("file-{number}")), [7; SMALL])?;
    }
    Ok(())
}

fn find(root: &Path, files: usize) -> Result<()> {
    let mut found = 0;
    each_file(&root.join("tree"), &mut |path| {
        found += usize::from(path.symlink_metadata()?.len() > 0);
        Ok(())
    })?;
    if found != files {
        bail!("{found} of {files} files were found");
    }
    Ok(())
}

fn write_stream(root: &Path, mib: usize) -> Result<()> {
    let mut file = File::create(root.join("stream"))?;
    let bytes = vec![3; MIB];
    for _ in 0..mib {
        file.write_all(&bytes)?;
    }
    Ok(())
}

fn read_stream(root: &Path, mib: usize) -> Result<()> {
    let mut file = File::open(root.join("stream"))?;
    let mut bytes = vec![0; MIB];
    for _ in 0..mib {
        file.read_exact(&mut bytes)?;
    }
    Ok(())
}

fn sync(root: &Path) -> Result<()> {
    let mut file = File::create(root.join("synced"))?;
    for _ in 0..SYNCED {
        file.write_all(&[1; 4096])?;
        file.sync_all()?;
    }
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Measures LOOKUP, and returns the result for the report.
fn lookups(folder: &Path) -> Result<serde_json::Value> {
    let lookup::Times {
        mut server,
        mut descriptors,
    } = lookup::measure(folder, LOOKUP_ROUNDS)?;
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or_default()
    };
    let (server, descriptors) = (median(&mut server), median(&mut descriptors));
    println!(
        "LOOKUP and FORGET, CPU time: {server:.0} ns; with a descriptor per inode \
         {descriptors:.0} ns: {:.2} times\n",
        server / descriptors
    );
    Ok(serde_json::json!({
        "step": "lookup",
        "server_ns": server,
        "descriptors_ns": descriptors,
    }))
}

/// A name of a step, and what it does in a directory.
type Step<'a> = (&'static str, Box<dyn Fn(&Path) -> Result<()> + 'a>);

fn steps(options: &Options) -> Vec<Step<'_>> {
    let (files, mib) = (options.files, options.mib);
    vec![
        (
            "create small files",
            Box::new(move |root| create(root, files)),
        ),
        (
            "find -size +0, cold",
            Box::new(move |root| find(root, files)),
        ),
        (
            "find twice",
            Box::new(move |root| find(root, files).and_then(|()| find(root, files))),
        ),
        (
            "read small files",
            Box::new(|root| {
                each_file(&root.join("tree"), &mut |path| {
                    let len = fs::read(path)?.len();
                    if len != SMALL {
                        bail!("{path:?} has {len} bytes");
                    }
                    Ok(())
                })
            }),
        ),
        (
            "rm -rf",
            Box::new(|root| Ok(fs::remove_dir_all(root.join("tree"))?)),
        ),
        (
            "write a stream",
            Box::new(move |root| write_stream(root, mib)),
        ),
        (
            "read a stream, cold",
            Box::new(move |root| read_stream(root, mib)),
        ),
        ("100 x write and fsync 4 KiB", Box::new(sync)),
    ]
}

fn main() -> Result<()> {
    let options = options()?;
    let work = tempfile::tempdir_in(&options.directory)?;
    let at = |name: &str| work.path().join(name);
    for name in ["native", "shared", "target"] {
        fs::create_dir(at(name))?;
    }
    let mut results = vec![lookups(&at("native"))?];
    if options.lookups_only {
        return report(&options, &results);
    }
    let media = [
        Medium {
            host: at("native"),
            target: None,
        },
        Medium {
            host: at("shared"),
            target: Some(at("target")),
        },
    ];
    let steps = steps(&options);
    let mut times = vec![[const { Vec::new() }; 2]; steps.len()];
    for _ in 0..options.rounds {
        for ((_, step), times) in steps.iter().zip(&mut times) {
            for (medium, times) in media.iter().zip(times.iter_mut()) {
                times.push(
                    medium
                        .timed(step)
                        .context("mount a server: are you root?")?,
                );
            }
        }
    }
    println!(
        "{} files of {SMALL} bytes, streams of {} MiB, medians of {} rounds\n{:<30} {:>10} {:>10} {:>7}",
        options.files, options.mib, options.rounds, "", "native", "/dev/fuse", "ratio"
    );
    for ((name, _), [native, server]) in steps.iter().zip(times) {
        let (native, server) = (median(native), median(server));
        let ratio = server.as_secs_f64() / native.as_secs_f64();
        println!(
            "{name:<30} {:>7.1} ms {:>7.1} ms {ratio:>7.2}",
            native.as_secs_f64() * 1e3,
            server.as_secs_f64() * 1e3,
        );
        results.push(serde_json::json!({
            "step": name,
            "native_ms": native.as_secs_f64() * 1e3,
            "server_ms": server.as_secs_f64() * 1e3,
        }));
    }
    report(&options, &results)
}

fn report(options: &Options, results: &[serde_json::Value]) -> Result<()> {
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_string_pretty(results)?)?;
    }
    Ok(())
}
