//! The comparison: threads that copy between two sockets.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use rustix::event::epoll;

/// Bytes per read or write at the ends of a stream.
pub(crate) const CHUNK: usize = 64 << 10;
/// The buffer of a typical pump.
const USUAL: usize = 16 << 10;

pub(crate) fn join<T>(thread: JoinHandle<T>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("a thread panicked"))
}

/// Writes `amount` bytes in chunks.
pub(crate) fn give(mut to: UnixStream, amount: usize) -> JoinHandle<std::io::Result<()>> {
    spawn(move || {
        let chunk = vec![7; CHUNK];
        let mut left = amount;
        while left > 0 {
            let now = left.min(CHUNK);
            to.write_all(chunk.get(..now).unwrap_or_default())?;
            left -= now;
        }
        Ok(())
    })
}

/// Reads until the end, which must come after `amount` bytes.
pub(crate) fn drain(from: &mut UnixStream, amount: usize) -> Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut left = amount;
    while left > 0 {
        let count = from.read(&mut chunk)?;
        left = left.checked_sub(count).context("more came than was sent")?;
        if count == 0 {
            return Err(anyhow!("the stream ended early"));
        }
    }
    Ok(())
}

/// Starts a thread that copies from one socket to another, and forwards the end.
fn pump(mut from: UnixStream, mut to: UnixStream, buffer: usize) -> Result<JoinHandle<()>> {
    let work = move || {
        let mut chunk = vec![0; buffer];
        while let Ok(count @ 1..) = from.read(&mut chunk) {
            if to
                .write_all(chunk.get(..count).unwrap_or_default())
                .is_err()
            {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    };
    Ok(std::thread::Builder::new()
        .stack_size(128 << 10)
        .spawn(work)?)
}

/// Returns the ends of a connection through two threads.
pub(crate) fn connection() -> Result<(UnixStream, UnixStream, [JoinHandle<()>; 2])> {
    let (near, from) = UnixStream::pair()?;
    let (to, far) = UnixStream::pair()?;
    let there = pump(from.try_clone()?, to.try_clone()?, USUAL)?;
    let back = pump(to, from, USUAL)?;
    Ok((near, far, [there, back]))
}

/// Sends `amount` bytes from one process's end to the other through a pump.
pub(crate) fn stream(buffer: usize, amount: usize) -> Result<Duration> {
    let (near, from) = UnixStream::pair()?;
    let (to, mut far) = UnixStream::pair()?;
    let pump = pump(from, to, buffer)?;
    let took = super::timed(|| {
        let giver = give(near, amount);
        drain(&mut far, amount)?;
        Ok(join(giver)??)
    })?;
    join(pump)?;
    Ok(took)
}

/// The host's ends of connections whose other ends echo.
pub(crate) struct HostEnds {
    pub(crate) ends: Vec<UnixStream>,
}

impl HostEnds {
    /// Writes a message on each connection, then reads the echoes as they arrive; repeats
    /// for `turns`.
    pub(crate) fn turns(&mut self, message: usize, turns: usize) -> Result<()> {
        let epoll = waiting(&self.ends)?;
        let out = vec![7; message];
        let mut back = vec![0; message];
        let mut events = Vec::with_capacity(256);
        for _ in 0..turns {
            for end in &mut self.ends {
                end.write_all(&out)?;
            }
            let mut left = message * self.ends.len();
            while left > 0 {
                events.clear();
                epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None)?;
                for event in &events {
                    if let Some(end) = self.ends.get_mut(usize::try_from(event.data.u64())?) {
                        left -= end.read(&mut back)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Measures `count` round trips of 64 bytes while the others are busy. When `other`
    /// is readable, this thread calls its function, too.
    pub(crate) fn latency(
        &mut self,
        count: usize,
        other: Option<(BorrowedFd<'_>, &mut dyn FnMut() -> Result<()>)>,
    ) -> Result<Vec<Trip>> {
        let mut trips = RoundTrips::begin(&mut self.ends)?;
        let mut nothing = || Ok(());
        let part = match other {
            Some((fd, part)) => {
                let data = epoll::EventData::new_u64(OTHER);
                epoll::add(&trips.epoll, fd, data, epoll::EventFlags::IN)?;
                part
            }
            None => &mut nothing,
        };
        let warm = count / 10;
        while trips.done.len() < count + warm {
            trips.step(&mut self.ends, part)?;
        }
        Ok(trips.done.split_off(warm))
    }
}

/// Returns an epoll instance for the ends, by index.
fn waiting(ends: &[UnixStream]) -> Result<OwnedFd> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for (index, end) in (0..).zip(ends) {
        let data = epoll::EventData::new_u64(index);
        epoll::add(&epoll, end, data, epoll::EventFlags::IN)?;
    }
    Ok(epoll)
}

/// One round trip.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trip {
    pub(crate) time: Duration,
    /// Round trips of neighbours that ended in the meantime: a measure of its wait that
    /// is independent of other load.
    pub(crate) others: usize,
}

/// Round trips of 64 bytes on the first connection, while each of the others has 4 KiB in
/// flight.
struct RoundTrips {
    epoll: OwnedFd,
    got: Vec<usize>,
    begun: Instant,
    others: usize,
    done: Vec<Trip>,
}

const BUSY: usize = 4096;
/// Epoll data of `other`.
const OTHER: u64 = u64::MAX;

fn size(index: usize) -> usize {
    if index == 0 { 64 } else { BUSY }
}

impl RoundTrips {
    fn begin(ends: &mut [UnixStream]) -> Result<Self> {
        let epoll = waiting(ends)?;
        for (index, end) in ends.iter_mut().enumerate() {
            end.write_all(&vec![7; size(index)])?;
        }
        Ok(Self {
            epoll,
            got: vec![0; ends.len()],
            begun: Instant::now(),
            others: 0,
            done: Vec::new(),
        })
    }

    /// Waits for input, and answers it.
    fn step(
        &mut self,
        ends: &mut [UnixStream],
        other: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let mut room = [0; BUSY];
        let mut events = Vec::with_capacity(256);
        let spare = rustix::buffer::spare_capacity(&mut events);
        epoll::wait(&self.epoll, spare, None)?;
        for event in &events {
            if event.data.u64() == OTHER {
                other()?;
                continue;
            }
            let index = usize::try_from(event.data.u64())?;
            let (Some(end), Some(got)) = (ends.get_mut(index), self.got.get_mut(index)) else {
                continue;
            };
            let left = size(index) - *got;
            *got += end.read(room.get_mut(..left).unwrap_or_default())?;
            if *got < size(index) {
                continue;
            }
            *got = 0;
            if index == 0 {
                self.done.push(Trip {
                    time: self.begun.elapsed(),
                    others: std::mem::take(&mut self.others),
                });
                self.begun = Instant::now();
            } else {
                self.others += 1;
            }
            end.write_all(room.get(..size(index)).unwrap_or_default())?;
        }
        Ok(())
    }
}

/// Connections with two threads each, and a thread that echoes at the other ends, as the
/// guest's process would.
pub(crate) struct HostEcho {
    host: HostEnds,
    pumps: Vec<JoinHandle<()>>,
    echo: Option<JoinHandle<Result<()>>>,
}

impl HostEcho {
    pub(crate) fn new(count: usize) -> Result<Self> {
        let mut ends = Vec::with_capacity(count);
        let mut far_ends = Vec::with_capacity(count);
        let mut pumps = Vec::with_capacity(2 * count);
        for _ in 0..count {
            let (near, far, both) = connection()?;
            pumps.extend(both);
            ends.push(near);
            far_ends.push(far);
        }
        let echo = spawn(move || echo(far_ends));
        Ok(Self {
            host: HostEnds { ends },
            pumps,
            echo: Some(echo),
        })
    }

    pub(crate) fn turns(&mut self, message: usize, turns: usize) -> Result<Duration> {
        super::timed(|| self.host.turns(message, turns))
    }

    pub(crate) fn latency(&mut self, count: usize) -> Result<Vec<Trip>> {
        self.host.latency(count, None)
    }
}

impl Drop for HostEcho {
    fn drop(&mut self) {
        self.host.ends.clear();
        for pump in self.pumps.drain(..) {
            let _ = pump.join();
        }
        if let Some(echo) = self.echo.take() {
            let _ = echo.join();
        }
    }
}

/// Echoes on all sockets until all have ended.
fn echo(mut ends: Vec<UnixStream>) -> Result<()> {
    let epoll = waiting(&ends)?;
    let mut room = vec![0; CHUNK];
    let mut open = ends.len();
    let mut events = Vec::with_capacity(256);
    while open > 0 {
        events.clear();
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let index = usize::try_from(event.data.u64())?;
            let Some(end) = ends.get_mut(index) else {
                continue;
            };
            match end.read(&mut room)? {
                0 => {
                    epoll::delete(&epoll, &*end)?;
                    end.shutdown(Shutdown::Both)?;
                    open -= 1;
                }
                count => end.write_all(room.get(..count).unwrap_or_default())?,
            }
        }
    }
    Ok(())
}
