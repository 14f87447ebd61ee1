//! Concurrent queries of many VMs.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sm_control::launch::{ControlAnswer, ControlCall, Stage, Status};
use sm_control::timed::{connect_now, connect_until};
use sm_control::timings::system_time;
use sm_control::{MAX_ANSWER, with_causes};
use sm_guest_proto::frame::{self, FrameDecoder, FrameType};

use super::{Inspection, StateView, StorageView, VmStatus};
use crate::Error;
use crate::record::{Damaged, Record, RecordError, VmState};

/// Connections open at the same time, out of the usual limit of 1024 descriptors per
/// process.
const MAX_CONCURRENT: usize = 256;
/// Most VMs with a full backlog that are waited for, each by a thread, because no event
/// reports free space in a backlog.
const MOST_FULL: usize = 64;

/// The problem of a VM that waits for space.
const NO_SPACE: &str = "no disk space on the host";

impl StateView {
    fn new(status: VmStatus) -> Self {
        Self {
            status,
            problem: None,
            pid: None,
            started: None,
            epoch: None,
            published: Vec::new(),
            exit_code: None,
            exit: None,
            last_exit: None,
            health: None,
            balloon: None,
            restarts: 0,
        }
    }

    /// Returns the view of a VM whose record cannot be read.
    #[must_use]
    pub fn damaged(damaged: &Damaged) -> Self {
        let status = match damaged.later {
            true => VmStatus::Unsupported,
            false => VmStatus::Damaged,
        };
        Self::failed(status, damaged.reason.clone())
    }

    fn failed(status: VmStatus, problem: String) -> Self {
        Self {
            problem: Some(problem),
            ..Self::new(status)
        }
    }

    /// Returns the view of a VM that answers.
    pub(super) fn alive(record: &Record, status: Status) -> Self {
        // That of the previous run, or of the run after which the VM is restarted.
        let last = match status.restarting {
            true => record.exit(),
            false => record.last_exit(),
        };
        Self {
            problem: status.lacks_space.then(|| NO_SPACE.to_owned()),
            last_exit: last.ok().flatten(),
            restarts: status.restarts,
            health: status.health,
            balloon: status.balloon,
            pid: Some(status.vmm_pid),
            started: system_time(status.started_ns),
            epoch: Some(status.epoch).filter(|epoch| !epoch.is_empty()),
            published: status.published,
            ..Self::new(match status.stage {
                _ if status.restarting => VmStatus::Restarting,
                _ if status.paused => VmStatus::Paused,
                Stage::Starting => VmStatus::Starting,
                Stage::Running => VmStatus::Running,
                Stage::Ending => VmStatus::Ending,
            })
        }
    }

    /// Returns the view of a VM that has ended, or whose record is damaged.
    ///
    /// # Errors
    /// The record does not exist any more.
    pub(super) fn exited(state: Result<VmState, RecordError>) -> Result<Self, Error> {
        match state {
            Ok(VmState::Exited(exit)) => Ok(Self {
                started: exit.started(),
                exit_code: Some(exit.status),
                restarts: exit.restarts,
                exit: Some(exit),
                ..Self::new(VmStatus::Exited)
            }),
            Ok(VmState::Created) => Ok(Self::new(VmStatus::Created)),
            // The process is about to start the VM again, and its socket is not there.
            Ok(VmState::Restarting(exit)) => Ok(Self {
                restarts: exit.restarts,
                last_exit: Some(exit),
                ..Self::new(VmStatus::Restarting)
            }),
            // The process is alive, and its socket does not exist yet, or not any more.
            Ok(VmState::Running) => Ok(Self::new(VmStatus::Starting)),
            Err(error @ RecordError::NotFound(_)) => Err(error.into()),
            Err(error) => Ok(Self::failed(VmStatus::Damaged, with_causes(&error))),
        }
    }

    /// Returns the view of a VM that is alive and has not answered.
    ///
    /// # Errors
    /// The record does not exist any more.
    pub(super) fn unresponsive(record: &Record, error: &Error) -> Result<Self, Error> {
        match (error, record.state()) {
            (Error::NotRunning(_), state) => Self::exited(state),
            (_, Ok(VmState::Running | VmState::Restarting(_))) => {
                Ok(Self::failed(VmStatus::Unresponsive, with_causes(error)))
            }
            // The VM has ended in the meantime.
            (_, state) => Self::exited(state),
        }
    }
}

/// A VM with a pending query.
struct PendingQuery {
    index: usize,
    stream: UnixStream,
    decoder: FrameDecoder,
}

/// Inspects the VMs of `records`, in this order. VMs that were removed are skipped.
pub(super) fn inspect_all(records: Vec<Record>, timeout: Duration) -> Vec<Inspection> {
    let views = thread::scope(|scope| query_all(scope, &records, timeout));
    let inspected = records.into_iter().zip(views);
    inspected
        .filter_map(|(record, state)| {
            Some(Inspection {
                config: record.config().clone(),
                state: state?,
                storage: StorageView::of(&record),
            })
        })
        .collect()
}

fn query_all<'scope, 'r: 'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    records: &'r [Record],
    timeout: Duration,
) -> Vec<Option<StateView>> {
    // A time beyond the range of the clock is no deadline.
    let deadline = Instant::now().checked_add(timeout);
    let mut views: Vec<Option<StateView>> = records.iter().map(|_| None).collect();
    let mut alive = VecDeque::new();
    for (index, record) in records.iter().enumerate() {
        match record.state() {
            Ok(VmState::Running | VmState::Restarting(_)) => alive.push_back(index),
            other => views[index] = StateView::exited(other).ok(),
        }
    }
    let mut note = |index: usize, answer: io::Result<Status>| {
        let name = &records[index].config().name;
        views[index] = match answer {
            Ok(status) => Some(StateView::alive(&records[index], status)),
            Err(error) => {
                let error = match error.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                        Error::NotRunning(name.clone())
                    }
                    _ => Error::Vmm {
                        operation: "talk to the VM's process",
                        source: error,
                    },
                };
                StateView::unresponsive(&records[index], &error).ok()
            }
        };
    };
    let mut queries: Vec<PendingQuery> = Vec::new();
    let mut full = Vec::new();
    while !alive.is_empty() || !queries.is_empty() {
        while queries.len() < MAX_CONCURRENT
            && let Some(index) = alive.pop_front()
        {
            match query(index, &records[index]) {
                Ok(vm) => queries.push(vm),
                Err(error) if error.kind() == io::ErrorKind::TimedOut && full.len() < MOST_FULL => {
                    let record = &records[index];
                    let waiter = thread::Builder::new().name("sm-survey".to_owned());
                    match waiter.spawn_scoped(scope, move || query_until(record, deadline)) {
                        Ok(answer) => full.push((index, answer)),
                        Err(error) => note(index, Err(error)),
                    }
                }
                Err(error) => note(index, Err(error)),
            }
        }
        if !wait(&queries, deadline) {
            let unanswered = alive.drain(..).chain(queries.drain(..).map(|vm| vm.index));
            unanswered.for_each(|index| note(index, Err(io::ErrorKind::TimedOut.into())));
        }
        queries.retain_mut(|vm| match vm.answer() {
            Ok(None) => true,
            Ok(Some(status)) => {
                note(vm.index, Ok(status));
                false
            }
            Err(error) => {
                note(vm.index, Err(error));
                false
            }
        });
    }
    for (index, answer) in full {
        // The thread does not panic.
        let answer = answer.join();
        note(
            index,
            answer.unwrap_or_else(|_| Err(io::ErrorKind::Other.into())),
        );
    }
    views
}

/// Sends a query to a VM, if its backlog has space.
fn query(index: usize, record: &Record) -> io::Result<PendingQuery> {
    send(index, connect_now(&record.control_socket())?)
}

/// Waits for space in the backlog of a VM, and for its answer.
fn query_until(record: &Record, deadline: Option<Instant>) -> io::Result<Status> {
    let socket = record.control_socket();
    let stream = match deadline {
        Some(deadline) => connect_until(&socket, deadline)?,
        None => UnixStream::connect(&socket)?,
    };
    stream.set_nonblocking(true)?;
    let mut vm = send(0, stream)?;
    loop {
        if !wait(std::slice::from_ref(&vm), deadline) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if let Some(status) = vm.answer()? {
            return Ok(status);
        }
    }
}

fn send(index: usize, mut stream: UnixStream) -> io::Result<PendingQuery> {
    let mut bytes = Vec::new();
    let call = serde_json::to_vec(&ControlCall::Status)?;
    frame::encode(FrameType::Request, &call, &mut bytes).map_err(io::Error::other)?;
    // The socket buffer of a new connection has space for it.
    stream.write_all(&bytes)?;
    Ok(PendingQuery {
        index,
        stream,
        decoder: FrameDecoder::with_limits(|_| MAX_ANSWER),
    })
}

/// Waits until a connection is readable; returns false at the deadline.
fn wait(queries: &[PendingQuery], deadline: Option<Instant>) -> bool {
    if queries.is_empty() {
        return true;
    }
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let Ok(left) = left.map(Timespec::try_from).transpose() else {
        return false;
    };
    let fds = queries
        .iter()
        .map(|vm| PollFd::new(&vm.stream, PollFlags::IN));
    let mut fds: Vec<_> = fds.collect();
    match poll(&mut fds, left.as_ref()) {
        Ok(ready) => ready > 0,
        // After an interruption nothing is ready, and the caller checks the deadline
        // again.
        Err(_) => true,
    }
}

impl PendingQuery {
    /// Reads available bytes; `None` while the answer is incomplete.
    fn answer(&mut self) -> io::Result<Option<Status>> {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => self.decoder.push(buffer.get(..count).unwrap_or_default()),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        let Some(frame) = self.decoder.next_frame().map_err(io::Error::other)? else {
            return Ok(None);
        };
        match serde_json::from_slice(frame.payload)? {
            ControlAnswer::Status(status) => Ok(Some(status)),
            ControlAnswer::Error(text) => Err(io::Error::other(text)),
            other => Err(io::Error::other(format!("it answered {other:?}"))),
        }
    }
}
