//! Commands: starting them, and requests on their connections.

use std::io;

use sm_event_loop::Key;
use sm_guest_proto::container::ContainerId;
use sm_guest_proto::exec::{ExecRequest, Role};

use super::requests::POWERING_OFF;
use super::{Agent, CommandKind, RunningCommand};
use crate::exec::session::SessionAction;
use crate::exec::stdio::{self, ChildEnds};
use crate::exec::{Launch, LaunchError};
use crate::reactor::{Readiness, Token};

impl Agent {
    pub(super) fn session_ready(&mut self, token: Token, ready: Readiness) {
        let Some(session) = self.sessions.get_mut(token.key) else {
            return;
        };
        let action = session.ready(
            &self.reactor,
            token.key,
            token.part,
            ready,
            &mut self.scratch,
        );
        self.serve(token.key, action);
        self.settle_session(token.key);
    }

    pub(super) fn serve(&mut self, key: Key, mut action: SessionAction) {
        loop {
            match action {
                SessionAction::Nothing | SessionAction::Finished => return,
                SessionAction::Launch(request) => self.launch(key, *request),
                SessionAction::Files(request) => self.start_files(key, &request),
                SessionAction::AttachMain(container) => {
                    return self.attach_main(key, &container);
                }
                SessionAction::Signal {
                    container,
                    pid,
                    signal,
                } => return self.signal_command(key, &container, pid, signal),
                SessionAction::ListProcesses(container) => {
                    return self.list_processes(key, &container);
                }
            }
            // Process frames that arrived together with the request.
            let Some(session) = self.sessions.get_mut(key) else {
                return;
            };
            action = session.take_frames();
        }
    }

    /// Signals the command `pid` of a container on behalf of session `key`, and answers
    /// the session.
    pub(super) fn signal_command(&mut self, key: Key, id: &ContainerId, pid: u32, signal: u8) {
        let container = self.containers.find(id);
        let mut commands = self.running.values();
        let found = commands.any(|command| {
            let session = self.sessions.get(command.session);
            Some(command.container) == container
                && session.is_some_and(|session| session.signal_if(pid, signal))
        });
        if let Some(session) = self.sessions.get_mut(key) {
            match found {
                true => session.confirm(),
                false => session.refuse(1, "no such command"),
            }
        }
    }

    pub(crate) fn settle_session(&mut self, key: Key) {
        let Some(session) = self.sessions.get_mut(key) else {
            return;
        };
        if let SessionAction::Finished = session.settle(&self.reactor, key, &mut self.scratch) {
            self.sessions.remove(key);
            self.resume_accepting();
            if let Some(container) = self.containers.of_main(key) {
                container.workload.clear_main();
            }
            if self.power.is_some() {
                self.check_power();
            }
        }
    }

    pub(super) fn launch(&mut self, key: Key, request: ExecRequest) {
        let timeout_ms = request.timeout_ms;
        let launched = self.try_launch(key, request);
        let Some(session) = self.sessions.get_mut(key) else {
            return;
        };
        match launched {
            Ok(()) => session.set_timeout(&self.reactor, key, timeout_ms),
            Err(error) => session.refuse(error.status, &error.message),
        }
    }

    pub(super) fn try_launch(
        &mut self,
        key: Key,
        mut request: ExecRequest,
    ) -> Result<(), LaunchError> {
        let fail = |what: &str, error: io::Error| LaunchError::failed(format!("{what}: {error}"));
        let (container_key, container) = self
            .containers
            .named(&request.container)
            .map_err(LaunchError::failed)?;
        let workload = &mut container.workload;
        workload.check_ready().map_err(LaunchError::failed)?;
        if self.power.is_some() {
            return Err(LaunchError::failed(POWERING_OFF));
        }
        if request.argv.is_empty() {
            return Err(LaunchError::failed("the request names no command"));
        }
        if request.role == Role::Main && workload.main().is_some() {
            return Err(LaunchError::failed(
                "the container's main command already runs",
            ));
        }
        request.privileges.get_or_insert(workload.privileges());
        request.tty &= !request.detached;
        let (child_ends, agent_ends) = if request.detached {
            stdio::nothing(&self.null).map_err(|error| fail("open the null device", error))?
        } else if request.tty {
            stdio::terminal(&workload.devpts(), request.cols, request.rows)
                .map_err(|error| fail("open a terminal", error))?
        } else {
            stdio::pipes(request.stdin, &self.null).map_err(|error| fail("make pipes", error))?
        };
        let (status, child_status) =
            stdio::status_pipe().map_err(|error| fail("make a pipe", error))?;
        let terminal = match &child_ends {
            ChildEnds::Terminal(path) => Some(path.clone()),
            ChildEnds::Pipes(_) => None,
        };
        let launch = Launch { request, terminal };
        let pid = match launch.request.role {
            Role::Main => workload.become_main(key, &launch, &child_ends, &child_status),
            Role::Exec => workload.spawn(&launch, &child_ends, child_status, &container.cgroup),
        };
        let pid = pid.map_err(|error| fail("start a process", error))?;
        let command = RunningCommand {
            session: key,
            container: container_key,
            kind: CommandKind::Exec,
        };
        self.running.insert(pid, command);
        if let Some(session) = self.sessions.get_mut(key) {
            session.started(&launch.request, pid, agent_ends, status);
        }
        Ok(())
    }

    pub(super) fn attach_main(&mut self, key: Key, id: &ContainerId) {
        let Some(session) = self.sessions.get_mut(key) else {
            return;
        };
        let container = self.containers.named(id).ok();
        let Some(main) = container.and_then(|(_, container)| container.workload.main()) else {
            let text = format!("no main command runs in container {id}");
            return session.refuse(125, &text);
        };
        let client = session.take_client();
        self.settle_session(key);
        if let (Some(client), Some(session)) = (client, self.sessions.get_mut(main)) {
            session.attach(client);
            session.take_frames();
            self.settle_session(main);
        }
    }
}
