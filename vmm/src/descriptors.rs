//! Budget of file descriptors of a VM's process.
//!
//! Every connection costs descriptors. A part is reserved, so that exec, snapshots and
//! stop work while connections flood the ports of a VM.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sm_frontends::Limit;

/// Descriptors reserved for everything except connections of frontends: the machine and
/// its disks, snapshots, the agent, clients of the control socket, routers of handoff
/// sockets.
const RESERVE: usize = 512;
/// Most exec sessions.
const MOST_EXEC: usize = 1024;
/// Most connections of the muxer.
const MOST_CONNECTIONS: usize = 16_384;
/// Connections of the muxer for other purposes: to the agent.
const OTHERS: usize = 16;
/// Descriptors per listener of a published port: its socket, a spare one, a timer.
const PER_LISTENER: usize = 3;
/// Most clients of the control socket that are attached or wait for the end. At least
/// [`MIN_PERSISTENT`] of [`RESERVE`] are theirs.
const MAX_PERSISTENT: usize = 1024;
const MIN_PERSISTENT: usize = 128;
/// Most descriptors for files of the host that a guest uses: open ones, and directories.
const MOST_FILES: usize = 5120;
const MIN_FILES: usize = 64;
/// Most descriptors for connections of a guest to its network, and their minimum.
const MOST_FLOWS: usize = 5632;
const MIN_FLOWS: usize = 64;
/// Minimum of each share where descriptors are too few.
const LEAST: usize = 16;

/// Raises the soft limit of open files to the hard limit. The low default is for programs
/// that use `select`, which this process does not.
pub(super) fn raise() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    let most = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Shares of this process's descriptors.
#[derive(Debug)]
pub(super) struct Descriptors {
    /// Limit for exec connections.
    pub(super) exec: Limit,
    /// Limit for connections to all published ports together.
    pub(super) published: Limit,
    /// Maximum of the muxer's connections: the sum of the limits and [`OTHERS`], so that
    /// the muxer never refuses one of these.
    pub(super) connections: usize,
    /// Maximum of files of the host that a guest has open, and of directories that are kept
    /// open beside them.
    pub(super) files: (u32, u32),
    /// Maximum of connections of the guest to its network.
    pub(super) flows: usize,
}

impl Descriptors {
    /// Divides this process's descriptors, for the given number of listeners, for files of the
    /// host if they are mounted, and for a network if there is one.
    pub(super) fn of_this_process(listeners: usize, has_files: bool, has_network: bool) -> Self {
        let most = most();
        let files = if has_files { files(most) } else { 0 };
        let flows = if has_network { flows(most) } else { 0 };
        let (exec, published) = shares(most.saturating_sub(files + flows), listeners);
        // At most `MOST_FILES`.
        let files = u32::try_from(files).unwrap_or(0);
        Self {
            exec: Limit::new(exec),
            published: Limit::new(published),
            connections: exec + published + OTHERS,
            files: (files - files / 5, files / 5),
            flows,
        }
    }
}

/// Returns the limit of open files of this process.
fn most() -> usize {
    let most = getrlimit(Resource::Nofile).current;
    most.map_or(usize::MAX, |most| {
        usize::try_from(most).unwrap_or(usize::MAX)
    })
}

/// Returns the maximum of control clients that are attached or wait for the end.
pub(super) fn max_persistent_clients() -> usize {
    persistent_clients(most())
}

fn persistent_clients(most: usize) -> usize {
    (most / 8).clamp(MIN_PERSISTENT, MAX_PERSISTENT)
}

/// Returns the descriptors for files of the host, out of `most`.
fn files(most: usize) -> usize {
    (most / 4).clamp(MIN_FILES, MOST_FILES)
}

/// Returns the descriptors for connections of a guest to its network, out of `most`.
fn flows(most: usize) -> usize {
    // The reserve is not for them, of whatever there are few.
    (most.saturating_sub(RESERVE) / 4).clamp(MIN_FLOWS, MOST_FLOWS)
}

/// Returns the descriptors for exec and for published ports, out of `most`.
fn shares(most: usize, listeners: usize) -> (usize, usize) {
    let reserve = RESERVE + persistent_clients(most) - MIN_PERSISTENT;
    let reserve = reserve.saturating_add(listeners.saturating_mul(PER_LISTENER));
    let free = most.saturating_sub(reserve);
    let exec = (free / 8).clamp(LEAST, MOST_EXEC);
    let published = free.saturating_sub(exec);
    let published = published.clamp(LEAST, MOST_CONNECTIONS - MOST_EXEC - OTHERS);
    (exec, published)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_other_uses_are_reserved() {
        for most in [1024, 4096, 65_536, 1 << 20, usize::MAX] {
            let (exec, published) = shares(most, 1);
            assert!(exec >= LEAST && published >= exec, "{most}");
            assert!(exec + published + RESERVE + 3 <= most, "{most}");
        }
        assert_eq!((files(1024), files(1 << 20)), (256, MOST_FILES));
        assert_eq!((flows(1024), flows(1 << 20)), (128, MOST_FLOWS));
        // Published ports still have some.
        assert_eq!((flows(700), shares(700 - flows(700), 1)), (64, (16, 105)));
        assert_eq!(shares(1024, 0), (64, 448));
        assert_eq!(shares(1024, 128), (16, 112));
        assert_eq!(shares(1 << 20, 10), (1024, 15_344));
        // Far too few descriptors: each share has the minimum, and system calls may fail.
        assert_eq!(shares(64, 1), (LEAST, LEAST));
    }

    #[test]
    fn the_limit_is_raised_as_far_as_it_goes() {
        let before = getrlimit(Resource::Nofile);
        let lower = before.maximum.or(Some(1 << 20)).map(|most| most / 2 + 256);
        let lowered = Rlimit {
            current: lower.min(before.maximum.or(lower)),
            ..before
        };
        setrlimit(Resource::Nofile, lowered).unwrap();
        raise();
        assert_eq!(getrlimit(Resource::Nofile).current, before.maximum);
    }
}
