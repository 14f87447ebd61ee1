//! A guest and host processes with arbitrary behaviour: valid and invalid packets, split
//! into any descriptors; receive buffers of any size, returned late; sockets of the host
//! that write, read, shut down and close; resets and pauses in between. The device
//! answers, resets connections or needs a reset, and respects its limits.
#![no_main]

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use sm_devices_vsock::testing::Guest;
use sm_devices_vsock::{ConnectOptions, Group, SocketKind, VsockConfig};

/// Ports on which the host listens, and to which it connects.
const PORTS: [u32; 2] = [1, 1030];
const LIMIT: usize = 16;
/// Bytes of a packet's header.
const HEADER: usize = 44;

type Ends = Arc<Mutex<Vec<UnixStream>>>;

/// Reads bytes from the input; zeroes after its end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(self.0.len().min(most));
        self.0 = later;
        now
    }
}

/// Creates a socket pair: one end stays here, the other goes to the device.
fn pair(kind: SocketKind, ends: &Ends) -> Option<OwnedFd> {
    let kind = match kind {
        SocketKind::Stream => SocketType::STREAM,
        SocketKind::SeqPacket => SocketType::SEQPACKET,
    };
    let (near, far) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).ok()?;
    let near = UnixStream::from(near);
    near.set_nonblocking(true).ok()?;
    ends.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(near);
    Some(far)
}

/// Builds a packet, whose addresses and type are valid in most cases.
fn packet(input: &mut Input<'_>, seen: &[(u32, u32)]) -> Vec<u8> {
    let truth = input.byte();
    let len = usize::from(input.byte()) * if truth & 0x80 != 0 { 64 } else { 1 };
    let mut packet = vec![0; HEADER];
    let head = input.bytes(HEADER);
    packet[..head.len()].copy_from_slice(head);
    if !truth.is_multiple_of(4) {
        packet[..8].copy_from_slice(&3u64.to_le_bytes());
        packet[8..16].copy_from_slice(&2u64.to_le_bytes());
        packet[24..28].copy_from_slice(&u32::try_from(len).unwrap_or(0).to_le_bytes());
        packet[28..30].copy_from_slice(&(1 + u16::from(truth % 8 == 1)).to_le_bytes());
        packet[30..32].copy_from_slice(&u16::from(truth / 8 % 9).to_le_bytes());
        // An existing connection, or a possible one.
        let (guest_port, host_port) = match seen.get(usize::from(packet[16]) % (seen.len() + 1)) {
            Some(&ports) => ports,
            None => (
                u32::from(packet[17] % 8),
                PORTS[usize::from(packet[20] % 2)],
            ),
        };
        packet[16..20].copy_from_slice(&guest_port.to_le_bytes());
        packet[20..24].copy_from_slice(&host_port.to_le_bytes());
    }
    if truth % 4 == 3 {
        // Realistic credit.
        packet[36..40].copy_from_slice(&0x1_0000_u32.to_le_bytes());
    }
    packet.resize(HEADER + len, truth);
    packet
}

fn host_acts(what: u8, input: &mut Input<'_>, ends: &Ends) {
    let mut ends = ends.lock().unwrap_or_else(PoisonError::into_inner);
    let count = ends.len();
    if count == 0 {
        return;
    }
    let which = usize::from(input.byte()) % count;
    match what {
        0 => {
            let len = usize::from(input.byte()) * 40;
            let _ = ends[which].write(&vec![7; len]);
        }
        1 => {
            let _ = ends[which].read(&mut [0; 16 << 10]);
        }
        2 => {
            let _ = ends[which].shutdown(Shutdown::Write);
        }
        3 => {
            let _ = ends[which].shutdown(Shutdown::Read);
        }
        _ => drop(ends.swap_remove(which)),
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut guest = Guest::new(VsockConfig::default()
.window(8192)
.max_connections(LIMIT));
    let ends = Ends::default();
    let group = Group::new();
    let mut seen = Vec::new();
    let listen = |guest: &Guest, port| {
        let ends = Arc::clone(&ends);
        let acceptor =
            move |stream: sm_devices_vsock::GuestStream| pair(stream.kind, &ends).map(Into::into);
        guest.muxer.listen(port, Box::new(acceptor))
    };
    let mut listening = PORTS.map(|port| Some(listen(&guest, port)));
    while !input.0.is_empty() {
        match input.byte() % 16 {
            0..6 => {
                let packet = packet(&mut input, &seen);
                let cuts = input.bytes(usize::from(packet[18] % 8)).to_vec();
                guest.offer_cut(&packet, &cuts);
            }
            6 | 7 => {
                // Returns receive buffers, of any size.
                let size = u32::from(input.byte()) * 16 + 40 + u32::from(input.byte() % 8 != 0) * 8;
                guest.take_all(size.min(4096), |ports| {
                    if seen.len() < 64 && !seen.contains(&ports) {
                        seen.push(ports);
                    }
                });
            }
            what @ 8..13 => host_acts(what - 8, &mut input, &ends),
            13 => {
                let kind = match input.byte() % 4 {
                    0 => SocketKind::SeqPacket,
                    _ => SocketKind::Stream,
                };
                let how = input.byte();
                let Some(far) = pair(kind, &ends) else {
                    return;
                };
                let options = ConnectOptions::default()
.preamble(vec![1; usize::from(how / 16)])
.status_reply(how % 4 == 0)
.member((how % 8 < 3).then(|| group.join(None)));
                guest
                    .muxer
                    .connect(PORTS[usize::from(how % 2)], far, options);
            }
            14 => {
                let which = usize::from(input.byte() % 2);
                listening[which] = match listening[which].take() {
                    Some(_) => None,
                    None => Some(listen(&guest, PORTS[which])),
                };
            }
            _ => match input.byte() % 8 {
                0 => guest.muxer.cut(&group),
                1 => guest.restart(),
                2 => guest.break_transmit_queue(),
                3 => guest.restore(),
                _ => guest.settle(),
            },
        }
    }
    guest.settle();
    let stats = guest.muxer.stats();
    // Counts connections of the guest and those that only drain.
    assert!(stats.connections <= LIMIT as u64);
});
