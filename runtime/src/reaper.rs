//! Child processes that outlive their handles.
//!
//! A VM outlives its handle, and its process must still be reaped, or a long-lived caller
//! would collect zombies. One thread waits for all of them, and exits when none is left.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A child process, which is reaped even after this value was dropped.
#[derive(Debug)]
pub(crate) struct Process(Option<Child>);

impl Process {
    pub(crate) fn new(child: Child) -> Self {
        Self(Some(child))
    }

    /// Waits for its exit.
    pub(crate) fn wait(&mut self) -> io::Result<ExitStatus> {
        match &mut self.0 {
            Some(child) => child.wait(),
            // Only `drop` takes the child.
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Waits for its exit until `deadline`, and kills it then.
    pub(crate) fn wait_until(&mut self, deadline: Instant) -> Option<ExitStatus> {
        let child = self.0.as_ref()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let ends = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok()?;
        let ended = ends.is_some_and(|ends| {
            let mut fds = [PollFd::new(&ends, PollFlags::IN)];
            rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timeout))).is_ok_and(|n| n > 0)
        });
        if !ended {
            self.kill();
            return None;
        }
        self.wait().ok()
    }

    /// Kills it, and waits for its exit.
    pub(crate) fn kill(&mut self) {
        if let Some(child) = &mut self.0 {
            // An error means that the process has already exited.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take()
            && matches!(child.try_wait(), Ok(None))
        {
            reap(child);
        }
    }
}

/// State shared with the reaping thread.
struct Reaper {
    incoming: Vec<Child>,
    /// Wakes the thread; `None` while it does not run.
    wake: Option<Arc<OwnedFd>>,
}

static REAPER: Mutex<Reaper> = Mutex::new(Reaper {
    incoming: Vec::new(),
    wake: None,
});

fn reaper() -> MutexGuard<'static, Reaper> {
    // No code panics while it holds this lock.
    REAPER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes `child` to the reaping thread.
fn reap(child: Child) {
    let mut reaper = reaper();
    reaper.incoming.push(child);
    let woken = match &reaper.wake {
        Some(wake) => rustix::io::write(wake, &1_u64.to_ne_bytes())
            .map(drop)
            .map_err(io::Error::from),
        None => start().map(|wake| reaper.wake = Some(wake)),
    };
    if let Err(error) = woken {
        // The next call starts a thread for both children.
        tracing::warn!(%error, "cannot start the thread that reaps VMM processes");
    }
}

fn start() -> io::Result<Arc<OwnedFd>> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    let wake = Arc::new(eventfd(0, flags)?);
    let woken = Arc::clone(&wake);
    std::thread::Builder::new()
        .name("sm-reaper".to_owned())
        .stack_size(128 * 1024)
        .spawn(move || wait_for_all(&woken))?;
    Ok(wake)
}

fn wait_for_all(woken: &OwnedFd) {
    let mut waiting: Vec<(Child, Option<OwnedFd>)> = Vec::new();
    loop {
        let mut reaper = reaper();
        waiting.extend(reaper.incoming.drain(..).map(|child| {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            // Without a pidfd (EMFILE), the child is checked whenever another one exits.
            let ends = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
            (child, ends)
        }));
        waiting.retain_mut(|(child, _)| matches!(child.try_wait(), Ok(None)));
        if waiting.is_empty() {
            reaper.wake = None;
            return;
        }
        drop(reaper);
        let mut fds = vec![PollFd::new(woken, PollFlags::IN)];
        let ends = waiting.iter().filter_map(|(_, ends)| ends.as_ref());
        fds.extend(ends.map(|ends| PollFd::new(ends, PollFlags::IN)));
        let _ = poll(&mut fds, None);
        let mut count = [0; 8];
        let _ = rustix::io::read(woken, &mut count);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn is_there(pid: u32) -> bool {
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::test_kill_process(pid).is_ok()
    }

    fn reapers() -> usize {
        let threads = std::fs::read_dir("/proc/self/task").unwrap();
        let names = threads.map(|task| std::fs::read(task.unwrap().path().join("comm")));
        names
            .filter(|name| name.as_ref().is_ok_and(|name| name == b"sm-reaper\n"))
            .count()
    }

    #[test]
    fn one_thread_waits_for_all_that_are_dropped() {
        let mut inputs = Vec::new();
        let mut pids = Vec::new();
        for _ in 0..20 {
            let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
            inputs.push(child.stdin.take().unwrap());
            pids.push(child.id());
            drop(Process::new(child));
        }
        assert!(pids.iter().all(|pid| is_there(*pid)));
        assert!(reapers() <= 1, "{} threads", reapers());
        // The processes exit, and none stays a zombie.
        drop(inputs);
        while pids.iter().any(|pid| is_there(*pid)) {
            std::thread::yield_now();
        }
    }
}
