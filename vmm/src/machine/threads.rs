//! Threads that end by themselves, and before the machine is gone.

use std::thread::JoinHandle;

/// Such threads. One that has ended keeps its stack until it is joined, and a machine can be
/// captured any number of times. Dropping the value waits for all of them.
#[derive(Debug, Default)]
pub(super) struct EndingThreads(Vec<JoinHandle<()>>);

impl EndingThreads {
    /// Adds threads, and joins those that have ended.
    pub(super) fn add(&mut self, threads: impl IntoIterator<Item = JoinHandle<()>>) {
        let ended = self.0.extract_if(.., |thread| thread.is_finished());
        ended.for_each(join);
        self.0.extend(threads);
    }
}

impl Drop for EndingThreads {
    fn drop(&mut self) {
        self.0.drain(..).for_each(join);
    }
}

fn join(thread: JoinHandle<()>) {
    // The thread has logged its result.
    let _ = thread.join();
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn threads_that_have_ended_are_joined() {
        let mut threads = EndingThreads::default();
        let (send, received) = channel();
        threads.add([std::thread::spawn(move || {
            let _ = received.recv();
        })]);
        for _ in 0..100 {
            let thread = std::thread::spawn(|| ());
            while !thread.is_finished() {
                std::thread::yield_now();
            }
            threads.add([thread]);
        }
        assert_eq!(threads.0.len(), 2, "the one that runs, and the last one");
        send.send(()).unwrap();
        drop(threads);
        send.send(()).unwrap_err();
    }
}
