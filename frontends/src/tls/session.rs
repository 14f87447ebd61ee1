//! One connection: TLS on the client's side, plain bytes on the guest's side.

use std::io::{self, BufRead as _, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::net::{SendFlags, send};
use rustls::{ServerConfig, ServerConnection};
use sm_devices_vsock::Member;
use sm_event_loop::Registered;

use crate::shortage::is_shortage;

/// Most bytes per read from the guest's side: the maximum of a TLS record.
const CHUNK: usize = 16 << 10;
/// Rounds before other connections are served.
const ROUNDS: usize = 16;

/// Result of [`TlsSession::pump`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pumped {
    /// Neither direction can make progress now.
    Idle,
    /// There is more to do.
    More,
    /// The handshake is complete, and a stream to the guest is needed.
    Established,
    /// Both directions have ended, and all bytes are sent.
    Ended,
}

/// The client's side of a connection; non-blocking.
pub(super) trait TlsSocket: io::Read + io::Write {
    /// Shuts down the sending direction.
    fn end(&self) -> io::Result<()>;
}

impl TlsSocket for Registered<TcpStream> {
    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

pub(super) struct TlsSession<S = Registered<TcpStream>> {
    tls: ServerConnection,
    pub(super) socket: S,
    /// The plain side; the muxer has the other end of the pair.
    pub(super) guest: Option<Registered<UnixStream>>,
    /// The client has ended its direction, and the guest's side is shut down for writing.
    client_ended: bool,
    /// The guest has ended its direction.
    guest_ended: bool,
    /// The client was sent close_notify after the guest's end.
    close_notify_sent: bool,
    /// The guest accepts no more bytes.
    guest_deaf: bool,
    /// The client has closed the TCP connection.
    hung_up: bool,
    /// The last pump was interrupted by a memory shortage.
    short_of_memory: bool,
    member: Member,
}

impl<S: TlsSocket> TlsSession<S> {
    /// Creates a session on a non-blocking socket.
    pub(super) fn new(socket: S, config: Arc<ServerConfig>, member: Member) -> io::Result<Self> {
        let tls = ServerConnection::new(config).map_err(io::Error::other)?;
        Ok(Self {
            tls,
            socket,
            guest: None,
            client_ended: false,
            guest_ended: false,
            close_notify_sent: false,
            guest_deaf: false,
            hung_up: false,
            short_of_memory: false,
            member,
        })
    }

    /// Sets the guest's side, after the handshake.
    pub(super) fn set_guest(&mut self, guest: Registered<UnixStream>) {
        self.member.begin();
        self.guest = Some(guest);
    }

    /// Returns the server name that the client requested.
    pub(super) fn server_name(&self) -> Option<&str> {
        self.tls.server_name()
    }

    /// Returns true if the session only waits for the client to close: the guest has
    /// ended the connection in both directions.
    pub(super) fn is_closing(&self) -> bool {
        let closed =
            |guest: &Registered<UnixStream>| send(guest, &[], SendFlags::NOSIGNAL).is_err();
        self.close_notify_sent && self.guest.as_ref().is_none_or(closed)
    }

    /// Returns true if the system lacked memory in the last [`Self::pump`]. No event
    /// reports that memory is available again, so the call is repeated after a delay.
    pub(super) fn is_short_of_memory(&self) -> bool {
        self.short_of_memory
    }

    /// Moves bytes in both directions until neither makes progress without blocking.
    ///
    /// # Errors
    /// The connection broke off, or the client violated the TLS protocol.
    pub(super) fn pump(&mut self) -> io::Result<Pumped> {
        self.short_of_memory = false;
        for _ in 0..ROUNDS {
            let mut moved = self.send()?;
            moved |= self.feed_guest()?;
            moved |= self.receive()?;
            if self.guest.is_none() && !self.tls.is_handshaking() {
                return Ok(Pumped::Established);
            }
            moved |= self.read_guest()?;
            if self.close_notify_sent && (self.client_ended && !self.guest_deaf || self.hung_up) {
                return Ok(Pumped::Ended);
            }
            if !moved {
                return Ok(Pumped::Idle);
            }
        }
        Ok(Pumped::More)
    }

    /// Sends pending TLS records to the client.
    fn send(&mut self) -> io::Result<bool> {
        let mut moved = false;
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.socket) {
                Ok(_) => moved = true,
                Err(error) if is_retryable(&error, &mut self.short_of_memory) => return Ok(moved),
                Err(error) => return Err(error),
            }
        }
        if self.guest_ended && !self.close_notify_sent {
            self.close_notify_sent = true;
            self.member.delivered();
            self.socket.end()?;
            moved = true;
        }
        Ok(moved)
    }

    /// Sends decrypted bytes to the guest.
    fn feed_guest(&mut self) -> io::Result<bool> {
        let Some(guest) = &mut self.guest else {
            return Ok(false);
        };
        let mut moved = false;
        let mut reader = self.tls.reader();
        loop {
            let bytes = match reader.fill_buf() {
                // The client has sent close_notify.
                Ok([]) => break,
                Ok(bytes) => bytes,
                // No decrypted bytes are available.
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(moved),
                Err(error) => return Err(error),
            };
            let count = match self.guest_deaf {
                true => bytes.len(),
                false => match guest.write(bytes) {
                    Ok(count) => count,
                    Err(error) if is_retryable(&error, &mut self.short_of_memory) => {
                        return Ok(moved);
                    }
                    Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                        self.guest_deaf = true;
                        bytes.len()
                    }
                    Err(error) => return Err(error),
                },
            };
            self.member.count_to_guest(count as u64);
            reader.consume(count);
            moved = true;
        }
        if !self.client_ended {
            self.client_ended = true;
            // An error means that the guest's side is closed already.
            let _ = guest.shutdown(Shutdown::Write);
            moved = true;
        }
        Ok(moved)
    }

    /// Receives TLS records from the client, by one read at most, and none while
    /// decrypted bytes wait for the guest.
    fn receive(&mut self) -> io::Result<bool> {
        if self.hung_up {
            return Ok(false);
        }
        if self.client_ended {
            return self.drain_until_eof();
        }
        if !self.tls.wants_read() {
            return Ok(false);
        }
        match self.tls.read_tls(&mut self.socket) {
            Ok(0) if self.close_notify_sent => self.hung_up = true,
            // The end of the stream without close_notify may be a truncation.
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if is_retryable(&error, &mut self.short_of_memory) => return Ok(false),
            Err(error) => return Err(error),
        }
        if let Err(error) = self.tls.process_new_packets() {
            // Sends the alert to the client, which may be gone.
            let _ = self.tls.write_tls(&mut self.socket);
            return Err(io::Error::new(ErrorKind::InvalidData, error));
        }
        Ok(true)
    }

    /// Discards bytes after the client's close_notify and waits for the end of the TCP
    /// stream.
    fn drain_until_eof(&mut self) -> io::Result<bool> {
        let mut ignored = [0; 512];
        match self.socket.read(&mut ignored) {
            Ok(0) => {
                self.hung_up = true;
                Ok(true)
            }
            Ok(_) => Ok(true),
            Err(error) if is_retryable(&error, &mut self.short_of_memory) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads from the guest, once all earlier bytes were sent.
    fn read_guest(&mut self) -> io::Result<bool> {
        let Some(guest) = &mut self.guest else {
            return Ok(false);
        };
        if self.guest_ended || self.tls.wants_write() {
            return Ok(false);
        }
        let mut chunk = [0; CHUNK];
        match guest.read(&mut chunk) {
            Ok(0) => {
                self.guest_ended = true;
                self.tls.send_close_notify();
            }
            Ok(count) => {
                let bytes = chunk.get(..count).unwrap_or_default();
                self.tls.writer().write_all(bytes)?;
                self.member.count_from_guest(count as u64);
            }
            Err(error) if is_retryable(&error, &mut self.short_of_memory) => return Ok(false),
            Err(error) => return Err(error),
        }
        Ok(true)
    }
}

/// Returns true if the call can be repeated later: on an event or, after a memory
/// shortage, which is noted in `short_of_memory`, after a delay.
fn is_retryable(error: &io::Error, short_of_memory: &mut bool) -> bool {
    let short = is_shortage(error);
    *short_of_memory |= short;
    short || matches!(error.kind(), ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use rustix::io::Errno;
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};
    use sm_devices_vsock::Group;

    use super::*;
    use crate::TlsIdentity;
    use crate::tls::identity::CurrentIdentity;

    /// A client whose first bytes can be read, and whose writes fail for lack of memory
    /// at first.
    struct Short {
        hello: io::Cursor<Vec<u8>>,
        sent: Vec<u8>,
        error: Option<Errno>,
    }

    impl Read for Short {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.hello.read(buffer)? {
                0 => Err(ErrorKind::WouldBlock.into()),
                count => Ok(count),
            }
        }
    }

    impl Write for Short {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.error {
                Some(error) => Err(error.into()),
                None => self.sent.write(bytes),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl TlsSocket for Short {
        fn end(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_lack_of_memory_ends_no_session() {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let name = ServerName::try_from("localhost").unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        for error in [Errno::NOBUFS, Errno::NOMEM] {
            let socket = Short {
                hello: io::Cursor::new(hello.clone()),
                sent: Vec::new(),
                error: Some(error),
            };
            let itself = TlsIdentity::SelfSigned {
                names: vec!["localhost".to_owned()],
            };
            let mut identity = CurrentIdentity::load(itself, Vec::new()).unwrap();
            let member = Group::new().join(None);
            let mut session = TlsSession::new(socket, identity.current(), member).unwrap();
            assert_eq!(session.pump().unwrap(), Pumped::Idle);
            assert!(session.is_short_of_memory());
            session.socket.error = None;
            assert_eq!(session.pump().unwrap(), Pumped::Idle);
            assert!(!session.is_short_of_memory());
            // The first byte is the type of a handshake record.
            assert_eq!(session.socket.sent.first(), Some(&22));
        }
    }
}
