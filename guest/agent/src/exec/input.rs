//! Standard input of a command: data from the client that the command has not read yet.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::reactor::{Interest, Reactor, Token, Watched};
#[cfg(test)]
use crate::sending::shortage;

/// Number of buffered bytes at which the client is no longer read. It is large enough
/// that a RESIZE or SIGNAL behind some typed-ahead input is still received. One frame may
/// exceed it.
const BACKLOG: usize = 256 * 1024;

/// Character that a terminal interprets as end of file (^D).
const END_OF_TRANSMISSION: u8 = 4;

/// Standard input of a command. Without a descriptor all input is discarded.
#[derive(Debug, Default)]
pub(crate) struct Input {
    fd: Option<Watched>,
    pending: Vec<u8>,
    written: usize,
    /// Close the descriptor once `pending` is written.
    closing: bool,
}

impl Input {
    pub(crate) fn new(fd: Option<OwnedFd>) -> Self {
        Self {
            fd: fd.map(Watched::new),
            ..Self::default()
        }
    }

    /// Buffers or writes bytes from the client.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        if self.fd.is_none() || self.closing {
            return;
        }
        let count = match self.pending.is_empty() {
            true => self.write(bytes),
            false => 0,
        };
        if self.fd.is_some() {
            let rest = bytes.get(count..).unwrap_or_default();
            self.pending.extend_from_slice(rest);
        }
    }

    /// Ends the input. A pipe is closed; a terminal, which cannot be closed, receives ^D.
    pub(crate) fn end(&mut self, tty: bool) {
        if tty {
            self.push(&[END_OF_TRANSMISSION]);
        } else {
            self.closing = true;
            self.flush();
        }
    }

    /// Writes as much as the command accepts.
    pub(crate) fn flush(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        let rest = pending.get(self.written..).unwrap_or_default();
        let count = self.write(rest);
        if self.fd.is_some() && count < rest.len() {
            self.written += count;
            self.pending = pending;
            return;
        }
        self.written = 0;
        if self.closing {
            self.close();
        }
    }

    /// Writes bytes until the descriptor would block, or the kernel lacks memory for a
    /// pipe's next page. If the command has closed its input, the bytes are discarded.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut count = 0;
        let mut starved = false;
        while let (Some(fd), Some(rest)) = (&self.fd, bytes.get(count..))
            && !rest.is_empty()
        {
            match write_some(fd, rest) {
                Ok(written) => count += written,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(Errno::NOMEM | Errno::NOBUFS) => {
                    starved = true;
                    break;
                }
                Err(_) => self.close(),
            }
        }
        if let Some(fd) = &mut self.fd {
            fd.set_starved(starved);
        }
        count
    }

    /// Returns true if the client should not be read for now.
    pub(crate) fn is_full(&self) -> bool {
        self.pending.len() >= BACKLOG
    }

    /// Closes the input immediately and discards pending data.
    pub(crate) fn close(&mut self) {
        self.fd = None;
        self.pending = Vec::new();
        self.written = 0;
    }

    /// Watches for writability while there is pending data.
    pub(crate) fn watch(&mut self, reactor: &Reactor, token: Token) -> io::Result<()> {
        let want = match self.pending.is_empty() {
            true => Interest::NONE,
            false => Interest::WRITE,
        };
        match &mut self.fd {
            Some(fd) => fd.set(reactor, token, want),
            None => Ok(()),
        }
    }
}

fn write_some(fd: &Watched, bytes: &[u8]) -> Result<usize, Errno> {
    #[cfg(test)]
    shortage::check()?;
    rustix::io::write(fd, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read as _;

    fn pipe() -> (Input, File) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        (Input::new(Some(writer)), reader.into())
    }

    #[test]
    fn a_shortage_of_memory_loses_no_input() {
        let (mut input, mut reader) = pipe();
        let mut reactor = Reactor::new().unwrap();
        shortage::begin(2);
        input.push(b"first ");
        input.push(b"second");
        input.end(false);
        // It is tried again although the pipe is writable all the time.
        let token = Token::single(crate::reactor::Class::Power, 1);
        while input.fd.is_some() {
            input.watch(&reactor, token).unwrap();
            assert!(!reactor.events().is_empty());
            input.flush();
        }
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "first second");
    }

    #[test]
    fn a_slow_command_gets_everything_and_then_the_end() {
        let (mut input, mut reader) = pipe();
        let mut sent = Vec::new();
        for round in 0u8..20 {
            let bytes = vec![round; 50_000];
            input.push(&bytes);
            sent.extend(bytes);
        }
        assert!(input.is_full());
        input.end(false);
        input.push(b"too late");
        let reader = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            bytes
        });
        while input.fd.is_some() {
            input.flush();
            std::thread::yield_now();
        }
        assert!(reader.join().unwrap() == sent);
        assert!(!input.is_full());
    }

    #[test]
    fn input_for_a_command_that_closed_it_is_discarded() {
        let (mut input, reader) = pipe();
        crate::sys::ignore_signal(libc::SIGPIPE);
        input.push(&[0; 200_000]);
        drop(reader);
        input.flush();
        assert!(input.fd.is_none() && input.pending.is_empty());
        input.push(&[0; 1_000_000]);
        assert!(input.pending.is_empty());
    }
}
