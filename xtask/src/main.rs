//! Developer commands of this workspace, run as `cargo xtask COMMAND`.
//!
//! Every command checks its needs first, caches slow results, and can be interrupted and
//! repeated. Caches are in `$XDG_CACHE_HOME/sm` (or `~/.cache/sm`) and may be deleted at
//! any time.

mod apt;
mod background;
mod bench_disk;
mod bench_fs;
mod bench_image;
mod bench_kernel;
mod bench_life;
mod bench_net;
mod bench_restore;
mod bench_vsock;
mod build;
mod ci;
mod cmd;
mod cpio;
mod deb;
mod demo;
mod deny;
mod dist;
mod docs;
mod fidelity;
mod fixtures;
mod fuzz;
mod host;
mod kconfig;
mod kernel;
mod lab;
mod modules;
mod needs;
mod options;
mod package;
mod paths;
mod qemu;
mod stock;
mod stream;
mod test;
mod tidy;

use std::process::ExitCode;

use crate::options::Invocation;

fn main() -> ExitCode {
    match options::parse().and_then(run) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(invocation: Invocation) -> anyhow::Result<ExitCode> {
    let apt = apt::Apt::default();
    match invocation {
        Invocation::Help => print!("{}", options::HELP),
        Invocation::Build(profile) => {
            println!("{}", build::sm(&apt, profile)?.display());
        }
        Invocation::Kernel { stock: false } => println!("{}", kernel::tuned(&apt)?.display()),
        Invocation::Kernel { stock: true } => println!("{}", stock::kernel(&apt)?.display()),
        Invocation::Fixtures => {
            println!("{}", fixtures::create(&apt)?.display());
            println!("{}", fixtures::docker(&apt)?.display());
            println!("{}", fixtures::systemd(&apt)?.display());
            println!("{}", fixtures::work(&apt)?.display());
            if let Some(images) = fidelity::create(&apt)? {
                println!("{}", images.display());
            }
        }
        Invocation::Lab(job) => {
            let lab = lab::prepare(&apt)?;
            let status = lab::run(&lab, &job, &lab::JobOutput::Inherit)?;
            return Ok(ExitCode::from(status));
        }
        Invocation::Setup => needs::everything(&apt)?,
        Invocation::Demo => return Ok(ExitCode::from(demo::run(&apt)?)),
        Invocation::BenchDisk(options) => bench_disk::run(&options)?,
        Invocation::BenchFs(options) => bench_fs::run(&options)?,
        Invocation::BenchImage(options) => bench_image::run(&apt, &options)?,
        Invocation::BenchKernel(options) => bench_kernel::run(&apt, &options)?,
        Invocation::BenchLife(options) => bench_life::run(&apt, &options)?,
        Invocation::BenchNet(options) => bench_net::run(&apt, &options)?,
        Invocation::BenchRestore(options) => bench_restore::run(&apt, &options)?,
        Invocation::BenchVsock(options) => bench_vsock::run(&apt, &options)?,
        Invocation::Fuzz(options) => fuzz::run(&apt, &options)?,
        Invocation::Test(options) => {
            needs::tests(&apt, &options)?;
            let kernel = options.e2e.then(background::KernelBuild::start);
            test::run(&apt, &options, kernel)?;
        }
        Invocation::Dist(options) => println!("{}", dist::run(&apt, options)?.display()),
        Invocation::Docs(options) => {
            docs::run(&apt, &options)?;
            tidy::documents()?;
        }
        Invocation::Tidy => tidy::run()?,
        Invocation::Deny => deny::run(&apt)?,
        Invocation::Package { build } => package::run(build)?,
        Invocation::Ci => ci::run(&apt)?,
    }
    Ok(ExitCode::SUCCESS)
}
