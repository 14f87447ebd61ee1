//! Capabilities of this host.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Returns an error unless `/dev/kvm` can be opened.
pub(crate) fn open_kvm() -> Result<()> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.open("/dev/kvm").context("cannot open /dev/kvm")?;
    Ok(())
}

/// Returns the reason why guests cannot run on this host, as a sentence; `None` if they
/// can.
///
/// `sm doctor` decides, so that there is one implementation of the check.
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

/// Estimates the same before an `sm` exists.
pub(crate) fn is_probably_able() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let hardware = flags.split_whitespace().any(|f| f == "vmx" || f == "svm");
    hardware && open_kvm().is_ok()
}
