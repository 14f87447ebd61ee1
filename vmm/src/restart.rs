//! The next run of a VM, which its own process starts.
//!
//! There is no daemon that could start a VM again. Its process does, by replacing itself
//! (execve): the new program has the same process ID, lock and control socket, and nothing
//! else of the run before. A lock that is held without a gap means that the VM has a process
//! all the time, and a process that is killed at any moment leaves the exit record of the
//! run before.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use sm_control::fdpass;
use sm_control::launch::{LaunchRequest, RestartProgress};
use sm_guest_proto::frame::{self, FrameType};

use super::SUBCOMMAND;

/// Wait before the first restart.
const FIRST_DELAY: Duration = Duration::from_millis(100);
/// Longest wait.
const LONGEST_DELAY: Duration = Duration::from_secs(60);
/// A run of this length counts as a success: the next wait is the first again.
const STABLE_RUN: Duration = Duration::from_secs(10);

/// Returns the progress after another restart, of a workload that ran for `ran`.
pub(crate) fn after_run(progress: RestartProgress, ran: Duration) -> RestartProgress {
    let delay = match Duration::from_millis(progress.delay_ms) {
        _ if ran >= STABLE_RUN => FIRST_DELAY,
        Duration::ZERO => FIRST_DELAY,
        last => last.saturating_mul(2).min(LONGEST_DELAY),
    };
    RestartProgress {
        count: progress.count.saturating_add(1),
        delay_ms: u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
    }
}

/// Everything that the next run takes over.
#[derive(Debug)]
pub(crate) struct NextRun {
    pub(crate) request: LaunchRequest,
    /// The record's lock.
    pub(crate) lock: File,
    /// The control socket: clients that connect now are served by the next run.
    pub(crate) listener: UnixListener,
}

impl NextRun {
    /// Replaces this process; returns only if that fails.
    pub(crate) fn exec(self) -> io::Error {
        match self.command() {
            Ok(mut command) => command.exec(),
            Err(error) => error,
        }
    }

    fn command(&self) -> io::Result<Command> {
        let mut bytes = Vec::new();
        let request = serde_json::to_vec(&self.request)?;
        frame::encode(FrameType::Request, &request, &mut bytes).map_err(io::Error::other)?;
        let (mut ours, theirs) = UnixStream::pair()?;
        // The stream's buffer has room for a frame. This end travels with it, so that the
        // stream does not end before the next run has read the request.
        let end = ours.try_clone()?;
        let fds = [self.lock.as_fd(), self.listener.as_fd(), end.as_fd()];
        ours.set_nonblocking(true)?;
        fdpass::send_all(&mut ours, &bytes, &fds)?;
        // A program that was replaced on disk meanwhile would be of another version.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("sm-vmm")
            .args([SUBCOMMAND, self.request.config.id.short()])
            .stdin(Stdio::from(OwnedFd::from(theirs)));
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_minute() {
        let short = Duration::from_secs(1);
        let mut progress = RestartProgress::default();
        let mut delays = Vec::new();
        for _ in 0..13 {
            progress = after_run(progress, short);
            delays.push(progress.delay_ms);
        }
        assert_eq!(delays[..4], [100, 200, 400, 800]);
        assert_eq!(delays[9..], [51_200, 60_000, 60_000, 60_000]);
        assert_eq!(progress.count, 13);
        let stable = after_run(progress, STABLE_RUN);
        assert_eq!((stable.count, stable.delay_ms), (14, 100));
    }
}
