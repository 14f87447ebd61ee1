//! Facts about the guest that do not change while it runs.

use rustix::time::{ClockId, clock_gettime};
use sm_guest_proto::PROTOCOL_VERSION;
use sm_guest_proto::control::AgentHello;

/// Facts recorded when the agent started.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Facts {
    /// Uptime when `main` was entered, in microseconds.
    pub(crate) init_us: u64,
    /// Uptime when the agent was ready to serve, in microseconds.
    pub(crate) ready_us: u64,
    /// Trace lines are logged.
    pub(crate) debug: bool,
}

/// Returns the uptime of the guest in microseconds.
pub(crate) fn uptime_us() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let rest = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds * 1_000_000 + rest / 1000
}

impl Facts {
    /// Returns the answer to HELLO.
    pub(crate) fn hello(self) -> AgentHello {
        let memory = rustix::system::sysinfo();
        AgentHello {
            protocol: PROTOCOL_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            init_us: self.init_us,
            ready_us: self.ready_us,
            cpus: std::thread::available_parallelism()
                .map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX)),
            memory_kib: memory.totalram.saturating_mul(u64::from(memory.mem_unit)) / 1024,
        }
    }
}
