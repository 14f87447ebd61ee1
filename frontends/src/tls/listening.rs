//! The frontend's part on the event loop: its listener and its connections.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use sm_devices_vsock::{MuxerHandle, Stage};
use sm_vmm_core::event_loop::{EventHandler, Interest, Readiness, Registration, Registry};

use super::identity::Identity;
use super::session::{Pumped, Session};
use crate::Target;
use crate::listening::Spare;

/// Time that a handshake, and hanging up at the end, may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Handshakes at once; of more, the oldest is hung up on.
const MAX_HANDSHAKES: usize = 256;
/// Connections accepted before other handlers get their turn.
const BATCH: usize = 16;

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
/// Tokens of connections begin here: an even one is a socket's, the next one
/// its plain side's.
const FIRST: u64 = 2;

const BOTH_EDGES: Interest = Interest {
    readable: true,
    writable: true,
    edge: true,
};

/// What the frontend did so far.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) accepted: AtomicU64,
    pub(super) refused: AtomicU64,
}

/// A connection and what it has on the event loop.
struct Place {
    session: Session,
    socket: Registration,
    guest: Option<Registration>,
    /// When it is hung up on, if what it is at is not done by then.
    deadline: Option<Instant>,
}

pub(super) struct Listening {
    listener: TcpListener,
    identity: Identity,
    target: Target,
    names: HashMap<String, Target>,
    muxer: MuxerHandle,
    counters: Arc<Counters>,
    sessions: HashMap<u64, Place>,
    next: u64,
    handshakes: usize,
    /// In order; an entry counts if its connection still has this deadline.
    deadlines: VecDeque<(Instant, u64)>,
    timer: OwnedFd,
    spare: Spare,
}

impl Listening {
    pub(super) fn new(
        listener: TcpListener,
        identity: Identity,
        target: Target,
        names: HashMap<String, Target>,
        muxer: MuxerHandle,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            listener,
            identity,
            target,
            names,
            muxer,
            counters,
            sessions: HashMap::new(),
            next: FIRST,
            handshakes: 0,
            deadlines: VecDeque::new(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            spare: Spare::new(),
        })
    }

    fn accept(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
        let begun = self.muxer.profiler().begin();
        let (socket, _) = self.spare.accept(|| self.listener.accept())?;
        let session = Session::new(socket, self.identity.current())?;
        let token = self.next;
        let registration = registry.add(&session.socket, token, BOTH_EDGES)?;
        self.next += 2;
        if self.handshakes >= MAX_HANDSHAKES {
            self.give_up_oldest(registry);
        }
        self.handshakes += 1;
        let place = Place {
            session,
            socket: registration,
            guest: None,
            deadline: None,
        };
        self.sessions.insert(token, place);
        self.limit(token);
        self.muxer.profiler().end(Stage::Accept, begun);
        Ok(())
    }

    /// Gives a connection so long and no longer.
    fn limit(&mut self, token: u64) {
        let deadline = Instant::now() + PATIENCE;
        if let Some(place) = self.sessions.get_mut(&token) {
            place.deadline = Some(deadline);
            self.deadlines.push_back((deadline, token));
            if self.deadlines.len() == 1 {
                self.arm();
            }
        }
    }

    /// Has the timer wake us at the first deadline.
    fn arm(&self) {
        let Some((deadline, _)) = self.deadlines.front() else {
            return;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = Itimerspec {
            it_interval: zero,
            it_value: Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                // Not zero: that would disarm it.
                tv_nsec: i64::from(left.subsec_nanos().max(1)),
            },
        };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value) {
            tracing::warn!(%error, "slow clients cannot be timed");
        }
    }

    fn is_due(&self, deadline: Instant, token: u64) -> bool {
        let place = self.sessions.get(&token);
        place.is_some_and(|place| place.deadline == Some(deadline))
    }

    /// Hangs up on whoever took too long.
    fn sweep(&mut self, registry: &mut Registry<'_>) {
        // Read so that it is not ready any more.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        let now = Instant::now();
        while let Some(&(deadline, token)) = self.deadlines.front() {
            let due = self.is_due(deadline, token);
            if due && deadline > now {
                break;
            }
            self.deadlines.pop_front();
            if due {
                self.remove(token, registry);
            }
        }
        self.arm();
    }

    fn give_up_oldest(&mut self, registry: &mut Registry<'_>) {
        let oldest = self.deadlines.iter().position(|&(deadline, token)| {
            let place = self.sessions.get(&token);
            place.is_some_and(|place| {
                place.deadline == Some(deadline) && place.session.guest.is_none()
            })
        });
        if let Some((_, token)) = oldest.and_then(|at| self.deadlines.remove(at)) {
            self.remove(token, registry);
        }
    }

    fn remove(&mut self, token: u64, registry: &mut Registry<'_>) {
        let Some(place) = self.sessions.remove(&token) else {
            return;
        };
        registry.remove(place.socket, &place.session.socket);
        match (place.guest, &place.session.guest) {
            (Some(registration), Some(guest)) => registry.remove(registration, guest),
            _ => {
                self.handshakes -= 1;
                self.counters.refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn serve(&mut self, token: u64, registry: &mut Registry<'_>) {
        let Some(place) = self.sessions.get_mut(&token) else {
            return;
        };
        match place.session.pump() {
            Ok(Pumped::Idle) => {
                if place.session.is_closing() && place.deadline.is_none() {
                    self.limit(token);
                }
            }
            Ok(Pumped::More) => registry.again(token),
            Ok(Pumped::Established) => match self.establish(token, registry) {
                Ok(()) => registry.again(token),
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be led to the guest");
                    self.remove(token, registry);
                }
            },
            Ok(Pumped::Ended) => self.remove(token, registry),
            Err(error) => {
                tracing::debug!(%error, "a TLS connection broke off");
                self.remove(token, registry);
            }
        }
    }

    /// Connects a client whose handshake is complete to the guest.
    fn establish(&mut self, token: u64, registry: &mut Registry<'_>) -> io::Result<()> {
        let Some(place) = self.sessions.get_mut(&token) else {
            return Ok(());
        };
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        place.guest = Some(registry.add(&ours, token + 1, BOTH_EDGES)?);
        let name = place.session.server_name().map(str::to_ascii_lowercase);
        let target = name.and_then(|name| self.names.get(&name).copied());
        place.session.guest = Some(ours);
        place.deadline = None;
        self.handshakes -= 1;
        self.counters.accepted.fetch_add(1, Ordering::Relaxed);
        let (port, options) = target.unwrap_or(self.target).open();
        self.muxer.connect(port, OwnedFd::from(theirs), options);
        Ok(())
    }
}

impl EventHandler for Listening {
    fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
        registry.add(&self.listener, LISTENER, Interest::READ)?;
        registry.add(&self.timer, TIMER, Interest::READ)?;
        Ok(())
    }

    fn ready(&mut self, token: u64, _readiness: Readiness, registry: &mut Registry<'_>) {
        match token {
            LISTENER => {
                for _ in 0..BATCH {
                    match self.accept(registry) {
                        Ok(()) => {}
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                        Err(error) => {
                            tracing::warn!(%error, "a connection could not be accepted");
                            return;
                        }
                    }
                }
            }
            TIMER => self.sweep(registry),
            token => {
                let begun = self.muxer.profiler().begin();
                self.serve(token & !1, registry);
                self.muxer.profiler().end(Stage::Tls, begun);
            }
        }
    }
}
