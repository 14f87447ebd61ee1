//! The subset of HTTP/1.1 that the APIs of two monitors need: one request, and an answer
//! whose body does not matter.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::CONTENDER_TIMEOUT;

/// Connects to a socket that a new process is about to create. Reads from it fail after
/// [`CONTENDER_TIMEOUT`] without data.
pub(super) fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + CONTENDER_TIMEOUT;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => {
                stream.set_read_timeout(Some(CONTENDER_TIMEOUT))?;
                return Ok(stream);
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                ) && Instant::now() < deadline =>
            {
                // A benchmark may poll: a blocking wait would cost the rival more time
                // than the polling.
                std::thread::yield_now();
            }
            Err(error) => return Err(error).context(format!("cannot connect to {socket:?}")),
        }
    }
}

/// Sends a request; any status but 2xx is an error.
pub(super) fn call(socket: &Path, method: &str, path: &str, body: &Value) -> Result<()> {
    let mut stream = connect(socket)?;
    let body = match body {
        Value::Null => String::new(),
        body => body.to_string(),
    };
    // The request is sent at once: a server may take the first part for all of it.
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    while !answer.windows(4).any(|window| window == b"\r\n\r\n") {
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            break;
        }
        answer.extend_from_slice(chunk.get(..count).unwrap_or_default());
    }
    let answer = String::from_utf8_lossy(&answer);
    match answer.split(' ').nth(1) {
        Some(status) if status.starts_with('2') => Ok(()),
        _ => bail!("{method} {path}: {answer}"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn answered(answer: &'static str) -> (Result<()>, String) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let count = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&request[..count]).into_owned()
        });
        let result = call(&socket, "PUT", "/x", &serde_json::json!({"a": 1}));
        (result, server.join().unwrap())
    }

    #[test]
    fn a_request_is_sent_and_its_status_returned() {
        let (result, request) = answered("HTTP/1.1 204 No Content\r\n\r\n");
        result.unwrap();
        assert!(request.starts_with("PUT /x HTTP/1.1\r\n") && request.ends_with("{\"a\":1}"));
        let (result, _) = answered("HTTP/1.1 400 Bad Request\r\n\r\n");
        assert!(result.unwrap_err().to_string().contains("400"));
    }
}
