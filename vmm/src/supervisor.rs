//! The supervisor: one thread that manages a VM through its life.
//!
//! It brings the guest from the agent's connection to a running workload, moves input and
//! output between guest, log and attached clients, serves the control socket, and writes
//! the exit record. It waits only for file descriptors and deadlines, in one `poll` loop.
//!
//! Flow control: output is read from the guest only while every attached client has space
//! for it, and input from a client only while the guest has. So a slow client stalls the
//! workload, as a slow terminal does, and memory is bounded. Without attached clients,
//! output goes only to the log.

mod admission;
mod clients;
mod ending;
mod events;
mod file_access;
mod guest_clock;
mod guest_side;
mod health;
mod host_changes;
mod machine_end;
mod mounts;
mod output;
mod restarting;
mod signals;
mod snapshots;
mod space;
mod stage;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sm_control::exit::ExitRecord;
use sm_control::launch::{LaunchRequest, VmmReport};
use sm_control::timings::Phase;
use sm_guest_proto::container::ContainerId;

use self::clients::ConnectedClient;
use self::health::Health;
use self::host_changes::HostChanges;
use self::restarting::EndRequest;
use self::signals::UnansweredSignal;
use self::stage::{MachineEnd, Startup, SupervisorStage};
use super::agent::AgentLink;
use super::conn::Conn;
use super::descriptors;
use super::environment::{OutputLog, VmRecord};
use super::guest::{EventReceiver, GuestMachine, SnapshotPlan, SupervisorEvent};
use super::restart::NextRun;

/// The parameters of a supervisor.
pub(crate) struct SupervisorParts<G> {
    pub(crate) guest: G,
    /// Warnings for the person who started the VM; sentences.
    pub(crate) warnings: Vec<String>,
    /// Events from other threads.
    pub(crate) events: EventReceiver,
    pub(crate) request: LaunchRequest,
    pub(crate) record: Arc<dyn VmRecord>,
    /// The record's lock, which is released when the machine has ended.
    pub(crate) lock: File,
    /// The launch stream; `None` for a run that the VM's own process has started.
    pub(crate) launcher: Option<UnixStream>,
    /// The control socket.
    pub(crate) listener: UnixListener,
    /// Becomes readable when this process receives SIGTERM or SIGINT.
    pub(crate) terminate: UnixStream,
    pub(crate) log: Box<dyn OutputLog>,
}

/// Time after which bytes are sent again for which the kernel had no memory.
const SHORTAGE: Duration = Duration::from_millis(10);

/// The purpose of a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SupervisorTimer {
    /// The workload must run.
    Start,
    /// The stop grace of the workload ends; SIGKILL follows.
    StopGrace,
    /// The workload did not exit after SIGKILL; the machine is stopped.
    Kill,
    /// The agent did not answer the question for OOM kills.
    OomCheck,
    /// The guest must be ready for a snapshot.
    Prepare,
    /// Changes of the host's files were collected.
    HostChanges,
    /// A stream of the guest ended, and the cause should be known.
    StreamEnded,
    /// Bytes sent to published ports should have been delivered.
    Delivery,
    /// The guest should have powered itself off.
    PowerOff,
    /// The host may have space again for what the guest writes.
    Space,
    /// The machine should have ended.
    End,
    /// Accepting connections is retried.
    Accept,
    /// Bytes for which the kernel had no memory are sent again.
    Shortage,
    /// The guest should have answered the signal of a client.
    Signal,
    /// Clients without calls exceeded their idle time.
    Idle,
    /// Writing the exit record is retried.
    Record,
    /// The next run of the VM starts.
    Restart,
    /// The run has lasted as long as it may.
    Expire,
    /// The next health check starts.
    Health,
    /// The health check that runs should have ended.
    HealthTimeout,
}

impl SupervisorTimer {
    fn is_of_guest(self) -> bool {
        !matches!(
            self,
            Self::Accept
                | Self::Idle
                | Self::Record
                | Self::Shortage
                | Self::Signal
                | Self::Restart
                | Self::Expire
                | Self::Health
                | Self::HealthTimeout
        )
    }
}

/// A VM with its clients; see the module's documentation.
pub(crate) struct Supervisor<G> {
    guest: Option<G>,
    events: EventReceiver,
    request: LaunchRequest,
    record: Arc<dyn VmRecord>,
    lock: Option<File>,
    listener: Option<UnixListener>,
    /// A spare descriptor, for accepting a client when no others are free.
    spare: Option<File>,
    /// True if the last connection could not be accepted.
    accept_fails: bool,
    idle_timeout: Duration,
    /// Most clients that are attached or wait for the end.
    max_persistent_clients: usize,
    terminate: UnixStream,
    log: Option<Box<dyn OutputLog>>,
    /// True if the last output could not be logged.
    log_fails: bool,
    /// True if output does not wait for slow clients any more.
    skips_slow_clients: bool,
    clients: BTreeMap<u64, ConnectedClient>,
    next_client: u64,
    agent: Option<AgentLink>,
    /// The container of the workload, whose exit ends the VM.
    container: ContainerId,
    /// The stream of that container's main command.
    main: Option<Conn>,
    stage: SupervisorStage,
    /// Phases of the start, or of the last reset.
    phases: Vec<Phase>,
    started_ns: u64,
    had_output: bool,
    /// Identifies the guest since its last start or reset.
    epoch: String,
    /// Number of snapshots begun.
    snapshots: u64,
    /// Snapshots that wait until layers of a disk are merged, with their clients.
    waiting_snapshots: Vec<(u64, SnapshotPlan)>,
    prepare_timeout: Duration,
    /// Signals of clients that the guest has not answered, oldest first.
    signals: Vec<UnansweredSignal>,
    /// Number of signals of clients that were passed on.
    signals_sent: u64,
    signal_timeout: Duration,
    power_off_timeout: Duration,
    space_interval: Duration,
    record_retry: Duration,
    /// The health of the workload, if it is checked.
    health: Option<Health>,
    /// The side that asked for the VM's end.
    end_request: EndRequest,
    /// The agent's error about the start of the workload; a sentence.
    start_error: Option<String>,
    /// The exit record of the workload, while OOM kills are queried.
    provisional: Option<ExitRecord>,
    /// Changes of the host's files of which the guest is to be notified.
    host_changes: HostChanges,
    timers: Vec<(SupervisorTimer, Instant)>,
}

/// The meaning of a descriptor in the poll set.
#[derive(Clone, Copy, Debug)]
enum PollSource {
    Notices,
    GuestEnd,
    Terminate,
    Listener,
    Agent,
    Main,
    Health,
    HostChanges,
    Client(u64),
}

impl<G: GuestMachine> Supervisor<G> {
    pub(crate) fn new(parts: SupervisorParts<G>) -> io::Result<Self> {
        parts.listener.set_nonblocking(true)?;
        parts.terminate.set_nonblocking(true)?;
        let launcher = parts
            .launcher
            .map(|stream| ConnectedClient::launcher(stream, &parts.request))
            .transpose()?;
        let power_off_timeout = machine_end::power_off_timeout(&parts.request);
        let mut supervisor = Self {
            guest: Some(parts.guest),
            events: parts.events,
            record: parts.record,
            lock: Some(parts.lock),
            listener: Some(parts.listener),
            spare: File::open("/dev/null").ok(),
            accept_fails: false,
            idle_timeout: admission::IDLE_TIMEOUT,
            max_persistent_clients: descriptors::max_persistent_clients(),
            terminate: parts.terminate,
            log: Some(parts.log),
            log_fails: false,
            skips_slow_clients: false,
            clients: BTreeMap::new(),
            next_client: 0,
            agent: None,
            container: ContainerId::default(),
            main: None,
            stage: SupervisorStage::Starting(Startup::AgentAwaited),
            phases: parts.request.phases.clone(),
            started_ns: 0,
            had_output: false,
            snapshots: 0,
            waiting_snapshots: Vec::new(),
            prepare_timeout: snapshots::PREPARE_TIMEOUT,
            signals: Vec::new(),
            signals_sent: 0,
            signal_timeout: signals::SIGNAL_TIMEOUT,
            power_off_timeout,
            space_interval: space::LOOK,
            record_retry: ending::RECORD_RETRY,
            epoch: String::new(),
            health: None,
            end_request: EndRequest::None,
            start_error: None,
            provisional: None,
            host_changes: HostChanges::default(),
            timers: Vec::new(),
            request: parts.request,
        };
        let timeout = Duration::from_millis(supervisor.request.start_timeout_ms);
        supervisor.set_timer(SupervisorTimer::Start, timeout);
        if let Some(launcher) = launcher {
            supervisor.add_client(launcher);
        }
        for warning in parts.warnings {
            supervisor.report(&VmmReport::Warning(warning));
        }
        Ok(supervisor)
    }

    /// Runs until the VM has ended and every client was notified. Returns the next run of
    /// a VM that is restarted.
    ///
    /// # Errors
    /// `poll` failed; the record then says that the VM was lost.
    pub(crate) fn run(mut self) -> io::Result<Option<NextRun>> {
        while !self.is_finished() {
            for (source, flags) in self.wait()? {
                self.handle(source, flags);
            }
            self.fire_timers();
            // Frames that wait for space in a connection are in buffers without a
            // descriptor that would wake the loop, so they are processed as long as a flush
            // makes space.
            loop {
                self.pump_agent();
                self.pump_main();
                self.pump_health_check();
                self.pump_clients();
                self.send_host_changes();
                self.flush_health_check();
                if !self.flush() {
                    break;
                }
            }
        }
        Ok(self.take_next_run())
    }

    fn is_finished(&self) -> bool {
        let is_left = match self.stage.is_restarting() {
            true => self.stage.is_restart_due(),
            false => self.clients.is_empty(),
        };
        self.guest.is_none() && is_left && !self.stage.is_unwritten()
    }

    /// Waits for descriptors or the next deadline. Descriptors without interest are not
    /// polled, so that a hang-up of the peer does not make the loop spin.
    fn wait(&self) -> io::Result<Vec<(PollSource, PollFlags)>> {
        let mut sources = Vec::new();
        let mut fds = Vec::new();
        let mut add = |source, fd| {
            sources.push(source);
            fds.push(fd);
        };
        if let Some(guest) = &self.guest {
            let end = self.stage.machine_end();
            if !matches!(end, Some(MachineEnd::Draining | MachineEnd::Ended)) {
                let fd = PollFd::from_borrowed_fd(guest.end_event(), PollFlags::IN);
                add(PollSource::GuestEnd, fd);
            }
            let fd = PollFd::from_borrowed_fd(self.events.fd(), PollFlags::IN);
            add(PollSource::Notices, fd);
        }
        if self.guest.is_some() || self.stage.is_unwritten() || self.stage.is_restarting() {
            add(
                PollSource::Terminate,
                PollFd::new(&self.terminate, PollFlags::IN),
            );
        }
        if let Some(listener) = self.listener.as_ref().filter(|_| self.accepts()) {
            add(PollSource::Listener, PollFd::new(listener, PollFlags::IN));
        }
        if let Some(agent) = &self.agent {
            let flags = interest(true, agent.conn.has_sendable());
            add(
                PollSource::Agent,
                PollFd::from_borrowed_fd(agent.conn.fd(), flags),
            );
        }
        if let Some(main) = &self.main {
            let flags = interest(self.has_room_for_output(), main.has_sendable());
            if !flags.is_empty() {
                add(PollSource::Main, PollFd::from_borrowed_fd(main.fd(), flags));
            }
        }
        if let Some((fd, flags)) = self.health_interest() {
            add(PollSource::Health, PollFd::from_borrowed_fd(fd, flags));
        }
        if let Some(fd) = self.host_changes_interest() {
            let fd = PollFd::from_borrowed_fd(fd, PollFlags::IN);
            add(PollSource::HostChanges, fd);
        }
        for (&id, client) in &self.clients {
            if let Some(flags) = self.client_interest(client) {
                let fd = PollFd::from_borrowed_fd(client.conn.fd(), flags);
                add(PollSource::Client(id), fd);
            }
        }
        let timeout = self.next_deadline().map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        }
        Ok(sources
            .into_iter()
            .zip(fds.iter().map(PollFd::revents))
            .filter(|(_, flags)| !flags.is_empty())
            .collect())
    }

    fn handle(&mut self, source: PollSource, flags: PollFlags) {
        let input = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        match source {
            PollSource::GuestEnd => self.guest_ended(),
            PollSource::Notices => {
                self.events.clear();
                while let Some(event) = self.events.next() {
                    match event {
                        SupervisorEvent::Agent(stream) => self.agent_dialed(stream),
                        SupervisorEvent::Captured(copied) => self.captured(copied),
                        SupervisorEvent::Snapshot(published) => self.snapshot_published(published),
                        SupervisorEvent::Delivered => self.delivered(),
                        SupervisorEvent::Merge(step) => self.merge_went_on(step),
                        SupervisorEvent::NoSpace => self.pause_for_space(),
                        SupervisorEvent::Unreachable(reason) => self.guest_broke(&format!(
                            "the guest's vsock driver broke its device: {reason}"
                        )),
                    }
                }
            }
            PollSource::Terminate => {
                // Unread bytes would keep the stream readable.
                let _ = self.terminate.read(&mut [0; 16]);
                match self.stage.is_unwritten() {
                    true => self.abandon_record(),
                    false => self.stop(EndRequest::Host, None),
                }
            }
            PollSource::Listener => self.accept(),
            PollSource::Agent if flags.intersects(input) => {
                if let Some(agent) = &mut self.agent {
                    agent.conn.read();
                }
            }
            PollSource::Main if flags.intersects(input) => {
                if let Some(main) = &mut self.main {
                    main.read();
                }
            }
            PollSource::Health if flags.intersects(input) => self.read_health_check(),
            PollSource::HostChanges => self.host_has_changed(),
            PollSource::Client(id) if flags.intersects(input) => self.client_ready(id, flags),
            // The stream is only writable: the flush follows.
            PollSource::Agent | PollSource::Main | PollSource::Health | PollSource::Client(_) => {}
        }
    }

    /// Writes pending bytes; clients with errors are dropped. Returns true if a
    /// connection that was full has space again.
    fn flush(&mut self) -> bool {
        let (mut room, mut starved) = (false, false);
        let mut flush = |conn: &mut Conn| {
            let was_full = conn.is_full();
            let flushed = conn.flush();
            room |= was_full && !conn.is_full();
            starved |= conn.is_starved();
            flushed
        };
        if let Some(agent) = &mut self.agent {
            // The end of the agent's stream is handled on a read.
            let _ = flush(&mut agent.conn);
        }
        if let Some(main) = &mut self.main {
            let _ = flush(main);
        }
        let ended: Vec<u64> = self
            .clients
            .iter_mut()
            .filter_map(|(&id, client)| {
                let alive = flush(&mut client.conn).is_ok();
                (!alive || client.is_done()).then_some(id)
            })
            .collect();
        if starved && !self.is_set(SupervisorTimer::Shortage) {
            self.set_timer(SupervisorTimer::Shortage, SHORTAGE);
        }
        // A full client that is gone does not block the others any more.
        room |= !ended.is_empty();
        for id in ended {
            self.drop_client(id);
        }
        room
    }

    fn set_timer(&mut self, timer: SupervisorTimer, after: Duration) {
        self.clear_timer(timer);
        // A time beyond the range of the clock is no deadline.
        if let Some(at) = Instant::now().checked_add(after) {
            self.timers.push((timer, at));
        }
    }

    /// Stops a timer; returns its remaining time.
    fn take_timer(&mut self, timer: SupervisorTimer) -> Option<Duration> {
        let at = self.timers.iter().find(|(other, _)| *other == timer)?.1;
        self.clear_timer(timer);
        Some(at.saturating_duration_since(Instant::now()))
    }

    fn is_set(&self, timer: SupervisorTimer) -> bool {
        self.timers.iter().any(|(other, _)| *other == timer)
    }

    fn clear_timer(&mut self, timer: SupervisorTimer) {
        self.timers.retain(|(other, _)| *other != timer);
    }

    /// Stops all timers that concern the guest.
    fn clear_guest_timers(&mut self) {
        self.timers.retain(|(timer, _)| !timer.is_of_guest());
    }

    /// Returns true if a timer shows that the workload is about to end.
    fn is_about_to_end(&self) -> bool {
        let goes_on = [SupervisorTimer::Space, SupervisorTimer::HostChanges];
        let mut timers = self.timers.iter();
        timers.any(|(timer, _)| timer.is_of_guest() && !goes_on.contains(timer))
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.timers.iter().map(|(_, at)| *at).min()
    }

    fn fire_timers(&mut self) {
        let now = Instant::now();
        let due: Vec<SupervisorTimer> = self
            .timers
            .extract_if(.., |(_, at)| *at <= now)
            .map(|(timer, _)| timer)
            .collect();
        for timer in due {
            self.timer_fired(timer);
        }
    }

    /// Records the end of a phase, and notifies clients.
    fn reach(&mut self, name: &str) {
        let phase = Phase::now(name);
        self.phases.push(phase.clone());
        self.report(&VmmReport::Phase(phase));
    }
}

fn interest(read: bool, write: bool) -> PollFlags {
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::IN, read);
    flags.set(PollFlags::OUT, write);
    flags
}

/// Longest quotation of a guest, in characters.
const QUOTE_LEN: usize = 2000;

/// Truncates text of a guest and replaces control characters, for records and terminals.
fn printable(text: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut clean: String = text.trim().chars().take(QUOTE_LEN).map(clean).collect();
    if text.trim().chars().nth(QUOTE_LEN).is_some() {
        clean.push('…');
    }
    clean
}
