//! Cloud Hypervisor: its API on a unix socket, snapshots in a directory.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{BenchGuest, Contender, Killed, await_output, discard_output, http};

#[derive(Debug)]
pub(super) struct CloudHypervisor {
    program: PathBuf,
    directory: Option<tempfile::TempDir>,
}

impl CloudHypervisor {
    pub(super) fn new(program: PathBuf) -> Self {
        Self {
            program,
            directory: None,
        }
    }

    fn file(&self, name: &str) -> Result<PathBuf> {
        let directory = self.directory.as_ref().context("not prepared")?;
        Ok(directory.path().join(name))
    }

    fn command(&self, socket: &PathBuf) -> Command {
        let _ = std::fs::remove_file(socket);
        let mut command = Command::new(&self.program);
        command
            .arg("--api-socket")
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }
}

impl Contender for CloudHypervisor {
    fn name(&self) -> &'static str {
        "cloud-hypervisor"
    }

    fn prepare(&mut self, guest: &BenchGuest) -> Result<()> {
        self.directory = Some(tempfile::tempdir()?);
        let (socket, state) = (self.file("api")?, self.file("state")?);
        std::fs::create_dir(&state)?;
        let mut child = Killed(
            self.command(&socket)
                .arg("--kernel")
                .arg(&guest.kernel)
                .arg("--initramfs")
                .arg(&guest.initramfs)
                .args(["--cmdline", &guest.cmdline])
                .args(["--serial", "tty", "--console", "off", "--cpus", "boot=1"])
                .args(["--memory", &format!("size={}M", guest.mib())])
                .spawn()?,
        );
        let mut stdout = child.0.stdout.take().context("no output")?;
        await_output(&mut stdout, guest.sign)?;
        discard_output(stdout);
        http::call(&socket, "PUT", "/api/v1/vm.pause", &Value::Null)?;
        let url = json!({"destination_url": format!("file://{}", state.display())});
        http::call(&socket, "PUT", "/api/v1/vm.snapshot", &url)
    }

    fn restore(&self, guest: &BenchGuest) -> Result<Duration> {
        let (socket, state) = (self.file("api")?, self.file("state")?);
        let mut command = self.command(&socket);
        command
            .arg("--restore")
            .arg(format!("source_url=file://{}", state.display()));
        let started = Instant::now();
        let mut child = Killed(command.spawn()?);
        let mut stdout = child.0.stdout.take().context("no output")?;
        http::call(&socket, "PUT", "/api/v1/vm.resume", &Value::Null)?;
        await_output(&mut stdout, guest.sign)?;
        Ok(started.elapsed())
    }
}
