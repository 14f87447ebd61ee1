//! The host's hypervisor, for tests.

use crate::{Hypervisor as _, Native};

/// Set where there is no KVM, on purpose, to leave out the tests that need the host's
/// hypervisor.
pub const WITHOUT: &str = "SM_TEST_WITHOUT_KVM";

/// The host's hypervisor; `None`, with a word, where that is to be done without.
///
/// # Panics
/// Where it cannot be opened: a test that is left out must not look like one that
/// has passed.
#[must_use]
#[expect(clippy::panic, reason = "fails the test that asks for it")]
pub fn native() -> Option<Native> {
    match Native::open() {
        Ok(native) => Some(native),
        Err(error) if std::env::var_os(WITHOUT).is_some() => {
            eprintln!("left out: {error}");
            None
        }
        Err(error) => panic!("{error} (set {WITHOUT}=1 to leave out what needs it)"),
    }
}
