//! Identity reports: the guest's identity as the workload's own processes see it.
//!
//! The report reads files in the workload's tree, which may be on a file system that does
//! not respond: a process of the workload or a remote machine may serve it. A child
//! process reads them, so that PID 1 can serve others.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::time::Duration;

use sm_event_loop::Key;
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::ControlReply;

use super::Agent;
use crate::part;
use crate::sys::{self, Fork};
use crate::workload;

/// Timeout for reading.
const DEADLINE: Duration = Duration::from_secs(10);

/// Maximum number of bytes that the child writes: four files of [`crate::root::MAX_ID`]
/// bytes as JSON, with up to six characters per byte. The host accepts messages of 64
/// KiB.
const MAX_REPORT: u64 = 16 << 10;

impl Agent {
    /// Starts to read, in a child outside the workload's cgroup, because reports are also
    /// requested while the workload is frozen.
    pub(crate) fn start_report(&mut self, key: Key, container: &ContainerId) -> io::Result<()> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::memfd_create("report", flags)?);
        let container = self.containers.find(container);
        let container = container.and_then(|key| self.containers.get(key));
        let root = container.and_then(|container| container.workload.root());
        match workload::fork_agent(0, None)? {
            Fork::Child => {
                // The child must not hold open connections that the parent closes.
                let mut keep = vec![file.as_fd()];
                keep.extend(self.identity.descriptors());
                sys::close_all_but(&keep);
                let reply = match self.identity.identity_report(root) {
                    Ok(identity_report) => ControlReply::IdentityReport(identity_report),
                    Err(error) => ControlReply::Error {
                        message: error.to_string(),
                    },
                };
                let json = serde_json::to_vec(&reply).unwrap_or_default();
                sys::exit_now(u8::from(file.write_all(&json).is_err()))
            }
            Fork::Parent(pid) => {
                let waiting = self.await_containers(part::REPORT, key, DEADLINE);
                self.reporting = Some((waiting, pid, file));
                Ok(())
            }
        }
    }

    /// Answers the request when the child has exited.
    pub(crate) fn check_reported(&mut self, reaped: &sys::Reaped) {
        if let Some((waiting, _, file)) = self.reporting.take_if(|(_, pid, _)| *pid == reaped.pid) {
            let reply = read_report(file).unwrap_or_else(|error| ControlReply::Error {
                message: format!(
                    "reading the workload's files ended with status {}: {error}",
                    reaped.status
                ),
            });
            self.answer(Some(waiting.key), &reply);
        }
    }
}

fn read_report(mut file: File) -> io::Result<ControlReply> {
    file.rewind()?;
    let mut json = Vec::new();
    file.take(MAX_REPORT).read_to_end(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}
