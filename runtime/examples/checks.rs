//! Says whether this host can run VMs, and what is missing if not.
//!
//! `cargo run -p sm-runtime --example checks`

use std::process::ExitCode;

use sm_runtime::Sm;

fn main() -> Result<ExitCode, sm_runtime::Error> {
    let able = report(&Sm::new()?);
    Ok(if able {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Prints all checks, and returns whether all are good.
fn report(sm: &Sm) -> bool {
    let checks = sm.examine();
    for check in &checks {
        let sign = if check.ok { "ok " } else { "NOT" };
        println!("{sign} {}: {}", check.name, check.detail);
    }
    checks.iter().all(|check| check.ok)
}

#[cfg(test)]
mod tests {
    use sm_runtime::Sm;

    #[test]
    fn a_home_without_a_kernel_is_not_able() {
        let directory = tempfile::tempdir().unwrap();
        let sm = Sm::builder().below(directory.path());
        let sm = sm.kernel("/no/kernel").build().unwrap();
        assert!(!super::report(&sm));
    }
}
