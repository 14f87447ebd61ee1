//! Runs a command in a VM of an image, and prints its output.
//!
//! `SM_AGENT=AGENT cargo run -p sm-runtime --example hello -- IMAGE [COMMAND...]`. VMs need
//! KVM, a guest kernel and the guest agent: see README.md.

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use sm_runtime::{ErrorKind, RunOptions, Sm};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    // This program is also the VMM of the VMs that it starts.
    sm_runtime::run_vmm_if_asked();

    let mut words = std::env::args().skip(1);
    let reference = words.next().ok_or("usage: hello IMAGE [COMMAND...]")?;
    let options = RunOptions::new()
        .command(words)
        .memory(128 << 20)
        .auto_remove(true)
        .attach(true);
    let started = Sm::new()?.image(&reference)?.run(options);
    let mut vm = match started {
        Ok(vm) => vm,
        // Such as a name that is not in the image; the message is the guest's.
        Err(error) if error.kind() == ErrorKind::Command => {
            eprintln!("{error}");
            return Ok(ExitCode::from(u8::try_from(error.exit_status())?));
        }
        Err(error) => return Err(error.into()),
    };
    let session = vm.take_session().ok_or("the VM was started attached")?;
    let output = session.output()?;
    std::io::stdout().write_all(&output.stdout)?;
    std::io::stderr().write_all(&output.stderr)?;
    Ok(ExitCode::from(u8::try_from(output.status)?))
}
