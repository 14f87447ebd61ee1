//! The frontends in a VMM of another project: a vsock device, its driver, and listeners.
//!
//! The guest is a model of a driver in this process, so that the example runs anywhere; a
//! VMM puts the device on its own transport instead (`VirtioDevice` of `sm-virtio`).
//! `cargo run -p sm-frontends --example publish`
#![allow(
    clippy::unwrap_used,
    reason = "an example stops at what it cannot do; mind this in a program"
)]

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use sm_devices_vsock::VsockConfig;
use sm_devices_vsock::testing::{Guest, REQUEST, RESPONSE, RST, RW, SHUTDOWN};
use sm_event_loop::EventLoop;
use sm_frontends::{ForwardTarget, HybridFrontend, Limit, TcpFrontend};

/// The vsock port of the guest's server.
const PORT: u32 = 5000;

fn main() {
    // The device, and a handle that opens connections to its guest. A VMM calls
    // `Vsock::new` here.
    let guest = Guest::new(VsockConfig::default());
    let muxer = guest.muxer.clone();
    std::thread::spawn(move || answer_in_capitals(guest));

    // All frontends share an event loop, which may be that of the devices, and a limit of
    // descriptors.
    let event_loop = EventLoop::spawn("frontends").unwrap();
    let limit = Limit::new(1000);
    let tcp = TcpFrontend::new((Ipv4Addr::LOCALHOST, 0).into(), ForwardTarget::Vsock(PORT))
        .limit(&limit)
        .start(muxer.clone(), &event_loop.handle())
        .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let hybrid = HybridFrontend::new(&path)
        .limit(&limit)
        .start(muxer, &event_loop.handle())
        .unwrap();

    // A client of the TCP port.
    let mut client = TcpStream::connect(tcp.local_address().tcp().unwrap()).unwrap();
    client.write_all(b"hello by TCP").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    println!("{}: {answer}", tcp.local_address());

    // A client of Firecracker's protocol.
    let mut client = UnixStream::connect(&path).unwrap();
    write!(client, "CONNECT {PORT}\nhello by vsock").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    println!("{}: {answer:?}", hybrid.local_address());

    // Stop accepting; open connections have a second to finish.
    println!("{:?}", tcp.stats());
    let cut = tcp.stop(Duration::from_secs(1)) + hybrid.stop(Duration::from_secs(1));
    println!("{cut} connections were cut");
}

/// The server in the guest: sends back what it receives, in capitals.
fn answer_in_capitals(mut guest: Guest) {
    let mut taken: HashMap<u32, u32> = HashMap::new();
    loop {
        let packet = guest.receive();
        match packet.op {
            REQUEST if packet.dst_port == PORT => guest.send(&packet.reply(RESPONSE)),
            REQUEST => guest.send(&packet.reply(RST)),
            RW => {
                let taken = taken.entry(packet.src_port).or_default();
                *taken += u32::try_from(packet.payload.len()).unwrap();
                let mut answer = packet.reply(RW);
                answer.fwd_cnt = *taken;
                answer.payload = packet.payload.to_ascii_uppercase();
                guest.send(&answer);
            }
            SHUTDOWN => {
                let mut end = packet.reply(SHUTDOWN);
                end.flags = 2;
                guest.send(&end);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_runs_to_its_end() {
        super::main();
    }
}
