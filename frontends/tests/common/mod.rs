//! A guest that echoes, and clients of every frontend.
#![allow(
    clippy::unwrap_used,
    dead_code,
    unreachable_pub,
    reason = "a failed expectation is a failed test; each test program uses a part"
)]

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use sm_devices_vsock::testing::{Guest, Packet, REQUEST, RESPONSE, RST, RW, SHUTDOWN};
use sm_devices_vsock::{ConnectOptions, MuxerHandle, VsockConfig};
use sm_event_loop::{EventHandler, EventLoop, HandlerId, Readiness, Registry};
use sm_frontends::{
    ForwardTarget, FrontendHandle, HandoffFrontend, HandoffSender, HybridFrontend, Limit,
    TcpFrontend, TlsFrontend, TlsIdentity, UnixFrontend,
};
use sm_guest_proto::forward::{ForwardHeader, HEADER_LEN};
use sm_guest_proto::port;

/// The guest's port that echoes.
pub const ECHO: u32 = 7;
/// A connection to this port ends the guest.
const QUIT: u32 = 9;
pub const KINDS: [Kind; 5] = [
    Kind::Unix,
    Kind::Tcp,
    Kind::Tls,
    Kind::Handoff,
    Kind::Hybrid,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Unix,
    Tcp,
    Tls,
    Handoff,
    Hybrid,
}

/// State of one connection in a guest that echoes.
#[derive(Default)]
struct Echoed {
    /// Bytes of a forward header that are still to be received.
    header: usize,
    /// Received bytes that are not sent back yet, because the host has no credit left.
    pending: Vec<u8>,
    /// Bytes received, which are the `fwd_cnt` for the host.
    taken: u32,
    sent: u32,
    /// The host has shut down its sending direction.
    end: Option<Packet>,
}

impl Echoed {
    /// Processes the payload of a data packet.
    fn take(&mut self, packet: &Packet) {
        let mut data = &packet.payload[..];
        if self.header > 0 {
            let skipped = data.len().min(self.header);
            data = &data[skipped..];
            self.taken += u32::try_from(skipped).unwrap();
            self.header -= skipped;
            if self.header == 0 {
                // The header is answered with a status byte, which the client has not
                // sent.
                self.pending.push(0);
                self.taken = self.taken.wrapping_sub(1);
            }
        }
        self.pending.extend(data);
    }

    /// Sends back as many bytes as the host's credit in `packet` allows.
    fn answer(&mut self, guest: &mut Guest, packet: &Packet) {
        let way = self.sent.wrapping_sub(packet.fwd_cnt);
        let room = usize::try_from(packet.buf_alloc.saturating_sub(way)).unwrap();
        let now: Vec<u8> = self.pending.drain(..self.pending.len().min(room)).collect();
        for payload in now.chunks(64 << 10) {
            let len = u32::try_from(payload.len()).unwrap();
            self.taken = self.taken.wrapping_add(len);
            self.sent = self.sent.wrapping_add(len);
            let mut back = packet.reply(RW);
            back.fwd_cnt = self.taken;
            back.payload = payload.to_vec();
            guest.send(&back);
        }
        if self.pending.is_empty()
            && let Some(mut end) = self.end.take()
        {
            end.fwd_cnt = self.taken;
            guest.send(&end);
        }
    }
}

/// A guest that sends back all bytes, and ends its direction when the host does.
fn echo(mut guest: Guest) {
    let mut streams: HashMap<u32, Echoed> = HashMap::new();
    loop {
        let packet = guest.receive();
        match packet.op {
            REQUEST if packet.dst_port == QUIT => return,
            REQUEST if packet.dst_port == ECHO || packet.dst_port == port::FORWARD => {
                let header = match packet.dst_port {
                    port::FORWARD => HEADER_LEN,
                    _ => 0,
                };
                let stream = Echoed {
                    header,
                    ..Echoed::default()
                };
                streams.insert(packet.src_port, stream);
                guest.send(&packet.reply(RESPONSE));
            }
            REQUEST => guest.send(&packet.reply(RST)),
            RST => {
                streams.remove(&packet.src_port);
            }
            op => {
                let Some(stream) = streams.get_mut(&packet.src_port) else {
                    continue;
                };
                match op {
                    RW => stream.take(&packet),
                    // The host has shut down its sending direction: the guest does the
                    // same. If it has shut down both, the guest resets the connection.
                    SHUTDOWN => {
                        let op = if packet.flags == 3 { RST } else { SHUTDOWN };
                        let mut end = packet.reply(op);
                        end.flags = 2;
                        stream.end = Some(end);
                    }
                    _ => {}
                }
                stream.answer(&mut guest, &packet);
            }
        }
    }
}

pub struct Rig {
    pub muxer: MuxerHandle,
    pub event_loop: EventLoop,
    directory: tempfile::TempDir,
    guest: Option<JoinHandle<()>>,
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
}

impl Rig {
    pub fn new() -> Self {
        let guest = Guest::new(VsockConfig::default());
        Self {
            muxer: guest.muxer.clone(),
            event_loop: EventLoop::spawn("test").unwrap(),
            directory: tempfile::tempdir().unwrap(),
            guest: Some(std::thread::spawn(move || echo(guest))),
        }
    }

    /// Starts a frontend with the given descriptor limit and the given time limit for its
    /// clients.
    pub fn start(&self, kind: Kind, limit: &Limit, timeout: Duration) -> Server {
        self.try_start(kind, limit, timeout).unwrap()
    }

    /// Like [`Self::start`], and returns errors.
    pub fn try_start(
        &self,
        kind: Kind,
        limit: &Limit,
        timeout: Duration,
    ) -> Result<Server, sm_frontends::Error> {
        let (muxer, event_loop) = (self.muxer.clone(), self.event_loop.handle());
        let path = self.directory.path().join(format!("{kind:?}"));
        let any: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
        let header = ForwardHeader {
            port: 80,
            wait_ms: 0,
        };
        let identity = TlsIdentity::SelfSigned {
            names: vec!["localhost".to_owned()],
        };
        let echo = ForwardTarget::Vsock(ECHO);
        let started = match kind {
            Kind::Unix => UnixFrontend::new(&path, echo)
                .limit(limit)
                .start(muxer, &event_loop),
            Kind::Tcp => TcpFrontend::new(any, echo)
                .limit(limit)
                .start(muxer, &event_loop),
            Kind::Tls => TlsFrontend::new(any, identity, echo)
                .limit(limit)
                .handshake_timeout(timeout)
                .start(muxer, &event_loop),
            Kind::Handoff => HandoffFrontend::new(&path, header)
                .limit(limit)
                .handoff_timeout(timeout)
                .start(muxer, &event_loop),
            Kind::Hybrid => HybridFrontend::new(&path)
                .limit(limit)
                .request_timeout(timeout)
                .start(muxer, &event_loop),
        };
        let handle = started?;
        let certificate = handle.self_signed_certificate().map(str::to_owned);
        let door = Door {
            kind,
            tcp: handle.local_address().tcp(),
            path,
            certificate,
        };
        Ok(Server { door, handle })
    }

    /// Adds a handler to the frontends' event loop, and returns its ID.
    pub fn id_of_a_handler(&self) -> HandlerId {
        let (holds, _held) = channel();
        let (_, released) = channel();
        let block = Arc::new(Mutex::new(Block { holds, released }));
        self.event_loop.handle().add_handler(block).unwrap()
    }

    /// Starts a frontend without limits.
    pub fn serve(&self, kind: Kind) -> Server {
        self.start(kind, &Limit::none(), Duration::from_secs(3600))
    }

    /// Blocks the frontends' event loop until the returned guard is dropped.
    pub fn hold(&self) -> Held {
        let (release, released) = channel();
        let (holds, held) = channel();
        let event_loop = self.event_loop.handle();
        let thread = std::thread::spawn(move || {
            let block = Block { holds, released };
            event_loop.add_handler(Arc::new(Mutex::new(block))).unwrap();
        });
        held.recv().unwrap();
        Held {
            release: Some(release),
            thread: Some(thread),
        }
    }
}

struct Block {
    holds: Sender<()>,
    released: Receiver<()>,
}

impl EventHandler for Block {
    fn start(&mut self, _registry: &mut dyn Registry) -> io::Result<()> {
        self.holds.send(()).unwrap();
        // Ends when the other side is dropped.
        let _ = self.released.recv();
        Ok(())
    }

    fn ready(&mut self, _token: u64, _readiness: Readiness, _registry: &mut dyn Registry) {}
}

/// The guard of [`Rig::hold`].
pub struct Held {
    release: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.release = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let (_near, far) = UnixStream::pair().unwrap();
        self.muxer
            .connect(QUIT, far.into(), ConnectOptions::default());
        if let Some(guest) = self.guest.take()
            && guest.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the guest");
        }
    }
}

/// A running frontend.
pub struct Server {
    pub door: Door,
    pub handle: FrontendHandle,
}

/// The address of a frontend for its clients.
#[derive(Clone, Debug)]
pub struct Door {
    pub kind: Kind,
    pub tcp: Option<SocketAddr>,
    pub path: PathBuf,
    certificate: Option<String>,
}

trait Stream: Read + Write + Send {
    /// Shuts down the sending direction.
    fn end(&mut self) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn end(&mut self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Stream for TcpStream {
    fn end(&mut self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Stream for StreamOwned<ClientConnection, TcpStream> {
    fn end(&mut self) -> io::Result<()> {
        self.conn.send_close_notify();
        self.flush()
    }
}

/// A client whose connection has reached the guest.
pub struct Client(Box<dyn Stream>);

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    /// Sends bytes and receives them back.
    pub fn echo(&mut self, sent: &[u8]) -> io::Result<()> {
        self.0.write_all(sent)?;
        self.0.flush()?;
        let mut received = vec![0; sent.len()];
        self.0.read_exact(&mut received)?;
        assert!(received == sent);
        Ok(())
    }

    /// Ends the connection, and waits for the guest's end.
    pub fn finish(mut self) {
        self.0.end().unwrap();
        assert_eq!(self.0.read(&mut [0; 1]).unwrap(), 0);
    }

    /// Returns true if the connection ends without a byte, with or without a reset.
    pub fn ends(mut self) -> bool {
        matches!(self.0.read(&mut [0; 1]), Ok(0) | Err(_))
    }
}

impl Door {
    /// Connects without speaking the frontend's protocol.
    pub fn knock(&self) -> io::Result<Box<dyn Knocker>> {
        Ok(match self.tcp {
            Some(address) => Box::new(TcpStream::connect(address)?),
            None => Box::new(UnixStream::connect(&self.path)?),
        })
    }

    /// Returns a connection that the guest has accepted.
    pub fn enter(&self) -> io::Result<Client> {
        let mut client: Box<dyn Stream> = match self.kind {
            Kind::Unix => Box::new(UnixStream::connect(&self.path)?),
            Kind::Tcp => Box::new(TcpStream::connect(self.tcp.unwrap())?),
            Kind::Tls => Box::new(self.tls()?),
            Kind::Handoff => Box::new(self.hand_over()?),
            Kind::Hybrid => Box::new(self.ask()?),
        };
        client.write_all(b"hello")?;
        client.flush()?;
        let mut said = [0; 5];
        client.read_exact(&mut said)?;
        assert_eq!(&said, b"hello");
        Ok(Client(client))
    }

    fn tls(&self) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
        let mut roots = RootCertStore::empty();
        let trusted = self.certificate.as_ref().unwrap();
        let certificate = CertificateDer::from_pem_slice(trusted.as_bytes()).unwrap();
        roots.add(certificate).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("localhost").unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let socket = TcpStream::connect(self.tcp.unwrap())?;
        Ok(StreamOwned::new(connection, socket))
    }

    fn hand_over(&self) -> io::Result<TcpStream> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let mut client = TcpStream::connect(listener.local_addr()?)?;
        let (accepted, _) = listener.accept()?;
        HandoffSender::connect(&self.path)?.send(&accepted, b"!")?;
        drop(accepted);
        let mut said = [0; 1];
        client.read_exact(&mut said)?;
        assert_eq!(&said, b"!");
        Ok(client)
    }

    fn ask(&self) -> io::Result<UnixStream> {
        let mut client = UnixStream::connect(&self.path)?;
        client.write_all(format!("CONNECT {ECHO}\n").as_bytes())?;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0; 1];
            client.read_exact(&mut byte)?;
            line.extend(byte);
        }
        assert!(line.starts_with(b"OK "), "{line:?}");
        Ok(client)
    }
}

/// A bare connection to a frontend.
pub trait Knocker: Read + Write + Send {
    /// Closes the connection with a reset, where the socket type has one.
    fn reset(self: Box<Self>);
}

impl Knocker for TcpStream {
    fn reset(self: Box<Self>) {
        rustix::net::sockopt::set_socket_linger(&*self, Some(Duration::ZERO)).unwrap();
    }
}

impl Knocker for UnixStream {
    fn reset(self: Box<Self>) {}
}
