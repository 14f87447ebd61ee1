//! The status pipe of a new process, and its format.
//!
//! The process writes its own PID in the workload's namespace (`u32` LE), then nothing if
//! the program runs (exec closes the pipe), or a status byte and a sentence. Root in the
//! workload can open the pipe through `/proc` and write to it or hold it open, so the
//! agent reads no more than a report can have, and does not wait for the pipe's end after
//! the exit.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::reactor::{Interest, Reactor, Token, Watched};

/// Maximum length of a status byte with its sentence. A longer sentence is truncated, so
/// that one write, which is atomic below PIPE_BUF, passes it.
pub(super) const MAX_FAILURE: usize = 4000;

/// Maximum length of a report.
const MAX_REPORT: usize = size_of::<u32>() + MAX_FAILURE;

/// The agent's end of the pipe.
#[derive(Debug)]
pub(super) struct Status {
    fd: Watched,
    report: Vec<u8>,
}

/// The result of starting a program.
#[derive(Debug)]
pub(super) struct Report {
    /// The process's PID in the workload's namespace; 0 if it did not write one.
    pub(super) pid: u32,
    /// An exit status and the reason, unless the program runs.
    pub(super) failure: Option<(u8, String)>,
}

impl Status {
    /// Wraps the read end, which does not block.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self {
            fd: Watched::new(fd),
            report: Vec::new(),
        }
    }

    /// Reads available bytes. Returns the report at the end of the pipe, or once it has
    /// its maximum length.
    pub(super) fn read(&mut self) -> Option<Report> {
        let mut chunk = [0; 512];
        while self.report.len() < MAX_REPORT {
            match rustix::io::read(&self.fd, &mut chunk) {
                Ok(0) => break,
                Ok(count) => self.report.extend_from_slice(&chunk[..count]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return None,
                Err(_) => break,
            }
        }
        Some(self.parse())
    }

    /// Returns the report of a process that has exited: the bytes that have arrived, also
    /// if others hold the pipe open.
    pub(super) fn finish(mut self) -> Report {
        let report = self.read();
        report.unwrap_or_else(|| self.parse())
    }

    fn parse(&self) -> Report {
        let report = self.report.get(..MAX_REPORT).unwrap_or(&self.report);
        let (pid, failure) = report.split_first_chunk().unwrap_or((&[0; 4], &[]));
        let failure = failure.split_first().map(|(status, sentence)| {
            let sentence = String::from_utf8_lossy(sentence);
            (*status, sentence.into_owned())
        });
        Report {
            pid: u32::from_le_bytes(*pid),
            failure,
        }
    }

    /// Watches for a part of the report, and for the end of the pipe.
    pub(super) fn watch(&mut self, reactor: &Reactor, token: Token) -> io::Result<()> {
        self.fd.set(reactor, token, Interest::READ)
    }
}
