//! How many files the process of a VM may have open, and what for.
//!
//! Every connection costs descriptors. What others need is set aside, so that a VM
//! whose ports are flooded can still be entered, snapshotted and stopped.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sm_frontends::Limit;

/// Set aside for what is not a connection of a frontend: the machine and its disks,
/// snapshots, the agent, clients of the control socket, routers of handoff sockets.
const RESERVE: usize = 512;
/// Most sessions of `sm exec` and the like.
const MOST_EXEC: usize = 1024;
/// Most connections of the muxer.
const MOST_CONNECTIONS: usize = 16_384;
/// Connections of neither: to the agent.
const OTHERS: usize = 16;
/// Descriptors of a listener of a published port: its socket, a spare one, a timer.
const PER_LISTENER: usize = 3;
/// Most clients of the control socket that are attached or wait for the end. Of
/// [`RESERVE`], that many at least are theirs.
const MOST_STAYING: usize = 1024;
const LEAST_STAYING: usize = 128;
/// What each gets where there are far too few for everything.
const LEAST: usize = 16;

/// Raises the limit of open files as far as the system allows. The default suits
/// programs that use `select`, which none here does.
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
        tracing::warn!(%error, "the limit of open files stays as low as it is");
    }
}

/// Shares of the descriptors that this process may have.
#[derive(Debug)]
pub(super) struct Descriptors {
    /// For connections to exec.
    pub(super) exec: Limit,
    /// For connections to published ports, all together.
    pub(super) published: Limit,
    /// Connections that the muxer may have: as many, so that none of these is ever
    /// refused there.
    pub(super) connections: usize,
}

impl Descriptors {
    /// Shares out what this process may have, which listens for so many ports.
    pub(super) fn of_this_process(listeners: usize) -> Self {
        let (exec, published) = shares(most(), listeners);
        Self {
            exec: Limit::new(exec),
            published: Limit::new(published),
            connections: exec + published + OTHERS,
        }
    }
}

/// Descriptors that this process may have.
fn most() -> usize {
    let most = getrlimit(Resource::Nofile).current;
    most.map_or(usize::MAX, |most| {
        usize::try_from(most).unwrap_or(usize::MAX)
    })
}

/// Clients of the control socket that may be attached or wait for the end.
pub(super) fn staying_clients() -> usize {
    staying(most())
}

fn staying(most: usize) -> usize {
    (most / 8).clamp(LEAST_STAYING, MOST_STAYING)
}

/// Descriptors for exec and for published ports, of so many.
fn shares(most: usize, listeners: usize) -> (usize, usize) {
    let reserve = RESERVE + staying(most) - LEAST_STAYING;
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
    fn what_others_need_is_set_aside() {
        for most in [1024, 4096, 65_536, 1 << 20, usize::MAX] {
            let (exec, published) = shares(most, 1);
            assert!(exec >= LEAST && published >= exec, "{most}");
            assert!(exec + published + RESERVE + 3 <= most, "{most}");
        }
        assert_eq!(shares(1024, 0), (64, 448));
        assert_eq!(shares(1024, 128), (16, 112));
        assert_eq!(shares(1 << 20, 10), (1024, 15_344));
        // Far too few: a few of each, and what fails then is said.
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
