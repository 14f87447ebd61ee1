//! Needs of tests that not every machine meets: privileges, a hypervisor, programs.
//!
//! `cargo test --workspace` passes on a machine without them and says what it left out.
//! `cargo xtask test` names the needs that its machine meets in [`REQUIRED`]; a test that
//! lacks one of these fails.
//!
//! ```
//! if !sm_test_needs::programs(&["sh"]) {
//!     return;
//! }
//! ```
#![warn(missing_docs)]

use std::env;
use std::io::Write as _;

/// Environment variable with the needs, separated by commas, that a machine must meet.
pub const REQUIRED: &str = "SM_TEST_REQUIRED";

/// Returns true if nothing is missing for `need`. Otherwise prints that the current test
/// is left out, and returns false.
///
/// # Panics
/// The need is one of those in [`REQUIRED`].
#[must_use]
pub fn met(need: &str, missing: Option<&str>) -> bool {
    let Some(missing) = missing else {
        return true;
    };
    let required = env::var(REQUIRED).unwrap_or_default();
    assert!(
        !required.split(',').any(|required| required == need),
        "{missing}, and {REQUIRED} has \"{need}\""
    );
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // The macros write to the captured output of the test, which nobody sees if it passes.
    // One write keeps the line together with tests on other threads.
    let line = format!("left out: {test}: {missing}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    false
}

/// Returns true if the process has the privileges to mount file systems (`root`).
///
/// # Panics
/// See [`met`].
#[must_use]
pub fn root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // CAP_SYS_ADMIN, capability 21.
    let privileged = effective.is_some_and(|mask| mask & 1 << 21 != 0);
    met("root", (!privileged).then_some("it needs root"))
}

/// Returns true if all programs are installed (`programs`).
///
/// # Panics
/// See [`met`].
#[must_use]
pub fn programs(names: &[&str]) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let is_there = |name: &&&str| env::split_paths(&path).any(|folder| folder.join(name).is_file());
    let missing: Vec<&str> = names
        .iter()
        .filter(|name| !is_there(name))
        .copied()
        .collect();
    let missing = missing.join(" and ");
    let text = format!("it needs {missing}");
    met("programs", (!missing.is_empty()).then_some(text.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_the_search_path() {
        assert!(programs(&["sh"]));
        assert!(met("anything", None));
    }
}
