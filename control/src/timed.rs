//! Blocking operations on unix sockets with deadlines.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Shortest socket timeout; a timeout of zero would mean no timeout.
const SHORTEST: Duration = Duration::from_millis(1);

/// Connects to the socket at `path`, waiting for room in its backlog until `deadline`.
///
/// # Errors
/// Nothing listens there (`NotFound`, `ConnectionRefused`), or there was no room
/// (`TimedOut`).
pub fn connect_until(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        // The send timeout also applies to connect(2), see unix(7).
        set_socket_timeout(&socket, Timeout::Send, Some(remaining(deadline)?))?;
        match connect(&socket, &address) {
            Ok(()) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(errno) => return Err(errno.into()),
        }
    }
    set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket.into())
}

/// Connects to the socket at `path` without waiting for room in its backlog. The stream
/// is non-blocking.
///
/// # Errors
/// As [`connect_until`], without waiting.
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::io::retry_on_intr(|| connect(&socket, &address)) {
        Ok(()) => Ok(socket.into()),
        Err(rustix::io::Errno::AGAIN) => Err(io::ErrorKind::TimedOut.into()),
        Err(errno) => Err(errno.into()),
    }
}

fn remaining(deadline: Instant) -> io::Result<Duration> {
    match deadline.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(left.max(SHORTEST)),
        _ => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// A stream whose reads and writes fail with `TimedOut` after a deadline. Without a
/// deadline they block indefinitely.
#[derive(Debug)]
pub struct Until<'a> {
    /// The stream. Its socket timeouts are changed.
    pub stream: &'a UnixStream,
    /// The deadline.
    pub deadline: Option<Instant>,
}

impl Until<'_> {
    fn time_left(&self) -> io::Result<Option<Duration>> {
        self.deadline.map(remaining).transpose()
    }
}

/// Converts the error of a socket timeout: `WouldBlock` becomes `TimedOut`.
#[must_use]
pub fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

impl Read for Until<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.time_left()?)?;
        self.stream.read(buffer).map_err(timed_out)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.time_left()?)?;
        self.stream.write(bytes).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    #[test]
    fn a_peer_that_does_nothing_is_waited_for_until_the_deadline() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut until = Until {
            stream: &ours,
            deadline: Some(soon()),
        };
        let error = until.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        until.deadline = Some(soon());
        let error = until.write_all(&vec![0; 16 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_full_backlog_is_waited_for_until_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let mut connected = Vec::new();
        let error = loop {
            match connect_until(&path, soon()) {
                Ok(stream) => connected.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(!connected.is_empty());
    }
}
