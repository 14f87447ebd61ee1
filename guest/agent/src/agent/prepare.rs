//! Preparation of the guest for a snapshot.

use std::fs;
use std::io;
use std::time::Duration;

use sm_event_loop::Key;
use sm_guest_proto::control::ControlReply;

use super::Agent;
use crate::log;
use crate::part;
use crate::sys::{self, Fork};
use crate::workload;

/// Timeout for writing data back.
const DEADLINE: Duration = Duration::from_secs(30);

impl Agent {
    /// Starts to write data back in a child process, because it may block on a device
    /// while this process must serve others.
    pub(crate) fn start_prepare(&mut self, key: Key) -> io::Result<()> {
        match workload::fork_agent(0, None)? {
            Fork::Child => {
                // The child must not hold open connections that the parent closes.
                let keep: Vec<_> = log::descriptor().into_iter().collect();
                sys::close_all_but(&keep);
                prepare_snapshot();
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

/// Writes dirty data back. Caches are dropped only if that makes the snapshot smaller:
/// without `init_on_free=1` Linux leaves the contents of freed pages in place, so that
/// the pages would be captured in any case, and every clone would have to read the files
/// again.
fn prepare_snapshot() {
    rustix::fs::sync();
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if command_line
        .split_whitespace()
        .any(|word| word == "init_on_free=1")
    {
        log::note_failure("drop caches", fs::write("/proc/sys/vm/drop_caches", "3"));
    }
}
