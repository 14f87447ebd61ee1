use std::io::{IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use sm_devices_vsock::VsockConfig;
use sm_devices_vsock::testing::{Guest, Packet, REQUEST, RESPONSE, RW};
use sm_event_loop::EventLoop;
use sm_guest_proto::forward::HEADER_LEN;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;

const TARGET: ForwardHeader = ForwardHeader {
    port: 80,
    wait_ms: 5,
};

struct Rig {
    guest: Guest,
    path: PathBuf,
    _frontend: FrontendHandle,
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
    /// Accepts a stream in the guest and returns its first `len` bytes after the forward
    /// header.
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
        // Closing it here would add a packet.
        clients.push(client);
    }
}

/// A socket of root is accepted for every user, that of another user only for itself.
#[test]
fn another_users_socket_gets_no_clients() {
    let rig = rig();
    let own = rustix::process::geteuid();
    HandoffSender::connect_to_user(&rig.path, own.as_raw()).unwrap();
    let other = HandoffSender::connect_to_user(&rig.path, own.as_raw() + 1);
    if !own.is_root() {
        let error = other.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        return;
    }
    other.unwrap();
    // A user without rights takes the path before the VM does.
    let stranger = 65_534;
    let path = rig.path.with_file_name("taken");
    let directory = path.parent().unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(directory, open).unwrap();
    let listener = std::thread::scope(|scope| {
        let stranger = scope.spawn(|| {
            let uid = rustix::process::Uid::from_raw(stranger);
            // Of this thread only.
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            UnixListener::bind(&path).unwrap()
        });
        stranger.join().unwrap()
    });
    let error = HandoffSender::connect(&path).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    assert!(error.to_string().contains("user 65534"), "{error}");
    HandoffSender::connect_to_user(&path, stranger).unwrap();
    drop(listener);
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

/// Returns true if all descriptors of the other end of the pair are closed.
fn is_closed(mut client: &UnixStream) -> bool {
    matches!(client.read(&mut [0; 1]), Ok(0))
}

#[test]
fn violations_close_all_received_descriptors() {
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
    // Other routers are still served.
    let mut sender = HandoffSender::connect(&rig.path).unwrap();
    let (_client, socket) = UnixStream::pair().unwrap();
    sender.send(&socket, b"fine").unwrap();
    assert_eq!(rig.accepts(4).1, b"fine");
}

#[test]
fn nothing_can_be_sent_after_a_partial_handoff() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    // The peer does not read: the socket buffer takes a part of the handoff.
    ours.set_nonblocking(true).unwrap();
    let mut sender = HandoffSender::from(ours);
    let (_client, socket) = UnixStream::pair().unwrap();
    let error = sender.send(&socket, &vec![7; MAX_PAYLOAD]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(sender.is_broken());
    let mut begun = vec![0; MAX_PAYLOAD];
    assert!(theirs.read(&mut begun).unwrap() > HEADER);
    // The buffer has space now, but the peer would take new bytes for the rest.
    let error = sender.send(&socket, b"next").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    drop(sender);
    let mut rest = Vec::new();
    let _ = theirs.read_to_end(&mut rest);
    assert!(!rest.ends_with(b"next"));
    // A failure before the first byte leaves the sender usable.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut sender = HandoffSender::from(ours);
    drop(theirs);
    assert!(sender.send(&socket, b"gone").is_err());
    assert!(!sender.is_broken());
}
