//! The hybrid vsock protocol of Firecracker and Cloud Hypervisor.
//!
//! A client connects to the socket and writes `CONNECT PORT\n`; once something in
//! the guest has accepted on that vsock port, it reads `OK HOSTPORT\n`, and the
//! bytes of the stream follow. What a guest opens to the host's port N is
//! connected to the socket `PATH_N`, which whoever serves that port makes.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use sm_devices_vsock::{ConnectOptions, GuestStream, Listening, MuxerHandle, SocketKind};
use sm_vmm_core::event_loop::{
    EventHandler, EventLoopHandle, HandlerId, Interest, Readiness, Registration, Registry,
};

use crate::Error;
use crate::listening::Spare;
use crate::unix::{bind_private, is_our_own};

/// Longest request line, with its end: `CONNECT 4294967295\n`.
const MAX_LINE: usize = 19;
/// Clients that have not said yet what they want; of more, the first is hung up on.
const MAX_UNDECIDED: usize = 64;
/// Connections accepted before other handlers get their turn.
const BATCH: usize = 64;
const LISTENER: u64 = 0;
const FRONTEND: &str = "hybrid";

/// A frontend to be started.
#[derive(Clone, Debug)]
pub struct HybridFrontend {
    path: PathBuf,
}

impl HybridFrontend {
    /// A frontend that will listen on `path`, and connect what the guest opens to
    /// sockets beside it.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Starts listening; the socket is private as [`crate::UnixFrontend`]'s is.
    ///
    /// # Errors
    /// The place is taken, or the system refused.
    pub fn start(
        self,
        muxer: MuxerHandle,
        event_loop: &EventLoopHandle,
    ) -> Result<HybridFrontendHandle, Error> {
        let failed = |operation: &'static str| {
            let path = self.path.clone();
            move |source: io::Error| Error::Io {
                frontend: FRONTEND,
                operation,
                path,
                source,
            }
        };
        if UnixStream::connect(&self.path).is_ok() {
            return Err(Error::InUse {
                frontend: FRONTEND,
                path: self.path,
            });
        }
        let listener = bind_private(&self.path).map_err(failed("listen on"))?;
        let path = self.path.clone();
        let listening =
            muxer.listen_to_others(Box::new(move |request| connect_beside(&path, request)));
        let handler = Hybrid {
            listener,
            spare: Spare::new(),
            muxer,
            undecided: VecDeque::new(),
            next_token: LISTENER + 1,
        };
        let id = event_loop
            .add_handler(Arc::new(Mutex::new(handler)))
            .map_err(failed("wait for connections on"))?;
        Ok(HybridFrontendHandle {
            path: self.path,
            event_loop: event_loop.clone(),
            id,
            _listening: listening,
        })
    }
}

/// A frontend that listens. Dropping it closes the listener and unlinks the
/// socket; connections that were made go on.
#[derive(Debug)]
pub struct HybridFrontendHandle {
    path: PathBuf,
    event_loop: EventLoopHandle,
    id: HandlerId,
    /// What the guest opens is refused once this is gone.
    _listening: Listening,
}

impl HybridFrontendHandle {
    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for HybridFrontendHandle {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        // Fails when the loop has stopped: then nothing listens any more either.
        let _ = self.event_loop.remove_handler(self.id);
    }
}

/// Connects a stream of the guest's to the socket of its port. Never waits: a
/// server whose backlog is full is as good as none.
fn connect_beside(path: &Path, request: GuestStream) -> Option<OwnedFd> {
    let kind = match request.kind {
        SocketKind::Stream => SocketType::STREAM,
        SocketKind::SeqPacket => SocketType::SEQPACKET,
    };
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{}", request.host_port));
    let address = SocketAddrUnix::new(PathBuf::from(name)).ok()?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).ok()?;
    rustix::net::connect(&socket, &address).ok()?;
    Some(socket)
}

/// A client that has not said yet what it wants.
struct Undecided {
    token: u64,
    stream: UnixStream,
    registration: Registration,
}

struct Hybrid {
    listener: UnixListener,
    spare: Spare,
    muxer: MuxerHandle,
    /// By age.
    undecided: VecDeque<Undecided>,
    next_token: u64,
}

impl Hybrid {
    fn accept(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
        let (stream, _) = self.spare.accept(|| self.listener.accept())?;
        if !is_our_own(&stream)? {
            return Ok(());
        }
        stream.set_nonblocking(true)?;
        if self.undecided.len() >= MAX_UNDECIDED
            && let Some(oldest) = self.undecided.pop_front()
        {
            registry.remove(oldest.registration, &oldest.stream);
        }
        let token = self.next_token;
        self.next_token += 1;
        let registration = registry.add(&stream, token, Interest::READ)?;
        self.undecided.push_back(Undecided {
            token,
            stream,
            registration,
        });
        Ok(())
    }

    fn client_ready(&mut self, token: u64, registry: &mut Registry<'_>) {
        let position = self.undecided.iter().position(|one| one.token == token);
        let Some(position) = position else {
            return;
        };
        let wanted = match self
            .undecided
            .get(position)
            .map(|one| read_line(&one.stream))
        {
            Some(Ok(None)) => return,
            Some(Ok(Some(port))) => Some(port),
            // Nonsense, or gone.
            Some(Err(_)) | None => None,
        };
        let Some(client) = self.undecided.remove(position) else {
            return;
        };
        registry.remove(client.registration, &client.stream);
        let (Some(port), Ok(answer)) = (wanted, client.stream.try_clone()) else {
            return;
        };
        let options = ConnectOptions {
            on_result: Some(Box::new(move |result| {
                if let Ok(host_port) = result {
                    // The first thing that is written, so there is room for it.
                    let line = format!("OK {host_port}\n");
                    let _ = rustix::io::write(&answer, line.as_bytes());
                }
            })),
            ..ConnectOptions::default()
        };
        self.muxer
            .connect(port, OwnedFd::from(client.stream), options);
    }
}

/// The port of a request line, which is taken off the stream, and nothing after
/// it; `None` if not all of it is there yet.
fn read_line(stream: &UnixStream) -> io::Result<Option<u32>> {
    let mut line = [0; MAX_LINE];
    let peeked = rustix::net::recv(stream, &mut line[..], RecvFlags::PEEK);
    let (count, _) = match peeked {
        Ok(peeked) => peeked,
        Err(rustix::io::Errno::AGAIN) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let bytes = line.get(..count).unwrap_or_default();
    let Some(end) = bytes.iter().position(|&byte| byte == b'\n') else {
        // Hung up, or longer than any request.
        return match count {
            0 | MAX_LINE => Err(io::ErrorKind::InvalidData.into()),
            _ if !could_begin(bytes) => Err(io::ErrorKind::InvalidData.into()),
            _ => Ok(None),
        };
    };
    let port = bytes
        .get(..end)
        .and_then(parse)
        .ok_or(io::ErrorKind::InvalidData)?;
    let mut taken = [0; MAX_LINE];
    let line = taken.get_mut(..=end).unwrap_or_default();
    rustix::net::recv(stream.as_fd(), line, RecvFlags::empty())?;
    Ok(Some(port))
}

const WORD: &[u8] = b"CONNECT ";

/// Whether these may be the first bytes of a request.
fn could_begin(bytes: &[u8]) -> bool {
    let known = bytes.len().min(WORD.len());
    bytes.get(..known) == WORD.get(..known) && bytes.iter().skip(WORD.len()).all(u8::is_ascii_digit)
}

/// The port of a line without its end.
fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(WORD)?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

impl EventHandler for Hybrid {
    fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
        registry.add(&self.listener, LISTENER, Interest::READ)?;
        Ok(())
    }

    fn ready(&mut self, token: u64, _readiness: Readiness, registry: &mut Registry<'_>) {
        if token != LISTENER {
            return self.client_ready(token, registry);
        }
        for _ in 0..BATCH {
            match self.accept(registry) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    // Room for the next attempt, where there is no other.
                    if let Some(oldest) = self.undecided.pop_front() {
                        registry.remove(oldest.registration, &oldest.stream);
                    }
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};

    use sm_devices_vsock::VsockConfig;
    use sm_devices_vsock::testing::{Guest, Packet, REQUEST, RESPONSE, RST, RW};
    use sm_vmm_core::event_loop::EventLoop;

    use super::*;

    struct Rig {
        guest: Guest,
        path: PathBuf,
        _frontend: HybridFrontendHandle,
        _event_loop: EventLoop,
        _directory: tempfile::TempDir,
    }

    fn rig() -> Rig {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let guest = Guest::new(VsockConfig::default());
        let event_loop = EventLoop::spawn("test").unwrap();
        let frontend = HybridFrontend::new(&path)
            .start(guest.muxer.clone(), &event_loop.handle())
            .unwrap();
        Rig {
            guest,
            path,
            _frontend: frontend,
            _event_loop: event_loop,
            _directory: directory,
        }
    }

    #[test]
    fn a_client_names_a_port_and_is_told_when_it_has_it() {
        let mut rig = rig();
        let mut client = UnixStream::connect(&rig.path).unwrap();
        // In pieces, and with more behind it.
        for piece in ["CON", "NECT 52", "\nearly"] {
            client.write_all(piece.as_bytes()).unwrap();
        }
        let request = rig.guest.expect(REQUEST);
        assert_eq!(request.dst_port, 52);
        rig.guest.send(&request.reply(RESPONSE));
        assert_eq!(rig.guest.expect(RW).payload, b"early");
        let mut data = request.reply(RW);
        data.payload = b"hello".to_vec();
        rig.guest.send(&data);
        let mut reader = BufReader::new(client);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", request.src_port));
        let mut said = [0; 5];
        reader.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"hello");
    }

    #[test]
    fn a_port_that_nobody_has_ends_the_connection() {
        let mut rig = rig();
        let mut client = UnixStream::connect(&rig.path).unwrap();
        client.write_all(b"CONNECT 7\n").unwrap();
        let request = rig.guest.expect(REQUEST);
        rig.guest.send(&request.reply(RST));
        assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn nonsense_is_hung_up_on_and_nobody_else_notices() {
        let mut rig = rig();
        for nonsense in [
            "GET / HTTP/1.1\r\n",
            "CONNECT \n",
            "CONNECT x\n",
            "CONNECT 4294967296\n",
            "CONNECT 99999999999999999999",
            "CONNECT -1\n",
            "\n",
        ] {
            let mut client = UnixStream::connect(&rig.path).unwrap();
            client.write_all(nonsense.as_bytes()).unwrap();
            // The end, or a reset because not all was read.
            assert!(
                matches!(client.read(&mut [0; 8]), Ok(0) | Err(_)),
                "{nonsense:?}"
            );
        }
        // Many who say nothing do not keep others out; the first of them go.
        let silent: Vec<_> = (0..MAX_UNDECIDED + 8)
            .map(|_| UnixStream::connect(&rig.path).unwrap())
            .collect();
        let mut client = UnixStream::connect(&rig.path).unwrap();
        client.write_all(b"CONNECT 9\n").unwrap();
        assert_eq!(rig.guest.expect(REQUEST).dst_port, 9);
        assert_eq!((&silent[0]).read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn the_guest_reaches_the_socket_of_its_port() {
        let mut rig = rig();
        let beside = rig.path.with_file_name("v.sock_1234");
        let listener = UnixListener::bind(beside).unwrap();
        rig.guest.send(&Packet::from_guest(55, 1234, REQUEST));
        rig.guest.expect(RESPONSE);
        let (mut server, _) = listener.accept().unwrap();
        let mut data = Packet::from_guest(55, 1234, RW);
        data.payload = b"from inside".to_vec();
        rig.guest.send(&data);
        let mut said = [0; 11];
        server.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"from inside");
        rig.guest.send(&Packet::from_guest(56, 1235, REQUEST));
        rig.guest.expect(RST);
    }
}
