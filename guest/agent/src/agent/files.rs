//! Operations on files: starting and ending their processes.

use std::io;

use rustix::process::Pid;
use sm_event_loop::Key;
use sm_guest_proto::exec::ExecRequest;
use sm_guest_proto::files::FileRequest;

use super::requests::POWERING_OFF;
use super::{Agent, CommandKind, RunningCommand};
use crate::exec::LaunchError;
use crate::exec::stdio;
use crate::sys::{self, Fork};
use crate::{files, log, workload};

impl Agent {
    /// Starts the process that performs an operation for session `key`.
    pub(super) fn start_files(&mut self, key: Key, request: &FileRequest) {
        if let Err(error) = self.try_start_files(key, request)
            && let Some(session) = self.sessions.get_mut(key)
        {
            session.refuse(error.status, &error.message);
        }
    }

    fn try_start_files(&mut self, key: Key, request: &FileRequest) -> Result<(), LaunchError> {
        let fail = |what: &str, error: io::Error| LaunchError::failed(format!("{what}: {error}"));
        let (container_key, container) = self
            .containers
            .named(&request.container)
            .map_err(LaunchError::failed)?;
        container
            .workload
            .check_ready()
            .map_err(LaunchError::failed)?;
        if self.power.is_some() {
            return Err(LaunchError::failed(POWERING_OFF));
        }
        let cgroup = container.cgroup.directory();
        let view = container.workload.view(cgroup).ok_or_else(|| {
            LaunchError::failed("the container has no root whose files can be accessed")
        })?;
        let operation = &request.operation;
        let takes_input = files::takes_input(operation);
        let (child_ends, agent_ends) =
            stdio::pipes(takes_input, &self.null).map_err(|error| fail("make pipes", error))?;
        let (status, child_status) =
            stdio::status_pipe().map_err(|error| fail("make a pipe", error))?;
        let forked = workload::fork_agent(0, None);
        let pid: Pid = match forked.map_err(|error| fail("start a process", error))? {
            Fork::Child => files::run(view, operation, child_ends, child_status),
            Fork::Parent(pid) => pid,
        };
        let command = RunningCommand {
            session: key,
            container: container_key,
            kind: CommandKind::Files {
                pauses: files::pauses(operation),
            },
        };
        self.running.insert(pid, command);
        if let Some(session) = self.sessions.get_mut(key) {
            let described = ExecRequest {
                container: request.container.clone(),
                ..ExecRequest::default()
            };
            session.started(&described, pid, agent_ends, status);
        }
        Ok(())
    }

    /// Thaws a container that an operation has frozen, unless another one still needs it
    /// frozen.
    pub(super) fn continue_container(&mut self, key: Key) {
        let pauses = CommandKind::Files { pauses: true };
        let is_needed = |other: &RunningCommand| other.container == key && other.kind == pauses;
        if self.running.values().any(is_needed) {
            return;
        }
        if let Some(container) = self.containers.get(key) {
            log::note_failure("thaw a container", container.cgroup.freeze(false));
        }
    }

    /// Ends all operations, because the guest is powering off.
    pub(super) fn end_file_operations(&self) {
        for (pid, command) in &self.running {
            if matches!(command.kind, CommandKind::Files { .. }) {
                let _ = sys::kill(*pid, 9);
            }
        }
    }
}
