//! Connections that a router has accepted, handed over with what it has read.
//!
//! A router connects to the socket and sends, as often as it likes,
//! `[u32 BE length][payload]` with a stream socket (SCM_RIGHTS) somewhere among
//! these bytes. The length is 1 to 1 MiB. The guest gets the payload first and
//! then what the socket still has to say. [`HandoffSender`] is the router's side.
//!
//! Whoever breaks these rules is hung up on, and the descriptors that came are
//! closed; streams that were handed over before go on.

use std::collections::HashMap;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::net::sockopt::socket_type;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType, recvmsg, sendmsg,
};
use sm_devices_vsock::{ConnectOptions, MuxerHandle};
use sm_guest_proto::forward::ForwardHeader;
use sm_guest_proto::port;
use sm_vmm_core::event_loop::{
    EventHandler, EventLoopHandle, HandlerId, Interest, Readiness, Registration, Registry,
};

use crate::Error;
use crate::listening::Spare;
use crate::unix::{bind_private, is_our_own};

/// Longest payload of one handoff, in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Bytes of the length before it.
const HEADER: usize = 4;
/// Routers served at once; of more, the newest is hung up on.
const MAX_ROUTERS: usize = 64;
/// Reads or connections served before other handlers get their turn.
const BATCH: usize = 64;
const CHUNK: usize = 64 << 10;
const LISTENER: u64 = 0;
const FRONTEND: &str = "handoff";

/// A frontend to be started.
#[derive(Clone, Debug)]
pub struct HandoffFrontend {
    path: PathBuf,
    target: ForwardHeader,
}

impl HandoffFrontend {
    /// A frontend that will listen on `path`, and connect what it is handed to a
    /// TCP port of the guest.
    #[must_use]
    pub fn new(path: &Path, target: ForwardHeader) -> Self {
        Self {
            path: path.to_owned(),
            target,
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
    ) -> Result<HandoffFrontendHandle, Error> {
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
        let handler = Handoff {
            listener,
            spare: Spare::new(),
            target: self.target,
            muxer,
            routers: HashMap::new(),
            next_token: LISTENER + 1,
        };
        let id = event_loop
            .add_handler(Arc::new(Mutex::new(handler)))
            .map_err(failed("wait for connections on"))?;
        Ok(HandoffFrontendHandle {
            path: self.path,
            event_loop: event_loop.clone(),
            id,
        })
    }
}

/// A frontend that listens. Dropping it closes the listener and its routers'
/// connections and unlinks the socket; streams that were handed over go on.
#[derive(Debug)]
pub struct HandoffFrontendHandle {
    path: PathBuf,
    event_loop: EventLoopHandle,
    id: HandlerId,
}

impl HandoffFrontendHandle {
    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for HandoffFrontendHandle {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        // Fails when the loop has stopped: then nothing listens any more either.
        let _ = self.event_loop.remove_handler(self.id);
    }
}

/// One handoff on its way.
#[derive(Debug, Default)]
struct Parcel {
    header: [u8; HEADER],
    /// Bytes of the header that are there.
    read: usize,
    length: usize,
    payload: Vec<u8>,
    fd: Option<OwnedFd>,
}

/// Why a router is hung up on.
fn broken(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

impl Parcel {
    /// Reads some of it from a router. `true` when it is complete.
    fn read_from(&mut self, router: &UnixStream) -> io::Result<bool> {
        // Exactly what belongs to this handoff: descriptors come with their bytes.
        if self.read < HEADER {
            let mut header = self.header;
            let rest = header.get_mut(self.read..).unwrap_or_default();
            let count = self.receive(router, rest)?;
            self.header = header;
            self.read += count;
            if self.read == HEADER {
                self.length =
                    usize::try_from(u32::from_be_bytes(self.header)).unwrap_or(usize::MAX);
                if !(1..=MAX_PAYLOAD).contains(&self.length) {
                    return Err(broken("the length is not from 1 to 1 MiB"));
                }
            }
            return Ok(false);
        }
        let mut chunk = [0; CHUNK];
        let most = (self.length - self.payload.len()).min(CHUNK);
        let place = chunk.get_mut(..most).unwrap_or_default();
        let count = self.receive(router, place)?;
        self.payload
            .extend_from_slice(chunk.get(..count).unwrap_or_default());
        Ok(self.payload.len() == self.length)
    }

    fn receive(&mut self, router: &UnixStream, place: &mut [u8]) -> io::Result<usize> {
        // Room for one more than is allowed, so that two are seen.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            router,
            &mut [IoSliceMut::new(place)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )?;
        // Whatever came is owned from here on, and closed if it is not wanted.
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > 1 {
            return Err(broken("more than one descriptor came at once"));
        }
        if let Some(fd) = fds.pop() {
            if self.fd.is_some() {
                return Err(broken("two descriptors came with one payload"));
            }
            if socket_type(&fd).ok() != Some(SocketType::STREAM) {
                return Err(broken("the descriptor is not a stream socket"));
            }
            self.fd = Some(fd);
        }
        match received.bytes {
            0 if self.read == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            0 => Err(broken("it hung up in the middle of a handoff")),
            count => Ok(count),
        }
    }
}

struct Router {
    stream: UnixStream,
    registration: Registration,
    parcel: Parcel,
}

struct Handoff {
    listener: UnixListener,
    spare: Spare,
    target: ForwardHeader,
    muxer: MuxerHandle,
    routers: HashMap<u64, Router>,
    next_token: u64,
}

impl Handoff {
    fn accept(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
        let (stream, _) = self.spare.accept(|| self.listener.accept())?;
        if !is_our_own(&stream)? || self.routers.len() >= MAX_ROUTERS {
            return Ok(());
        }
        stream.set_nonblocking(true)?;
        let token = self.next_token;
        self.next_token += 1;
        let registration = registry.add(&stream, token, Interest::READ)?;
        let router = Router {
            stream,
            registration,
            parcel: Parcel::default(),
        };
        self.routers.insert(token, router);
        Ok(())
    }

    /// Takes what a router has sent; an error when it is done, or done for.
    fn serve(&mut self, token: u64) -> io::Result<()> {
        let Some(router) = self.routers.get_mut(&token) else {
            return Ok(());
        };
        for _ in 0..BATCH {
            if !router.parcel.read_from(&router.stream)? {
                continue;
            }
            let parcel = std::mem::take(&mut router.parcel);
            let fd = parcel.fd.ok_or_else(|| broken("no descriptor came"))?;
            let mut preamble = self.target.encode().to_vec();
            preamble.extend_from_slice(&parcel.payload);
            let options = ConnectOptions {
                preamble,
                status_reply: true,
                wait: self.target.wait(),
                ..ConnectOptions::default()
            };
            self.muxer.connect(port::FORWARD, fd, options);
        }
        Ok(())
    }
}

impl EventHandler for Handoff {
    fn start(&mut self, registry: &mut Registry<'_>) -> io::Result<()> {
        registry.add(&self.listener, LISTENER, Interest::READ)?;
        Ok(())
    }

    fn ready(&mut self, token: u64, _readiness: Readiness, registry: &mut Registry<'_>) {
        if token != LISTENER {
            let Err(error) = self.serve(token) else {
                return;
            };
            match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => return,
                io::ErrorKind::UnexpectedEof => {}
                _ => tracing::warn!(%error, "a router was hung up on"),
            }
            if let Some(router) = self.routers.remove(&token) {
                registry.remove(router.registration, &router.stream);
            }
            return;
        }
        for _ in 0..BATCH {
            match self.accept(registry) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    return;
                }
            }
        }
    }
}

/// A router's connection to a handoff socket.
#[derive(Debug)]
pub struct HandoffSender {
    stream: UnixStream,
}

impl HandoffSender {
    /// Connects to a VM's handoff socket.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        UnixStream::connect(path).map(|stream| Self { stream })
    }

    /// Hands a stream socket over, with the 1 to [`MAX_PAYLOAD`] bytes that were
    /// read from it already.
    ///
    /// # Errors
    /// The payload's length is not that, or the VM is gone.
    pub fn send(&mut self, socket: impl AsFd, payload: &[u8]) -> io::Result<()> {
        if !(1..=MAX_PAYLOAD).contains(&payload.len()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a payload has 1 byte to 1 MiB",
            ));
        }
        let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
        self.stream.write_all(&length.to_be_bytes())?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [socket.as_fd()];
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("no room for a file descriptor"));
        }
        let sent = rustix::io::retry_on_intr(|| {
            sendmsg(
                &self.stream,
                &[IoSlice::new(payload)],
                &mut control,
                SendFlags::NOSIGNAL,
            )
        })?;
        self.stream
            .write_all(payload.get(sent..).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use sm_devices_vsock::VsockConfig;
    use sm_devices_vsock::testing::{Guest, Packet, REQUEST, RESPONSE, RW};
    use sm_guest_proto::forward::HEADER_LEN;
    use sm_vmm_core::event_loop::EventLoop;

    use super::*;

    const TARGET: ForwardHeader = ForwardHeader {
        port: 80,
        wait_ms: 5,
    };

    struct Rig {
        guest: Guest,
        path: PathBuf,
        _frontend: HandoffFrontendHandle,
        _event_loop: EventLoop,
        _directory: tempfile::TempDir,
    }

    fn rig() -> Rig {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("handoff");
        let guest = Guest::new(VsockConfig::default());
        let event_loop = EventLoop::spawn("test").unwrap();
        let frontend = HandoffFrontend::new(&path, TARGET)
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

    impl Rig {
        /// Accepts a stream in the guest and returns its first `len` bytes after
        /// the forward header.
        fn accepts(&mut self, len: usize) -> (Packet, Vec<u8>) {
            let request = self.guest.expect(REQUEST);
            assert_eq!(request.dst_port, port::FORWARD);
            self.guest.send(&request.reply(RESPONSE));
            let mut got = Vec::new();
            while got.len() < HEADER_LEN + len {
                got.extend(self.guest.expect(RW).payload);
            }
            assert_eq!(got[..HEADER_LEN], TARGET.encode());
            (request, got.split_off(HEADER_LEN))
        }
    }

    #[test]
    fn payload_and_socket_arrive_in_order_again_and_again() {
        let mut rig = rig();
        let mut sender = HandoffSender::connect(&rig.path).unwrap();
        let mut clients = Vec::new();
        for round in 0..3u8 {
            let (mut client, socket) = UnixStream::pair().unwrap();
            client.write_all(b"later").unwrap();
            let payload = vec![round; 1 + usize::from(round) * 5000];
            sender.send(&socket, &payload).unwrap();
            drop(socket);
            let (request, got) = rig.accepts(payload.len() + 5);
            assert_eq!(got[..payload.len()], payload);
            assert_eq!(&got[payload.len()..], b"later");
            let mut answer = request.reply(RW);
            answer.payload = b"\0answer".to_vec();
            rig.guest.send(&answer);
            let mut said = [0; 6];
            client.read_exact(&mut said).unwrap();
            assert_eq!(&said, b"answer");
            // Its end would be a packet of its own.
            clients.push(client);
        }
    }

    #[test]
    fn a_payload_of_a_mebibyte_is_the_longest() {
        let rig = rig();
        let mut sender = HandoffSender::connect(&rig.path).unwrap();
        let (_client, socket) = UnixStream::pair().unwrap();
        assert!(sender.send(&socket, &[]).is_err());
        assert!(sender.send(&socket, &vec![0; MAX_PAYLOAD + 1]).is_err());
        sender.send(&socket, &vec![7; MAX_PAYLOAD]).unwrap();
    }

    /// Sends bytes with some descriptors.
    fn raw(stream: &UnixStream, bytes: &[u8], fds: &[&dyn AsFd]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let flags = SendFlags::NOSIGNAL;
        sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags).unwrap();
    }

    /// Whether the other end of the pair was closed by everybody.
    fn is_closed(mut client: &UnixStream) -> bool {
        matches!(client.read(&mut [0; 1]), Ok(0))
    }

    #[test]
    fn rules_that_are_broken_close_everything_that_came() {
        let mut rig = rig();
        let file = tempfile::tempfile().unwrap();
        type Breach = fn(&UnixStream, &UnixStream, &std::fs::File);
        let breaches: [(&str, Breach); 8] = [
            ("length 0", |s, fd, _| raw(s, &[0, 0, 0, 0], &[fd])),
            ("too long", |s, fd, _| raw(s, &[0, 0x10, 0, 1], &[fd])),
            ("no fd", |s, _, _| raw(s, b"\0\0\0\x02hi", &[])),
            ("a file", |s, _, file| raw(s, b"\0\0\0\x02hi", &[file])),
            ("three fds", |s, fd, _| {
                raw(s, b"\0\0\0\x02hi", &[fd, fd, fd])
            }),
            ("two fds at once", |s, fd, _| {
                raw(s, b"\0\0\0\x02hi", &[fd, fd])
            }),
            ("two fds", |s, fd, _| {
                raw(s, b"\0\0\0\x02h", &[fd]);
                raw(s, b"i", &[fd]);
            }),
            ("half a header", |s, fd, _| {
                raw(s, b"\0\0", &[fd]);
                s.shutdown(std::net::Shutdown::Write).unwrap();
            }),
        ];
        for (name, breach) in breaches {
            let mut router = UnixStream::connect(&rig.path).unwrap();
            let (client, socket) = UnixStream::pair().unwrap();
            breach(&router, &socket, &file);
            drop(socket);
            assert!(is_closed(&client), "{name}: the socket is closed");
            assert!(matches!(router.read(&mut [0; 1]), Ok(0) | Err(_)), "{name}");
        }
        // Others are served as ever.
        let mut sender = HandoffSender::connect(&rig.path).unwrap();
        let (_client, socket) = UnixStream::pair().unwrap();
        sender.send(&socket, b"fine").unwrap();
        assert_eq!(rig.accepts(4).1, b"fine");
    }
}
