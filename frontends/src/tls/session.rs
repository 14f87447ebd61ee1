//! One connection: TLS on one side, plain bytes on the other.

use std::io::{self, BufRead as _, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::net::{SendFlags, send};
use rustls::{ServerConfig, ServerConnection};
use sm_devices_vsock::Member;

use crate::shortage::is_shortage;

/// Bytes taken from the guest's side at once; a TLS record holds as many.
const CHUNK: usize = 16 << 10;
/// Rounds before other connections get their turn.
const ROUNDS: usize = 16;

/// What [`Session::pump`] has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pumped {
    /// All that can be done now is done.
    Idle,
    /// There is more to do.
    More,
    /// The client is known, and wants a stream to the guest.
    Established,
    /// Both directions have ended, what was sent included.
    Ended,
}

/// A client's side of a connection; does not block.
pub(super) trait Socket: io::Read + io::Write {
    /// Says that nothing more is sent.
    fn end(&self) -> io::Result<()>;
}

impl Socket for TcpStream {
    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

pub(super) struct Session<S = TcpStream> {
    tls: ServerConnection,
    pub(super) socket: S,
    /// Plain bytes; the muxer has the other end.
    pub(super) guest: Option<UnixStream>,
    /// The client has sent all that it will, and the guest's side knows.
    client_ended: bool,
    /// The guest has sent all that it will.
    guest_ended: bool,
    /// ... and the client has been told.
    client_told: bool,
    /// The guest takes no more bytes.
    guest_deaf: bool,
    /// The client's side of the TCP connection is closed.
    hung_up: bool,
    /// The system lacked memory for what is to be done.
    short_of_memory: bool,
    member: Member,
}

impl<S: Socket> Session<S> {
    /// A session on a socket that does not block.
    pub(super) fn new(socket: S, config: Arc<ServerConfig>, member: Member) -> io::Result<Self> {
        let tls = ServerConnection::new(config).map_err(io::Error::other)?;
        Ok(Self {
            tls,
            socket,
            guest: None,
            client_ended: false,
            guest_ended: false,
            client_told: false,
            guest_deaf: false,
            hung_up: false,
            short_of_memory: false,
            member,
        })
    }

    /// The client is known, and its plain bytes go here.
    pub(super) fn begin(&mut self, guest: UnixStream) {
        self.member.begin();
        self.guest = Some(guest);
    }

    /// The name of the server that the client asked for.
    pub(super) fn server_name(&self) -> Option<&str> {
        self.tls.server_name()
    }

    /// Whether only the client's hanging up is waited for: the guest has ended the
    /// connection, in both directions.
    pub(super) fn is_closing(&self) -> bool {
        let gone = |guest: &UnixStream| send(guest, &[], SendFlags::NOSIGNAL).is_err();
        self.client_told && self.guest.as_ref().is_none_or(gone)
    }

    /// The system lacked memory in the last [`Self::pump`]. No event says
    /// when it has some again, so another is due after a while.
    pub(super) fn is_short_of_memory(&self) -> bool {
        self.short_of_memory
    }

    /// Moves bytes both ways as far as it goes without waiting.
    ///
    /// # Errors
    /// The connection is over: broken off, or what the client sends is not TLS.
    pub(super) fn pump(&mut self) -> io::Result<Pumped> {
        self.short_of_memory = false;
        for _ in 0..ROUNDS {
            let mut moved = self.send()?;
            moved |= self.feed_guest()?;
            moved |= self.receive()?;
            if self.guest.is_none() && !self.tls.is_handshaking() {
                return Ok(Pumped::Established);
            }
            moved |= self.hear_guest()?;
            if self.client_told && (self.client_ended && !self.guest_deaf || self.hung_up) {
                return Ok(Pumped::Ended);
            }
            if !moved {
                return Ok(Pumped::Idle);
            }
        }
        Ok(Pumped::More)
    }

    /// Records to the client.
    fn send(&mut self) -> io::Result<bool> {
        let mut moved = false;
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.socket) {
                Ok(_) => moved = true,
                Err(error) if is_for_later(&error, &mut self.short_of_memory) => return Ok(moved),
                Err(error) => return Err(error),
            }
        }
        if self.guest_ended && !self.client_told {
            self.client_told = true;
            self.member.delivered();
            self.socket.end()?;
            moved = true;
        }
        Ok(moved)
    }

    /// What was decrypted, to the guest.
    fn feed_guest(&mut self) -> io::Result<bool> {
        let Some(guest) = &mut self.guest else {
            return Ok(false);
        };
        let mut moved = false;
        let mut reader = self.tls.reader();
        loop {
            let bytes = match reader.fill_buf() {
                // The client has said that this was all.
                Ok([]) => break,
                Ok(bytes) => bytes,
                // Nothing now.
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(moved),
                Err(error) => return Err(error),
            };
            let count = match self.guest_deaf {
                true => bytes.len(),
                false => match guest.write(bytes) {
                    Ok(count) => count,
                    Err(error) if is_for_later(&error, &mut self.short_of_memory) => {
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
            // Fails when the guest has gone already.
            let _ = guest.shutdown(Shutdown::Write);
            moved = true;
        }
        Ok(moved)
    }

    /// Records from the client, one read at most; none while what came before
    /// waits for the guest.
    fn receive(&mut self) -> io::Result<bool> {
        if self.hung_up {
            return Ok(false);
        }
        if self.client_ended {
            return self.await_hang_up();
        }
        if !self.tls.wants_read() {
            return Ok(false);
        }
        match self.tls.read_tls(&mut self.socket) {
            Ok(0) if self.client_told => self.hung_up = true,
            // Without a word, so perhaps not by the client's will.
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if is_for_later(&error, &mut self.short_of_memory) => return Ok(false),
            Err(error) => return Err(error),
        }
        if let Err(error) = self.tls.process_new_packets() {
            // Tells the client what was wrong, if it listens.
            let _ = self.tls.write_tls(&mut self.socket);
            return Err(io::Error::new(ErrorKind::InvalidData, error));
        }
        Ok(true)
    }

    /// After the client's last record nothing counts but its hanging up.
    fn await_hang_up(&mut self) -> io::Result<bool> {
        let mut ignored = [0; 512];
        match self.socket.read(&mut ignored) {
            Ok(0) => {
                self.hung_up = true;
                Ok(true)
            }
            Ok(_) => Ok(true),
            Err(error) if is_for_later(&error, &mut self.short_of_memory) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What the guest sends, once what it sent before is on its way.
    fn hear_guest(&mut self) -> io::Result<bool> {
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
            Err(error) if is_for_later(&error, &mut self.short_of_memory) => return Ok(false),
            Err(error) => return Err(error),
        }
        Ok(true)
    }
}

/// Returns true if the call can be repeated later: on an event or, if the system
/// lacked memory, which is noted, after a while.
fn is_for_later(error: &io::Error, short_of_memory: &mut bool) -> bool {
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
    use crate::tls::identity::Identity;

    /// Reads a client's first bytes; does not write for lack of memory at first.
    struct Short {
        hello: io::Cursor<Vec<u8>>,
        sent: Vec<u8>,
        error: Option<Errno>,
    }

    impl Read for Short {
        fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
            match self.hello.read(room)? {
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

    impl Socket for Short {
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
            let mut identity = Identity::load(itself, Vec::new()).unwrap();
            let member = Group::new().join(None);
            let mut session = Session::new(socket, identity.current(), member).unwrap();
            assert_eq!(session.pump().unwrap(), Pumped::Idle);
            assert!(session.is_short_of_memory());
            session.socket.error = None;
            assert_eq!(session.pump().unwrap(), Pumped::Idle);
            assert!(!session.is_short_of_memory());
            // A record of the handshake.
            assert_eq!(session.socket.sent.first(), Some(&22));
        }
    }
}
