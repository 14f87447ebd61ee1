//! Waits for events in guests, which can be hundreds of times slower in a busy emulated
//! machine than on hardware.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// Timeout for events that never happen. It says nothing about speed.
pub const TIMEOUT: Duration = Duration::from_secs(600);

/// Waits until a condition holds. It is checked at increasing intervals, as each check
/// takes time from the guest.
///
/// # Panics
/// The condition does not hold after [`TIMEOUT`].
#[track_caller]
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < TIMEOUT, "never happened: {what}");
        let pause = begun.elapsed() / 8;
        sleep(pause.clamp(Duration::from_millis(50), Duration::from_secs(2)));
    }
}
