//! The proof that clones of a snapshot share no identity.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;
use sm_control::launch::StartSource;
pub use sm_control::launch::VmIdentityReport;
pub use sm_guest_proto::control::IdentityReport;
use sm_snapshot::chain::Chain;
use sm_snapshot::store::SnapshotStore;
use sm_vmm::saved;

use crate::Error;
use crate::record::VmConfig;
use crate::run::{self, ReportingVm, RunOptions};
use crate::sm::Sm;

/// Tolerated difference between the clocks of a clone and of the host, in nanoseconds.
const CLOCK_TOLERANCE_NS: u64 = 100_000_000;

/// Clones, by number, that have a value in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SharedValue {
    /// The kind of the value.
    pub what: &'static str,
    /// The value.
    pub value: String,
    /// Numbers of the clones, from 0.
    pub clones: Vec<usize>,
}

/// Result of [`super::Snapshots::prove_distinct`].
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Proof {
    /// The snapshot.
    pub snapshot: String,
    /// Number of clones that existed concurrently.
    pub at_once: usize,
    /// The identity report of each clone.
    pub clones: Vec<VmIdentityReport>,
    /// Values that should differ, and do not.
    pub twins: Vec<SharedValue>,
    /// Clones whose clock is off by more than 100 ms.
    pub wrong_clocks: Vec<usize>,
}

impl Proof {
    /// Returns true if all clones are distinct and their clocks are right.
    #[must_use]
    pub fn is_distinct(&self) -> bool {
        self.twins.is_empty() && self.wrong_clocks.is_empty()
    }

    fn of(snapshot: &str, at_once: usize, clones: Vec<VmIdentityReport>) -> Self {
        let mut seen: BTreeMap<(&'static str, String), Vec<usize>> = BTreeMap::new();
        for (number, clone) in clones.iter().enumerate() {
            let identity_report = &clone.identity_report;
            let mut note = |what, value: &str| {
                seen.entry((what, value.to_owned()))
                    .or_default()
                    .push(number);
            };
            note("getrandom", &identity_report.random);
            note("uuid", &identity_report.uuid);
            note("machine-id", &identity_report.machine_id);
            note("boot_id", &identity_report.boot_id);
            note("epoch", &identity_report.epoch);
            note("hostname", &identity_report.hostname);
            if let Some(mac) = &identity_report.mac {
                note("MAC", mac);
            }
        }
        let twins = seen
            .into_iter()
            .filter(|(_, clones)| clones.len() > 1)
            .map(|((what, value), clones)| SharedValue {
                what,
                value,
                clones,
            })
            .collect();
        let wrong_clocks = clones
            .iter()
            .enumerate()
            .filter(|(_, clone)| clone.clock_error_ns > CLOCK_TOLERANCE_NS)
            .map(|(number, _)| number)
            .collect();
        Self {
            snapshot: snapshot.to_owned(),
            at_once,
            clones,
            twins,
            wrong_clocks,
        }
    }
}

/// Estimated memory of a clone that is queried, in bytes: its VMM, and pages that its
/// guest writes.
const EACH: u64 = 64 << 20;

/// See [`super::Snapshots::prove_distinct`].
pub(super) fn prove_distinct(
    sm: &Sm,
    name: &str,
    count: usize,
    mut progress: impl FnMut(usize),
) -> Result<Proof, Error> {
    let chain = Chain::open(&SnapshotStore::read_only(&sm.home().snapshots()), name)?;
    let max = usize::try_from(free_memory() / 2 / EACH).unwrap_or(usize::MAX);
    let at_once = count.min(max).max(1);
    let mut clones = Vec::new();
    let mut alive = VecDeque::new();
    for number in 0..count {
        progress(number);
        if alive.len() == at_once {
            alive.pop_front();
        }
        let (report, reporting) = query(sm, &chain)?;
        clones.push(report);
        alive.push_back(reporting);
    }
    Ok(Proof::of(name, at_once, clones))
}

/// Returns the memory in bytes that the host can provide without swapping; 0 if unknown.
fn free_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
}

fn query(sm: &Sm, chain: &Chain) -> Result<(VmIdentityReport, ReportingVm), Error> {
    let lease = &chain.tip().lease;
    let manifest = lease.manifest();
    let content = saved::content(chain)?;
    let source = StartSource::IdentityReport(lease.name().to_owned());
    let options = RunOptions::new().auto_remove(true);
    let config = |id: sm_control::id::VmId, name: String| {
        let mut config = VmConfig::new(id, name);
        config.workload.hostname = config.id.short().to_owned();
        config.image = format!("snapshot {}", lease.name());
        config.memory_bytes = manifest.memory_bytes;
        config.cpus = manifest.vcpus;
        config.kernel = content.kernel;
        config.auto_remove = true;
        Ok(config)
    };
    run::launch(sm, &options, config, source)?.until_identity_report()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clone(number: u64) -> VmIdentityReport {
        let text = |what: &str| format!("{what}-{number}");
        VmIdentityReport {
            identity_report: IdentityReport {
                random: text("random"),
                uuid: text("uuid"),
                machine_id: text("machine"),
                boot_id: text("boot"),
                epoch: text("epoch"),
                hostname: text("host"),
                realtime_ns: number,
                ..IdentityReport::default()
            },
            clock_error_ns: 0,
        }
    }

    #[test]
    fn distinct_clones_are_distinct() {
        assert!(Proof::of("s", 2, vec![clone(1), clone(2), clone(3)]).is_distinct());
    }

    #[test]
    fn one_thing_in_common_is_one_too_many() {
        let mut twin = clone(2);
        twin.identity_report.boot_id = "boot-1".to_owned();
        let proof = Proof::of("s", 2, vec![clone(1), twin, clone(3)]);
        assert!(!proof.is_distinct());
        assert_eq!(
            proof.twins,
            [SharedValue {
                what: "boot_id",
                value: "boot-1".to_owned(),
                clones: vec![0, 1],
            }]
        );
    }

    #[test]
    fn a_wrong_clock_is_detected() {
        let mut late = clone(2);
        late.clock_error_ns = CLOCK_TOLERANCE_NS + 1;
        let proof = Proof::of("s", 2, vec![clone(1), late]);
        assert_eq!(proof.wrong_clocks, [1]);
        assert!(!proof.is_distinct());
    }
}
