//! The demonstration: from nothing to a container image running as a microVM.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::process::step;
use crate::{build, fixtures, kernel, lab, paths, apt};

const SCRIPT: &str = "echo \"Hello from $(uname -sr) as PID $$ on $(hostname)\"; \
    echo \"CPUs: $(nproc), memory: $(awk '/MemTotal/ {print $2}' /proc/meminfo) KiB\"; \
    mount | head -1; exit 7";

pub fn run() -> Result<ExitCode> {
    let built = build::release()?;
    let kernel = kernel::tuned()?;
    apt::ensure(&["busybox-static", "umoci"])?;
    let cache = paths::cache("demo")?;
    let image = cache.join("v1");
    if !image.is_dir() {
        let draft = paths::draft(&cache)?;
        fixtures::busybox(draft.path())?;
        paths::publish(draft, &image)?;
    }
    let reference = format!("oci:{}", image.join("busybox").display());
    let words: Vec<OsString> = [
        built.sm.as_os_str().to_owned(),
        "run".into(),
        "--rm".into(),
        "--timings".into(),
        "--kernel".into(),
        kernel.into_os_string(),
        reference.into(),
        "sh".into(),
        "-c".into(),
        SCRIPT.into(),
    ]
    .into();
    let status = match why_not_here(&built) {
        None => {
            step("Running the image as a microVM");
            let (program, arguments) = words.split_at(1);
            let status = Command::new(&program[0]).args(arguments).status()?;
            status.code().unwrap_or(255)
        }
        Some(reason) => {
            eprintln!("{reason} So the same runs in the lab.");
            lab::run(&lab::Options::default(), &words)?
        }
    };
    println!("Exit status: {status} (the script ends with 7)");
    Ok(if status == 7 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Why guests cannot run on this host, in a sentence.
pub fn why_not_here(built: &build::Built) -> Option<String> {
    let output = Command::new(&built.sm).args(["doctor", "--json"]).output().ok()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let checks = report.get("checks").unwrap_or(&report).as_array()?;
    let hypervisor = checks.iter().find(|check| {
        check
            .get("name")
            .and_then(serde_json::Value::as_str)
            .is_some_and(|name| name.contains("hypervisor") || name.contains("kvm"))
    })?;
    if hypervisor.get("ok").and_then(serde_json::Value::as_bool) == Some(true) {
        return None;
    }
    let detail = hypervisor.get("detail").or_else(|| hypervisor.get("message"));
    let text = detail.and_then(serde_json::Value::as_str).unwrap_or("KVM cannot run Linux here");
    Some(text.to_owned())
}
