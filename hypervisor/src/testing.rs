//! The host's KVM, for tests.

use crate::Hypervisor as _;
use crate::kvm::Kvm;

/// Set where there is no KVM, on purpose, to leave out the tests that need it.
pub const WITHOUT: &str = "SM_TEST_WITHOUT_KVM";

/// The host's KVM; `None`, with a word, where that is to be done without.
///
/// # Panics
/// Where it cannot be opened: a test that is left out must not look like one that
/// has passed.
#[must_use]
#[expect(clippy::panic, reason = "fails the test that asks for it")]
pub fn kvm() -> Option<Kvm> {
    match Kvm::open() {
        Ok(kvm) => Some(kvm),
        Err(error) if std::env::var_os(WITHOUT).is_some() => {
            eprintln!("left out: {error}");
            None
        }
        Err(error) => panic!("{error} (set {WITHOUT}=1 to leave out what needs it)"),
    }
}
