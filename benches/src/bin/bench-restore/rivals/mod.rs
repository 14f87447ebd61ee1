//! Other virtual machine monitors, each restoring its own snapshot of the same guest: the
//! same kernel, initramfs and memory. Measured is the time from the start of the process
//! to the guest's sign.

mod cloud_hypervisor;
mod firecracker;
mod http;
mod qemu;

use std::fmt::Debug;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Timeout for a contender that hangs.
const CONTENDER_TIMEOUT: Duration = Duration::from_secs(60);

/// The guest that every contender restores.
#[derive(Clone, Debug)]
pub(crate) struct BenchGuest {
    /// An uncompressed kernel with a PVH note.
    pub(crate) kernel: PathBuf,
    /// An initramfs whose init prints `sign` on the first serial port every few
    /// milliseconds.
    pub(crate) initramfs: PathBuf,
    pub(crate) cmdline: String,
    /// Bytes of memory.
    pub(crate) memory: u64,
    pub(crate) sign: &'static [u8],
}

impl BenchGuest {
    fn mib(&self) -> u64 {
        self.memory >> 20
    }
}

/// A monitor that can restore the guest.
pub(crate) trait Contender: Debug {
    /// Returns its name in reports.
    fn name(&self) -> &'static str;

    /// Boots the guest and takes a snapshot of it after its first sign.
    fn prepare(&mut self, guest: &BenchGuest) -> Result<()>;

    /// Restores the guest, and returns the time until its sign.
    fn restore(&self, guest: &BenchGuest) -> Result<Duration>;
}

/// Returns the rival of that name, if its program exists.
pub(crate) fn find(name: &str) -> Result<Box<dyn Contender>> {
    let program = match name {
        "qemu" => "qemu-system-x86_64",
        "firecracker" => "firecracker",
        "cloud-hypervisor" => "cloud-hypervisor",
        _ => bail!("there is no rival {name:?}: qemu, firecracker or cloud-hypervisor"),
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let Some(program) = std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|program| program.is_file())
    else {
        bail!("{program} is not in the search path");
    };
    Ok(match name {
        "qemu" => Box::new(qemu::Qemu::new(program)),
        "firecracker" => Box::new(firecracker::Firecracker::new(program)),
        _ => Box::new(cloud_hypervisor::CloudHypervisor::new(program)),
    })
}

/// Reads until `sign` was received.
pub(crate) fn await_output(from: &mut (impl Read + AsFd), sign: &[u8]) -> Result<()> {
    await_output_for(from, sign, CONTENDER_TIMEOUT)
}

fn await_output_for(from: &mut (impl Read + AsFd), sign: &[u8], timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    let mut output: Vec<u8> = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left)?;
        if poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&left))? == 0 {
            bail!(
                "the guest has not given its sign in {timeout:?}; it said:\n{}",
                String::from_utf8_lossy(&output)
            );
        }
        let count = from.read(&mut chunk)?;
        if count == 0 {
            bail!(
                "the guest ended without its sign; it said:\n{}",
                String::from_utf8_lossy(&output)
            );
        }
        output.extend_from_slice(chunk.get(..count).unwrap_or_default());
        if output.windows(sign.len()).any(|window| window == sign) {
            return Ok(());
        }
    }
}

/// A child that is killed when dropped.
#[derive(Debug)]
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads and discards further output of a guest, so that it never blocks.
fn discard_output(mut output: impl Read + Send + 'static) {
    std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
}

#[cfg(test)]
mod fake;

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_sign_is_found_across_reads_and_missed_at_the_end() {
        let said = |words: &'static [&[u8]]| {
            let (from, mut to) = std::io::pipe().unwrap();
            std::thread::spawn(move || words.iter().try_for_each(|word| to.write_all(word)));
            from
        };
        await_output(&mut said(&[b"boot ti", b"ck\n"]), b"tick").unwrap();
        let error = await_output(&mut said(&[b"panic"]), b"tick").unwrap_err();
        assert!(error.to_string().contains("panic"), "{error}");
    }

    #[test]
    fn waiting_for_a_sign_times_out() {
        let (mut from, mut to) = std::io::pipe().unwrap();
        to.write_all(b"boot").unwrap();
        let error = await_output_for(&mut from, b"tick", Duration::from_millis(20));
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("sign in 20ms") && error.contains("boot"),
            "{error}"
        );
    }

    #[test]
    fn unknown_and_absent_rivals_are_named() {
        let error = find("vmware").unwrap_err().to_string();
        assert!(error.contains("vmware"), "{error}");
    }
}
