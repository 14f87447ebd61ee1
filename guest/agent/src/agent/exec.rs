//! Commands: starting them, and requests on their connections.

use std::io;

use sm_event_loop::Key;
use sm_guest_proto::exec::{ExecRequest, Role};

use super::Agent;
use super::requests::POWERING_OFF;
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
                SessionAction::AttachMain => return self.attach_main(key),
                SessionAction::Signal { pid, signal } => {
                    return self.signal_command(key, pid, signal);
                }
                SessionAction::ListProcesses => return self.list_processes(key),
            }
            // Process frames that arrived together with the request.
            let Some(session) = self.sessions.get_mut(key) else {
                return;
            };
            action = session.take_frames();
        }
    }

    /// Signals the command `pid` on behalf of session `key`, and answers the session.
    pub(super) fn signal_command(&mut self, key: Key, pid: u32, signal: u8) {
        let found = self
            .sessions
            .iter_mut()
            .any(|(_, session)| session.signal_if(pid, signal));
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
            if self.workload.main() == Some(key) {
                self.workload.clear_main();
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

    pub(super) fn try_launch(&mut self, key: Key, request: ExecRequest) -> Result<(), LaunchError> {
        let fail = |what: &str, error: io::Error| LaunchError::failed(format!("{what}: {error}"));
        self.workload.check_ready().map_err(LaunchError::failed)?;
        if self.power.is_some() {
            return Err(LaunchError::failed(POWERING_OFF));
        }
        if request.argv.is_empty() {
            return Err(LaunchError::failed("the request names no command"));
        }
        if request.role == Role::Main && self.workload.main().is_some() {
            return Err(LaunchError::failed(
                "the workload's main command already runs",
            ));
        }
        let (child_ends, agent_ends) = if request.tty {
            stdio::terminal(&self.workload.devpts(), request.cols, request.rows)
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
            Role::Main => self
                .workload
                .become_main(key, &launch, &child_ends, &child_status),
            Role::Exec => self
                .workload
                .spawn(&launch, &child_ends, child_status, &self.cgroup),
        };
        let pid = pid.map_err(|error| fail("start a process", error))?;
        self.running.insert(pid, key);
        if let Some(session) = self.sessions.get_mut(key) {
            session.started(&launch.request, pid, agent_ends, status);
        }
        Ok(())
    }

    pub(super) fn attach_main(&mut self, key: Key) {
        let Some(session) = self.sessions.get_mut(key) else {
            return;
        };
        let Some(main) = self.workload.main() else {
            return session.refuse(125, "no main command runs in this guest");
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
