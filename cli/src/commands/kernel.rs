//! `sm kernel` and `sm doctor`.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, anyhow};
use rustix::process::{getegid, geteuid};
use serde_json::json;
use sm_runtime::kernel::ListedKernel;
use sm_runtime::{AgentError, KernelError, Sm};

use crate::args::{DoctorArgs, KernelCommand, ListArgs};
use crate::failure::{FAILED, Failure, hint_of_agent, hint_of_kernel};
use crate::filter::Filters;
use crate::listing::Listing;
use crate::printer::Printer;

pub(crate) fn run(sm: &Sm, command: KernelCommand, printer: &Printer) -> Result<u32, Failure> {
    match command {
        KernelCommand::Build => build(),
        KernelCommand::List { filter, list: args } => list(sm, &filter, &args, printer),
        KernelCommand::Use { kernel } => {
            let chosen = sm.kernels().choose(&kernel)?;
            printer.line(chosen.path.display());
            Ok(0)
        }
    }
}

/// Runs the `xtask` of the source tree, which has the configuration and the
/// distribution's packages.
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
    refuse_of_others(&checkout)?;
    // Cargo and rustup obey files of the current directory and all above it, such as
    // `.cargo/config.toml` and `rust-toolchain.toml`, which in `/tmp` anybody can create
    // at any moment. The root directory is the administrator's.
    let status = Command::new("cargo")
        .args(["run", "--quiet", "--manifest-path"])
        .arg(checkout.join("Cargo.toml"))
        .args(["--package", "xtask", "--", "kernel"])
        .current_dir("/")
        .status()
        .context("cannot run cargo")?;
    Ok(if status.success() { 0 } else { FAILED })
}

/// Returns the source tree that contains `directory`.
fn checkout(directory: &Path) -> Option<PathBuf> {
    directory
        .ancestors()
        .find(|path| path.join("xtask/Cargo.toml").is_file() && path.join("vmm-core").is_dir())
        .map(Path::to_owned)
}

/// Refuses a source tree that another user could have created or changed, because
/// building it runs its programs (compare Git's `safe.directory`).
fn refuse_of_others(checkout: &Path) -> anyhow::Result<()> {
    for path in ["", "Cargo.toml", "xtask", "xtask/Cargo.toml"].map(|p| checkout.join(p)) {
        let found = match std::fs::metadata(&path) {
            Ok(found) => found,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot examine {path:?}")),
        };
        let (user, group) = (geteuid().as_raw(), getegid().as_raw());
        let owned = [0, user].contains(&found.uid());
        // Many systems have a private group for each user, without other members.
        let group_may = found.mode() & 0o020 != 0 && found.gid() != group;
        if !owned || group_may || found.mode() & 0o002 != 0 {
            return Err(anyhow!(
                "not building in {checkout:?}: another user owns or can change {path:?}, and \
                 building runs what is there. Copy the source tree to a directory of yours"
            ));
        }
    }
    Ok(())
}

fn list(sm: &Sm, filter: &[String], args: &ListArgs, printer: &Printer) -> Result<u32, Failure> {
    let filters = Filters::parse(filter, &["name"])?;
    let mut kernels = sm.kernels().list();
    kernels.retain(|kernel| filters.hold("name", |value| kernel.name.contains(value)));
    let listing = Listing {
        header: &[" ", "NAME", "PATH"],
        name: &|kernel: &ListedKernel| kernel.name.clone(),
        cells: &|kernel| {
            let mark = if kernel.current { "*" } else { "" };
            let path = kernel.path.display().to_string();
            vec![mark.to_owned(), kernel.name.clone(), path]
        },
        members: &|kernel| json!({"Name": kernel.name, "Path": kernel.path, "Current": kernel.current}),
    };
    listing.print(&kernels, &args.form()?, printer)?;
    Ok(0)
}

pub(crate) fn doctor(sm: &Sm, args: &DoctorArgs, printer: &Printer) -> Result<u32, Failure> {
    let mut checks = sm.examine();
    for check in &mut checks {
        // The library, whose text this is, knows no commands.
        let hint = match &check.detail {
            _ if check.ok => None,
            detail if *detail == KernelError::None.to_string() => {
                hint_of_kernel(&KernelError::None)
            }
            detail if *detail == AgentError::None.to_string() => hint_of_agent(&AgentError::None),
            _ => None,
        };
        if let Some(hint) = hint {
            check.detail = format!("{}: {hint}", check.detail);
        }
    }
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
            "This host cannot run VMs until the failed checks pass"
        });
    }
    Ok(if works { 0 } else { FAILED })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_tree_that_others_can_change_is_not_built() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("sm");
        fs::create_dir_all(tree.join("xtask")).unwrap();
        fs::create_dir(tree.join("vmm-core")).unwrap();
        fs::write(tree.join("xtask/Cargo.toml"), b"").unwrap();
        let below = tree.join("vmm-core");
        assert_eq!(checkout(&below).as_deref(), Some(tree.as_path()));
        let mode = |name: &str, mode| {
            fs::set_permissions(tree.join(name), Permissions::from_mode(mode)).unwrap();
        };
        for (name, safe) in [("", 0o755), ("xtask", 0o755), ("xtask/Cargo.toml", 0o644)] {
            mode(name, safe);
        }
        refuse_of_others(&tree).unwrap();
        for (name, safe) in [("", 0o755), ("xtask", 0o755), ("xtask/Cargo.toml", 0o644)] {
            mode(name, safe | 0o002);
            let error = refuse_of_others(&tree).unwrap_err().to_string();
            assert!(error.contains("another user"), "{error}");
            mode(name, safe);
        }
    }
}
