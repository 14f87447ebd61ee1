//! Rates, captures and small packets, with Linux as the guest.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on is a failed test"
)]

mod rig;

use std::fs::File;
use std::net::UdpSocket;
use std::num::NonZeroU64;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use sm_devices_net::engine::{FrameCapture, NetRate};

use crate::rig::{MIB, Rig, SERVER, SOON, exchange, receive, recv, send};

#[test]
fn a_rate_holds_in_each_direction_and_can_be_changed() {
    let Some(rig) = Rig::new() else { return };
    let handle = rig.handle();
    let (guest, peer) = rig.pair(SERVER.into());
    let rate = 4 * MIB as u64;
    let rate = NonZeroU64::new(rate).unwrap();
    // It can only be slower: a busy machine does not make this fail.
    let least = Duration::from_millis(350);
    for from_guest in [true, false] {
        let mut limit = NetRate::default();
        match from_guest {
            true => limit.from_guest = Some(rate),
            false => limit.to_guest = Some(rate),
        }
        handle.set_rate(limit);
        let (sender, receiver) = match from_guest {
            true => (&guest, &peer),
            false => (&peer, &guest),
        };
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| send(sender, 3, 2 * MIB));
            receive(receiver, 3, 2 * MIB);
        });
        assert!(start.elapsed() > least, "{:?}", start.elapsed());
    }
    handle.set_rate(NetRate::both(rate));
    exchange(&guest, &peer, MIB);
    // Flows that wait go on without a limit.
    handle.set_rate(NetRate::default());
    exchange(&guest, &peer, 8 * MIB);
    assert_eq!(rig.stats().malformed, 0);
}

#[test]
fn datagrams_beyond_a_rate_are_dropped() {
    let Some(rig) = Rig::new() else { return };
    let mut limit = NetRate::default();
    limit.from_guest = NonZeroU64::new(1000);
    rig.handle().set_rate(limit);
    let server = rig.internet(|| UdpSocket::bind((SERVER, 0)).unwrap());
    let client = rig.guest(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let start = Instant::now();
    // Some are lost before the engine has them.
    while rig.stats().udp_dropped < 20 {
        let _ = client.send_to(&[7; 1000], server.local_addr().unwrap());
        assert!(start.elapsed() < SOON, "{:?}", rig.stats());
    }
    let sent = rig.stats().udp_from_guest;
    assert!(
        sent >= 60 && sent <= 70 + start.elapsed().as_secs(),
        "{sent}"
    );
}

#[test]
fn a_capture_has_the_frames_of_both_directions() {
    let Some(rig) = Rig::new() else { return };
    let path = std::env::temp_dir().join(format!("sm-net-pcap-{}", std::process::id()));
    let capture = FrameCapture::new(File::create(&path).unwrap(), 1 << 24).unwrap();
    rig.handle().set_capture(Some(capture));
    let (guest, peer) = rig.pair(SERVER.into());
    exchange(&guest, &peer, MIB / 16);
    rig.handle().set_capture(None);
    exchange(&guest, &peer, MIB / 16);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    // Each frame has its length twice before it.
    let (mut at, mut frames) = (24, 0);
    while at < bytes.len() {
        let len = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
        assert_eq!(bytes[at + 8..at + 12], bytes[at + 12..at + 16]);
        at += 16 + len;
        frames += 1;
    }
    assert_eq!(at, bytes.len());
    assert!(frames > 6, "{frames} frames");
    let both = MIB / 16 * 2;
    assert!(
        bytes.len() > both && bytes.len() < 2 * both,
        "{}",
        bytes.len()
    );
}

#[test]
fn a_guest_learns_of_small_packets_on_the_way() {
    let Some(rig) = Rig::new() else { return };
    let _interface = rig.internet(|| {
        let interface = rig::create_interface("small");
        for arguments in [
            "link set small up",
            "address add 198.18.0.1/24 dev small",
            "route add 192.0.2.0/24 dev small mtu 1300",
            "neigh add 192.0.2.7 lladdr 02:00:00:00:00:07 dev small",
        ] {
            let status = Command::new("ip").args(arguments.split(' ')).status();
            assert!(status.unwrap().success(), "ip {arguments}");
        }
        interface
    });
    let client = rig.guest(|| {
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        client.connect("192.0.2.7:9000").unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        client
    });
    assert_eq!(sockopt::ip_mtu(&client).unwrap(), 1500);
    client.send(&[7; 1400]).unwrap();
    let start = Instant::now();
    while sockopt::ip_mtu(&client).unwrap() != 1300 {
        assert!(start.elapsed() < SOON);
        std::thread::sleep(Duration::from_millis(5));
    }
    // The guest sends fragments from now on, and they arrive as one datagram.
    let before = rig.stats().udp_from_guest;
    // The first call has the error of the first datagram.
    let _ = client.send(&[7; 1400]);
    client.send(&[7; 1400]).unwrap();
    let stats = rig.settle(|stats| stats.udp_from_guest > before);
    assert!(stats.reassembled > 0);
    // Other ways have their size.
    let server = rig.internet(|| UdpSocket::bind((SERVER, 0)).unwrap());
    server.set_read_timeout(Some(SOON)).unwrap();
    let address = server.local_addr().unwrap();
    client.connect(address).unwrap();
    client.send(&[7; 1472]).unwrap();
    assert_eq!(recv(&server, &mut [0; 2000]).unwrap().0, 1472);
}
