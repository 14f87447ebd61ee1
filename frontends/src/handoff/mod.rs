//! Connections that a router has accepted, handed over with what it has read.
//!
//! A router connects to the socket and sends, as often as it likes,
//! `[u32 BE length][payload]` with a stream socket (SCM_RIGHTS) somewhere among
//! these bytes. The length is 1 to 1 MiB. The guest gets the payload first and
//! then what the socket still has to say. [`HandoffSender`] is the router's side.
//!
//! Whoever breaks these rules is hung up on, and the descriptors that came are
//! closed; streams that were handed over before go on.

pub(crate) mod parcel;
mod sender;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sm_devices_vsock::{ConnectOptions, Limit, MuxerHandle, Permit, Stage};
use sm_event_loop::{EventHandler, EventLoopHandle, Interest, Readiness, Registration, Registry};
use sm_guest_proto::forward::ForwardHeader;
use sm_guest_proto::port;

use self::parcel::Parcel;
pub use self::sender::HandoffSender;
use crate::deadlines::Deadlines;
use crate::gate::{CLOSING_ROUNDS, Gate, LISTENER};
use crate::handle::Frontend;
use crate::place;
use crate::service::{Bell, Service};
use crate::shortage::{Retries, is_shortage};
use crate::{Error, FrontendHandle, LocalAddress};

/// Longest payload of one handoff, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Bytes of the length before it.
const HEADER: usize = 4;
/// Routers served at once.
const MAX_ROUTERS: usize = 64;
/// Reads served before other handlers get their turn.
const BATCH: usize = 64;
/// Time for one handoff, and after which an idle router makes room for another.
const PATIENCE: Duration = Duration::from_secs(10);
const FRONTEND: &str = "handoff";

const TIMER: u64 = 1;
/// There may be room for more streams.
const ROOM: u64 = 2;
/// Routers that could not be heard for want of memory.
const SHORTAGE: u64 = 3;
/// Tokens of routers begin here.
const FIRST: u64 = 4;

/// Told once per change: routers that wait for room are not heard meanwhile.
const NEW_BYTES: Interest = Interest {
    readable: true,
    writable: false,
    edge: true,
};

/// A frontend to be started.
#[derive(Clone, Debug)]
pub struct HandoffFrontend {
    path: PathBuf,
    target: ForwardHeader,
    limit: Limit,
    patience: Duration,
}

impl HandoffFrontend {
    /// A frontend that will listen on `path`, and connect what it is handed to a
    /// TCP port of the guest.
    #[must_use]
    pub fn new(path: &Path, target: ForwardHeader) -> Self {
        Self {
            path: path.to_owned(),
            target,
            limit: Limit::none(),
            patience: PATIENCE,
        }
    }

    /// Takes descriptors, one for each stream, from this limit. When there are none
    /// left, routers wait. They themselves, at most 64, do not count.
    #[must_use]
    pub fn limit(mut self, limit: &Limit) -> Self {
        self.limit = limit.clone();
        self
    }

    /// How long a router may take for a handoff that it has begun; a router that was
    /// idle for so long is hung up on when others wait. 10 s unless this is called.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Starts listening; the socket is private as [`crate::UnixFrontend`]'s is.
    ///
    /// # Errors
    /// The place is taken, or the system refused.
    pub fn start(
        self,
        muxer: MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<FrontendHandle, Error> {
        let (listener, place) = place::listen(FRONTEND, &self.path)?;
        let name = format!("{FRONTEND} {}", self.path.display());
        let service = Service::new(name, muxer, self.limit);
        let failed = || place::failed(FRONTEND, "wait for routers on", &self.path);
        let handoff = Handoff {
            gate: Gate::new(listener, 0, service.limit.clone()),
            target: self.target,
            patience: self.patience,
            service: service.clone(),
            bell: None,
            routers: HashMap::new(),
            next_token: FIRST,
            deadlines: Deadlines::new().map_err(failed())?,
            retries: Retries::new().map_err(failed())?,
            somebody_waits: false,
        };
        let address = LocalAddress::Unix(self.path.clone());
        FrontendHandle::start(handoff, address, Some(place), service, event_loop).map_err(failed())
    }
}

struct Router {
    stream: UnixStream,
    registration: Registration,
    parcel: Parcel,
    /// For the stream that comes with it.
    room: Option<Permit>,
    /// It is not heard until there is room for another stream.
    waits: bool,
    /// When it will have been idle, or at one handoff, for too long.
    deadline: Option<Instant>,
    /// It was idle for too long by then.
    idle_since: Option<Instant>,
}

struct Handoff {
    gate: Gate<UnixListener>,
    target: ForwardHeader,
    patience: Duration,
    service: Service,
    bell: Option<Bell>,
    routers: HashMap<u64, Router>,
    next_token: u64,
    deadlines: Deadlines,
    /// When routers are heard again, after there was no memory for it.
    retries: Retries,
    /// There may be a router in the backlog for which there is no place.
    somebody_waits: bool,
}

impl Handoff {
    /// Accepts some routers; whether there may be more.
    fn accept(&mut self, registry: &mut Registry<'_>) -> bool {
        let Some(bell) = self.bell.clone() else {
            return false;
        };
        if self.routers.len() >= MAX_ROUTERS && !self.give_up_idle(registry) {
            self.somebody_waits = true;
            return false;
        }
        let room = MAX_ROUTERS.saturating_sub(self.routers.len());
        let accepted = self.gate.accept(room, &bell, &self.service, registry);
        for (stream, _) in accepted {
            if let Err(error) = self.add(stream, registry) {
                self.service.counters.refuse(error);
            }
        }
        self.gate.has_more()
    }

    fn add(&mut self, stream: UnixStream, registry: &mut Registry<'_>) -> io::Result<()> {
        let token = self.next_token;
        let registration = registry.add(&stream, token, NEW_BYTES)?;
        self.next_token += 1;
        let router = Router {
            stream,
            registration,
            parcel: Parcel::default(),
            room: None,
            waits: false,
            deadline: Some(self.deadlines.add(token, self.patience)),
            idle_since: None,
        };
        self.routers.insert(token, router);
        // What it has sent already may be an event that came before.
        registry.again(token);
        Ok(())
    }

    /// Hangs up on the router that was idle for the longest, if that was too long.
    fn give_up_idle(&mut self, registry: &mut Registry<'_>) -> bool {
        let idle = self
            .routers
            .iter()
            .filter_map(|(&token, router)| Some((router.idle_since?, token)));
        let Some((_, token)) = idle.min() else {
            return false;
        };
        let why = "others wait, and it was idle for long";
        self.service.counters.evict(why);
        self.remove(token, registry);
        true
    }

    fn remove(&mut self, token: u64, registry: &mut Registry<'_>) {
        if let Some(router) = self.routers.remove(&token) {
            registry.remove(router.registration, &router.stream);
            if let Some(at) = router.deadline {
                self.deadlines.remove(at, token);
            }
            if std::mem::take(&mut self.somebody_waits) {
                registry.again(LISTENER);
            }
        }
    }

    /// A router has been at something for too long, or idle.
    fn is_due(&mut self, token: u64, registry: &mut Registry<'_>) {
        let Some(router) = self.routers.get_mut(&token) else {
            return;
        };
        if router.waits {
            // For us: that is no fault of its own.
            router.deadline = Some(self.deadlines.add(token, self.patience));
            return;
        }
        router.deadline = None;
        if router.parcel.has_begun() {
            self.service
                .counters
                .evict("a handoff was not complete in time");
            return self.remove(token, registry);
        }
        router.idle_since = Some(Instant::now());
        if self.somebody_waits {
            registry.again(LISTENER);
        }
    }

    /// Takes what a router has sent. `true` when there may be more.
    ///
    /// # Errors
    /// It is done, or done for.
    fn serve(&mut self, token: u64) -> io::Result<bool> {
        for _ in 0..BATCH {
            let Some(router) = self.routers.get_mut(&token) else {
                return Ok(false);
            };
            let had_begun = router.parcel.has_begun();
            if had_begun && router.room.is_none() {
                let Some(bell) = self.bell.clone() else {
                    return Ok(false);
                };
                let limit = &self.service.limit;
                let room = limit.take_or_wait(1, move || bell.ring(ROOM));
                router.waits = room.is_err();
                router.room = room.ok();
                if router.waits {
                    let why = "the limit of descriptors is reached";
                    self.service.counters.say("routers wait", why);
                    return Ok(false);
                }
            }
            let complete = router.parcel.read_from(&router.stream)?;
            if !had_begun || complete {
                // For this handoff, or until the next.
                if let Some(at) = router.deadline.take() {
                    self.deadlines.remove(at, token);
                }
                router.deadline = Some(self.deadlines.add(token, self.patience));
                router.idle_since = None;
            }
            if complete {
                self.hand_over(token)?;
            }
        }
        Ok(true)
    }

    fn hand_over(&mut self, token: u64) -> io::Result<()> {
        let Some(router) = self.routers.get_mut(&token) else {
            return Ok(());
        };
        let begun = self.service.muxer.profiler().begin();
        let permit = router.room.take();
        let (stream, payload) = std::mem::take(&mut router.parcel).open()?;
        let mut preamble = self.target.encode().to_vec();
        preamble.extend(payload);
        let options = ConnectOptions {
            preamble,
            status_reply: true,
            wait: self.target.wait(),
            ..ConnectOptions::default()
        };
        let member = self.service.group.join(permit);
        self.service
            .connect((port::FORWARD, options), stream, Some(member));
        self.service.muxer.profiler().end(Stage::Accept, begun);
        Ok(())
    }

    fn router_ready(&mut self, token: u64, registry: &mut Registry<'_>) {
        let error = match self.serve(token) {
            Ok(true) => return registry.again(token),
            Ok(false) => return,
            Err(error) => error,
        };
        if is_shortage(&error) {
            self.retries.add(token);
            return;
        }
        match error.kind() {
            io::ErrorKind::WouldBlock => return,
            io::ErrorKind::Interrupted => return registry.again(token),
            // It is done.
            io::ErrorKind::UnexpectedEof => {}
            _ => self.service.counters.refuse(error),
        }
        self.remove(token, registry);
    }
}

impl EventHandler for Handoff {
    fn start(&mut self, _registry: &mut Registry<'_>) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, token: u64, _readiness: Readiness, registry: &mut Registry<'_>) {
        match token {
            LISTENER => {
                self.accept(registry);
            }
            TIMER => {
                while let Some(token) = self.deadlines.next_due() {
                    self.is_due(token, registry);
                }
            }
            SHORTAGE => {
                while let Some(token) = self.retries.next_due() {
                    registry.again(token);
                }
            }
            ROOM => {
                let waiting = self.routers.iter().filter(|(_, router)| router.waits);
                for (&token, _) in waiting {
                    registry.again(token);
                }
            }
            token => self.router_ready(token, registry),
        }
    }
}

impl Frontend for Handoff {
    fn begin(&mut self, bell: Bell, registry: &mut Registry<'_>) -> io::Result<()> {
        self.bell = Some(bell);
        registry.add(&self.deadlines, TIMER, Interest::READ)?;
        registry.add(&self.retries, SHORTAGE, Interest::READ)?;
        self.gate.begin(registry)
    }

    fn close(&mut self, registry: &mut Registry<'_>) {
        let mut rounds = 0..CLOSING_ROUNDS;
        while rounds.next().is_some() && self.accept(registry) {}
        self.gate.close(registry);
        // What routers have handed over counts; there will be no more.
        let tokens: Vec<u64> = self.routers.keys().copied().collect();
        for token in tokens {
            let _ = self.serve(token);
            self.remove(token, registry);
        }
    }
}
