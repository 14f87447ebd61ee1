//! The command line.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use lexopt::prelude::*;

use crate::bench_disk;
use crate::bench_fs;
use crate::bench_image;
use crate::bench_kernel;
use crate::bench_life;
use crate::bench_net;
use crate::bench_restore;
use crate::bench_vsock;
use crate::build::BuildProfile;
use crate::dist;
use crate::docs;
use crate::fuzz;
use crate::lab::LabJob;
use crate::test::TestOptions;

pub(crate) const HELP: &str = "\
Developer commands of sm: cargo xtask COMMAND

  demo        build everything and run a container image as a microVM
  test        all tests: unit tests here, end-to-end tests where KVM runs Linux
              [--unit | --e2e] [--lab] [--debug] [NAME...: end-to-end tests only]
              [--full: also those that take too long for CI, named full_...]
  ci          fmt, tidy, deny, clippy, doc, package, test: what .ci/run calls
  tidy        rules that no compiler checks: dependencies of crates and modules, operating
              systems, lengths of files, pointers outside the repository, links and
              commands in documents
  docs        the site and manual pages, in the build output
              [--write: the pages that are generated from the parser of sm instead]
              [--man DIRECTORY: manual pages only]
  deny        licences, sources and versions of dependencies, by cargo-deny and deny.toml
  package     whether each library could be published as it is: its metadata and files
              [--full: build each from its archive, too]
  build       sm with its guest agent (release) [--debug]
  dist        a release: one static sm with agent and kernel inside, man pages, completions,
              licences, a bill of materials, checksums [--check: and run it alone in the lab]
  kernel      the tuned guest kernel, built once [--stock: the distribution's]
  fixtures    images for the end-to-end tests
  bench-disk  disks of layers against raw files, and the time of a freeze
              [--rounds N] [--only NAME] [--directory DIR] [--json FILE]
  bench-fs    the server of shared directories without a guest: LOOKUP, and on /dev/fuse
              [--rounds N] [--files N] [--mib N] [--lookups] [--directory DIR] [--json FILE]
  bench-kernel
              the tuned kernel's size, and its instructions until the first program
              [--vs VMLINUX]...
  bench-life  what disks cost the start of VMs, and how fast sm cp is
              [--rounds N] [--mib N]
  bench-net   the network engine against pasta and slirp4netns, in network namespaces
              [--rounds N] [--seconds N] [--only NAME] [--json FILE]
  bench-restore
              how long restoring takes, phase by phase, against a floor and rivals
              [--iterations N] [--memory MIB]... [--vcpus N]... [--vs RIVAL]...
              [--vmm-only | --path-only] [--json FILE] [--html FILE]
  bench-vsock how fast bytes move through the vsock device, against pumps, with a
              model of a guest and with a real one
              [--rounds N] [--harness-only | --guest-only] [--json FILE]
  bench-image how long images take to become disks, against the usual tools
              [--iterations N] [--json FILE] [--html FILE]
  fuzz        the fuzz targets, until each has had so much of a CPU, in any number of runs
              [--minutes N (60)] [--save: keep their corpora in fuzz/corpus] [NAME...]
  lab -- CMD  run CMD in a QEMU machine that has a real /dev/kvm
              [--results DIR] [--memory MIB] [--cpus N] [--timeout SECONDS]
              [--env NAME=VALUE]
  setup       install the packages that all of this needs

In the lab, CMD sees this host's files at the same paths; what it writes stays
in the lab's memory, except in $SM_LAB_RESULTS (--results DIR here). The data of sm
is empty there, and so are /tmp and /run but for the workspace, its build output, the
cache and the current directory.
";

/// A parsed command line.
pub(crate) enum Invocation {
    Help,
    Build(BuildProfile),
    Kernel { stock: bool },
    Fixtures,
    Lab(LabJob),
    Setup,
    Demo,
    BenchDisk(bench_disk::BenchDiskOptions),
    BenchFs(bench_fs::BenchFsOptions),
    BenchImage(bench_image::BenchImageOptions),
    BenchKernel(bench_kernel::BenchKernelOptions),
    BenchLife(bench_life::BenchLifeOptions),
    BenchNet(bench_net::BenchNetOptions),
    BenchRestore(bench_restore::BenchRestoreOptions),
    BenchVsock(bench_vsock::BenchVsockOptions),
    Fuzz(fuzz::FuzzOptions),
    Test(TestOptions),
    Dist(dist::DistOptions),
    Docs(docs::DocsOptions),
    Tidy,
    Deny,
    Package { build: bool },
    Ci,
}

/// Parses the command line of this process.
pub(crate) fn parse() -> Result<Invocation> {
    read(lexopt::Parser::from_env())
}

pub(crate) fn read(parser: lexopt::Parser) -> Result<Invocation> {
    match command(parser) {
        Err(error) if asks_for_help(&error) => Ok(Invocation::Help),
        invocation => invocation,
    }
}

/// Returns true if the unknown option is a request for help.
fn asks_for_help(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(lexopt::Error::UnexpectedOption(option)) if option == "--help" || option == "-h"
    )
}

fn command(mut parser: lexopt::Parser) -> Result<Invocation> {
    let command = match parser.next()? {
        None | Some(Long("help") | Short('h')) => return Ok(Invocation::Help),
        Some(Value(command)) => command.string()?,
        Some(other) => return Err(other.unexpected().into()),
    };
    Ok(match command.as_str() {
        "help" => Invocation::Help,
        "build" => Invocation::Build(match flag(&mut parser, "debug")? {
            true => BuildProfile::Debug,
            false => BuildProfile::Release,
        }),
        "kernel" => Invocation::Kernel {
            stock: flag(&mut parser, "stock")?,
        },
        "fixtures" => without_options(parser, Invocation::Fixtures)?,
        "setup" => without_options(parser, Invocation::Setup)?,
        "demo" => without_options(parser, Invocation::Demo)?,
        "tidy" => without_options(parser, Invocation::Tidy)?,
        "deny" => without_options(parser, Invocation::Deny)?,
        "package" => Invocation::Package {
            build: flag(&mut parser, "full")?,
        },
        "ci" => without_options(parser, Invocation::Ci)?,
        "bench-disk" => Invocation::BenchDisk(bench_disk(parser)?),
        "bench-fs" => Invocation::BenchFs(bench_fs(parser)?),
        "bench-image" => Invocation::BenchImage(bench_image(parser)?),
        "bench-kernel" => Invocation::BenchKernel(bench_kernel(parser)?),
        "bench-life" => Invocation::BenchLife(bench_life(parser)?),
        "bench-net" => Invocation::BenchNet(bench_net(parser)?),
        "bench-restore" => Invocation::BenchRestore(bench_restore(parser)?),
        "bench-vsock" => Invocation::BenchVsock(bench_vsock(parser)?),
        "dist" => Invocation::Dist(dist::DistOptions {
            check: flag(&mut parser, "check")?,
        }),
        "docs" => Invocation::Docs(docs(parser)?),
        "fuzz" => Invocation::Fuzz(fuzz(parser)?),
        "lab" => Invocation::Lab(lab(parser)?),
        "test" => Invocation::Test(test(parser)?),
        other => bail!("there is no command \"{other}\"; \"cargo xtask help\" lists them"),
    })
}

fn flag(parser: &mut lexopt::Parser, name: &str) -> Result<bool> {
    let mut set = false;
    while let Some(argument) = parser.next()? {
        match argument {
            Long(given) if given == name => set = true,
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(set)
}

fn without_options(mut parser: lexopt::Parser, invocation: Invocation) -> Result<Invocation> {
    match parser.next()? {
        None => Ok(invocation),
        Some(other) => Err(other.unexpected().into()),
    }
}

fn lab(mut parser: lexopt::Parser) -> Result<LabJob> {
    let mut job = LabJob {
        input: true,
        ..LabJob::default()
    };
    while let Some(argument) = parser.next()? {
        match argument {
            Long("results") => job.results = Some(parser.value()?.into()),
            Long("memory") => job.memory_mib = parser.value()?.parse()?,
            Long("cpus") => job.cpus = parser.value()?.parse()?,
            Long("timeout") => {
                job.timeout = Some(Duration::from_secs(parser.value()?.parse()?));
            }
            Long("env") => {
                let pair = parser.value()?.string()?;
                let (name, value) = pair
                    .split_once('=')
                    .with_context(|| format!("--env {pair}: expected NAME=VALUE"))?;
                job.environment.push((name.to_owned(), value.to_owned()));
            }
            Value(first) => {
                job.command.push(first.string()?);
                for word in parser.raw_args()? {
                    job.command.push(word.string()?);
                }
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if job.command.is_empty() {
        bail!("which command? cargo xtask lab -- CMD [ARGUMENT...]");
    }
    Ok(job)
}

fn test(mut parser: lexopt::Parser) -> Result<TestOptions> {
    let mut options = TestOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("unit") => options.e2e = false,
            Long("e2e") => options.unit = false,
            Long("lab") => options.force_lab = true,
            Long("full") => options.full = true,
            Long("debug") => options.profile = BuildProfile::Debug,
            Value(name) => options.names.push(name.string()?),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn docs(mut parser: lexopt::Parser) -> Result<docs::DocsOptions> {
    let mut options = docs::DocsOptions::All;
    while let Some(argument) = parser.next()? {
        options = match argument {
            Long("write") => docs::DocsOptions::Generated,
            Long("man") => docs::DocsOptions::Man(parser.value()?.into()),
            other => return Err(other.unexpected().into()),
        };
    }
    Ok(options)
}

fn bench_image(mut parser: lexopt::Parser) -> Result<bench_image::BenchImageOptions> {
    let mut options = bench_image::BenchImageOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("iterations") => options.iterations = Some(parser.value()?.parse()?),
            Long("json") => options.json = Some(parser.value()?.into()),
            Long("html") => options.html = Some(parser.value()?.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn bench_kernel(mut parser: lexopt::Parser) -> Result<bench_kernel::BenchKernelOptions> {
    let mut options = bench_kernel::BenchKernelOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("vs") => options.others.push(parser.value()?.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn bench_life(mut parser: lexopt::Parser) -> Result<bench_life::BenchLifeOptions> {
    let mut options = bench_life::BenchLifeOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("rounds") => options.rounds = Some(parser.value()?.parse()?),
            Long("mib") => options.mib = Some(parser.value()?.parse()?),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn bench_restore(mut parser: lexopt::Parser) -> Result<bench_restore::BenchRestoreOptions> {
    let mut options = bench_restore::BenchRestoreOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("iterations") => options.iterations = Some(parser.value()?.parse()?),
            Long("memory") => options.memory_mib.push(parser.value()?.parse()?),
            Long("vcpus") => options.vcpus.push(parser.value()?.parse()?),
            Long("vs") => options.rivals.push(parser.value()?.string()?),
            Long("vmm-only") => options.vmm_only = true,
            Long("path-only") => options.path_only = true,
            Long("json") => options.json = Some(parser.value()?.into()),
            Long("html") => options.html = Some(parser.value()?.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    if options.vmm_only && options.path_only {
        bail!("--vmm-only and --path-only leave nothing to measure");
    }
    Ok(options)
}

fn fuzz(mut parser: lexopt::Parser) -> Result<fuzz::FuzzOptions> {
    let mut options = fuzz::FuzzOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("minutes") => options.minutes = Some(parser.value()?.parse()?),
            Long("save") => options.save = true,
            Value(name) => options.names.push(name.string()?),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn bench_disk(mut parser: lexopt::Parser) -> Result<bench_disk::BenchDiskOptions> {
    let mut options = bench_disk::BenchDiskOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("rounds") => options.rounds = Some(parser.value()?.parse()?),
            Long("only") => options.only = Some(parser.value()?.string()?),
            Long("directory") => options.directory = Some(parser.value()?.into()),
            Long("json") => options.json = Some(parser.value()?.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn bench_net(mut parser: lexopt::Parser) -> Result<bench_net::BenchNetOptions> {
    let mut options = bench_net::BenchNetOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("rounds") => options.rounds = Some(parser.value()?.parse()?),
            Long("seconds") => options.seconds = Some(parser.value()?.parse()?),
            Long("only") => options.only = Some(parser.value()?.string()?),
            Long("json") => options.json = Some(parser.value()?.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn bench_fs(mut parser: lexopt::Parser) -> Result<bench_fs::BenchFsOptions> {
    let mut options = bench_fs::BenchFsOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("rounds") => options.rounds = Some(parser.value()?.parse()?),
            Long("files") => options.files = Some(parser.value()?.parse()?),
            Long("mib") => options.mib = Some(parser.value()?.parse()?),
            Long("lookups") => options.lookups = true,
            Long("directory") => options.directory = Some(parser.value()?.into()),
            Long("json") => options.json = Some(parser.value()?.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn bench_vsock(mut parser: lexopt::Parser) -> Result<bench_vsock::BenchVsockOptions> {
    let mut options = bench_vsock::BenchVsockOptions::default();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("rounds") => options.rounds = Some(parser.value()?.parse()?),
            Long("harness-only") => options.harness_only = true,
            Long("guest-only") => options.guest_only = true,
            Long("json") => options.json = Some(parser.value()?.into()),
            other => return Err(other.unexpected().into()),
        }
    }
    if options.harness_only && options.guest_only {
        bail!("--harness-only and --guest-only leave nothing to measure");
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::{Invocation, read};

    fn parsed(line: &str) -> anyhow::Result<Invocation> {
        read(lexopt::Parser::from_args(line.split_whitespace()))
    }

    #[test]
    fn options_after_the_lab_command_are_the_commands_own() {
        for line in [
            "lab --memory 512 -- ls --memory x",
            "lab --memory 512 ls --memory x",
        ] {
            let Ok(Invocation::Lab(job)) = parsed(line) else {
                panic!("{line} is a lab command");
            };
            assert_eq!(job.memory_mib, 512);
            assert_eq!(job.command, ["ls", "--memory", "x"]);
        }
    }

    #[test]
    fn every_command_can_be_asked_for_help() {
        for line in [
            "--help",
            "-h",
            "help",
            "test --help",
            "ci -h",
            "fuzz tar -h",
            "lab --help",
        ] {
            assert!(matches!(parsed(line), Ok(Invocation::Help)), "{line}");
        }
        assert!(matches!(parsed("lab ls --help"), Ok(Invocation::Lab(_))));
    }

    #[test]
    fn invalid_command_lines_are_refused() {
        for line in [
            "lab",
            "frobnicate",
            "ci extra",
            "kernel --sock",
            "lab --env A -- b",
            "bench-restore --vmm-only --path-only",
            "fuzz --minutes many",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }
}
