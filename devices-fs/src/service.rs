//! The file system thread: takes requests from the queues, serves them, returns them.
//!
//! System calls on shared directories may wait for a disk or a network, so none is made on
//! the event loop. The thread owns the queues and the server while it runs; the device gets
//! them back when it ends, which is how a pause waits for requests in execution.

use std::sync::Arc;
use std::thread::JoinHandle;

use sm_fs_server::{Served, Server, own_umask};
use sm_virtio::GuestMemory;
use sm_virtio::Interrupt;
use sm_virtio::queue::{DescriptorChain, Queue, QueueError};

use crate::buffers::ChainBuffers;
use crate::worker::{FinishedRequest, LongRequest, Shared, Workers};

/// Requests after which the driver is notified, although there are more.
const BATCH: u32 = 16;
/// Size of the thread's stack in bytes.
const STACK: usize = 256 << 10;

/// The parts of an active device that its thread uses.
pub(crate) struct Service {
    pub(crate) memory: GuestMemory,
    pub(crate) interrupt: Arc<dyn Interrupt>,
    pub(crate) queues: Vec<Queue>,
    pub(crate) server: Server,
    /// A ring is malformed: no further chain is taken.
    pub(crate) failed: bool,
}

/// A running file system thread.
pub(crate) struct Running {
    shared: Arc<Shared>,
    thread: JoinHandle<Service>,
}

impl Running {
    /// Has the thread look at the queues.
    pub(crate) fn notify(&self) {
        self.shared.send(|messages| messages.notified = true);
    }

    /// Ends the thread, after all requests that it has taken, and those that the driver has
    /// offered unless `abandon` is set. None if it has panicked.
    pub(crate) fn stop(self, abandon: bool) -> Option<Service> {
        self.shared.send(|messages| {
            messages.stop = true;
            if abandon {
                messages.abandon();
            }
        });
        self.thread.join().ok()
    }
}

impl Service {
    /// Returns true if the driver has offered requests.
    pub(crate) fn has_requests(&self) -> bool {
        let mut queues = self.queues.iter();
        // An error is reported when the queue is served.
        !self.failed && queues.any(|queue| queue.pending(&self.memory) != Ok(0))
    }

    /// Starts a thread that serves the queues.
    ///
    /// # Errors
    /// No thread could be started. The service is lost, and the driver has to reset the
    /// device.
    pub(crate) fn start(self) -> std::io::Result<Running> {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("fs".to_owned())
            .stack_size(STACK)
            .spawn(move || self.run(&own))?;
        Ok(Running { shared, thread })
    }

    fn run(mut self, shared: &Arc<Shared>) -> Self {
        if let Err(error) = own_umask() {
            tracing::warn!(%error, "modes of shared files are reduced by this process's mask");
        }
        let mut workers = Workers::new(Arc::clone(shared));
        let mut chain = DescriptorChain::new();
        loop {
            if !self.failed
                && let Err(error) = self.serve(shared, &mut workers, &mut chain)
            {
                // Out of service until the driver resets it.
                self.failed = true;
                self.interrupt.needs_reset(&error.to_string());
            }
            let mut messages = shared.lock();
            loop {
                if messages.notified || !messages.done.is_empty() {
                    messages.notified = false;
                    break;
                }
                if messages.stop && messages.is_idle() {
                    drop(messages);
                    // Their threads are idle.
                    drop(workers);
                    return self;
                }
                messages = shared.wait(messages);
            }
        }
    }

    /// Serves requests until none is left.
    fn serve(
        &mut self,
        shared: &Shared,
        workers: &mut Workers,
        chain: &mut DescriptorChain,
    ) -> Result<(), QueueError> {
        for index in 0..self.queues.len() {
            self.finish(shared)?;
            let mut batch = 0;
            while let Some(queue) = self.queues.get_mut(index)
                && queue.pop(&self.memory, chain)?
            {
                if let Some(len) = self.serve_one(index, workers, chain) {
                    self.push(index, chain.head(), len)?;
                }
                batch += 1;
                if batch == BATCH {
                    batch = 0;
                    self.finish(shared)?;
                    self.publish()?;
                }
            }
        }
        self.finish(shared)?;
        self.publish()
    }

    /// Serves a request; returns the length of the reply, if it is not that of a worker.
    fn serve_one(
        &mut self,
        queue: usize,
        workers: &mut Workers,
        chain: &mut DescriptorChain,
    ) -> Option<usize> {
        let mut buffers = ChainBuffers {
            memory: &self.memory,
            chain,
        };
        match self.server.serve(&mut buffers) {
            Served::Reply(len) => Some(len),
            Served::NoReply => Some(0),
            Served::Job(job) if !job.is_long() => Some(job.run(&mut buffers)),
            Served::Job(job) => {
                let request = LongRequest {
                    queue,
                    chain: std::mem::take(chain),
                    job,
                };
                workers.submit(&self.memory, request);
                None
            }
        }
    }

    /// Returns the requests that workers have performed.
    fn finish(&mut self, shared: &Shared) -> Result<(), QueueError> {
        let done = std::mem::take(&mut shared.lock().done);
        for FinishedRequest { queue, chain, len } in done {
            self.push(queue, chain.head(), len)?;
        }
        Ok(())
    }

    fn push(&mut self, queue: usize, head: u16, len: usize) -> Result<(), QueueError> {
        // A reply fits into its chain, which has less than 4 GiB.
        let len = u32::try_from(len).unwrap_or(0);
        match self.queues.get_mut(queue) {
            Some(queue) => queue.push_used(&self.memory, head, len),
            None => Ok(()),
        }
    }

    fn publish(&mut self) -> Result<(), QueueError> {
        let mut interrupt = false;
        for queue in self.queues.iter_mut().filter(|queue| queue.ready) {
            interrupt |= queue.publish(&self.memory)?;
        }
        if interrupt {
            self.interrupt.used_buffers();
        }
        Ok(())
    }
}
