//! `sm system`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use serde_json::json;
use sm_runtime::image::PruneOptions;
use sm_runtime::{Sm, VmStatus, Volume};

use super::list::PS_TIMEOUT;
use crate::args::{FormatArgs, InstallUnitArgs, SystemCommand, SystemPruneArgs};
use crate::failure::{FAILED, Failure};
use crate::printer::Printer;
use crate::table;
use crate::units::format_size;

/// Name of the unit for the user's systemd.
const UNIT: &str = "sm-resume.service";

pub(crate) fn run(sm: &Sm, command: &SystemCommand, printer: &Printer) -> Result<u32, Failure> {
    match command {
        SystemCommand::Resume => resume(sm, printer),
        SystemCommand::InstallUnit(args) => install_unit(args, printer),
        SystemCommand::Df(format) => usage(sm, format, printer),
        SystemCommand::Prune(args) => prune(sm, args, printer),
        SystemCommand::Info(format) => info(sm, format, printer),
    }
}

fn resume(sm: &Sm, printer: &Printer) -> Result<u32, Failure> {
    let mut status = 0;
    for resumed in sm.resume()? {
        match resumed.error {
            None => printer.line(resumed.vm.name()),
            Some(error) => {
                let name = resumed.vm.name().to_owned();
                let context = format!("cannot start VM \"{name}\"");
                printer.error(&Failure::new(anyhow::Error::from(error).context(context)));
                status = FAILED;
            }
        }
    }
    Ok(status)
}

fn install_unit(args: &InstallUnitArgs, printer: &Printer) -> Result<u32, Failure> {
    let program = std::env::current_exe().context("cannot determine the path of sm")?;
    let text = unit(&program, &passed_on());
    if args.print {
        printer.line(text.trim_end());
        return Ok(0);
    }
    let directory = unit_directory()?;
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot create {directory:?}"))?;
    let path = directory.join(UNIT);
    std::fs::write(&path, text).with_context(|| format!("cannot write {path:?}"))?;
    printer.line(path.display());
    printer.note(format_args!(
        "Enable it with \"systemctl --user daemon-reload && systemctl --user enable {UNIT}\", and \
         with \"loginctl enable-linger\" it runs at boot, without a login"
    ));
    Ok(0)
}

fn unit_directory() -> anyhow::Result<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let config = match var("XDG_CONFIG_HOME") {
        Some(config) => PathBuf::from(config),
        None => {
            let home = var("HOME").ok_or_else(|| anyhow!("HOME is not set"))?;
            PathBuf::from(home).join(".config")
        }
    };
    Ok(config.join("systemd/user"))
}

/// Returns the variables of this environment that choose other directories or programs:
/// the unit has no other way to know them.
fn passed_on() -> Vec<(&'static str, String)> {
    let names = [
        "XDG_DATA_HOME",
        "XDG_CACHE_HOME",
        "SM_AGENT",
        "SM_KERNEL",
        "SM_VMM",
    ];
    let set = names
        .into_iter()
        .filter_map(|name| Some((name, std::env::var(name).ok()?)));
    set.filter(|(_, value)| !value.is_empty()).collect()
}

/// Returns the unit. The processes of VMs that it starts are in its control group: a stop
/// of the unit, also at a shutdown, sends them SIGTERM, at which they stop their workloads.
fn unit(program: &Path, environment: &[(&str, String)]) -> String {
    let quoted = |text: &str| {
        let text = text.replace('\\', "\\\\").replace('"', "\\\"");
        format!("\"{}\"", text.replace('%', "%%"))
    };
    let environment: String = environment
        .iter()
        .map(|(name, value)| format!("Environment={}\n", quoted(&format!("{name}={value}"))))
        .collect();
    format!(
        "[Unit]\n\
         Description=VMs of sm with a restart policy\n\
         Documentation=man:sm-system(1)\n\
         \n\
         [Service]\n\
         Type=oneshot\n\
         RemainAfterExit=yes\n\
         {environment}\
         ExecStart={} system resume\n\
         TimeoutStopSec=90\n\
         \n\
         [Install]\n\
         WantedBy=default.target\n",
        quoted(&program.display().to_string()).replace('$', "$$")
    )
}

fn usage(sm: &Sm, format: &FormatArgs, printer: &Printer) -> Result<u32, Failure> {
    let images = sm.images().usage()?;
    let snapshots = sm.snapshots().list()?;
    let vms = sm.disk_usage()?;
    let volumes = sm.volumes().disk_usage()?;
    let snapshot_bytes = snapshots.iter().map(|snapshot| snapshot.disk_bytes);
    let snapshot_bytes: u64 = snapshot_bytes.fold(0, u64::saturating_add);
    let unused = images.images.iter().filter(|image| !image.in_use);
    let unused = unused.map(|image| image.size.saturating_sub(image.shared));
    let unused: u64 = unused.fold(0, u64::saturating_add);
    let used = images.images.iter().filter(|image| image.in_use).count();
    if format.json() {
        printer.json(&json!({
            "images": {
                "total": images.images.len(), "active": used, "bytes": images.total,
                "reclaimable_bytes": unused,
            },
            "vms": vms,
            "volumes": volumes,
            "snapshots": {"total": snapshots.len(), "bytes": snapshot_bytes},
        }))?;
        return Ok(0);
    }
    let rows = [
        [
            "Images".to_owned(),
            images.images.len().to_string(),
            used.to_string(),
            format_size(images.total),
            format_size(unused),
        ],
        [
            "VMs".to_owned(),
            vms.total.to_string(),
            vms.active.to_string(),
            format_size(vms.bytes),
            format_size(vms.reclaimable_bytes),
        ],
        [
            "Volumes".to_owned(),
            volumes.total.to_string(),
            volumes.active.to_string(),
            format_size(volumes.bytes),
            format_size(volumes.reclaimable_bytes),
        ],
        [
            "Snapshots".to_owned(),
            snapshots.len().to_string(),
            String::new(),
            format_size(snapshot_bytes),
            String::new(),
        ],
    ];
    let header = ["TYPE", "TOTAL", "ACTIVE", "SIZE", "RECLAIMABLE"];
    printer.line(table::render(header, &rows));
    Ok(0)
}

fn prune(sm: &Sm, args: &SystemPruneArgs, printer: &Printer) -> Result<u32, Failure> {
    if !args.force {
        let volumes = match args.volumes {
            true => ", anonymous volumes that no VM needs",
            false => "",
        };
        let images = match args.all {
            true => "all images that no VM and no snapshot uses",
            false => "data of images that no image needs",
        };
        let question = format!("Remove all VMs that do not run{volumes}, and {images}?");
        match printer.confirm(&question) {
            Some(true) => {}
            Some(false) => return Ok(FAILED),
            None => {
                return Err(anyhow!("this is not a terminal to ask at: add --force").into());
            }
        }
    }
    let (names, mut freed) = sm.prune_vms()?;
    for name in &names {
        printer.line(name);
    }
    if args.volumes {
        let pruned = sm.volumes().prune(Volume::is_anonymous)?;
        for name in &pruned.names {
            printer.line(name);
        }
        freed = freed.saturating_add(pruned.bytes);
    }
    let pruned = sm.images().prune(PruneOptions::new().all(args.all))?;
    freed = freed.saturating_add(pruned.bytes);
    printer.line(format_args!("Freed {}", format_size(freed)));
    Ok(0)
}

fn info(sm: &Sm, format: &FormatArgs, printer: &Printer) -> Result<u32, Failure> {
    let vms = sm.vms().inspect(PS_TIMEOUT)?.vms;
    let count = |wanted: VmStatus| vms.iter().filter(|vm| vm.state.status == wanted).count();
    let home = sm.home();
    let kernel = sm.kernels().current();
    let kernel = kernel.map(|kernel| kernel.path.display().to_string());
    let info = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "vms": vms.len(),
        "running": count(VmStatus::Running),
        "paused": count(VmStatus::Paused),
        "restarting": count(VmStatus::Restarting),
        "exited": count(VmStatus::Exited),
        "created": count(VmStatus::Created),
        "volumes": sm.volumes().names()?.len(),
        "images": sm.images().list()?.len(),
        "snapshots": sm.snapshots().list()?.len(),
        "data": home.data(), "run": home.run(), "cache": home.cache(),
        "kernel": kernel.ok(),
        "cpus": std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        "architecture": std::env::consts::ARCH,
    });
    if format.json() {
        printer.json(&info)?;
        return Ok(0);
    }
    let members = info.as_object().into_iter().flatten();
    for (name, value) in members {
        let value = match value {
            serde_json::Value::String(text) => text.clone(),
            serde_json::Value::Null => "none".to_owned(),
            other => other.to_string(),
        };
        printer.line(format_args!("{name}: {value}"));
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_has_the_program_and_its_environment() {
        let data = ("XDG_DATA_HOME", "/a b/50%".to_owned());
        let text = unit(Path::new("/opt/my sm"), &[data]);
        assert!(
            text.contains("ExecStart=\"/opt/my sm\" system resume\n"),
            "{text}"
        );
        assert!(
            text.contains("Environment=\"XDG_DATA_HOME=/a b/50%%\"\n"),
            "{text}"
        );
        assert!(text.contains("WantedBy=default.target"));
    }
}
