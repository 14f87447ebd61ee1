//! Both sides of the exec protocol on a socket pair: a client asks for a command, and an
//! agent of a few lines runs it and sends back its output and status.
//!
//! `cargo run -p sm-guest-proto --example exchange [PROGRAM [ARGUMENT...]]`

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode};
use std::thread;

use sm_guest_proto::PROTOCOL_VERSION;
use sm_guest_proto::exec::{ExecControl, ExecReply, ExecRequest, Hello};
use sm_guest_proto::frame::{BULK_PAYLOAD, ExitStatus, FrameDecoder, FrameType, encode};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<ExitCode> {
    let mut argv: Vec<String> = std::env::args().skip(1).collect();
    if argv.is_empty() {
        argv = ["echo", "hello from the guest"].map(str::to_owned).into();
    }
    let (output, status) = exchange(argv)?;
    std::io::stdout().write_all(&output)?;
    Ok(ExitCode::from(
        u8::try_from(status.status).unwrap_or(u8::MAX),
    ))
}

/// Has an agent on another thread run a command.
fn exchange(argv: Vec<String>) -> Result<(Vec<u8>, ExitStatus)> {
    let (host, guest) = UnixStream::pair()?;
    // In a virtual machine, this is a connection to vsock port `port::EXEC`.
    let agent = thread::spawn(move || agent(guest));
    let done = client(host, argv)?;
    agent.join().map_err(|_| "the agent panicked")??;
    Ok(done)
}

/// The host's side.
fn client(mut stream: UnixStream, argv: Vec<String>) -> Result<(Vec<u8>, ExitStatus)> {
    let hello = ExecControl::Hello(Hello {
        protocol: PROTOCOL_VERSION,
    });
    let request = ExecRequest {
        argv,
        ..ExecRequest::default()
    };
    let mut bytes = Vec::new();
    // The request does not wait for the answer to the greeting.
    encode(FrameType::Control, &serde_json::to_vec(&hello)?, &mut bytes)?;
    encode(
        FrameType::Request,
        &serde_json::to_vec(&request)?,
        &mut bytes,
    )?;
    stream.write_all(&bytes)?;

    let mut output = Vec::new();
    let mut frames = Frames::new(stream);
    loop {
        let (kind, payload) = frames.next()?;
        match kind {
            FrameType::Control => match serde_json::from_slice(&payload)? {
                ExecReply::Hello(hello) => eprintln!("the agent speaks version {}", hello.protocol),
                ExecReply::Started { container, pid } => {
                    eprintln!("the command runs as process {pid} of container {container}");
                }
            },
            FrameType::Stdout => output.extend_from_slice(&payload),
            FrameType::Error => return Err(String::from_utf8_lossy(&payload).into()),
            FrameType::Exit => return Ok((output, ExitStatus::parse(&payload)?)),
            other => return Err(format!("an agent does not send {other:?}").into()),
        }
    }
}

/// The guest's side. The real agent does not block, and sends output as it comes.
fn agent(stream: UnixStream) -> Result<()> {
    let mut frames = Frames::new(stream);
    let (_, hello) = frames.next()?;
    let ExecControl::Hello(_) = serde_json::from_slice(&hello)? else {
        return Err("the first frame is not a greeting".into());
    };
    let (_, request) = frames.next()?;
    let request: ExecRequest = serde_json::from_slice(&request)?;
    let [program, arguments @ ..] = request.argv.as_slice() else {
        return Err("the request names no program".into());
    };

    let mut bytes = Vec::new();
    let hello = ExecReply::Hello(Hello {
        protocol: PROTOCOL_VERSION,
    });
    encode(FrameType::Control, &serde_json::to_vec(&hello)?, &mut bytes)?;
    match Command::new(program).args(arguments).output() {
        Ok(done) => {
            let started = ExecReply::Started {
                container: request.container,
                pid: std::process::id(),
            };
            encode(
                FrameType::Control,
                &serde_json::to_vec(&started)?,
                &mut bytes,
            )?;
            for piece in done.stdout.chunks(BULK_PAYLOAD) {
                encode(FrameType::Stdout, piece, &mut bytes)?;
            }
            let status = ExitStatus {
                status: done
                    .status
                    .code()
                    .and_then(|code| u32::try_from(code).ok())
                    .unwrap_or(1),
                peak_rss_kib: None,
            };
            encode(FrameType::Exit, &status.to_payload(), &mut bytes)?;
        }
        Err(error) => encode(FrameType::Error, error.to_string().as_bytes(), &mut bytes)?,
    }
    frames.stream.write_all(&bytes)?;
    Ok(())
}

/// A stream, cut into frames.
struct Frames {
    stream: UnixStream,
    decoder: FrameDecoder,
}

impl Frames {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            decoder: FrameDecoder::with_limits(|_| BULK_PAYLOAD),
        }
    }

    fn next(&mut self) -> Result<(FrameType, Vec<u8>)> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok((frame.kind, frame.payload.to_vec()));
            }
            match self.stream.read(&mut buffer)? {
                0 => return Err("the stream ended within a frame".into()),
                count => self.decoder.push(&buffer[..count]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::exchange;

    fn run(argv: &[&str]) -> super::Result<(Vec<u8>, u32)> {
        let (output, exit) = exchange(argv.iter().copied().map(str::to_owned).collect())?;
        Ok((output, exit.status))
    }

    #[test]
    fn output_and_status_arrive() {
        let many = "head -c 200000 /dev/zero; exit 7";
        assert_eq!(run(&["echo", "hello"]).unwrap(), (b"hello\n".to_vec(), 0));
        assert_eq!(run(&["sh", "-c", many]).unwrap(), (vec![0; 200_000], 7));
    }

    #[test]
    fn a_command_that_is_not_there_is_an_error() {
        assert!(run(&["/no/such/program"]).is_err());
    }
}
