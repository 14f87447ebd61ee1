use std::io::{BufRead as _, BufReader, Read as _, Write as _};

use sm_devices_vsock::VsockConfig;
use sm_devices_vsock::testing::{Guest, Packet, REQUEST, RESPONSE, RST, RW};
use sm_event_loop::EventLoop;

use super::*;

struct Rig {
    guest: Guest,
    path: PathBuf,
    frontend: FrontendHandle,
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
        frontend,
        _event_loop: event_loop,
        _directory: directory,
    }
}

#[test]
fn a_client_requests_a_port_and_receives_ok() {
    let mut rig = rig();
    let mut client = UnixStream::connect(&rig.path).unwrap();
    // The line arrives in pieces, with data after it.
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
fn a_port_without_a_listener_ends_the_connection() {
    let mut rig = rig();
    let mut client = UnixStream::connect(&rig.path).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    let request = rig.guest.expect(REQUEST);
    rig.guest.send(&request.reply(RST));
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn invalid_requests_end_their_connection_only() {
    let mut rig = rig();
    for nonsense in [
        "GET / HTTP/1.1\r\n",
        "CONNECT \n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "CONNECT 999999999999999999999999",
        "CONNECT -1\n",
        "\n",
    ] {
        let mut client = UnixStream::connect(&rig.path).unwrap();
        client.write_all(nonsense.as_bytes()).unwrap();
        // The client reads the end of the stream, or a reset because unread bytes were
        // dropped.
        assert!(
            matches!(client.read(&mut [0; 8]), Ok(0) | Err(_)),
            "{nonsense:?}"
        );
    }
    let mut client = UnixStream::connect(&rig.path).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    assert_eq!(rig.guest.expect(REQUEST).dst_port, 9);
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
    let stats = rig.frontend.stats();
    assert_eq!((stats.accepted, stats.active, stats.from_guest), (1, 1, 11));
    // A closed frontend refuses connections of the guest.
    rig.frontend.close();
    rig.guest.send(&Packet::from_guest(57, 1234, REQUEST));
    rig.guest.expect(RST);
    server.write_all(b"goes on").unwrap();
    assert_eq!(rig.guest.expect(RW).payload, b"goes on");
}

/// A server whose socket is of another user.
#[test]
fn the_guest_does_not_reach_another_users_socket() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("this needs root, to be somebody else");
        return;
    }
    let mut rig = rig();
    let beside = rig.path.with_file_name("v.sock_1300");
    let listen = move || {
        let flags = SocketFlags::CLOEXEC;
        let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
        let socket = rustix::net::socket_with(family, kind, flags, None).unwrap();
        rustix::net::bind(&socket, &SocketAddrUnix::new(beside).unwrap()).unwrap();
        // These credentials are of this thread only. The peer of a socket is the user
        // that called listen(2).
        let nobody = rustix::fs::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        rustix::net::listen(&socket, 8).unwrap();
        UnixListener::from(socket)
    };
    let listener = std::thread::spawn(listen).join().unwrap();
    rig.guest.send(&Packet::from_guest(55, 1300, REQUEST));
    rig.guest.expect(RST);
    let (mut stream, _) = listener.accept().unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(rig.frontend.stats().accepted, 0);
}
