//! What this host can do.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::apt::Apt;

/// Whether there is a `/dev/kvm` to be used at all.
pub(crate) fn open_kvm() -> Result<()> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.open("/dev/kvm").context("cannot open /dev/kvm")?;
    Ok(())
}

/// Why guests cannot run here, in a sentence; `None` where they can.
///
/// `sm doctor` decides, so that there is one opinion on it.
pub(crate) fn why_not_here(sm: &Path) -> Result<Option<String>> {
    let output = Command::new(sm).args(["doctor", "--json"]).output()?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let check = report["checks"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|check| check["name"] == "hypervisor");
    Ok(match check {
        Some(check) if check["ok"] == true => None,
        Some(check) => Some(check["detail"].as_str().unwrap_or("unknown").to_owned()),
        None => Some("sm doctor says nothing of the hypervisor".to_owned()),
    })
}

/// Installs what all commands need, at once.
pub(crate) fn set_up(apt: &Apt) -> Result<()> {
    let mut packages = Vec::new();
    packages.extend(crate::kernel::PACKAGES);
    packages.extend(crate::fixtures::PACKAGES);
    packages.extend(crate::fixtures::CLIENTS);
    packages.extend(crate::lab::PACKAGES);
    packages.extend(crate::test::UNIT_PACKAGES);
    packages.sort_unstable();
    packages.dedup();
    apt.ensure(&packages)?;
    apt.ensure_qemu()
}
