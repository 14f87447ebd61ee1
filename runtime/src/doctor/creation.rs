//! Measures how long this host takes to create a VM, and suggests a remedy if that is
//! slow.

use std::time::{Duration, Instant};

use sm_hypervisor::{Hypervisor as _, Native, VmParameters};

use super::with_causes;

/// After a wait in the kernel, another VM is created without a wait for some time.
const WHILE: Duration = Duration::from_millis(100);
/// Hosts without the wait took 0.4 to 4 ms, in the lab as well.
const SLOW: Duration = Duration::from_millis(5);

pub(super) fn describe() -> Result<String, String> {
    let host = Native::open().map_err(|error| with_causes(&error))?;
    // Another check may just have created a VM, and a VM created soon after another is
    // fast on affected hosts as well (1.4 ms instead of 10.7). No event marks the end of
    // that time.
    std::thread::sleep(WHILE);
    let started = Instant::now();
    let vm = host.create_vm(&VmParameters { vcpus: 1 });
    let time = started.elapsed();
    vm.map_err(|error| with_causes(&error))?;
    let took = format!("takes {:.1} ms", time.as_secs_f64() * 1e3);
    let advice = (time >= SLOW).then(|| host.creation_advice()).flatten();
    Ok(match advice {
        Some(advice) => format!("{took}; {advice}"),
        None => took,
    })
}
