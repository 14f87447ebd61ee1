//! The agent's state and its event loop, which dispatches every event to its owner.

mod controls;
mod exec;
mod files;
mod host_changes;
mod mounting;
mod poweroff;
mod prepare;
mod processes;
mod progress;
mod report;
mod requests;
mod stats;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::Pid;
use sm_event_loop::{Key, Slab};

use self::poweroff::PowerOff;
use crate::cgroup::Cgroup;
use crate::container::Containers;
use crate::control::Control;
use crate::exec::session::Session;
use crate::facts::Facts;
use crate::forward::Forwards;
use crate::identity::Identity;
use crate::kernel_log::KernelLog;
use crate::log;
use crate::node::Node;
use crate::peer;
use crate::reactor::{Class, Deadline, Event, Interest, Reactor, Token, Watched};
use crate::sys;
use crate::waiting::Waiting;
use crate::wire::SCRATCH_LEN;

/// Listening sockets, in the order of the protocol's ports.
#[derive(Debug)]
pub(crate) struct Listeners {
    pub(crate) exec: OwnedFd,
    pub(crate) forward: OwnedFd,
    pub(crate) control: OwnedFd,
}

/// Parts of listener tokens.
mod listener {
    pub(super) const EXEC: u8 = 0;
    pub(super) const FORWARD: u8 = 1;
    pub(super) const CONTROL: u8 = 2;
    /// Timer for accepting again after a pause.
    pub(super) const RESUME: u8 = 3;
}

/// Pause after a failed accept, if no connection ends before: Linux sends no event when
/// other processes release descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Exit status of a process that SIGKILL terminated.
const KILLED: u32 = 128 + 9;

/// State of the agent. There is one per process, used by one thread.
pub(crate) struct Agent {
    pub(crate) reactor: Reactor,
    scratch: Vec<u8>,
    listeners: [Watched; 3],
    accepting: Accepting,
    signals: Watched,
    null: Node,
    kernel_log: Option<KernelLog>,
    pub(crate) controls: Slab<Control>,
    pub(crate) sessions: Slab<Session>,
    /// Running commands that have not been reaped.
    pub(crate) running: HashMap<Pid, RunningCommand>,
    forwards: Forwards,
    pub(crate) containers: Containers,
    pub(crate) identity: Identity,
    pub(crate) facts: Facts,
    pub(crate) vmgenid_seen: bool,
    /// Connections waiting for an answer, by kind of request.
    pub(crate) freezing: Option<Waiting>,
    pub(crate) preparing: Option<(Waiting, Pid)>,
    /// The child that notifies programs of changes by the host.
    noting: Option<Pid>,
    pub(crate) refreshing: Option<Waiting>,
    /// Also contains the file that the child writes its answer to.
    pub(crate) reporting: Option<(Waiting, Pid, File)>,
    /// As `reporting`.
    pub(crate) mounting: Option<(Waiting, Pid, File)>,
    pub(crate) power: Option<PowerOff>,
}

/// A process that serves a session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunningCommand {
    pub(crate) session: Key,
    pub(crate) container: Key,
    pub(crate) kind: CommandKind,
}

/// The kind of a process that serves a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CommandKind {
    /// A command in the container.
    Exec,
    /// An operation on its files, outside its cgroup.
    Files {
        /// It freezes the container.
        pauses: bool,
    },
}

/// State of accepting connections.
#[derive(Debug)]
enum Accepting {
    Yes,
    /// Accepting is paused after a lack of descriptors or memory.
    Paused {
        /// The end of the pause.
        _until: Deadline,
    },
    /// Accepting again after a pause; no connection has been accepted since.
    Retrying,
}

impl Agent {
    /// Creates an agent that serves `listeners`, stores its files and mount points in
    /// `directory` and places containers below `cgroup`.
    pub(crate) fn new(
        listeners: Listeners,
        directory: PathBuf,
        cgroup: Cgroup,
        facts: Facts,
    ) -> io::Result<Self> {
        // These files are opened before a workload runs, because it could replace them.
        log::open();
        let null = Node::find("/dev/null")?;
        let random = Node::find("/dev/urandom")?.open(OFlags::WRONLY)?;
        let reactor = Reactor::new()?;
        let mut listeners =
            [listeners.exec, listeners.forward, listeners.control].map(Watched::new);
        for (watched, part) in listeners.iter_mut().zip(0..) {
            watched.set(
                &reactor,
                Token::single(Class::Listener, part),
                Interest::READ,
            )?;
        }
        let mut signals = Watched::new(sys::signal_fd(&[libc::SIGCHLD])?);
        signals.set(&reactor, Token::single(Class::Signals, 0), Interest::READ)?;
        let kernel_log = KernelLog::open()
            .map_err(|error| log::error("open the kernel log", error))
            .ok();
        Ok(Self {
            reactor,
            scratch: vec![0; SCRATCH_LEN],
            listeners,
            accepting: Accepting::Yes,
            signals,
            null,
            kernel_log,
            controls: Slab::default(),
            sessions: Slab::default(),
            running: HashMap::new(),
            forwards: Forwards::default(),
            containers: Containers::new(&directory, cgroup),
            identity: Identity::new(directory, random),
            facts,
            vmgenid_seen: false,
            freezing: None,
            preparing: None,
            noting: None,
            refreshing: None,
            reporting: None,
            mounting: None,
            power: None,
        })
    }

    /// Adds the connection that the agent makes to the host once it is ready.
    pub(crate) fn announce(&mut self, socket: OwnedFd) {
        let key = self.controls.insert(Control::dialled(socket));
        self.settle_control(key);
    }

    /// Serves until the host requests power-off.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        while !self.power.as_ref().is_some_and(PowerOff::is_complete) {
            self.reactor.wait()?;
            while let Some(event) = self.reactor.take_event() {
                self.handle(event);
            }
        }
        Ok(())
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Io(token, ready) => match token.class {
                Class::Listener => self.accept(token.part),
                Class::Signals => self.reap(),
                Class::KernelLog => self.check_vmgenid(),
                Class::Control => self.control_ready(token.key, ready),
                Class::Exec => self.session_ready(token, ready),
                Class::Forward => {
                    let (reactor, scratch) = (&self.reactor, &mut self.scratch);
                    if self.forwards.ready(reactor, token, ready, scratch) {
                        self.resume_accepting();
                    }
                }
                Class::Container => self.check_attach(token.key),
                Class::Containers => self.cgroup_changed(),
                Class::Power => {}
            },
            Event::Timer(token) => match token.class {
                Class::Exec => {
                    if let Some(session) = self.sessions.get_mut(token.key) {
                        session.deadline(token.part);
                    }
                }
                Class::Forward => {
                    if self.forwards.deadline(&self.reactor, token.key) {
                        self.resume_accepting();
                    }
                }
                Class::Control => self.refresh_deadline(),
                Class::Container => self.attach_deadline(token.key),
                Class::Containers => self.containers_deadline(token.part),
                Class::Power => self.power_deadline(token.part),
                Class::Listener => self.resume_accepting(),
                Class::Signals | Class::KernelLog => {}
            },
        }
    }

    fn accept(&mut self, part: u8) {
        let Some(listener) = self.listeners.get(usize::from(part)) else {
            return;
        };
        // One connection per event: the listener stays readable while others wait, and
        // running sessions are served in between.
        match peer::accept_served(listener.as_fd()) {
            Ok(served) => {
                self.accepting = Accepting::Yes;
                if let Some(socket) = served {
                    self.serve_new(part, socket);
                }
            }
            // No connection waits, or its peer has closed it.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::Interrupted
                        | io::ErrorKind::ConnectionAborted
                        | io::ErrorKind::ConnectionReset
                ) => {}
            Err(error) => self.pause_accepting(&error),
        }
    }

    /// Stops accepting until a connection ends or [`ACCEPT_PAUSE`] has passed, because
    /// readable listeners would wake the agent continuously. Pending connections stay in
    /// the backlog.
    fn pause_accepting(&mut self, error: &io::Error) {
        if matches!(self.accepting, Accepting::Yes) {
            log::error("accept a connection", error);
        }
        log::note_failure(
            "leave listeners alone",
            self.watch_listeners(Interest::NONE),
        );
        let token = Token::single(Class::Listener, listener::RESUME);
        let _until = self.reactor.deadline(Instant::now() + ACCEPT_PAUSE, token);
        self.accepting = Accepting::Paused { _until };
    }

    fn resume_accepting(&mut self) {
        if matches!(self.accepting, Accepting::Paused { .. }) {
            self.accepting = Accepting::Retrying;
            if let Err(error) = self.watch_listeners(Interest::READ) {
                // The reason may be a lack of memory; a listener that is not watched
                // would be lost.
                self.pause_accepting(&error);
            }
        }
    }

    fn watch_listeners(&mut self, want: Interest) -> io::Result<()> {
        let mut watched = Ok(());
        for (listener, part) in self.listeners.iter_mut().zip(0..) {
            let token = Token::single(Class::Listener, part);
            watched = watched.and(listener.set(&self.reactor, token, want));
        }
        watched
    }

    fn serve_new(&mut self, part: u8, socket: OwnedFd) {
        match part {
            listener::EXEC => {
                let key = self.sessions.insert(Session::new(socket));
                self.settle_session(key);
            }
            listener::FORWARD => self.forwards.accept(&self.reactor, socket),
            listener::CONTROL => {
                let key = self.controls.insert(Control::accepted(socket));
                self.settle_control(key);
            }
            _ => {}
        }
    }

    fn reap(&mut self) {
        while sys::next_signal(self.signals.as_fd()).is_some() {}
        while let Ok(Some(reaped)) = sys::reap() {
            let owner = self.running.remove(&reaped.pid);
            if let Some(RunningCommand {
                session,
                container,
                kind,
            }) = owner
            {
                match kind {
                    CommandKind::Exec if reaped.status == KILLED => {
                        self.note_killed(session, container);
                    }
                    CommandKind::Files { pauses: true } => self.continue_container(container),
                    CommandKind::Exec | CommandKind::Files { .. } => {}
                }
                if let Some(session) = self.sessions.get_mut(session) {
                    session.exited(reaped.status, reaped.peak_rss_kib);
                }
                self.settle_session(session);
            }
            self.check_prepared(&reaped);
            self.check_noted(&reaped);
            self.check_reported(&reaped);
            self.check_mounted(&reaped);
            if let Some(key) = self.containers.of_init(reaped.pid) {
                let container = self.containers.get(key);
                if container.is_some_and(|container| container.workload.attaching()) {
                    // Its last message may still be in the channel.
                    self.check_attach(key);
                }
                self.init_ended(key, &reaped, owner.is_some());
            }
        }
        if self.power.is_some() {
            self.check_power();
        }
    }

    /// Records that a container's init was reaped.
    fn init_ended(&mut self, key: Key, reaped: &sys::Reaped, has_session: bool) {
        let Some(container) = self.containers.get_mut(key) else {
            return;
        };
        let ended = container.workload.reaped(reaped.pid);
        if ended && self.power.is_none() && !has_session {
            let (id, status) = (&container.id, reaped.status);
            let text = format!("the init of container {id} ended with status {status}");
            log::line(3, &text);
        }
    }

    /// Attributes the SIGKILL of an exec to the OOM killer, if that has killed more
    /// processes than are accounted for. If PID 1 of the container is exiting, the exec
    /// was killed with all other processes of the namespace (of which PID 1 exits last,
    /// pid_namespaces(7)).
    fn note_killed(&mut self, session: Key, container: Key) {
        let Some(container) = self.containers.get_mut(container) else {
            return;
        };
        let is_exec = container.workload.main() != Some(session);
        if is_exec
            && !container.workload.init_ends()
            && container.cgroup.oom_kills() > container.exec_oom_kills
        {
            container.exec_oom_kills += 1;
        }
    }
}
