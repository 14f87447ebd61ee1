//! The agent's state and its loop: every event is handed to its owner here.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::Pid;
use sm_guest_proto::control::{ControlReply, ControlRequest};
use sm_guest_proto::exec::{ExecRequest, Role};

use crate::cgroup::{Cgroup, Events};
use crate::control::{self, Control};
use crate::exec::session::{Ask, Session, status_pipe};
use crate::exec::stdio::{self, ChildEnds};
use crate::exec::{Launch, LaunchError};
use crate::forward::Forwards;
use crate::identity::Identity;
use crate::kernel_log::KernelLog;
use crate::log;
use crate::node::Node;
use crate::peer;
use crate::poweroff::PowerOff;
use crate::reactor::{Class, Event, Reactor, Ready, Token, Watched};
use crate::slab::{Key, Slab};
use crate::stats::{Facts, uptime_us};
use crate::sys;
use crate::waiting::{Deadlines, Waiting};
use crate::wire::SCRATCH_LEN;
use crate::workload::{self, Attached, Workload};

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
    /// Time to accept again.
    pub(super) const RESUME: u8 = 3;
}

/// Connections of strangers closed before others get their turn.
const STRANGERS: usize = 64;
/// Until connections are accepted again after that failed, when none has ended before:
/// Linux announces no descriptors or memory that others have released.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Status of a process that SIGKILL ended.
const KILLED: u32 = 128 + 9;

/// How long the root may take to assemble.
const ATTACH_DEADLINE: Duration = Duration::from_secs(30);
/// How long freezing may take.
const FREEZE_DEADLINE: Duration = Duration::from_secs(5);

/// Everything the agent knows. One per process, used by one thread.
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
    /// Commands that have not been reaped, and whose they are.
    pub(crate) running: HashMap<Pid, Key>,
    /// OOM kills that ended commands beside the main one, of those that the cgroup
    /// has counted.
    pub(crate) exec_oom_kills: u64,
    forwards: Forwards,
    pub(crate) workload: Workload,
    pub(crate) identity: Identity,
    pub(crate) cgroup: Cgroup,
    pub(crate) facts: Facts,
    pub(crate) vmgenid_seen: bool,
    /// Connections waiting for an answer to a request of each kind.
    pub(crate) attaching: Option<Waiting>,
    pub(crate) freezing: Option<Waiting>,
    pub(crate) preparing: Option<(Waiting, Pid)>,
    pub(crate) refreshing: Option<Waiting>,
    /// With where the answer is written.
    pub(crate) reporting: Option<(Waiting, Pid, File)>,
    pub(crate) deadlines: Deadlines,
    pub(crate) power: Option<PowerOff>,
}

/// True while connections are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accepting {
    Yes,
    /// Not at the moment, for want of descriptors or memory.
    Paused,
    /// Again, though the last attempt failed.
    Retrying,
}

impl Agent {
    /// An agent that serves `listeners`, keeps its files and mount points in
    /// `directory` and the workload in `cgroup`.
    pub(crate) fn new(
        listeners: Listeners,
        directory: PathBuf,
        cgroup: Cgroup,
        facts: Facts,
    ) -> io::Result<Self> {
        // All before a workload runs, which could replace what is opened here.
        log::open();
        let null = Node::find("/dev/null")?;
        let random = Node::find("/dev/urandom")?.open(OFlags::WRONLY)?;
        let reactor = Reactor::new()?;
        let mut listeners =
            [listeners.exec, listeners.forward, listeners.control].map(Watched::new);
        for (watched, part) in listeners.iter_mut().zip(0..) {
            watched.set(&reactor, Token::single(Class::Listener, part), Ready::IN)?;
        }
        let mut signals = Watched::new(sys::signal_fd(&[libc::SIGCHLD])?);
        signals.set(&reactor, Token::single(Class::Signals, 0), Ready::IN)?;
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
            exec_oom_kills: 0,
            forwards: Forwards::default(),
            workload: Workload::new(directory.clone())?,
            identity: Identity::new(directory, random),
            cgroup,
            facts,
            vmgenid_seen: false,
            attaching: None,
            freezing: None,
            preparing: None,
            refreshing: None,
            reporting: None,
            deadlines: Deadlines::default(),
            power: None,
        })
    }

    /// Adds the connection that the agent makes to the host when it is ready.
    pub(crate) fn announce(&mut self, socket: OwnedFd) {
        let key = self.controls.insert(Control::dialled(socket));
        self.settle_control(key);
    }

    /// Serves until the host asks to power off.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::new();
        while !self.power.as_ref().is_some_and(PowerOff::is_complete) {
            self.reactor.wait(&mut events)?;
            for event in events.drain(..) {
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
                    let reactor = &mut self.reactor;
                    if self
                        .forwards
                        .ready(reactor, token, ready, &mut self.scratch)
                    {
                        self.resume_accepting();
                    }
                }
                Class::Workload if token.part == workload::part::CHANNEL => self.check_attach(),
                Class::Workload => self.cgroup_changed(),
                Class::Power => {}
            },
            Event::Timer(token) => match token.class {
                Class::Exec => {
                    if let Some(session) = self.sessions.get_mut(token.key) {
                        session.deadline(token.part);
                    }
                }
                Class::Forward => {
                    if self.forwards.deadline(&mut self.reactor, token.key) {
                        self.resume_accepting();
                    }
                }
                Class::Control => self.finish_refresh(Some(token)),
                Class::Workload => self.workload_deadline(token),
                Class::Power => self.power_deadline(token.part),
                Class::Listener => self.resume_accepting(),
                Class::Signals | Class::KernelLog => {}
            },
        }
    }

    // ---- connections ----

    fn accept(&mut self, part: u8) {
        let Some(listener) = self.listeners.get(usize::from(part)) else {
            return;
        };
        // One per wake-up: the listener stays readable while more wait, and
        // running sessions get their turn in between. Nobody waits for strangers.
        for _ in 0..STRANGERS {
            match peer::accept(listener.as_fd()) {
                Ok((socket, peer)) => {
                    self.accepting = Accepting::Yes;
                    if peer.is_served() {
                        return self.serve_new(part, socket);
                    }
                }
                // Nobody waits, or whoever did has left.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::Interrupted
                            | io::ErrorKind::ConnectionAborted
                            | io::ErrorKind::ConnectionReset
                    ) =>
                {
                    return;
                }
                Err(error) => return self.pause_accepting(&error),
            }
        }
    }

    /// Accepts nothing until a connection ends or [`ACCEPT_PAUSE`] has passed: those
    /// that wait would wake the agent again and again. They stay in the backlog.
    fn pause_accepting(&mut self, error: &io::Error) {
        if self.accepting == Accepting::Yes {
            log::error("accept a connection", error);
        }
        self.accepting = Accepting::Paused;
        log::note_failure(
            "leave listeners alone",
            self.watch_listeners(Ready::empty()),
        );
        let token = Token::single(Class::Listener, listener::RESUME);
        self.reactor.timer(Instant::now() + ACCEPT_PAUSE, token);
    }

    fn resume_accepting(&mut self) {
        if self.accepting == Accepting::Paused {
            self.accepting = Accepting::Retrying;
            if let Err(error) = self.watch_listeners(Ready::IN) {
                // For want of memory, as it may be: a listener that is not watched is lost.
                self.pause_accepting(&error);
            }
        }
    }

    fn watch_listeners(&mut self, want: Ready) -> io::Result<()> {
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
            listener::FORWARD => self.forwards.accept(&mut self.reactor, socket),
            listener::CONTROL => {
                let key = self.controls.insert(Control::accepted(socket));
                self.settle_control(key);
            }
            _ => {}
        }
    }

    // ---- processes ----

    fn reap(&mut self) {
        while sys::next_signal(self.signals.as_fd()).is_some() {}
        while let Ok(Some(reaped)) = sys::reap() {
            let owner = self.running.remove(&reaped.pid);
            if let Some(key) = owner {
                if reaped.status == KILLED && self.workload.main() != Some(key) {
                    self.note_exec_killed();
                }
                if let Some(session) = self.sessions.get_mut(key) {
                    session.exited(&self.reactor, reaped.status, reaped.peak_rss_kib);
                }
                self.settle_session(key);
            }
            self.check_prepared(&reaped);
            self.check_reported(&reaped);
            if self.workload.attaching() && self.workload.init() == Some(reaped.pid) {
                // Its last words are in the channel.
                self.check_attach();
            }
            if self.workload.reaped(reaped.pid, &self.reactor)
                && self.power.is_none()
                && owner.is_none()
            {
                log::line(
                    3,
                    &format!("the workload's init ended with status {}", reaped.status),
                );
            }
        }
        if self.power.is_some() {
            self.check_power();
        }
    }

    /// A command beside the main one was killed: by the kernel for lack of memory, if
    /// that has killed more processes than are accounted for; or with all others of its
    /// namespace, if PID 1 of that is ending (which ends last: pid_namespaces(7)).
    fn note_exec_killed(&mut self) {
        if !self.workload.init_ends() && self.cgroup.oom_kills() > self.exec_oom_kills {
            self.exec_oom_kills += 1;
        }
    }

    // ---- exec ----

    fn session_ready(&mut self, token: Token, ready: Ready) {
        let Some(session) = self.sessions.get_mut(token.key) else {
            return;
        };
        let ask = session.ready(
            &mut self.reactor,
            token.key,
            token.part,
            ready,
            &mut self.scratch,
        );
        self.serve(token.key, ask);
        self.settle_session(token.key);
    }

    fn serve(&mut self, key: Key, mut ask: Ask) {
        loop {
            match ask {
                Ask::Nothing | Ask::Finished => return,
                Ask::Launch(request) => self.launch(key, *request),
                Ask::AttachMain => return self.attach_main(key),
                Ask::Signal { pid, signal } => return self.signal_command(key, pid, signal),
            }
            // Frames that came right behind the request.
            let Some(session) = self.sessions.get_mut(key) else {
                return;
            };
            ask = session.take_frames(&self.reactor);
        }
    }

    /// Signals the command `pid` for the session `key`, and answers it.
    fn signal_command(&mut self, key: Key, pid: u32, signal: u8) {
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
        if let Ask::Finished = session.settle(&mut self.reactor, key, &mut self.scratch) {
            self.sessions.remove(key);
            self.resume_accepting();
            if self.workload.main() == Some(key) {
                self.workload.forget_main();
            }
            if self.power.is_some() {
                self.check_power();
            }
        }
    }

    fn launch(&mut self, key: Key, request: ExecRequest) {
        let timeout_ms = request.timeout_ms;
        match self.try_launch(key, request) {
            Ok(()) => Session::set_timeout(&mut self.reactor, key, timeout_ms),
            Err(error) => {
                if let Some(session) = self.sessions.get_mut(key) {
                    session.refuse(error.status, &error.message);
                }
            }
        }
    }

    fn try_launch(&mut self, key: Key, request: ExecRequest) -> Result<(), LaunchError> {
        let fail = |what: &str, error: io::Error| LaunchError::failed(format!("{what}: {error}"));
        self.workload.check_ready().map_err(LaunchError::failed)?;
        if self.power.is_some() {
            return Err(LaunchError::failed("the guest is powering off"));
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
        let (status, child_status) = status_pipe().map_err(|error| fail("make a pipe", error))?;
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

    fn attach_main(&mut self, key: Key) {
        let Some(session) = self.sessions.get_mut(key) else {
            return;
        };
        let Some(main) = self.workload.main() else {
            return session.refuse(125, "no main command runs in this guest");
        };
        let client = session.take_client(&self.reactor);
        self.settle_session(key);
        if let (Some(client), Some(session)) = (client, self.sessions.get_mut(main)) {
            session.attach(client, &self.reactor);
            session.take_frames(&self.reactor);
            self.settle_session(main);
        }
    }

    // ---- control ----

    /// Logs what happens when, if asked for by `sm.debug` on the command line.
    pub(crate) fn trace(&self, text: impl FnOnce() -> String) {
        if self.facts.debug {
            log::line(6, &format!("{} us: {}", uptime_us(), text()));
        }
    }

    fn control_ready(&mut self, key: Key, ready: Ready) {
        let alive = match self.controls.get_mut(key) {
            Some(control) => control.ready(ready, &mut self.scratch),
            None => return,
        };
        if alive {
            self.serve_control(key);
        } else {
            self.drop_control(key);
        }
    }

    fn serve_control(&mut self, key: Key) {
        while let Some(request) = self.controls.get_mut(key).and_then(Control::next_request) {
            self.trace(|| format!("asked {}", request_name(&request)));
            if let Some(reply) = self.perform(key, request) {
                self.answer_now(key, &reply);
            }
        }
        self.settle_control(key);
    }

    fn answer_now(&mut self, key: Key, reply: &ControlReply) {
        self.trace(|| format!("answered {reply:?}"));
        if let Some(control) = self.controls.get_mut(key) {
            control.reply(reply);
        }
    }

    /// Answers a request that was put off, and goes on with the next.
    pub(crate) fn answer(&mut self, key: Option<Key>, reply: &ControlReply) {
        if let Some(key) = key {
            self.answer_now(key, reply);
            self.serve_control(key);
        }
    }

    fn settle_control(&mut self, key: Key) {
        let alive = match self.controls.get_mut(key) {
            Some(control) => control.settle(&self.reactor, key),
            None => return,
        };
        if !alive {
            self.drop_control(key);
        }
    }

    fn drop_control(&mut self, key: Key) {
        if let Some(control) = self.controls.remove(key) {
            control.close(&self.reactor);
            self.resume_accepting();
        }
    }

    // ---- the workload's progress ----

    /// Notes that connection `key` waits for a part of the workload's progress.
    pub(crate) fn await_workload(&mut self, part: u8, key: Key, limit: Duration) -> Waiting {
        self.deadlines
            .wait(&mut self.reactor, Class::Workload, part, key, limit)
    }

    pub(crate) fn await_root(&mut self, key: Key) {
        self.attaching = Some(self.await_workload(workload::part::ATTACH, key, ATTACH_DEADLINE));
    }

    fn check_attach(&mut self) {
        let reply = match self.workload.attach_progress(&self.reactor) {
            Attached::Pending => return,
            Attached::Done(machine_id) => {
                if let Some(init) = self.workload.init() {
                    let learnt = self.cgroup.learn_path(init);
                    log::note_failure("find the workload's cgroup", learnt);
                }
                match self.identity.attached(machine_id) {
                    Ok(()) => ControlReply::Done,
                    Err(error) => {
                        self.workload.abandon(&self.reactor);
                        let message = error.to_string();
                        ControlReply::Error { message }
                    }
                }
            }
            Attached::Failed(message) => ControlReply::Error { message },
        };
        let waiting = self.attaching.take();
        self.answer(waiting.map(|waiting| waiting.key), &reply);
    }

    fn workload_deadline(&mut self, passed: Token) {
        let late = |what: &str| ControlReply::Error {
            message: format!("{what} took too long"),
        };
        if let Some(waiting) = self.attaching.take_if(|w| w.is_due(passed)) {
            self.workload.abandon(&self.reactor);
            self.answer(Some(waiting.key), &late("mounting the root file system"));
        } else if let Some(waiting) = self.freezing.take_if(|w| w.is_due(passed)) {
            log::note_failure("thaw", self.cgroup.freeze(false));
            self.cgroup.stop_watching(&self.reactor);
            self.answer(
                Some(waiting.key),
                &late("stopping the workload's processes"),
            );
        } else if let Some((waiting, _)) = self.preparing.take_if(|(w, _)| w.is_due(passed)) {
            // The child cannot be ended while it waits for a device; it does no harm.
            self.answer(Some(waiting.key), &late("writing data back"));
        } else if let Some((waiting, pid, _)) = self.reporting.take_if(|(w, ..)| w.is_due(passed)) {
            let _ = sys::kill(pid, 9);
            self.answer(Some(waiting.key), &late("reading the workload's files"));
        }
    }

    /// Begins to freeze; the answer comes when every process has stopped.
    pub(crate) fn begin_freeze(&mut self, key: Key) -> io::Result<()> {
        self.cgroup.freeze(true)?;
        self.freezing = Some(self.await_workload(workload::part::FREEZE, key, FREEZE_DEADLINE));
        Ok(())
    }

    /// The answer to a freeze. A workload that nobody says is frozen goes on.
    pub(crate) fn frozen(&mut self, result: io::Result<Events>) -> ControlReply {
        match result {
            Ok(_) => ControlReply::Done,
            Err(error) => {
                log::note_failure("thaw", self.cgroup.freeze(false));
                ControlReply::Error {
                    message: format!("read cgroup.events: {error}"),
                }
            }
        }
    }

    pub(crate) fn cgroup_changed(&mut self) {
        if self.freezing.is_some() {
            match self.cgroup.events(&self.reactor) {
                Ok(events) if !events.frozen => {}
                result => {
                    self.cgroup.stop_watching(&self.reactor);
                    let waiting = self.freezing.take();
                    let reply = self.frozen(result);
                    self.answer(waiting.map(|waiting| waiting.key), &reply);
                }
            }
        }
        if self.power.is_some() {
            self.check_power();
        }
    }

    /// Looks for a new VM generation ID in what the kernel logged.
    pub(crate) fn check_vmgenid(&mut self) {
        if let Some(kernel_log) = &mut self.kernel_log {
            self.vmgenid_seen |= kernel_log.vm_fork_seen();
        }
        if self.vmgenid_seen {
            self.finish_refresh(None);
        }
    }

    /// Answers a refresh that waits for the VM generation ID; if a deadline has
    /// passed, only the one that it was set for.
    fn finish_refresh(&mut self, passed: Option<Token>) {
        let due = |waiting: &mut Waiting| passed.is_none_or(|token| waiting.is_due(token));
        if let Some(waiting) = self.refreshing.take_if(due) {
            self.watch_kernel_log(false);
            let reply = self.refreshed();
            self.answer(Some(waiting.key), &reply);
        }
    }

    fn watch_kernel_log(&mut self, on: bool) {
        if let Some(kernel_log) = &mut self.kernel_log {
            log::note_failure("watch the kernel log", kernel_log.watch(&self.reactor, on));
        }
    }

    /// Sets the deadline of a refresh that waits for the VM generation ID.
    pub(crate) fn wait_for_vmgenid(&mut self, key: Key, wait: Duration) {
        self.watch_kernel_log(true);
        let part = control::part::VMGENID;
        let waiting = self
            .deadlines
            .wait(&mut self.reactor, Class::Control, part, key, wait);
        self.refreshing = Some(waiting);
    }
}

/// The request without its contents, which may be secret (entropy).
fn request_name(request: &ControlRequest) -> &'static str {
    match request {
        ControlRequest::Hello(_) => "hello",
        ControlRequest::Refresh(_) => "refresh",
        ControlRequest::AttachRoot(_) => "attach root",
        ControlRequest::Freeze => "freeze",
        ControlRequest::Thaw => "thaw",
        ControlRequest::PrepareSnapshot => "prepare snapshot",
        ControlRequest::SignalMain { .. } => "signal main",
        ControlRequest::PowerOff { .. } => "power off",
        ControlRequest::Stats => "stats",
        ControlRequest::Evidence => "evidence",
    }
}
