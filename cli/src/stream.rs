//! Moves bytes between a session and this process's standard streams.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::os::fd::AsFd as _;

use anyhow::Context as _;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;
use sm_runtime::record::ExitRecord;
use sm_runtime::session::{Event, Session, SessionWriter};
use sm_runtime::timings::Phase;

use crate::terminal::{self, RawMode};

/// Ctrl-P Ctrl-Q detaches.
const DETACH: [u8; 2] = [0x10, 0x11];
/// So many interrupts end `sm` whatever the command does with them.
const FORCE_QUIT: u32 = 3;
const SIGPIPE: u8 = 13;

/// What of the caller's streams is connected.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wiring {
    pub(crate) stdin: bool,
    pub(crate) tty: bool,
}

/// How a session ended for the caller.
#[derive(Debug)]
pub(crate) enum End {
    /// The command ended.
    Exited {
        status: u32,
        /// How the VM ended, for a workload's session.
        vm: Option<ExitRecord>,
    },
    /// The caller detached; the command goes on.
    Detached,
    /// The VM went away under the command.
    Lost,
}

/// The command, apart from its streams.
pub(crate) trait Remote: Clone + Send + 'static {
    /// Passes a signal on.
    fn signal(&self, signal: u8);
    /// Ends it: what it writes is of no use to anybody any more.
    fn abandon(&self);
}

/// Runs a session with `remote` to its end. Phases that arrive are added to
/// `phases`.
pub(crate) fn run(
    mut session: Session,
    wiring: Wiring,
    remote: &impl Remote,
    phases: &mut Vec<Phase>,
) -> anyhow::Result<End> {
    let raw = (wiring.tty && wiring.stdin && io::stdin().is_terminal())
        .then(RawMode::enter)
        .transpose()
        .context("cannot put the terminal into raw mode")?;
    let writer = session.writer();
    watch_signals(&writer, raw.clone(), wiring, remote.clone())?;
    let (detached, detach) = io::pipe().context("cannot create a pipe")?;
    let detaches = raw.is_some();
    if wiring.stdin {
        let writer = writer.clone();
        std::thread::Builder::new()
            .name("stdin".to_owned())
            .spawn(move || {
                if send_stdin(&writer, detaches) {
                    // Dropped after the message, so that the end is seen.
                    let _ = (&detach).write_all(b"d");
                    writer.hang_up();
                }
                // The other end must not see an end of file before that.
                std::mem::forget(detach);
            })
            .context("cannot start a thread")?;
    }
    let result = receive(&mut session, remote, phases);
    if let Some(raw) = raw {
        raw.restore();
    }
    match result {
        // Hanging up ends the session like a loss does; the pipe tells which.
        Ok(End::Lost) | Err(_) if detaches && is_readable(&detached) => Ok(End::Detached),
        other => other,
    }
}

fn is_readable(pipe: &io::PipeReader) -> bool {
    let mut fds = [rustix::event::PollFd::new(
        pipe,
        rustix::event::PollFlags::IN,
    )];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Output to our standard streams until the command ends.
fn receive(
    session: &mut Session,
    remote: &impl Remote,
    phases: &mut Vec<Phase>,
) -> anyhow::Result<End> {
    let mut stdout = Sink::new(io::stdout().as_fd().try_clone_to_owned()?.into());
    let mut stderr = Sink::new(io::stderr().as_fd().try_clone_to_owned()?.into());
    let mut status = None;
    while let Some(event) = session
        .next_event()
        .context("lost the connection to the VM")?
    {
        match event {
            Event::Stdout(bytes) => stdout.write(bytes, remote),
            Event::Stderr(bytes) => stderr.write(bytes, remote),
            Event::Error(text) => {
                let _ = writeln!(io::stderr(), "sm: {text}");
            }
            Event::Started { .. } | Event::Evidence(_) | Event::Warning(_) => {}
            Event::Phase(phase) => phases.push(phase),
            Event::Exit(code) => status = Some(code),
            Event::Ended(exit) => {
                return Ok(End::Exited {
                    status: exit.status,
                    vm: Some(exit),
                });
            }
        }
    }
    Ok(match status {
        Some(status) => End::Exited { status, vm: None },
        None => End::Lost,
    })
}

/// An output stream whose reader may go away before the command does.
struct Sink {
    file: File,
    broken: bool,
}

impl Sink {
    fn new(file: File) -> Self {
        Self {
            file,
            broken: false,
        }
    }

    /// Unbuffered: what the command wrote is seen at once. When its reader has
    /// gone away, the command gets the signal that the kernel would send; since
    /// the first process of a PID namespace ignores it, it is ended besides.
    fn write(&mut self, bytes: &[u8], remote: &impl Remote) {
        if !self.broken && self.file.write_all(bytes).is_err() {
            self.broken = true;
            remote.signal(SIGPIPE);
            remote.abandon();
        }
    }
}

/// Sends standard input until it ends; `true` if the detach keys were pressed.
fn send_stdin(writer: &SessionWriter, detaches: bool) -> bool {
    let mut keys = DetachKeys::default();
    let mut buffer = vec![0; 64 * 1024];
    let mut stdin = io::stdin().lock();
    loop {
        let count = match stdin.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
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
            // The command is gone; its end arrives on the other side.
            return false;
        }
    }
    let _ = writer.close_stdin();
    false
}

/// Recognises the detach keys, also across reads.
#[derive(Debug, Default)]
struct DetachKeys {
    first_seen: bool,
}

impl DetachKeys {
    /// The bytes to pass on, and whether to detach.
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

/// Passes signals and terminal sizes on, on a thread of its own.
fn watch_signals(
    writer: &SessionWriter,
    raw: Option<RawMode>,
    wiring: Wiring,
    remote: impl Remote,
) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH])
        .context("cannot watch for signals")?;
    let writer = writer.clone();
    if wiring.tty {
        // It may have changed since the start was asked for.
        if let Some((columns, rows)) = terminal::size() {
            let _ = writer.resize(columns, rows);
        }
    }
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let mut interrupts = 0;
            for signal in signals.forever() {
                if signal == SIGWINCH {
                    if let Some((columns, rows)) = terminal::size().filter(|_| wiring.tty) {
                        let _ = writer.resize(columns, rows);
                    }
                    continue;
                }
                let number = u8::try_from(signal).unwrap_or_default();
                interrupts += u32::from(matches!(signal, SIGINT | SIGTERM));
                // On a raw terminal keys reach the command as bytes; a signal
                // is meant for this process, which then merely detaches.
                if raw.is_some() || interrupts >= FORCE_QUIT {
                    if let Some(raw) = &raw {
                        raw.restore();
                    }
                    std::process::exit(128 + signal);
                }
                remote.signal(number);
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
