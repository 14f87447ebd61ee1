//! `cargo xtask bench-kernel`: the size of guest kernels, and the instructions that each
//! executes until it starts its first program.
//!
//! QEMU counts the instructions (`-icount`), and derives the kernel's clock from that
//! count, so a figure is the same in every run and on every machine. It does not predict
//! time: the duration of an instruction that accesses a device or faults varies.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::apt::Apt;
use crate::{cmd, cpio, kernel, paths};

/// Nanoseconds of the guest's clock per instruction, as a power of two.
const SHIFT: u32 = 3;
/// Calibration of clocks against each other fails when instructions are counted.
const COMMAND_LINE: &str = "console=ttyS0 loglevel=4 panic=-1 tsc_early_khz=1000000 lpj=1000000";
/// The last message of a kernel that has tried all first programs.
const LAST: &str = "Kernel panic - not syncing: No working init found";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BenchKernelOptions {
    /// Kernels to compare the tuned one with, each a `vmlinux`.
    pub(crate) others: Vec<PathBuf>,
}

pub(crate) fn run(apt: &Apt, options: &BenchKernelOptions) -> Result<()> {
    apt.ensure_qemu()?;
    let tuned = kernel::tuned(apt)?;
    let work = tempfile::tempdir_in(paths::cache("tmp")?)?;
    let initramfs = work.path().join("initramfs");
    let mut archive = cpio::CpioArchive::default();
    archive.file("init", 0o755, b"no program")?;
    std::fs::write(&initramfs, archive.finish()?)?;
    let (size, count) = measure(&tuned, &initramfs)?;
    println!("     BYTES  INSTRUCTIONS  KERNEL");
    println!("{size:>10} {count:>13}  {}", tuned.display());
    for other in &options.others {
        let (other_size, other_count) = measure(other, &initramfs)?;
        println!(
            "{other_size:>10} {other_count:>13}  {} (the tuned one: {:+} bytes, {} times the instructions)",
            other.display(),
            i128::from(size) - i128::from(other_size),
            thousandths(count, other_count),
        );
    }
    Ok(())
}

/// Formats `a / b` with three decimals.
fn thousandths(a: u64, b: u64) -> String {
    let ratio = u128::from(a) * 1000 / u128::from(b.max(1));
    format!("{}.{:03}", ratio / 1000, ratio % 1000)
}

/// Returns the size of `kernel` in bytes, and its instructions until the first program.
fn measure(kernel: &Path, initramfs: &Path) -> Result<(u64, u64)> {
    let size = std::fs::metadata(kernel)
        .with_context(|| format!("cannot read {:?}", kernel.display()))?
        .len();
    cmd::step(format_args!(
        "counting instructions of {}",
        kernel.display()
    ));
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .args(["-M", "microvm,pit=on,pic=on,rtc=on,isa-serial=on"])
        .args(["-cpu", "Nehalem", "-m", "256"])
        .args(["-icount", &format!("shift={SHIFT},sleep=off")])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", COMMAND_LINE])
        .stdin(Stdio::null());
    let console = cmd::text(&mut qemu)?;
    let Some(at) = console.lines().find_map(reached) else {
        bail!(
            "{} did not reach its first program; its last words: {}",
            kernel.display(),
            console.lines().next_back().unwrap_or("none")
        );
    };
    Ok((size, at >> SHIFT))
}

/// Parses the guest's time in nanoseconds at which the kernel had tried all first
/// programs.
fn reached(line: &str) -> Option<u64> {
    let (time, text) = line.trim().strip_prefix('[')?.split_once("] ")?;
    if !text.starts_with(LAST) {
        return None;
    }
    let (seconds, microseconds) = time.trim().split_once('.')?;
    let seconds: u64 = seconds.parse().ok()?;
    let microseconds: u64 = microseconds.parse().ok()?;
    Some((seconds * 1_000_000 + microseconds) * 1000)
}

#[cfg(test)]
mod tests {
    use super::{reached, thousandths};

    #[test]
    fn the_last_message_has_the_time() {
        let line = "[    1.304949] Kernel panic - not syncing: No working init found.  Try";
        assert_eq!(reached(line), Some(1_304_949_000));
        assert_eq!(
            reached("[    1.304949] Kernel panic - not syncing: other"),
            None
        );
        assert_eq!(reached("Run /init"), None);
    }

    #[test]
    fn ratios_have_three_decimals() {
        assert_eq!(thousandths(1051, 1000), "1.051");
        assert_eq!(thousandths(5, 0), "5.000");
    }
}
