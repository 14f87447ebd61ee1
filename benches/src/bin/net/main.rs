//! Programs of `cargo xtask bench-net`, which runs them in network namespaces.
//!
//! - `net pump LISTEN TARGET` forwards connections with a buffer of 64 KiB for each direction:
//!   the least that a program between two sockets does.
//! - `net echo LISTEN` returns what it receives, with any number of connections.
//! - `net ask TARGET CONNECTIONS MESSAGES` sends messages over as many connections in turn, and
//!   prints the nanoseconds for each message and its answer.

mod echo;

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;

use anyhow::{Context as _, Result, bail};

/// The buffer of each direction.
const BUFFER: usize = 64 << 10;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("net: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Result<()> {
    match arguments {
        ["pump", listen, target] => pump(listen, target),
        ["echo", listen] => echo::serve(listen),
        ["ask", target, connections, messages] => {
            let connections = connections.parse().context("CONNECTIONS is no number")?;
            let messages = messages.parse().context("MESSAGES is no number")?;
            println!("{}", echo::ask(target, connections, messages)?);
            Ok(())
        }
        _ => bail!("usage: net pump LISTEN TARGET | echo LISTEN | ask TARGET CONNECTIONS MESSAGES"),
    }
}

fn pump(listen: &str, target: &str) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("cannot listen: {listen}"))?;
    println!("listening");
    loop {
        let (near, _) = listener.accept().context("cannot accept a connection")?;
        let far = TcpStream::connect(target).with_context(|| format!("cannot reach {target}"))?;
        let (near_copy, far_copy) = (near.try_clone()?, far.try_clone()?);
        thread::spawn(move || copy(near, far));
        thread::spawn(move || copy(far_copy, near_copy));
    }
}

/// Copies one direction to its end.
fn copy(mut from: TcpStream, mut to: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer)? {
            0 => return to.shutdown(Shutdown::Write),
            len => to.write_all(&buffer[..len])?,
        }
    }
}
