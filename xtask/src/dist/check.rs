//! Runs a release in a lab that has the archive, a kernel with KVM, and nothing else of
//! ours: in a root of its own, on a tmpfs.

use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::apt::Apt;
use crate::lab::{self, JobOutput, LabJob};
use crate::{cmd, fixtures, paths};

/// Unpacks the program `$1` of the archive `$2` into an empty root, beside the image `$3`,
/// and runs a command in a VM from there. Busybox is the lab's.
const SCRIPT: &str = r#"set -e
b=/run/lab/busybox
root=/run/alone
$b mkdir -p $root/tmp $root/dev $root/proc $root/sys $root/image
$b gzip -dc "$2" | $b tar -x -C $root -f - "$1/sm"
$b cp -r "$3/." $root/image
for dir in dev proc sys; do $b mount --bind /$dir $root/$dir; done
$b ls $root $root/image
exec $b env -i HOME=/tmp PATH=/ $b chroot $root "/$1/sm" run --rm oci:/image sh -c 'uname -r; exit 7'
"#;

/// Status with which the command in the VM ends.
const STATUS: u8 = 7;

pub(super) fn run(apt: &Apt, archive: &Path, name: &str) -> Result<()> {
    let image = fixtures::demo_image(apt)?;
    let lab = lab::prepare(apt)?;
    cmd::step("running the program of the archive alone, in the lab");
    let text = |path: &Path| {
        let text = path.to_str().map(str::to_owned);
        text.context("a path is not UTF-8")
    };
    let job = LabJob {
        command: vec![
            "/run/lab/busybox".to_owned(),
            "sh".to_owned(),
            "-c".to_owned(),
            SCRIPT.to_owned(),
            "sh".to_owned(),
            name.to_owned(),
            text(archive)?,
            text(&image)?,
        ],
        ..LabJob::default()
    };
    let status = lab::outlive_crashes(|| lab::run(&lab, &job, &JobOutput::Inherit))?;
    if status != STATUS {
        bail!("the program of the archive ended with status {status} instead of {STATUS}");
    }
    cmd::note(format_args!(
        "{} runs an image with nothing else of sm on the machine",
        archive
            .strip_prefix(paths::target())
            .unwrap_or(archive)
            .display()
    ));
    Ok(())
}
