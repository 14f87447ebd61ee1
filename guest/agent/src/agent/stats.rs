//! Usage figures of the guest.

use std::fs;

use sm_guest_proto::control::GuestStats;

use super::Agent;
use crate::cgroup::field;

impl Agent {
    /// Returns the answer to STATS.
    pub(crate) fn stats(&mut self) -> GuestStats {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let waiting = usize::from(self.workload.init().is_some() && self.workload.main().is_none());
        let processes = self.cgroup.processes().len().saturating_sub(waiting);
        let oom_kills = self.cgroup.oom_kills();
        GuestStats {
            memory_total_kib: field(&memory, "MemTotal"),
            memory_available_kib: field(&memory, "MemAvailable"),
            processes: u32::try_from(processes).unwrap_or(u32::MAX),
            cpu_us: self.cgroup.cpu_us(),
            oom_kills,
            main_oom_kills: oom_kills.saturating_sub(self.exec_oom_kills),
        }
    }
}
