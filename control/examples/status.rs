//! A client of a running VM that needs nothing but its control socket:
//! `status SOCKET [pause|resume]`.
//!
//! The socket of a VM of `sm` is `vms/SHORT-ID/control.sock` in the run directory of its user.

use std::error::Error;
use std::path::Path;

use sm_control::launch::{ControlAnswer, ControlCall};
use sm_control::{Control, ControlError, Endpoint};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let call = match arguments.as_slice() {
        [_] => ControlCall::Status,
        [_, "pause"] => ControlCall::Pause,
        [_, "resume"] => ControlCall::Resume,
        _ => return Err("usage: status SOCKET [pause|resume]".into()),
    };
    println!("{}", query(Path::new(arguments[0]), &call)?);
    Ok(())
}

/// Makes one call and says what was answered.
fn query(socket: &Path, call: &ControlCall) -> Result<String, Box<dyn Error>> {
    // The second argument is a name for messages.
    let endpoint = Endpoint::new(socket.to_owned(), socket.display().to_string());
    let mut control = match Control::connect(&endpoint) {
        // A client can tell this from a failure, and start the VM, for one.
        Err(ControlError::NotRunning(name)) => return Ok(format!("{name}: no VM is running")),
        other => other?,
    };
    Ok(match control.call(call)? {
        ControlAnswer::Status(status) => format!(
            "{:?}{}, process {}, {} clients",
            status.stage,
            if status.paused { ", paused" } else { "" },
            status.vmm_pid,
            status.clients,
        ),
        other => format!("{other:?}"),
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixListener;
    use std::thread;

    use sm_control::launch::{ControlAnswer, ControlCall, Stage, Status};
    use sm_guest_proto::frame::{self, FrameDecoder, FrameType};

    use super::query;

    #[test]
    fn a_vm_is_asked_for_its_status() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        let absent = query(&socket, &ControlCall::Status).unwrap();
        assert!(absent.ends_with("no VM is running"), "{absent}");

        // Stands for the VM's process.
        let listener = UnixListener::bind(&socket).unwrap();
        let process = thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let (mut decoder, mut buffer) = (FrameDecoder::new(), [0; 512]);
            let call: ControlCall = loop {
                let count = client.read(&mut buffer).unwrap();
                decoder.push(&buffer[..count]);
                if let Some(frame) = decoder.next_frame().unwrap() {
                    break serde_json::from_slice(frame.payload).unwrap();
                }
            };
            let answer = ControlAnswer::Status(Status {
                stage: Stage::Running,
                paused: true,
                lacks_space: false,
                vmm_pid: 42,
                epoch: String::new(),
                started_ns: 1,
                clients: 3,
                published: Vec::new(),
                restarting: false,
                restarts: 0,
                health: None,
                balloon: None,
            });
            let mut bytes = Vec::new();
            let answer = serde_json::to_vec(&answer).unwrap();
            frame::encode(FrameType::Control, &answer, &mut bytes).unwrap();
            client.write_all(&bytes).unwrap();
            call
        });
        let answer = query(&socket, &ControlCall::Status).unwrap();
        assert_eq!(answer, "Running, paused, process 42, 3 clients");
        assert_eq!(process.join().unwrap(), ControlCall::Status);
    }
}
