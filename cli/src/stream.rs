//! Moves bytes between a session and this process's standard streams.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::os::fd::AsFd;
use std::sync::mpsc;

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;
use sm_runtime::ExitRecord;
use sm_runtime::session::{Event, Session, SessionWriter};
use sm_runtime::timings::Phase;

use crate::shown::Shown;
use crate::terminal::{self, RawMode};

/// The detach keys, Ctrl-P Ctrl-Q.
const DETACH: [u8; 2] = [0x10, 0x11];
/// Number of interrupts that end `sm`, even if the command ignores them.
const FORCE_QUIT: u32 = 3;
const SIGPIPE: u8 = 13;

/// The connected streams of the caller.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wiring {
    pub(crate) stdin: bool,
    pub(crate) tty: bool,
}

/// The end of a session, for the caller.
#[derive(Debug)]
pub(crate) enum End {
    /// The command ended.
    Exited {
        status: u32,
        /// The exit record of the VM, for a workload's session.
        vm: Option<ExitRecord>,
    },
    /// The caller detached; the command continues.
    Detached,
    /// The VM ended while the command ran.
    Lost,
}

/// Control of the command, independent of its streams.
pub(crate) trait Remote: Clone + Send + 'static {
    /// Forwards a signal.
    fn signal(&self, signal: u8);
    /// Ends the command, because its output has no reader.
    fn abandon(&self);
}

/// Runs a session with `remote` to its end. Appends received phases to `phases`.
///
/// Nothing that ends the session waits behind data: the main thread waits for the end of
/// the output or the detach keys, while other threads move bytes, and forward and count
/// signals.
pub(crate) fn run(
    session: Session,
    wiring: Wiring,
    remote: &impl Remote,
    phases: &mut Vec<Phase>,
) -> anyhow::Result<End> {
    // Signals are caught before the terminal becomes raw: otherwise one could end this
    // process and leave the terminal raw.
    // Ignored signals, as with nohup and some shells, stay ignored.
    let ignored = ignored_signals();
    let all = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH];
    let heeded = all.into_iter().filter(|signal| !ignored.contains(signal));
    let signals = Signals::new(heeded).context("cannot watch for signals")?;
    let raw = (wiring.tty && wiring.stdin && io::stdin().is_terminal())
        .then(RawMode::enter)
        .transpose()
        .context("cannot put the terminal into raw mode")?;
    let writer = session.writer();
    let resizes = wiring.tty.then(|| resizer(writer.clone())).transpose()?;
    watch_signals(signals, raw.clone(), resizes, remote.clone())?;
    let (outcome, outcomes) = mpsc::channel();
    if wiring.stdin {
        let (detaches, outcome) = (raw.is_some(), outcome.clone());
        let writer = writer.clone();
        spawn("stdin", move || {
            if send_stdin(&writer, detaches) {
                let _ = outcome.send((Ok(End::Detached), Vec::new()));
            }
        })?;
    }
    let receiver = remote.clone();
    spawn("output", move || {
        let mut session = session;
        let mut phases = Vec::new();
        let end = receive(&mut session, &receiver, &mut phases);
        let _ = outcome.send((end, phases));
    })?;
    let (end, seen) = outcomes.recv().context("the session's threads are gone")?;
    if matches!(end, Ok(End::Detached)) {
        writer.hang_up();
    }
    if let Some(raw) = raw {
        raw.restore();
    }
    phases.extend(seen);
    end
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map(drop)
        .context("cannot start a thread")
}

/// Writes output to the standard streams until the command ends.
fn receive(
    session: &mut Session,
    remote: &impl Remote,
    phases: &mut Vec<Phase>,
) -> anyhow::Result<End> {
    let mut stdout = OutputSink::new(io::stdout().as_fd().try_clone_to_owned()?.into());
    let mut stderr = OutputSink::new(io::stderr().as_fd().try_clone_to_owned()?.into());
    let mut status = None;
    while let Some(event) = session
        .next_event()
        .context("lost the connection to the VM")?
    {
        match event {
            Event::Stdout(bytes) => stdout.write(bytes, remote),
            Event::Stderr(bytes) => stderr.write(bytes, remote),
            Event::Error(text) => {
                let _ = writeln!(io::stderr(), "sm: {}", Shown(text));
            }
            Event::Warning(text) => {
                let _ = writeln!(io::stderr(), "sm: {}", Shown(text));
            }
            Event::Phase(phase) => phases.push(phase),
            Event::Exit(code) => status = Some(code),
            Event::Ended(exit) => {
                return Ok(End::Exited {
                    status: exit.status,
                    vm: Some(exit),
                });
            }
            // Nothing to show.
            _ => {}
        }
    }
    Ok(match status {
        Some(status) => End::Exited { status, vm: None },
        None => End::Lost,
    })
}

/// An output stream whose reader may be gone before the command ends.
struct OutputSink {
    file: File,
    broken: bool,
}

impl OutputSink {
    fn new(file: File) -> Self {
        Self {
            file,
            broken: false,
        }
    }

    /// Writes without a buffer, so that output appears at once. If the reader is gone,
    /// the command receives SIGPIPE as from the kernel; since the first process of a PID
    /// namespace ignores it, the command is ended as well.
    fn write(&mut self, bytes: &[u8], remote: &impl Remote) {
        if self.broken {
            return;
        }
        if let Err(error) = write_all(&mut self.file, bytes) {
            self.broken = true;
            if error.kind() != io::ErrorKind::BrokenPipe {
                let _ = writeln!(io::stderr(), "sm: cannot write the output: {error}");
            }
            remote.signal(SIGPIPE);
            remote.abandon();
        }
    }
}

/// Writes all of `bytes`, also to a non-blocking file (the flag belongs to the open file
/// description, which other processes share).
fn write_all(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait_for(&*file, PollFlags::OUT)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait_for(file: impl AsFd, flags: PollFlags) -> io::Result<()> {
    rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&file, flags)], None))?;
    Ok(())
}

/// Returns the signals that this process ignores (proc_pid_status(5), `SigIgn`).
fn ignored_signals() -> Vec<i32> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    (1..=64)
        .filter(|number| mask >> (number - 1) & 1 == 1)
        .collect()
}

/// Sends standard input until it ends; returns true if the detach keys were pressed.
fn send_stdin(writer: &SessionWriter, detaches: bool) -> bool {
    let mut keys = DetachKeys::default();
    let mut buffer = vec![0; 64 * 1024];
    let mut stdin = io::stdin().lock();
    loop {
        let count = match stdin.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                match wait_for(io::stdin(), PollFlags::IN) {
                    Ok(()) => continue,
                    Err(_) => break,
                }
            }
            Err(_) => break,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        let sent = if detaches {
            let (bytes, detach) = keys.filter(bytes);
            if detach {
                return true;
            }
            writer.write_stdin(&bytes)
        } else {
            writer.write_stdin(bytes)
        };
        if sent.is_err() {
            // The command has ended; its exit status arrives in the other direction.
            return false;
        }
    }
    let _ = writer.close_stdin();
    false
}

/// Recognises the detach keys, also when they are split between reads.
#[derive(Debug, Default)]
struct DetachKeys {
    first_seen: bool,
}

impl DetachKeys {
    /// Returns the bytes to forward, and true to detach.
    fn filter(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(bytes.len() + 1);
        for &byte in bytes {
            if std::mem::take(&mut self.first_seen) {
                if byte == DETACH[1] {
                    return (passed, true);
                }
                passed.push(DETACH[0]);
            }
            if byte == DETACH[0] {
                self.first_seen = true;
            } else {
                passed.push(byte);
            }
        }
        (passed, false)
    }
}

/// Sends the terminal's size to the command now, and again at each message. It runs in
/// its own thread, because a size waits behind input that the command has not read.
fn resizer(writer: SessionWriter) -> anyhow::Result<mpsc::Sender<()>> {
    let (changed, changes) = mpsc::channel();
    spawn("sizes", move || {
        // The size may have changed since the start was requested.
        let mut waiting = true;
        while waiting {
            if let Some((columns, rows)) = terminal::size() {
                let _ = writer.resize(columns, rows);
            }
            waiting = changes.recv().is_ok();
            // Only the last of several changes matters.
            while changes.try_recv().is_ok() {}
        }
    })?;
    Ok(changed)
}

/// Counts signals on one thread, and forwards them on another.
fn watch_signals(
    mut signals: Signals,
    raw: Option<RawMode>,
    resizes: Option<mpsc::Sender<()>>,
    remote: impl Remote,
) -> anyhow::Result<()> {
    let (to_remote, passed_on) = mpsc::channel();
    spawn("remote", move || {
        for number in passed_on {
            remote.signal(number);
        }
    })?;
    spawn("signals", move || {
        let mut interrupts = 0;
        for signal in signals.forever() {
            if signal == SIGWINCH {
                if let Some(resizes) = &resizes {
                    let _ = resizes.send(());
                }
                continue;
            }
            let number = u8::try_from(signal).unwrap_or_default();
            interrupts += u32::from(matches!(signal, SIGINT | SIGTERM));
            // On a raw terminal, keys reach the command as bytes; a signal is then for
            // this process, which exits and leaves the command running.
            if raw.is_some() || interrupts >= FORCE_QUIT {
                if let Some(raw) = &raw {
                    raw.restore();
                }
                std::process::exit(128 + signal);
            }
            let _ = to_remote.send(number);
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Programs with an event loop pass non-blocking pipes.
    #[test]
    fn all_bytes_are_written_to_a_nonblocking_file() {
        let (mut reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let mut file = File::from(std::os::fd::OwnedFd::from(writer));
        let sent: Vec<u8> = (0..=250).cycle().take(1_000_000).collect();
        let expected = sent.clone();
        let written = std::thread::spawn(move || write_all(&mut file, &sent));
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        written.join().unwrap().unwrap();
        assert!(received == expected);
    }

    #[test]
    fn detach_keys_are_found_across_reads_and_others_pass() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.filter(b"a\x10"), (b"a".to_vec(), false));
        assert_eq!(keys.filter(b"b"), (b"\x10b".to_vec(), false));
        assert_eq!(keys.filter(b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(keys.filter(b"\x11x"), (Vec::new(), true));
        assert_eq!(keys.filter(b"\x11"), (b"\x11".to_vec(), false));
    }
}
