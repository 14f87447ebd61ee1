//! Runs a command in a network namespace of its own, whose network is an engine of this
//! process: `sudo target/debug/examples/tap curl http://192.0.2.1/`.
//!
//! The command has the addresses 100.96.0.2 and fd73:6d00::2, and reaches what this process
//! reaches. Only creating the namespace and the TAP needs root; the engine does not.
#![expect(
    unsafe_code,
    reason = "a namespace and a TAP are created by system calls"
)]

mod device;

use std::error::Error;
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::{Arc, Mutex};

use rustix::thread::{UnshareFlags, unshare_unsafe};
use sm_devices_net::engine::{EgressRequest, EgressVerdict, EngineConfig, NetEngine};
use sm_event_loop::EventLoop;

use crate::device::TapGateway;

/// Commands that set up the namespace's side.
const SETUP: [&str; 6] = [
    "link set lo up",
    "address add 100.96.0.2/30 dev eth0",
    "address add fd73:6d00::2/64 dev eth0 nodad",
    "link set eth0 up",
    "route add default via 100.96.0.1",
    "-6 route add default via fd73:6d00::1",
];

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let usage = "usage: tap [--lose-one-of NUMBER] COMMAND [ARGUMENT]...";
    let mut program = arguments.next().ok_or(usage)?;
    let mut lose = 0;
    if program == "--lose-one-of" {
        let number = arguments.next().ok_or(usage)?;
        lose = number.to_string_lossy().parse()?;
        program = arguments.next().ok_or(usage)?;
    }
    let mut command = Command::new(program);
    command.args(arguments);

    // This thread stays in the namespace that it is in; so does that of the loop.
    let event_loop = EventLoop::spawn("network")?;
    let guest = std::thread::spawn(move || run(&event_loop, &mut command, lose));
    let status = guest.join().map_err(|_| "the thread panicked")?;
    let status = status.map_err(|error| error.to_string())?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, Into::into))
}

/// Runs the command in a namespace of its own.
fn run(
    event_loop: &EventLoop,
    command: &mut Command,
    lose: u64,
) -> Result<ExitStatus, Box<dyn Error + Send + Sync>> {
    // SAFETY: of a thread's own resources, only its network namespace is replaced.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET)? };
    let tap = device::create("eth0", true)?;
    for arguments in SETUP {
        let status = Command::new("ip").args(arguments.split(' ')).status()?;
        if !status.success() {
            return Err(format!("`ip {arguments}` failed").into());
        }
    }
    let everything = |request: &EgressRequest| EgressVerdict::Connect(request.destination);
    let engine = NetEngine::new(EngineConfig::default(), Box::new(everything));
    let mut gateway = TapGateway::new(engine, tap, true);
    gateway.loss.one_of = lose;
    let gateway = Arc::new(Mutex::new(gateway));
    event_loop.handle().add_handler(gateway.clone())?;
    let status = command.status()?;
    if let Ok(gateway) = gateway.lock() {
        eprintln!("{:?}", gateway.engine.stats());
    }
    Ok(status)
}
