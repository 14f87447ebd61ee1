//! A TCP server on the loop, which sends back what it gets: one handler, any number of
//! connections. `cargo run -p sm-event-loop --example echo [ADDRESS]`

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sm_event_loop::{EventHandler, EventLoop, Interest, Readiness, Registered, Registry};

/// The listener's token; connections have those from 1 on.
const LISTENER: u64 = 0;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:7000".to_owned());
    let event_loop = EventLoop::spawn("echo")?;
    println!("listening on {}", listen(&event_loop, address.parse()?)?);
    loop {
        // The loop has a thread of its own.
        std::thread::park();
    }
}

/// Adds a server to a loop and returns where it listens.
fn listen(event_loop: &EventLoop, address: SocketAddr) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let server = Echo {
        new: Some(listener),
        listener: None,
        connections: HashMap::new(),
        next: LISTENER + 1,
    };
    event_loop
        .handle()
        .add_handler(Arc::new(Mutex::new(server)))?;
    Ok(address)
}

struct Echo {
    /// The listener until the loop starts the server.
    new: Option<TcpListener>,
    listener: Option<Registered<TcpListener>>,
    connections: HashMap<u64, Registered<TcpStream>>,
    next: u64,
}

impl EventHandler for Echo {
    fn start(&mut self, registry: &mut dyn Registry) -> io::Result<()> {
        if let Some(listener) = self.new.take() {
            self.listener = Some(registry.add(listener, LISTENER, Interest::READ)?);
        }
        Ok(())
    }

    fn ready(&mut self, token: u64, _readiness: Readiness, registry: &mut dyn Registry) {
        if token == LISTENER {
            while let Some(Ok((stream, _))) = self.listener.as_ref().map(|l| l.accept()) {
                if let Ok(stream) = registry.add(stream, self.next, Interest::READ) {
                    self.connections.insert(self.next, stream);
                    self.next += 1;
                }
            }
            return;
        }
        let Some(stream) = self.connections.get_mut(&token) else {
            return;
        };
        let mut buffer = [0; 4096];
        // Small messages fit into the socket's buffer: a real server also waits for room.
        let open = match stream.read(&mut buffer) {
            Ok(0) => false,
            Ok(count) => stream.write_all(&buffer[..count]).is_ok(),
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        if !open && let Some(stream) = self.connections.remove(&token) {
            registry.remove(stream);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, TcpStream};

    use sm_event_loop::EventLoop;

    #[test]
    fn connections_are_served_beside_each_other() {
        let event_loop = EventLoop::spawn("echo").unwrap();
        let address = super::listen(&event_loop, ([127, 0, 0, 1], 0).into()).unwrap();
        let mut clients: Vec<TcpStream> = (0..3)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect();
        for (client, text) in clients.iter_mut().zip([b"one", b"two", b"six"]).rev() {
            client.write_all(text).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).unwrap();
            assert_eq!(answer, text);
        }
    }
}
