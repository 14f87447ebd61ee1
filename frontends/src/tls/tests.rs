use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use sm_devices_vsock::VsockConfig;
use sm_devices_vsock::testing::{Guest, REQUEST, RESPONSE, RST, RW, SHUTDOWN};
use sm_event_loop::EventLoop;

use super::*;

type Client = StreamOwned<ClientConnection, TcpStream>;

struct Rig {
    guest: Guest,
    frontend: FrontendHandle,
    _event_loop: EventLoop,
}

fn self_signed() -> TlsIdentity {
    TlsIdentity::SelfSigned {
        names: vec!["localhost".to_owned(), "other.test".to_owned()],
    }
}

fn rig(identity: TlsIdentity) -> Rig {
    rig_with_timeout(identity, Duration::from_secs(3600))
}

fn rig_with_timeout(identity: TlsIdentity, handshake_timeout: Duration) -> Rig {
    let guest = Guest::new(VsockConfig::default());
    let event_loop = EventLoop::spawn("test").unwrap();
    let frontend = TlsFrontend::new(
        (Ipv4Addr::LOCALHOST, 0).into(),
        identity,
        ForwardTarget::Vsock(7),
    )
    .server_name("Other.test", ForwardTarget::Vsock(8))
    .handshake_timeout(handshake_timeout)
    .protocol("h2")
    .protocol("http/1.1")
    .start(guest.muxer.clone(), &event_loop.handle())
    .unwrap();
    Rig {
        guest,
        frontend,
        _event_loop: event_loop,
    }
}

impl Rig {
    fn tcp(&self) -> TcpStream {
        TcpStream::connect(self.frontend.local_address().tcp().unwrap()).unwrap()
    }

    fn client(&self, name: &'static str) -> Client {
        let trusted = self.frontend.self_signed_certificate().unwrap();
        client(self.tcp(), name, trusted, &["http/1.1"])
    }
}

fn client(socket: TcpStream, name: &'static str, trusted: &str, protocols: &[&str]) -> Client {
    let mut roots = RootCertStore::empty();
    let certificate = CertificateDer::from_pem_slice(trusted.as_bytes()).unwrap();
    roots.add(certificate).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
    let name = ServerName::try_from(name).unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    StreamOwned::new(connection, socket)
}

/// A guest that echoes, until the given number of connections have ended.
fn echo(mut guest: Guest, connections: usize) -> JoinHandle<Guest> {
    std::thread::spawn(move || {
        let mut ended = 0;
        let mut taken: HashMap<u32, u32> = HashMap::new();
        while ended < connections {
            let packet = guest.receive();
            match packet.op {
                REQUEST => guest.send(&packet.reply(RESPONSE)),
                RW => {
                    let taken = taken.entry(packet.src_port).or_default();
                    *taken += u32::try_from(packet.payload.len()).unwrap();
                    let mut back = packet.reply(RW);
                    back.fwd_cnt = *taken;
                    back.payload = packet.payload;
                    guest.send(&back);
                }
                SHUTDOWN => {
                    guest.send(&packet.reply(RST));
                    ended += 1;
                }
                RST => ended += 1,
                _ => {}
            }
        }
        guest
    })
}

#[test]
fn the_guest_gets_plain_bytes_and_an_end_is_an_end() {
    let mut rig = rig(self_signed());
    let mut client = rig.client("localhost");
    let side = std::thread::spawn(move || {
        client.write_all(b"ping").unwrap();
        let mut all = Vec::new();
        // The end of the stream without close_notify is an error.
        client.read_to_end(&mut all).unwrap();
        let protocol = client.conn.alpn_protocol().map(<[u8]>::to_vec);
        (all, protocol)
    });
    let request = rig.guest.expect(REQUEST);
    assert_eq!(request.dst_port, 7);
    rig.guest.send(&request.reply(RESPONSE));
    assert_eq!(rig.guest.expect(RW).payload, b"ping");
    let mut data = request.reply(RW);
    data.payload = b"pong".to_vec();
    rig.guest.send(&data);
    let mut end = request.reply(SHUTDOWN);
    end.flags = 2;
    rig.guest.send(&end);
    let (all, protocol) = side.join().unwrap();
    assert_eq!(all, b"pong");
    assert_eq!(protocol.as_deref(), Some(&b"http/1.1"[..]));
    assert_eq!(rig.frontend.stats().accepted, 1);
}

#[test]
fn large_streams_go_both_ways_concurrently() {
    let rig = rig(self_signed());
    let mut clients: Vec<_> = (0..4).map(|_| rig.client("localhost")).collect();
    let guest = echo(rig.guest, clients.len());
    std::thread::scope(|scope| {
        for (n, client) in (0_u8..).zip(&mut clients) {
            scope.spawn(move || {
                for round in 0..40_u8 {
                    let sent = vec![n ^ round; 50_000];
                    client.write_all(&sent).unwrap();
                    let mut received = vec![0; sent.len()];
                    client.read_exact(&mut received).unwrap();
                    assert!(sent == received);
                }
                client.conn.send_close_notify();
                client.flush().unwrap();
            });
        }
    });
    guest.join().unwrap();
}

#[test]
fn the_server_name_selects_the_target() {
    let mut rig = rig(self_signed());
    let mut client = rig.client("other.test");
    let side = std::thread::spawn(move || client.write_all(b"x").map(|()| client).unwrap());
    assert_eq!(rig.guest.expect(REQUEST).dst_port, 8);
    side.join().unwrap();
}

#[test]
fn an_end_without_close_notify_ends_the_stream_at_once() {
    let mut rig = rig(self_signed());
    let mut client = rig.client("localhost");
    let side = std::thread::spawn(move || client.write_all(b"x").map(|()| client).unwrap());
    let request = rig.guest.expect(REQUEST);
    rig.guest.send(&request.reply(RESPONSE));
    rig.guest.expect(RW);
    drop(side.join().unwrap());
    let end = rig.guest.receive();
    assert!(
        end.op == RST || (end.op == SHUTDOWN && end.flags == 3),
        "{end:?}"
    );
}

#[test]
fn no_byte_before_the_handshake_reaches_the_guest() {
    let rig = rig(self_signed());
    let mut stranger = rig.tcp();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut alert = Vec::new();
    let _ = stranger.read_to_end(&mut alert);
    assert_eq!(alert.first(), Some(&21), "an alert: {alert:?}");
    // An incomplete handshake.
    let half = rig.tcp();
    (&half).write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
    half.shutdown(Shutdown::Write).unwrap();
    assert!(matches!((&half).read(&mut [0; 8]), Ok(0) | Err(_)));
    assert_eq!(rig.frontend.stats().refused, 2);
    // A client that sends nothing is closed after the time limit.
    let rig = rig_with_timeout(self_signed(), Duration::from_millis(50));
    assert_eq!(rig.tcp().read(&mut [0; 1]).unwrap(), 0);
    let stats = rig.frontend.stats();
    assert_eq!((stats.evicted, stats.accepted), (1, 0));
}

/// Writes a new certificate and its key; returns the certificate.
fn certify(directory: &Path) -> String {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    for (name, text) in [
        ("c", made.cert.pem()),
        ("k", made.signing_key.serialize_pem()),
    ] {
        std::fs::write(directory.join("fresh"), text).unwrap();
        std::fs::rename(directory.join("fresh"), directory.join(name)).unwrap();
    }
    made.cert.pem()
}

#[test]
fn new_certificates_are_used_when_valid() {
    let directory = tempfile::tempdir().unwrap();
    let identity = TlsIdentity::Files {
        certificates: directory.path().join("c"),
        key: directory.path().join("k"),
    };
    let handshakes = |rig: &Rig, trusted: &str| {
        let mut client = client(rig.tcp(), "localhost", trusted, &[]);
        client.conn.complete_io(&mut client.sock).is_ok()
    };
    let first = certify(directory.path());
    let rig = rig(identity);
    assert!(handshakes(&rig, &first));
    std::fs::write(directory.path().join("c"), "half of a").unwrap();
    assert!(handshakes(&rig, &first));
    let second = certify(directory.path());
    assert!(handshakes(&rig, &second));
    assert!(!handshakes(&rig, &first));
}

#[test]
fn unusable_certificates_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let event_loop = EventLoop::spawn("test").unwrap();
    let guest = Guest::new(VsockConfig::default());
    certify(directory.path());
    let other = rcgen::KeyPair::generate().unwrap().serialize_pem();
    std::fs::write(directory.path().join("other"), other).unwrap();
    std::fs::write(directory.path().join("empty"), "").unwrap();
    for (certificates, key, named) in [
        ("none", "k", "none"),
        ("c", "none", "none"),
        ("empty", "k", "empty"),
        ("c", "empty", "empty"),
        ("c", "other", "c"),
    ] {
        let identity = TlsIdentity::Files {
            certificates: directory.path().join(certificates),
            key: directory.path().join(key),
        };
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let error = TlsFrontend::new(address, identity, ForwardTarget::Vsock(1))
            .start(guest.muxer.clone(), &event_loop.handle())
            .unwrap_err()
            .to_string();
        let path = directory.path().join(named);
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
}
