//! Preparation of the guest for a snapshot.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use sm_event_loop::Key;
use sm_guest_proto::control::ControlReply;

use super::Agent;
use crate::log;
use crate::mounts::{self, SHARES_TYPE};
use crate::part;
use crate::sys::{self, Fork};
use crate::workload;

/// Timeout for writing data back.
const DEADLINE: Duration = Duration::from_secs(30);

impl Agent {
    /// Starts to write data back in a child process, because it may block on a device
    /// while this process must serve others.
    pub(crate) fn start_prepare(&mut self, key: Key) -> io::Result<()> {
        let roots = self.containers.iter();
        let roots: Vec<_> = roots
            .filter_map(|container| container.workload.root())
            .collect();
        match workload::fork_agent(0, None)? {
            Fork::Child => {
                // The child must not hold open connections that the parent closes.
                let keep: Vec<_> = log::descriptor().into_iter().collect();
                sys::close_all_but(&keep);
                prepare_snapshot(&roots);
                sys::exit_now(0)
            }
            Fork::Parent(pid) => {
                let waiting = self.await_containers(part::PREPARE, key, DEADLINE);
                self.preparing = Some((waiting, pid));
                Ok(())
            }
        }
    }

    /// Answers the request when the child has exited.
    pub(crate) fn check_prepared(&mut self, reaped: &sys::Reaped) {
        if let Some((waiting, _)) = self.preparing.take_if(|(_, pid)| *pid == reaped.pid) {
            let reply = match reaped.status {
                0 => ControlReply::Done,
                status => ControlReply::Error {
                    message: format!("writing data back ended with status {status}"),
                },
            };
            self.answer(Some(waiting.key), &reply);
        }
    }
}

/// Writes dirty data back, and removes what is cached of shared directories in `roots`, of
/// which the host saves every inode that this kernel knows. Other caches are dropped only if that makes the snapshot smaller:
/// without `init_on_free=1` Linux leaves the contents of freed pages in place, so that
/// the pages would be captured in any case, and every clone would have to read the files
/// again.
fn prepare_snapshot(roots: &[PathBuf]) {
    rustix::fs::sync();
    for root in roots {
        let removed = mounts::unused_names(root, SHARES_TYPE);
        log::note_failure("remove names of shared directories", removed);
    }
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if command_line
        .split_whitespace()
        .any(|word| word == "init_on_free=1")
    {
        log::note_failure("drop caches", fs::write("/proc/sys/vm/drop_caches", "3"));
    }
}
