//! Arbitrary chunks and ends between a client of the exec socket and the guest, in any
//! order: each side receives the other's bytes and end.
#![no_main]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use sm_devices_vsock::VsockConfig;
use sm_devices_vsock::testing::{Guest, Packet, REQUEST, RESPONSE, RST, RW, SHUTDOWN};
use sm_event_loop::EventLoop;
use sm_frontends::{ForwardTarget, FrontendHandle, UnixFrontend};
use sm_guest_proto::port;

/// The rig is created once and reused for all connections.
struct Rig {
    guest: Guest,
    path: PathBuf,
    _frontend: FrontendHandle,
    _event_loop: EventLoop,
    _directory: tempfile::TempDir,
}

thread_local! {
    static RIG: RefCell<Option<Rig>> = const { RefCell::new(None) };
}

fn rig() -> Rig {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("exec.sock");
    let guest = Guest::new(VsockConfig::default());
    let event_loop = EventLoop::spawn("fuzz").expect("a thread");
    let frontend = UnixFrontend::new(&path, ForwardTarget::Exec)
        .start(guest.muxer.clone(), &event_loop.handle())
        .expect("a socket");
    Rig {
        guest,
        path,
        _frontend: frontend,
        _event_loop: event_loop,
        _directory: directory,
    }
}

/// A connection with both its ends.
struct Bridge<'a> {
    guest: &'a mut Guest,
    client: UnixStream,
    request: Packet,
    /// Bytes that the guest has received.
    taken: u32,
    client_ended: bool,
    guest_ended: bool,
}

impl Bridge<'_> {
    fn client_says(&mut self, bytes: &[u8]) {
        if self.client_ended || bytes.is_empty() {
            return;
        }
        self.client.write_all(bytes).expect("the guest reads");
        let mut got = Vec::new();
        while got.len() < bytes.len() {
            let packet = self.guest.receive();
            if packet.op == RW {
                got.extend(packet.payload);
            }
        }
        assert_eq!(got, bytes);
        self.taken = self.taken.wrapping_add(bytes.len() as u32);
    }

    fn guest_says(&mut self, bytes: &[u8]) {
        if self.guest_ended || bytes.is_empty() {
            return;
        }
        let mut packet = self.request.reply(RW);
        packet.fwd_cnt = self.taken;
        packet.payload = bytes.to_vec();
        self.guest.send(&packet);
        let mut got = vec![0; bytes.len()];
        self.client.read_exact(&mut got).expect("what was sent");
        assert_eq!(got, bytes);
    }

    fn client_ends(&mut self) {
        if !std::mem::replace(&mut self.client_ended, true) {
            self.client.shutdown(Shutdown::Write).expect("a socket");
            // When both directions have ended, the connection may be closed at once.
            while ![SHUTDOWN, RST].contains(&self.guest.receive().op) {}
        }
    }

    fn guest_ends(&mut self) {
        if !std::mem::replace(&mut self.guest_ended, true) {
            let mut end = self.request.reply(SHUTDOWN);
            end.flags = 2;
            self.guest.send(&end);
            assert_eq!(self.client.read(&mut [0; 1]).expect("an end"), 0);
        }
    }

    /// Ends both directions, so that nothing is left for the next connection.
    fn finish(mut self) {
        self.client_ends();
        self.guest_ends();
        self.guest.send(&self.request.reply(RST));
    }
}

fuzz_target!(|data: &[u8]| {
    RIG.with_borrow_mut(|place| {
        let rig = place.get_or_insert_with(rig);
        let client = UnixStream::connect(&rig.path).expect("a listener");
        let request = loop {
            let packet = rig.guest.receive();
            // Packets of the previous connection may still arrive.
            if packet.op == REQUEST {
                break packet;
            }
        };
        assert_eq!(request.dst_port, port::EXEC);
        rig.guest.send(&request.reply(RESPONSE));
        let mut bridge = Bridge {
            guest: &mut rig.guest,
            client,
            request,
            taken: 0,
            client_ended: false,
            guest_ended: false,
        };
        let mut rest = data;
        // Each step is an operation, a length and bytes.
        while let [what, len, after @ ..] = rest {
            let (bytes, later) = after.split_at(after.len().min(usize::from(*len)));
            rest = later;
            match what % 8 {
                0..3 => bridge.client_says(bytes),
                3..6 => bridge.guest_says(bytes),
                6 => bridge.client_ends(),
                _ => bridge.guest_ends(),
            }
        }
        bridge.finish();
    });
});
