//! Firecracker: its API on a unix socket, full snapshots.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{BenchGuest, Contender, Killed, await_output, discard_output, http};

#[derive(Debug)]
pub(super) struct Firecracker {
    program: PathBuf,
    directory: Option<tempfile::TempDir>,
}

impl Firecracker {
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

    /// Starts it with its API at a socket that does not exist yet.
    fn spawn(&self, socket: &PathBuf) -> Result<Killed> {
        let _ = std::fs::remove_file(socket);
        let child = Command::new(&self.program)
            .arg("--api-sock")
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(Killed(child))
    }
}

impl Contender for Firecracker {
    fn name(&self) -> &'static str {
        "firecracker"
    }

    fn prepare(&mut self, guest: &BenchGuest) -> Result<()> {
        self.directory = Some(tempfile::tempdir()?);
        let socket = self.file("api")?;
        let mut child = self.spawn(&socket)?;
        let mut stdout = child.0.stdout.take().context("no output")?;
        let put = |path: &str, body| http::call(&socket, "PUT", path, &body);
        put(
            "/boot-source",
            json!({
                "kernel_image_path": guest.kernel,
                "initrd_path": guest.initramfs,
                "boot_args": guest.cmdline,
            }),
        )?;
        put(
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": guest.mib()}),
        )?;
        put("/actions", json!({"action_type": "InstanceStart"}))?;
        await_output(&mut stdout, guest.sign)?;
        discard_output(stdout);
        http::call(&socket, "PATCH", "/vm", &json!({"state": "Paused"}))?;
        put(
            "/snapshot/create",
            json!({
                "snapshot_type": "Full",
                "snapshot_path": self.file("state")?,
                "mem_file_path": self.file("memory")?,
            }),
        )
    }

    fn restore(&self, guest: &BenchGuest) -> Result<Duration> {
        let socket = self.file("api")?;
        let started = Instant::now();
        let mut child = self.spawn(&socket)?;
        let mut stdout = child.0.stdout.take().context("no output")?;
        let body = json!({
            "snapshot_path": self.file("state")?,
            "mem_backend": {"backend_type": "File", "backend_path": self.file("memory")?},
            "resume_vm": true,
        });
        http::call(&socket, "PUT", "/snapshot/load", &body)?;
        await_output(&mut stdout, guest.sign)?;
        Ok(started.elapsed())
    }
}
