//! Disks: waiting for a block device to appear with a non-zero capacity, and mounting it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::net::{RecvFlags, recv};

use crate::sys;

/// Mounts the ext4 file system of a disk for writing, with `flags` and those of all disks.
///
/// The kernel would read all block bitmaps in the background, which takes 4 MiB of memory for
/// each 64 GiB and is of use to disks only that are nearly full. One that does not know the
/// option (before Linux 5.13) reads none ahead.
///
/// # Errors
/// As mount(2).
pub(crate) fn mount_ext4(device: &str, target: &Path, flags: MountFlags) -> io::Result<()> {
    let flags = flags | MountFlags::NOATIME | MountFlags::LAZYTIME;
    let try_with = |options| mount(device, target, "ext4", flags, Some(options));
    match try_with(c"commit=30,discard,no_prefetch_block_bitmaps") {
        Err(Errno::INVAL) => Ok(try_with(c"commit=30,discard")?),
        mounted => Ok(mounted?),
    }
}

/// Waits until `path` is a block device of non-zero size.
///
/// Two kinds of events end a wait. Uevents announce a new device. A change from capacity
/// 0 causes no uevent (Linux sends RESIZE only between non-zero sizes), but the block
/// layer logs every change, and the kernel log can be polled.
///
/// # Errors
/// The timeout expired; the error is that of the last check.
pub(crate) fn wait_for_capacity(path: &Path, deadline: Duration) -> io::Result<()> {
    if has_capacity(path).is_ok() {
        return Ok(());
    }
    let until = Instant::now() + deadline;
    let uevents = sys::uevent_socket()?;
    let mut log = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")?;
    log.seek(SeekFrom::End(0))?;
    loop {
        // The check follows opening or draining of the event sources, so that no change
        // between check and wait is missed.
        let last = match has_capacity(path) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(last);
        }
        let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut fds = [
            PollFd::new(&uevents, PollFlags::IN),
            PollFd::new(&log, PollFlags::IN),
        ];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut waste = [0; 2048];
        while recv(&uevents, &mut waste, RecvFlags::DONTWAIT).is_ok() {}
        drain_log(&mut log, &mut waste);
    }
}

fn drain_log(log: &mut File, waste: &mut [u8]) {
    loop {
        match log.read(waste) {
            Ok(count) if count > 0 => {}
            // EPIPE: records were overwritten; the next read continues after them.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            _ => return,
        }
    }
}

fn has_capacity(path: &Path) -> io::Result<()> {
    let device = File::open(path)?;
    if sys::block_size(device.as_fd())? == 0 {
        return Err(io::Error::other("it has no capacity"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_reported_at_the_deadline() {
        let path = Path::new("/dev/does-not-exist");
        let missing = File::open("/dev/kmsg").err();
        let missing = missing.map(|error| format!("/dev/kmsg: {error}"));
        if !sm_test_needs::met("kmsg", missing.as_deref()) {
            return;
        }
        let begin = Instant::now();
        let error = wait_for_capacity(path, Duration::from_millis(30)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(begin.elapsed() >= Duration::from_millis(30));
    }
}
