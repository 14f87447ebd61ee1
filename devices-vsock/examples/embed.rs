//! The device without a VM: a model of a Linux driver is the guest.
//!
//! `cargo run -p sm-devices-vsock --example embed`

use std::error::Error;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;

use sm_devices_vsock::testing::linux::{LinuxGuest, Profile, SocketId};
use sm_devices_vsock::{ConnectOptions, VsockConfig};

/// Ports on which the guest and the host listen.
const GUEST_PORT: u32 = 1024;
const HOST_PORT: u32 = 5000;

fn main() -> Result<(), Box<dyn Error>> {
    // A VMM would call `Vsock::new(config)`, and create a transport for the device. The
    // model has done that, and started the driver.
    let mut guest = LinuxGuest::new(VsockConfig::default(), Profile::LINUX);
    let muxer = guest.muxer.clone();

    // From the host to the guest: the caller passes one end of a socket.
    let (mut ours, theirs) = UnixStream::pair()?;
    let (told, result) = channel();
    let options = ConnectOptions::default().on_result(move |outcome| {
        let _ = told.send(outcome);
    });
    muxer.connect(GUEST_PORT, theirs.into(), options);
    ours.write_all(b"hello from the host")?;
    let socket = wait_for(&mut guest, |guest, id| guest.readable(id) > 0);
    println!("the guest accepted: host port {}", result.recv()??);
    let mut room = [0; 64];
    let count = guest.read(socket, &mut room);
    println!(
        "the guest reads {:?}",
        String::from_utf8_lossy(&room[..count])
    );
    guest.write(socket, b"hello from the guest");
    guest.kick();
    let count = ours.read(&mut room)?;
    println!(
        "the host reads {:?}",
        String::from_utf8_lossy(&room[..count])
    );

    // From the guest to the host: an acceptor answers with one end of a socket.
    let (accepted, connections) = channel();
    let listening = muxer.listen(
        HOST_PORT,
        Box::new(move |stream| {
            println!(
                "the guest dials {} from {}",
                stream.host_port, stream.guest_port
            );
            let (ours, theirs) = UnixStream::pair().ok()?;
            accepted.send(ours).ok()?;
            Some(OwnedFd::from(theirs).into())
        }),
    );
    let dialled = guest.connect(2000, HOST_PORT);
    wait_for(&mut guest, |guest, id| {
        id == dialled && guest.is_established(id)
    });
    guest.write(dialled, b"a report");
    guest.shut_down(dialled, 2);
    guest.kick();
    let mut report = String::new();
    connections.recv()?.read_to_string(&mut report)?;
    println!("the host reads {report:?}, and the end of the stream");
    drop(listening);

    println!("{:#?}", muxer.stats());
    Ok(())
}

/// Waits for an event of a socket of the guest.
fn wait_for(guest: &mut LinuxGuest, happened: impl Fn(&LinuxGuest, SocketId) -> bool) -> SocketId {
    loop {
        guest.wait();
        while let Some(id) = guest.next_event() {
            if happened(guest, id) {
                return id;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_runs_to_its_end() {
        super::main().unwrap();
    }
}
