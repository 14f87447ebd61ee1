//! The device with a model of a Linux guest.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use sm_devices_vsock::testing::linux::{LinuxGuest, Profile, SocketId};
use sm_devices_vsock::{ConnectOptions, ProfileStage, Profiler, VsockConfig};

use super::pump::{CHUNK, HostEnds, Trip, connection, drain, give, join};

const PORT: u32 = 7;

fn profile(payload: u32) -> Profile {
    if payload + 44 == Profile::LINUX.buffer {
        Profile::LINUX
    } else {
        Profile::with_payload(payload)
    }
}

fn connect(guest: &mut LinuxGuest) -> Result<(UnixStream, SocketId)> {
    let (ours, theirs) = UnixStream::pair()?;
    Ok((ours, accepted(guest, theirs)?))
}

/// Returns the guest's socket that is connected with `theirs`.
fn accepted(guest: &mut LinuxGuest, theirs: UnixStream) -> Result<SocketId> {
    guest
        .muxer
        .connect(PORT, theirs.into(), ConnectOptions::default());
    loop {
        guest.wait();
        while let Some(id) = guest.next_event() {
            if guest.is_established(id) {
                return Ok(id);
            }
        }
    }
}

/// Sends `amount` bytes from a process on the host to an application's buffer in the
/// guest.
pub(crate) fn to_guest(payload: u32, amount: usize, profiled: bool) -> Result<Duration> {
    let mut guest = LinuxGuest::new(VsockConfig::default(), profile(payload));
    let (host, id) = connect(&mut guest)?;
    if profiled {
        guest.muxer.profiler().start();
    }
    let mut room = vec![0; CHUNK];
    super::timed(|| {
        let giver = give(host, amount);
        let mut left = amount;
        while left > 0 {
            match guest.read(id, &mut room) {
                0 => guest.wait(),
                count => {
                    left -= count;
                    guest.poll();
                }
            }
        }
        Ok(join(giver)??)
    })
}

/// Sends `amount` bytes from an application in the guest, in packets of `payload`, to a
/// process on the host.
pub(crate) fn to_host(payload: u32, amount: usize) -> Result<Duration> {
    let mut guest = LinuxGuest::new(VsockConfig::default(), Profile::LINUX);
    let (mut host, id) = connect(&mut guest)?;
    let data = vec![7; payload as usize];
    super::timed(|| {
        let reader = std::thread::spawn(move || drain(&mut host, amount));
        let mut left = amount;
        while left > 0 {
            let now = data.get(..left.min(data.len())).unwrap_or_default();
            match guest.write(id, now) {
                0 => guest.wait(),
                count => {
                    left -= count;
                    guest.poll();
                }
            }
        }
        join(reader)?
    })
}

pub(crate) fn cost_of_a_stage_that_is_off() -> f64 {
    const TIMES: u32 = 50_000_000;
    let profiler = Profiler::default();
    let begun = Instant::now();
    for _ in 0..TIMES {
        let stage = std::hint::black_box(&profiler).begin();
        profiler.end(ProfileStage::SocketRead, std::hint::black_box(stage));
    }
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(TIMES)
}

/// Connections to a guest that echoes on each.
pub(crate) struct GuestEcho {
    host: HostEnds,
    guest: Option<JoinHandle<()>>,
    stop: Sender<()>,
    /// Wakes the guest to stop.
    muxer: sm_devices_vsock::MuxerHandle,
}

impl GuestEcho {
    pub(crate) fn new(count: usize) -> Result<Self> {
        let mut guest = LinuxGuest::new(VsockConfig::default(), Profile::LINUX);
        let mut ends = Vec::with_capacity(count);
        for _ in 0..count {
            ends.push(connect(&mut guest)?.0);
        }
        Self::of(guest, ends)
    }

    /// Creates connections with two threads each between the host's processes and the
    /// device.
    pub(crate) fn behind_threads(count: usize) -> Result<Self> {
        let mut guest = LinuxGuest::new(VsockConfig::default(), Profile::LINUX);
        let mut ends = Vec::with_capacity(count);
        for _ in 0..count {
            // The threads end with their sockets.
            let (near, far, _) = connection()?;
            accepted(&mut guest, far)?;
            ends.push(near);
        }
        Self::of(guest, ends)
    }

    fn of(mut guest: LinuxGuest, ends: Vec<UnixStream>) -> Result<Self> {
        let muxer = guest.muxer.clone();
        let (stop, stopped) = channel();
        let guest = std::thread::Builder::new()
            .name("guest".to_owned())
            .spawn(move || echo(&mut guest, &stopped))?;
        Ok(Self {
            host: HostEnds { ends },
            guest: Some(guest),
            stop,
            muxer,
        })
    }

    pub(crate) fn turns(&mut self, message: usize, turns: usize) -> Result<Duration> {
        super::timed(|| self.host.turns(message, turns))
    }
}

/// Measures `count` round trips of 64 bytes with busy `neighbours`. One thread plays the
/// host's processes and the guest, so that the scheduler is not measured: with the
/// device's thread there are two, which any machine has processors for.
pub(crate) fn latency(neighbours: usize, count: usize) -> Result<Vec<Trip>> {
    let mut guest = LinuxGuest::new(VsockConfig::default(), Profile::LINUX);
    let mut ends = Vec::with_capacity(neighbours + 1);
    for _ in 0..=neighbours {
        ends.push(connect(&mut guest)?.0);
    }
    let line = guest.driver.line.clone();
    let mut echo = Echoing::default();
    let mut serve = || {
        // There may have been no interrupt yet: the driver enables it in this call.
        let _ = rustix::io::read(line.event(), &mut [0; 8]);
        guest.serve();
        echo.serve(&mut guest);
        Ok(())
    };
    serve()?;
    HostEnds { ends }.latency(count, Some((line.event(), &mut serve)))
}

impl Drop for GuestEcho {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        if let Ok((_ours, theirs)) = UnixStream::pair() {
            self.muxer
                .connect(PORT, theirs.into(), ConnectOptions::default());
        }
        if let Some(guest) = self.guest.take() {
            let _ = guest.join();
        }
    }
}

/// Echoes until stopped.
fn echo(guest: &mut LinuxGuest, stopped: &Receiver<()>) {
    let mut echo = Echoing::default();
    while stopped.try_recv().is_err() {
        guest.wait();
        echo.serve(guest);
    }
}

/// An application that echoes.
#[derive(Default)]
struct Echoing {
    room: Vec<u8>,
    /// Bytes that wait for credit, by socket.
    pending: Vec<VecDeque<u8>>,
}

impl Echoing {
    /// Serves the sockets with events.
    fn serve(&mut self, guest: &mut LinuxGuest) {
        self.room.resize(CHUNK, 0);
        while let Some(id) = guest.next_event() {
            if self.pending.len() <= id.index() {
                self.pending.resize_with(id.index() + 1, VecDeque::new);
            }
            self.socket(guest, id);
        }
        guest.kick();
    }

    fn socket(&mut self, guest: &mut LinuxGuest, id: SocketId) {
        let Some(pending) = self.pending.get_mut(id.index()) else {
            return;
        };
        loop {
            let front = pending.make_contiguous();
            if !front.is_empty() {
                let sent = guest.write(id, front);
                if sent == 0 {
                    guest.retry(id);
                    return;
                }
                pending.drain(..sent);
                continue;
            }
            let count = guest.read(id, &mut self.room);
            if count == 0 {
                return;
            }
            let data = self.room.get(..count).unwrap_or_default();
            let sent = guest.write(id, data);
            pending.extend(data.get(sent..).unwrap_or_default());
        }
    }
}
