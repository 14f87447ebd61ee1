//! Messages and their answers, over many connections.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use anyhow::{Context as _, Result};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// Bytes of a message.
const MESSAGE: usize = 64;
/// Messages before the measurement, over each connection.
const WARM_UP: usize = 2;

/// Returns what arrives, over any number of connections.
pub(crate) fn serve(listen: &str) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("cannot listen: {listen}"))?;
    listener.set_nonblocking(true)?;
    let poll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&poll, &listener, data(&listener), EventFlags::IN)?;
    let mut connections: HashMap<u64, TcpStream> = HashMap::new();
    println!("listening");
    let mut events = Vec::with_capacity(256);
    loop {
        events.clear();
        epoll::wait(&poll, spare_capacity(&mut events), None)?;
        for event in &events {
            let event: &epoll::Event = event;
            let number = event.data.u64();
            if number == data(&listener).u64() {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nodelay(true)?;
                    stream.set_nonblocking(true)?;
                    epoll::add(&poll, &stream, data(&stream), EventFlags::IN)?;
                    connections.insert(data(&stream).u64(), stream);
                }
            } else if let Some(stream) = connections.get_mut(&number)
                && !answer(stream).unwrap_or(false)
            {
                connections.remove(&number);
            }
        }
    }
}

/// Returns false at the end of the stream.
fn answer(stream: &mut TcpStream) -> io::Result<bool> {
    let mut message = [0; MESSAGE];
    match stream.read(&mut message) {
        Ok(0) => Ok(false),
        Ok(len) => stream.write_all(&message[..len]).map(|()| true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error),
    }
}

fn data(stream: &impl AsRawFd) -> EventData {
    let fd: RawFd = stream.as_raw_fd();
    EventData::new_u64(u64::try_from(fd).unwrap_or(0))
}

/// Returns the nanoseconds for each message and its answer, over each connection in turn.
pub(crate) fn ask(target: &str, connections: usize, messages: usize) -> Result<u128> {
    let connect = || -> Result<TcpStream> {
        let stream = TcpStream::connect(target)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    };
    let mut streams = Vec::new();
    for _ in 0..connections {
        streams.push(connect().with_context(|| format!("cannot reach {target}"))?);
    }
    let mut turn = |count: usize| -> Result<()> {
        let mut message = [7; MESSAGE];
        for number in 0..count {
            let index = number % streams.len();
            let stream = streams.get_mut(index).context("there is no connection")?;
            stream.write_all(&message)?;
            stream.read_exact(&mut message)?;
        }
        Ok(())
    };
    turn(connections * WARM_UP)?;
    let started = Instant::now();
    turn(messages)?;
    let count = u128::try_from(messages.max(1))?;
    Ok(started.elapsed().as_nanos() / count)
}
