//! `sm kernel` and `sm doctor`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, anyhow};
use sm_runtime::home::Home;
use sm_runtime::{doctor as checks, kernel};

use crate::args::{DoctorArgs, KernelCommand, ListArgs};
use crate::failure::{Failure, OUR_FAILURE};
use crate::printer::Printer;
use crate::table;

pub(crate) fn run(home: &Home, command: KernelCommand, printer: &Printer) -> Result<u32, Failure> {
    match command {
        KernelCommand::Build => build(),
        KernelCommand::List(args) => list(home, &args, printer),
        KernelCommand::Use { kernel } => {
            let chosen = kernel::choose(home, &kernel)?;
            printer.line(chosen.path.display());
            Ok(0)
        }
    }
}

/// Building is the work of the source tree's `xtask`, which knows the
/// configuration and the distribution's packages.
fn build() -> Result<u32, Failure> {
    let directory = std::env::current_dir().context("cannot tell the current directory")?;
    let Some(checkout) = checkout(&directory) else {
        return Err(anyhow!(
            "a kernel is built from the source tree of sm: run \"cargo xtask kernel\" there, \
             then \"sm kernel list\" shows it; or use a kernel of your distribution with \
             \"sm kernel use /boot/vmlinuz-VERSION\""
        )
        .into());
    };
    let status = Command::new("cargo")
        .args(["xtask", "kernel"])
        .current_dir(&checkout)
        .status()
        .context("cannot run cargo")?;
    Ok(if status.success() { 0 } else { OUR_FAILURE })
}

/// The source tree that `directory` is in.
fn checkout(directory: &Path) -> Option<PathBuf> {
    directory
        .ancestors()
        .find(|path| path.join("xtask/Cargo.toml").is_file() && path.join("vmm-core").is_dir())
        .map(Path::to_owned)
}

fn list(home: &Home, args: &ListArgs, printer: &Printer) -> Result<u32, Failure> {
    let kernels = kernel::list(home);
    if args.quiet {
        for kernel in &kernels {
            printer.line(&kernel.name);
        }
    } else if args.format.json() {
        printer.json(&kernels)?;
    } else {
        let rows: Vec<_> = kernels
            .iter()
            .map(|kernel| {
                let mark = if kernel.current { "*" } else { "" };
                [
                    mark.to_owned(),
                    kernel.name.clone(),
                    kernel.path.display().to_string(),
                ]
            })
            .collect();
        printer.line(table::render([" ", "NAME", "PATH"], &rows));
    }
    Ok(0)
}

pub(crate) fn doctor(home: &Home, args: &DoctorArgs, printer: &Printer) -> Result<u32, Failure> {
    let checks = checks::examine(home);
    let works = checks.iter().all(|check| check.ok);
    if args.format.json() {
        printer.json(&serde_json::json!({ "works": works, "checks": checks }))?;
    } else {
        for check in &checks {
            let mark = if check.ok { "ok  " } else { "FAIL" };
            printer.line(format_args!("{mark}  {}: {}", check.name, check.detail));
        }
        printer.line(if works {
            "This host can run VMs"
        } else {
            "This host cannot run VMs until what failed is put right"
        });
    }
    Ok(if works { 0 } else { OUR_FAILURE })
}
