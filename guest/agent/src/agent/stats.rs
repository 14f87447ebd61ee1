//! Usage figures of the guest.

use std::fs;

use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::GuestStats;

use super::Agent;
use crate::cgroup::field;

impl Agent {
    /// Returns the answer to STATS. A container that does not exist has no processes.
    pub(crate) fn stats(&mut self, id: &ContainerId) -> GuestStats {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory = GuestStats {
            memory_total_kib: field(&memory, "MemTotal"),
            memory_available_kib: field(&memory, "MemAvailable"),
            ..GuestStats::default()
        };
        let Ok((_, container)) = self.containers.named(id) else {
            return memory;
        };
        let workload = &container.workload;
        let waiting = usize::from(workload.init().is_some() && workload.main().is_none());
        let processes = container.cgroup.processes().len().saturating_sub(waiting);
        let oom_kills = container.cgroup.oom_kills();
        GuestStats {
            processes: u32::try_from(processes).unwrap_or(u32::MAX),
            cpu_us: container.cgroup.cpu_us(),
            oom_kills,
            main_oom_kills: oom_kills.saturating_sub(container.exec_oom_kills),
            ..memory
        }
    }
}
