//! Notification of programs about changes of shared directories by the host, by a child: it
//! waits for the host.

use std::io;

use rustix::process::Pid;
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::control::{ControlReply, HostFileChange};

use super::Agent;
use super::requests::failed;
use crate::mounts;
use crate::sys::{self, Fork};
use crate::workload;

impl Agent {
    /// Performs a request to notify programs; it is answered before it is complete.
    pub(super) fn note_host_changes(
        &mut self,
        container: &ContainerId,
        changes: &[HostFileChange],
    ) -> ControlReply {
        if self.noting.is_some() {
            return ControlReply::Busy;
        }
        match self.start_noting(container, changes) {
            Ok(pid) => {
                self.noting = Some(pid);
                ControlReply::Done
            }
            Err(error) => failed(format_args!("notify of changes: {error}")),
        }
    }

    fn start_noting(&mut self, id: &ContainerId, changes: &[HostFileChange]) -> io::Result<Pid> {
        let (_, container) = self.containers.named(id).map_err(io::Error::other)?;
        let namespaces = container.workload.namespaces();
        let (_, directory) = namespaces.map_err(io::Error::other)?;
        match workload::fork_agent(0, None)? {
            Fork::Child => {
                // The child must not hold open connections that the parent closes.
                sys::close_all_but(&[]);
                mounts::touch(directory, changes);
                sys::exit_now(0)
            }
            Fork::Parent(pid) => Ok(pid),
        }
    }

    /// Notes that the child has exited.
    pub(crate) fn check_noted(&mut self, reaped: &sys::Reaped) {
        self.noting.take_if(|pid| *pid == reaped.pid);
    }
}
