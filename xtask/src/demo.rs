//! `cargo xtask demo`: a container image as a microVM, without preparation.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::apt::Apt;
use crate::build::{self, BuildProfile};
use crate::lab::{self, JobOutput, LabJob};
use crate::{cmd, fixtures, host, kernel, needs, stock};

const SCRIPT: &str = "echo \"hello from $(uname -sr) on $(nproc) vCPU\"; \
                      head -n 1 /etc/os-release 2>/dev/null; \
                      awk '/MemTotal/ {print $2 / 1024 \" MiB of memory\"}' /proc/meminfo; \
                      echo 'this line went to standard error' >&2; exit 7";

/// Returns 0 when the guest exited with the expected status.
pub(crate) fn run(apt: &Apt) -> Result<u8> {
    needs::demo(apt)?;
    let sm = build::sm(apt, BuildProfile::Release)?;
    // Building the tuned kernel takes longer than everything else.
    let kernel = match kernel::built(apt)? {
        Some(tuned) => tuned,
        None => {
            cmd::note(
                "the distribution's kernel is used; \"cargo xtask kernel\" builds the tuned one, \
                 which starts faster",
            );
            stock::kernel(apt)?
        }
    };
    let image = fixtures::demo_image(apt)?;
    let text = |path: &std::path::Path| {
        path.to_str()
            .map(str::to_owned)
            .context("a path is not UTF-8")
    };
    let reference = format!("oci:{}", text(&image)?);
    let command: Vec<String> = [
        &text(&sm)?,
        "run",
        "--rm",
        "--timings",
        &reference,
        "/bin/sh",
        "-c",
        SCRIPT,
    ]
    .map(str::to_owned)
    .to_vec();
    let environment = vec![("SM_KERNEL".to_owned(), text(&kernel)?)];
    let status = match host::why_not_here(&sm)? {
        None => {
            cmd::step(format_args!(
                "sm run --rm --timings {reference} /bin/sh -c ..."
            ));
            let status = Command::new(&sm)
                .args(&command[1..])
                .envs(environment)
                .status()?;
            status.code().unwrap_or(255)
        }
        Some(reason) => {
            cmd::step("running it in the lab (QEMU emulation, some 20 times slower than hardware)");
            cmd::note(format_args!("because {reason}"));
            cmd::step(format_args!(
                "sm run --rm --timings {reference} /bin/sh -c ..."
            ));
            let job = LabJob {
                command,
                environment,
                ..LabJob::default()
            };
            let lab = lab::prepare(apt)?;
            i32::from(lab::outlive_crashes(|| {
                lab::run(&lab, &job, &JobOutput::Inherit)
            })?)
        }
    };
    cmd::step(format_args!(
        "exit status {status} (the guest's script ends with \"exit 7\")"
    ));
    Ok(u8::from(status != 7))
}
