//! Threads for the requests that would block the event loop: reads of uncached data,
//! writes, flushes.
//!
//! Threads are started on demand, up to [`MAX_THREADS`], so a machine that only reads
//! cached data has none. They report finished requests through an eventfd; only the event
//! loop accesses rings.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::request::{Operation, Outcome};
use crate::virtio::disk::Disk;
use sm_event_loop::{new_eventfd, signal};
use sm_virtio::GuestMemory;
use sm_virtio::queue::DescriptorChain;

/// Maximum number of threads, and so of concurrent requests of one disk.
const MAX_THREADS: usize = 4;

/// A request to execute.
pub(super) struct Job {
    pub(super) chain: DescriptorChain,
    pub(super) operation: Operation,
    pub(super) disk: Arc<Disk>,
}

/// An executed request.
pub(super) struct FinishedRequest {
    pub(super) job: Job,
    pub(super) outcome: Outcome,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    done: Vec<FinishedRequest>,
    /// Number of threads that execute a request.
    busy: usize,
    stop: bool,
}

struct Shared {
    memory: GuestMemory,
    state: Mutex<State>,
    /// Notified when there is a job, or at the end.
    work: Condvar,
    /// Notified when no request is left.
    idle: Condvar,
    finished: Arc<OwnedFd>,
}

/// The threads of one disk. Dropping it waits for the requests in execution.
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(super) fn new(memory: GuestMemory) -> io::Result<Self> {
        Ok(Self {
            shared: Arc::new(Shared {
                memory,
                state: Mutex::new(State::default()),
                work: Condvar::new(),
                idle: Condvar::new(),
                finished: Arc::new(new_eventfd()?),
            }),
            threads: Vec::new(),
        })
    }

    /// Returns the eventfd, which is readable when a request has finished.
    pub(super) fn finished(&self) -> &Arc<OwnedFd> {
        &self.shared.finished
    }

    /// Adds a request.
    pub(super) fn submit(&mut self, job: Job) {
        let mut state = self.shared.lock();
        state.jobs.push_back(job);
        let short = state.busy + state.jobs.len() > self.threads.len();
        drop(state);
        self.shared.work.notify_one();
        if short && self.threads.len() < MAX_THREADS {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new()
                .name("blk".to_owned())
                .stack_size(128 << 10)
                .spawn(move || shared.run());
            match thread {
                Ok(thread) => self.threads.push(thread),
                Err(error) => tracing::warn!(%error, "no further thread for block requests"),
            }
        }
        if self.threads.is_empty() {
            // Without threads, execute it here.
            let state = self.shared.lock();
            drop(self.shared.work_off(state));
        }
    }

    /// Swaps `done`, which must be empty, with the list of finished requests.
    pub(super) fn take_finished(&self, done: &mut Vec<FinishedRequest>) {
        std::mem::swap(&mut self.shared.lock().done, done);
    }

    /// Waits until all requests have finished.
    pub(super) fn drain(&self) {
        let mut state = self.shared.lock();
        while state.busy > 0 || !state.jobs.is_empty() {
            state = wait(&self.shared.idle, state);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stop = true;
        state.jobs.clear();
        drop(state);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // The panic hook has reported a panic of the thread.
            let _ = thread.join();
        }
    }
}

fn wait<'a>(condition: &Condvar, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    condition
        .wait(guard)
        .unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics with the lock held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        while !state.stop {
            state = self.work_off(state);
            if !state.stop && state.jobs.is_empty() {
                state = wait(&self.work, state);
            }
        }
    }

    /// Executes requests until none is left.
    fn work_off<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while let Some(job) = state.jobs.pop_front() {
            state.busy += 1;
            drop(state);
            let outcome = job.operation.execute(&self.memory, &job.disk, &job.chain);
            state = self.lock();
            state.busy -= 1;
            state.done.push(FinishedRequest { job, outcome });
            // One signal for all requests that are taken together.
            if state.done.len() == 1 {
                signal(self.finished.as_fd());
            }
            if state.busy == 0 && state.jobs.is_empty() {
                self.idle.notify_all();
            }
        }
        state
    }
}
