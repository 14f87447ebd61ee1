//! Orderly power-off: processes, output, connections, disks.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use sm_event_loop::Key;
use sm_guest_proto::control::ControlReply;

use super::Agent;
use crate::container::Container;
use crate::log;
use crate::reactor::{Class, Deadline, Token};
use crate::sys;

/// Parts of power tokens.
mod part {
    pub(super) const GRACE: u8 = 0;
    pub(super) const FLUSH: u8 = 1;
    pub(super) const LINGER: u8 = 2;
    pub(super) const KILL: u8 = 3;
}

/// Timeout for processes to end after SIGKILL. One that is blocked on a device or on a
/// file system without a server may never end. With [`FLUSH_DEADLINE`], it is less than the
/// two seconds after which the host stops the machine.
const KILL_DEADLINE: Duration = Duration::from_millis(500);

/// Timeout for clients to accept the rest of their output.
const FLUSH_DEADLINE: Duration = Duration::from_millis(1000);

/// Timeout for the host to close its connections after the answer, which means that it
/// has received the answer.
const LINGER_DEADLINE: Duration = Duration::from_millis(50);

const SIGTERM: u8 = 15;

/// `SIGRTMIN+3` in glibc's numbering, where SIGRTMIN is 34. systemd halts the system on
/// it (systemd(1), "SIGNALS").
const HALT: u8 = 37;

/// Returns the signal that ends `pid`, for a request to end it by `signal`.
pub(crate) fn stop_signal(pid: Pid, signal: u8) -> u8 {
    // Reading the link opens no file. systemd re-executes itself on SIGTERM; for every
    // other program the signal is unchanged.
    let program = std::fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero()));
    match program {
        Ok(path) if signal == SIGTERM && is_systemd(&path) => HALT,
        _ => signal,
    }
}

fn is_systemd(program: &Path) -> bool {
    // The running program's file is unlinked after an upgrade.
    let name = program.file_name().map(|name| name.as_encoded_bytes());
    matches!(name, Some(b"systemd" | b"systemd (deleted)"))
}

/// Maximum grace period.
const MAX_GRACE: Duration = Duration::from_secs(3600);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Processes have been sent SIGTERM, and SIGKILL after the grace period.
    Terminating,
    /// All processes have exited, or cannot be ended; their last output is sent to
    /// clients.
    Flushing,
    /// The answer has been sent.
    Lingering,
    /// The power-off is complete.
    Complete,
}

/// A power-off in progress.
#[derive(Debug)]
pub(crate) struct PowerOff {
    key: Key,
    stage: Stage,
    /// The end of the stage.
    deadline: Option<Deadline>,
}

impl PowerOff {
    /// Returns true if the machine can be powered off.
    pub(crate) fn is_complete(&self) -> bool {
        self.stage == Stage::Complete
    }
}

impl Agent {
    /// Starts the power-off: SIGTERM for every process, SIGKILL after `grace`.
    pub(crate) fn start_power_off(&mut self, key: Key, grace: Duration) {
        self.power = Some(PowerOff {
            key,
            stage: Stage::Terminating,
            deadline: None,
        });
        // The first deadline, because the answer to a freeze may advance the power-off.
        self.power_timer(grace.min(MAX_GRACE), part::GRACE);
        self.cancel_freeze();
        for container in self.containers.iter() {
            self.terminate(container);
        }
        self.end_file_operations();
        self.check_power();
    }

    /// Asks the processes of a container to end.
    fn terminate(&self, container: &Container) {
        let init = container.workload.init();
        // The agent asks an init without a main command to exit by closing its channel.
        let waiting = init.filter(|_| container.workload.main().is_none());
        let system = init.filter(|pid| stop_signal(*pid, SIGTERM) != SIGTERM);
        // An init system stops its services itself, in its own order.
        let processes = match system {
            Some(_) => {
                let key = self.containers.find(&container.id);
                let running = self.running.iter();
                let own = running.filter(|(_, command)| Some(command.container) == key);
                own.map(|(pid, _)| *pid).collect()
            }
            None => container.cgroup.processes(),
        };
        for pid in processes {
            let signal = if system == Some(pid) { HALT } else { SIGTERM };
            if Some(pid) != waiting {
                let _ = sys::kill(pid, signal);
            }
        }
    }

    fn power_timer(&mut self, after: Duration, part: u8) {
        let token = Token::single(Class::Power, part);
        if let Some(power) = &mut self.power {
            power.deadline = Some(self.reactor.deadline(Instant::now() + after, token));
        }
    }

    fn stage(&mut self) -> Stage {
        self.power
            .as_ref()
            .map_or(Stage::Terminating, |power| power.stage)
    }

    fn advance(&mut self, to: Stage) {
        if let Some(power) = &mut self.power {
            power.stage = power.stage.max(to);
        }
    }

    /// Advances as far as possible.
    pub(crate) fn check_power(&mut self) {
        if self.stage() == Stage::Terminating {
            let running = !self.running.is_empty();
            if !running {
                let all = self.containers.iter_mut();
                for container in all.filter(|one| one.workload.main().is_none()) {
                    container.workload.release_init();
                }
            }
            let populated = match self.containers.group.events(&self.reactor) {
                Ok(events) => events.populated,
                Err(error) => {
                    log::error("read cgroup.events", error);
                    false
                }
            };
            // A process leaves its cgroup before it is reaped. Wait for both, so that
            // every exit status has been reported.
            let has_init = self.containers.has_init();
            if !populated && !running && !has_init {
                self.begin_flush();
            }
        }
        if self.stage() == Stage::Flushing
            && !self
                .sessions
                .iter_mut()
                .any(|(_, session)| session.has_pending_frames())
        {
            self.send_answer();
        }
        if self.stage() == Stage::Lingering && self.controls.is_empty() {
            self.advance(Stage::Complete);
        }
    }

    fn begin_flush(&mut self) {
        self.containers.group.stop_watching();
        self.advance(Stage::Flushing);
        self.power_timer(FLUSH_DEADLINE, part::FLUSH);
    }

    fn send_answer(&mut self) {
        self.advance(Stage::Lingering);
        self.power_timer(LINGER_DEADLINE, part::LINGER);
        let key = self.power.as_ref().map(|power| power.key);
        self.answer(key, &ControlReply::Done);
    }

    /// Handles an expired deadline of the power-off.
    pub(crate) fn power_deadline(&mut self, which: u8) {
        match (which, self.stage()) {
            (part::GRACE, Stage::Terminating) => {
                log::note_failure("kill the containers", self.containers.group.kill());
                self.power_timer(KILL_DEADLINE, part::KILL);
                self.check_power();
            }
            (part::KILL, Stage::Terminating) => {
                log::line(3, "processes remain after SIGKILL");
                self.begin_flush();
                self.check_power();
            }
            (part::FLUSH, Stage::Flushing) => self.send_answer(),
            (part::LINGER, _) => self.advance(Stage::Complete),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::tests::{Fixture, HOUR};
    use crate::agent::{CommandKind, RunningCommand};
    use crate::control;
    use crate::exec::session::Session;
    use crate::reactor::{Event, Readiness};
    use sm_guest_proto::control::ControlRequest;
    use std::os::unix::net::UnixStream;

    #[test]
    fn systemd_is_known_by_its_program() {
        for name in ["/usr/lib/systemd/systemd", "/lib/systemd/systemd (deleted)"] {
            assert!(is_systemd(Path::new(name)), "{name}");
        }
        for name in ["/usr/lib/systemd/systemd-udevd", "/bin/busybox", "/", ""] {
            assert!(!is_systemd(Path::new(name)), "{name}");
        }
        assert_eq!(stop_signal(rustix::process::getpid(), SIGTERM), SIGTERM);
    }

    /// Returns an agent with a command that does not end, and the command's session.
    fn busy() -> (Fixture, UnixStream) {
        let mut fixture = Fixture::new();
        let (client, ours) = UnixStream::pair().unwrap();
        let session = fixture.agent.sessions.insert(Session::new(ours.into()));
        // No process is signalled but those of the cgroup, which is empty.
        let pid = rustix::process::getpid();
        let container = Key::new(0, 0);
        let kind = CommandKind::Exec;
        let command = RunningCommand {
            session,
            container,
            kind,
        };
        fixture.agent.running.insert(pid, command);
        (fixture, client)
    }

    fn is_complete(agent: &Agent) -> bool {
        agent.power.as_ref().is_some_and(PowerOff::is_complete)
    }

    #[test]
    fn a_power_off_is_complete_when_the_host_has_closed_its_connections() {
        let mut fixture = Fixture::new();
        let (key, mut host) = fixture.host();
        let (other, beside) = fixture.host();
        let agent = &mut fixture.agent;
        agent.start_power_off(key, HOUR);
        assert_eq!(host.reply(), ControlReply::Done);
        drop(host);
        let close = |agent: &mut Agent, key| {
            let token = Token::new(Class::Control, control::part::SOCKET, key);
            agent.handle(Event::Io(token, Readiness::UNKNOWN));
        };
        close(agent, key);
        assert!(!is_complete(agent));
        drop(beside);
        close(agent, other);
        assert!(is_complete(agent));
    }

    #[test]
    fn processes_that_cannot_be_killed_do_not_hold_a_power_off() {
        let (mut fixture, _client) = busy();
        let (key, mut host) = fixture.host();
        let agent = &mut fixture.agent;
        agent.start_power_off(key, HOUR);
        for which in [part::GRACE, part::KILL] {
            assert_eq!(agent.stage(), Stage::Terminating);
            agent.power_deadline(which);
        }
        assert_eq!(agent.stage(), Stage::Lingering);
        assert_eq!(host.reply(), ControlReply::Done);
        agent.power_deadline(part::LINGER);
        assert!(is_complete(agent));
    }

    #[test]
    fn a_power_off_cancels_a_freeze_and_refuses_others() {
        let (mut fixture, _client) = busy();
        let (freezing, mut first) = fixture.host();
        let (ending, mut second) = fixture.host();
        let (late, _third) = fixture.host();
        let agent = &mut fixture.agent;
        agent.freezing = Some(agent.await_containers(crate::part::FREEZE, freezing, HOUR));
        agent.start_power_off(ending, HOUR);
        let refused = |reply| match reply {
            ControlReply::Error { message } => message.contains("powering off"),
            _ => false,
        };
        assert!(refused(first.reply()));
        // The only deadline is that of the power-off.
        assert_eq!(agent.reactor.counts().1, 1);
        for request in [
            ControlRequest::Freeze,
            ControlRequest::PowerOff { grace_ms: 0 },
        ] {
            assert!(refused(agent.perform(late, request).unwrap()));
        }
        assert_eq!(agent.reactor.counts().1, 1);
        // The first power-off continues.
        agent.running.clear();
        agent.check_power();
        assert_eq!(second.reply(), ControlReply::Done);
    }
}
