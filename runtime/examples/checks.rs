//! Says whether this host can run VMs, and what is missing if not.
//!
//! `cargo run -p sm-runtime --example checks`

use std::process::ExitCode;

use sm_runtime::doctor;
use sm_runtime::home::{Home, HomeError};

fn main() -> Result<ExitCode, HomeError> {
    let able = report(&Home::from_env()?);
    Ok(if able {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Prints all checks, and returns whether all are good.
fn report(home: &Home) -> bool {
    let checks = doctor::examine(home);
    for check in &checks {
        let sign = if check.ok { "ok " } else { "NOT" };
        println!("{sign} {}: {}", check.name, check.detail);
    }
    checks.iter().all(|check| check.ok)
}

#[cfg(test)]
mod tests {
    use sm_runtime::home::Home;

    #[test]
    fn a_home_without_a_kernel_is_not_able() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name| directory.path().join(name);
        assert!(!super::report(&Home::new(
            &at("data"),
            &at("run"),
            &at("cache")
        )));
    }
}
