//! A faulty proxy in front of a registry.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A fault of an answer.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// No fault.
    None,
    /// The connection is closed without an answer.
    HangUp,
    /// The answer ends after this number of bytes of its body.
    Cut(usize),
    /// One byte of its body, at this position or the last one, is changed.
    Alter(usize),
    /// The answer is this status, with a `Retry-After` if given.
    Status(u16, Option<&'static str>),
    /// The answer arrives in small pieces.
    Slow,
    /// The answer redirects to this host and port.
    Elsewhere(String),
    /// The `Content-Length` is this number of bytes too large.
    Longer(usize),
    /// The `Content-Length` is this number of bytes too small.
    Shorter(usize),
}

/// A received request: its line and its headers.
pub(crate) type Request = Vec<String>;

pub(crate) struct Faulty {
    pub(crate) address: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

type Choose = Mutex<dyn FnMut(&str) -> Fault + Send>;

impl Faulty {
    /// Starts a proxy in front of `upstream`; `choose` selects the fault for each request
    /// line.
    pub(crate) fn start(
        upstream: &str,
        choose: impl FnMut(&str) -> Fault + Send + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, upstream) = (Arc::clone(&seen), upstream.to_owned());
        let choose: Arc<Choose> = Arc::new(Mutex::new(choose));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, upstream) = (Arc::clone(&log), upstream.clone());
                let choose = Arc::clone(&choose);
                std::thread::spawn(move || {
                    // Errors on either side are expected.
                    let _ = carry(&stream.unwrap(), &upstream, &choose, &log);
                });
            }
        });
        Self { address, seen }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

fn carry(
    mut stream: &TcpStream,
    upstream: &str,
    choose: &Choose,
    log: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut lines: Request = Vec::new();
    // The first byte is that of a TLS handshake. Servers without TLS answer it with an
    // error.
    if reader.fill_buf()?.first() == Some(&0x16) {
        let head = "HTTP/1.1 400 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        return stream.write_all(head.as_bytes());
    }
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? <= 2 {
            break;
        }
        lines.push(line.trim_end().to_owned());
    }
    let Some(first) = lines.first() else {
        return Ok(());
    };
    log.lock().unwrap().push(lines.clone());
    let fault = (choose.lock().unwrap())(first);
    match fault {
        Fault::HangUp => return stream.shutdown(Shutdown::Both),
        Fault::Status(status, pause) => {
            let pause = pause.map_or_else(String::new, |p| format!("Retry-After: {p}\r\n"));
            let head = format!(
                "HTTP/1.1 {status} X\r\n{pause}Content-Length: 0\r\nConnection: close\r\n\r\n"
            );
            return stream.write_all(head.as_bytes());
        }
        Fault::Elsewhere(host) => {
            let path = first.split(' ').nth(1).unwrap_or_default();
            let head = format!(
                "HTTP/1.1 307 X\r\nLocation: http://{host}{path}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
            return stream.write_all(head.as_bytes());
        }
        _ => {}
    }
    let (head, mut body) = ask(upstream, &lines)?;
    let length = body.len();
    let (mut sent, mut said) = (length, length);
    match fault {
        Fault::Cut(at) => sent = at.min(length),
        Fault::Alter(at) if length > 0 => body[at.min(length - 1)] ^= 1,
        Fault::Longer(by) => said += by,
        Fault::Shorter(by) => said = said.saturating_sub(by),
        _ => {}
    }
    let head = format!("{head}Content-Length: {said}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    let piece = match fault {
        Fault::Slow => 8 << 10,
        _ => usize::MAX,
    };
    for piece in body[..sent].chunks(piece.min(sent.max(1))) {
        stream.write_all(piece)?;
        if matches!(fault, Fault::Slow) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

/// Returns the registry's answer: its head without headers of the connection, and its
/// body.
fn ask(upstream: &str, lines: &[String]) -> std::io::Result<(String, Vec<u8>)> {
    let mut there = TcpStream::connect(upstream)?;
    for line in lines.iter().filter(|line| !is_about_connection(line)) {
        there.write_all(format!("{line}\r\n").as_bytes())?;
    }
    there.write_all(b"Connection: close\r\n\r\n")?;
    let mut reader = BufReader::new(there);
    let (mut head, mut line) = (String::new(), String::new());
    while reader.read_line(&mut line)? > 2 {
        if !is_about_connection(&line) {
            head.push_str(&line);
        }
        line.clear();
    }
    let mut body = Vec::new();
    reader.read_to_end(&mut body)?;
    Ok((head, body))
}

fn is_about_connection(line: &str) -> bool {
    let line = line.to_ascii_lowercase();
    ["connection:", "content-length:"]
        .iter()
        .any(|name| line.starts_with(name))
}
