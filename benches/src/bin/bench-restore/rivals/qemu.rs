//! QEMU: its microvm machine, with migration to and from a file.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::{BenchGuest, Contender, Killed, await_output, discard_output, http};

#[derive(Debug)]
pub(super) struct Qemu {
    program: PathBuf,
    directory: Option<tempfile::TempDir>,
}

impl Qemu {
    pub(super) fn new(program: PathBuf) -> Self {
        Self {
            program,
            directory: None,
        }
    }

    fn command(&self, guest: &BenchGuest) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-M", "microvm,pit=off,pic=off,rtc=off", "-accel", "kvm"])
            .args(["-cpu", "host", "-smp", "1"])
            .args(["-m", &format!("{}M", guest.mib())])
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(&guest.kernel)
            .arg("-initrd")
            .arg(&guest.initramfs)
            .args(["-append", &guest.cmdline])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }

    fn file(&self, name: &str) -> Result<PathBuf> {
        let directory = self.directory.as_ref().context("not prepared")?;
        Ok(directory.path().join(name))
    }
}

/// The machine protocol (QMP), as far as needed.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Waits for a message that `is_expected` accepts.
    fn until(&mut self, is_expected: impl Fn(&Value) -> bool) -> Result<()> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.0.read_line(&mut line)? == 0 {
                bail!("QEMU hung up");
            }
            let message: Value = serde_json::from_str(&line)?;
            if message.get("error").is_some() || message["data"]["status"] == "failed" {
                bail!("QEMU: {message}");
            }
            if is_expected(&message) {
                return Ok(());
            }
        }
    }

    fn call(&mut self, command: &Value) -> Result<()> {
        writeln!(self.0.get_mut(), "{command}")?;
        self.until(|message| message.get("return").is_some())
    }
}

impl Contender for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn prepare(&mut self, guest: &BenchGuest) -> Result<()> {
        self.directory = Some(tempfile::tempdir()?);
        let socket = self.file("qmp")?;
        let mut child = Killed(
            self.command(guest)
                .arg("-qmp")
                .arg(format!("unix:{},server=on,wait=off", socket.display()))
                .spawn()?,
        );
        let mut stdout = child.0.stdout.take().context("no output")?;
        await_output(&mut stdout, guest.sign)?;
        discard_output(stdout);
        let mut qmp = Qmp(BufReader::new(http::connect(&socket)?));
        qmp.call(&json!({"execute": "qmp_capabilities"}))?;
        qmp.call(&json!({
            "execute": "migrate-set-capabilities",
            "arguments": {"capabilities": [{"capability": "events", "state": true}]},
        }))?;
        let uri = format!("file:{}", self.file("state")?.display());
        qmp.call(&json!({"execute": "migrate", "arguments": {"uri": uri}}))?;
        qmp.until(|message| message["data"]["status"] == "completed")
    }

    fn restore(&self, guest: &BenchGuest) -> Result<Duration> {
        let mut command = self.command(guest);
        command
            .arg("-incoming")
            .arg(format!("file:{}", self.file("state")?.display()));
        let started = Instant::now();
        let mut child = Killed(command.spawn()?);
        let mut stdout = child.0.stdout.take().context("no output")?;
        await_output(&mut stdout, guest.sign)?;
        Ok(started.elapsed())
    }
}
