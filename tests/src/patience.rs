//! Waiting for what happens in guests, which in an emulated machine that has others
//! beside it can be hundreds of times slower than on hardware.

use std::thread::sleep;
use std::time::{Duration, Instant};

/// Time after which something is taken to hang. Of no meaning for speed.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// Waits until something is so. Asks more and more rarely, as asking takes the time of
/// the guest that is waited for.
///
/// # Panics
/// When it is not so after [`PATIENCE`].
#[track_caller]
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "never happened: {what}");
        let pause = begun.elapsed() / 8;
        sleep(pause.clamp(Duration::from_millis(50), Duration::from_secs(2)));
    }
}
