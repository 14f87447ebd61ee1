//! Any packets from a guest to the vsock device, between packets that make
//! sense: it answers, or resets connections, and stays within its limits.
#![no_main]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use sm_devices_vsock::testing::Guest;
use sm_devices_vsock::{ConnectOptions, VsockConfig};

/// Ports on which the host listens, and to which it connects.
const PORTS: [u32; 2] = [1, 1030];
const LIMIT: usize = 16;
/// Bytes of a packet's header.
const HEADER: usize = 44;

fuzz_target!(|data: &[u8]| {
    let mut guest = Guest::new(VsockConfig {
        window: 4096,
        max_connections: LIMIT,
        ..VsockConfig::default()
    });
    let mut ours = Vec::new();
    for port in PORTS {
        let listening = guest.muxer.listen(
            port,
            Box::new(|_| {
                let (near, far) = UnixStream::pair().ok()?;
                // Nobody reads: what the guest sends has to be kept, or refused.
                std::mem::forget(near);
                Some(OwnedFd::from(far).into())
            }),
        );
        listening.forever();
        let (near, far) = UnixStream::pair().expect("descriptors");
        guest
            .muxer
            .connect(port, far.into(), ConnectOptions::default());
        ours.push(near);
    }
    let mut rest = data;
    while let [len, near_truth, after @ ..] = rest {
        let (packet, later) = after.split_at(after.len().min(HEADER + usize::from(*len)));
        let mut packet = packet.to_vec();
        if packet.len() >= HEADER && near_truth % 2 == 0 {
            // Addresses and type that get past the first look.
            packet[..8].copy_from_slice(&3u64.to_le_bytes());
            packet[8..16].copy_from_slice(&2u64.to_le_bytes());
            packet[28..30].copy_from_slice(&1u16.to_le_bytes());
            packet[30..32].copy_from_slice(&u16::from(near_truth / 2 % 9).to_le_bytes());
            if near_truth % 4 == 0 {
                let port = PORTS[usize::from(near_truth / 32 % 2)];
                packet[20..24].copy_from_slice(&port.to_le_bytes());
            }
        }
        guest.send_bytes(&packet);
        rest = later;
    }
    assert!(guest.muxer.stats().connections <= LIMIT);
});
