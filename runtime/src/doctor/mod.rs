//! Checks of this host's ability to run VMs, with remedies.

mod creation;
mod ping;

use serde::Serialize;
use sm_control::with_causes;
use sm_hypervisor::{Hypervisor as _, Native};

use crate::record::Records;
use crate::run::{DEFAULT_MEMORY, MIN_MEMORY};
use crate::sm::Sm;

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Check {
    /// The subject of the check.
    pub name: &'static str,
    /// True if the check passed.
    pub ok: bool,
    /// The finding, and a remedy if the check failed.
    pub detail: String,
}

impl Sm {
    /// Checks everything that is needed to run a VM.
    #[must_use]
    pub fn examine(&self) -> Vec<Check> {
        examine(self)
    }
}

fn examine(sm: &Sm) -> Vec<Check> {
    let home = sm.home();
    let check = |name, result: Result<String, String>| match result {
        Ok(detail) => Check {
            name,
            ok: true,
            detail,
        },
        Err(detail) => Check {
            name,
            ok: false,
            detail,
        },
    };
    let mut checks = vec![check("hypervisor", hypervisor())];
    if checks.iter().all(|check| check.ok) {
        checks.push(check("creating a VM", creation::describe()));
    }
    checks.extend([
        check(
            "guest kernel",
            sm.kernels()
                .find(None)
                .map(|kernel| kernel.path.display().to_string())
                .map_err(|error| with_causes(&error)),
        ),
        check(
            "guest agent",
            sm.describe_agent().map_err(|error| with_causes(&error)),
        ),
        check(
            "data and sockets",
            Records::open(home)
                .map(|_| format!("{} and {}", home.data().display(), home.run().display()))
                .map_err(|error| with_causes(&error)),
        ),
        check("memory", memory()),
        check("network", Ok(ping::describe())),
    ]);
    checks
}

fn hypervisor() -> Result<String, String> {
    let host = Native::open().map_err(|error| with_causes(&error))?;
    let capabilities = host.capabilities();
    match capabilities.linux.refusal() {
        None => Ok(format!(
            "{} runs Linux, up to {} vCPUs",
            capabilities.backend, capabilities.max_vcpus
        )),
        Some(refusal) => Err(refusal),
    }
}

fn memory() -> Result<String, String> {
    let text = std::fs::read_to_string("/proc/meminfo")
        .map_err(|error| format!("cannot read /proc/meminfo: {error}"))?;
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .ok_or("/proc/meminfo does not contain the available memory")?;
    let mebibytes = available / 1024;
    if available.saturating_mul(1024) < MIN_MEMORY {
        return Err(format!(
            "{mebibytes} MiB available, and a guest needs at least {} MiB",
            MIN_MEMORY >> 20
        ));
    }
    Ok(format!(
        "{mebibytes} MiB available; a guest gets {} MiB by default",
        DEFAULT_MEMORY >> 20
    ))
}
