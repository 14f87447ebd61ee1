//! The host's hypervisor, for tests.

use crate::{Hypervisor as _, Native};

/// Environment variable for hosts that have no KVM on purpose: set, it skips the tests that
/// need the host's hypervisor.
pub const WITHOUT: &str = "SM_TEST_WITHOUT_KVM";

/// Returns the host's hypervisor; `None`, with a line on standard error, if it cannot be
/// opened and [`WITHOUT`] is set.
///
/// # Panics
/// If it cannot be opened and [`WITHOUT`] is not set: a skipped test must not look like one
/// that has passed.
#[must_use]
#[expect(clippy::panic, reason = "fails the test that asks for it")]
pub fn native() -> Option<Native> {
    match Native::open() {
        Ok(native) => Some(native),
        Err(error) if std::env::var_os(WITHOUT).is_some() => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error} (set {WITHOUT}=1 to skip the tests that need it)"),
    }
}
