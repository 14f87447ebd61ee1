//! The host's hypervisor, for tests.

use std::io::Write as _;

use crate::{Hypervisor as _, Native};

/// Environment variable with the needs, separated by commas, that a machine must meet: with
/// `kvm`, tests fail instead of being left out when the hypervisor cannot be opened.
pub const REQUIRED: &str = "SM_TEST_REQUIRED";

/// Returns the host's hypervisor; `None`, with a line on standard error, if it cannot be
/// opened.
///
/// # Panics
/// If it cannot be opened and [`REQUIRED`] has `kvm`.
#[must_use]
#[expect(clippy::panic, reason = "fails the test that asks for it")]
pub fn native() -> Option<Native> {
    match Native::open() {
        Ok(native) => Some(native),
        Err(error) => {
            let required = std::env::var(REQUIRED).unwrap_or_default();
            if required.split(',').any(|need| need == "kvm") {
                panic!("{error}, and {REQUIRED} has \"kvm\"");
            }
            let thread = std::thread::current();
            let test = thread.name().unwrap_or("a test");
            // The macros write to the captured output of the test.
            let line = format!("left out: {test}: {error}\n");
            let _ = std::io::stderr().write_all(line.as_bytes());
            None
        }
    }
}
