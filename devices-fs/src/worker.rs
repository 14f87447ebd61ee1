//! The state that the threads of a device share, and the threads for long requests.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use sm_fs_server::Job;
use sm_virtio::GuestMemory;
use sm_virtio::queue::DescriptorChain;

use crate::buffers::ChainBuffers;

/// Maximum number of threads for long requests.
const MAX_WORKERS: usize = 4;
/// Size of their stacks in bytes.
const STACK: usize = 128 << 10;

/// A request to perform.
pub(crate) struct LongRequest {
    pub(crate) queue: usize,
    pub(crate) chain: DescriptorChain,
    pub(crate) job: Job,
}

/// A request that was performed, and the length of its reply in bytes.
pub(crate) struct FinishedRequest {
    pub(crate) queue: usize,
    pub(crate) chain: DescriptorChain,
    pub(crate) len: usize,
}

/// Messages between the device, its file system thread and the workers.
#[derive(Default)]
pub(crate) struct Messages {
    /// The driver has notified a queue.
    pub(crate) notified: bool,
    /// The file system thread ends when no request is in execution.
    pub(crate) stop: bool,
    pub(crate) done: Vec<FinishedRequest>,
    jobs: VecDeque<LongRequest>,
    /// Number of workers that perform a request.
    busy: usize,
    /// The workers end.
    end: bool,
}

impl Messages {
    /// Returns true if no long request is left.
    pub(crate) fn is_idle(&self) -> bool {
        self.busy == 0 && self.jobs.is_empty() && self.done.is_empty()
    }

    /// Drops the requests whose execution has not begun.
    pub(crate) fn abandon(&mut self) {
        self.notified = false;
        self.jobs.clear();
    }
}

/// The messages, and the conditions for which threads wait.
#[derive(Default)]
pub(crate) struct Shared {
    messages: Mutex<Messages>,
    /// The file system thread has something to do.
    changed: Condvar,
    /// A worker has something to do.
    work: Condvar,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Messages> {
        // Nothing panics with the lock held.
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a message to the file system thread.
    pub(crate) fn wait<'a>(&self, messages: MutexGuard<'a, Messages>) -> MutexGuard<'a, Messages> {
        self.changed
            .wait(messages)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the messages, and wakes the file system thread.
    pub(crate) fn send(&self, change: impl FnOnce(&mut Messages)) {
        change(&mut self.lock());
        self.changed.notify_one();
    }

    fn work(&self, memory: &GuestMemory) {
        let mut messages = self.lock();
        while !messages.end {
            let Some(request) = messages.jobs.pop_front() else {
                messages = self
                    .work
                    .wait(messages)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            messages.busy += 1;
            drop(messages);
            let finished = perform(memory, request);
            messages = self.lock();
            messages.busy -= 1;
            messages.done.push(finished);
            self.changed.notify_one();
        }
    }
}

fn perform(memory: &GuestMemory, request: LongRequest) -> FinishedRequest {
    let LongRequest { queue, chain, job } = request;
    let mut buffers = ChainBuffers {
        memory,
        chain: &chain,
    };
    let len = job.run(&mut buffers);
    FinishedRequest { queue, chain, len }
}

/// The threads for long requests, which start when they are needed. Dropping it waits for
/// the requests in execution.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            threads: Vec::new(),
        }
    }

    /// Has a worker perform a request, or performs it here if there is none.
    pub(crate) fn submit(&mut self, memory: &GuestMemory, request: LongRequest) {
        let mut messages = self.shared.lock();
        let needed = messages.busy + messages.jobs.len() + 1;
        drop(messages);
        if needed > self.threads.len() && self.threads.len() < MAX_WORKERS {
            let (shared, memory) = (Arc::clone(&self.shared), memory.clone());
            let thread = std::thread::Builder::new()
                .name("fs-worker".to_owned())
                .stack_size(STACK)
                .spawn(move || shared.work(&memory));
            match thread {
                Ok(thread) => self.threads.push(thread),
                Err(error) => tracing::warn!(%error, "no further thread for shared files"),
            }
        }
        if self.threads.is_empty() {
            let finished = perform(memory, request);
            self.shared.lock().done.push(finished);
            return;
        }
        messages = self.shared.lock();
        messages.jobs.push_back(request);
        drop(messages);
        self.shared.work.notify_one();
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let mut messages = self.shared.lock();
        messages.end = true;
        messages.jobs.clear();
        drop(messages);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // The panic hook has reported a panic of the thread.
            let _ = thread.join();
        }
    }
}
