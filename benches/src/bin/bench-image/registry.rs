//! The distribution's registry, on this host, with the image.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

pub(crate) struct BenchRegistry {
    address: String,
    process: Child,
}

impl Drop for BenchRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl BenchRegistry {
    pub(crate) fn start(work: &Path, layout: &Path) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        drop(listener);
        let configuration = work.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: \"{address}\"}}\n\
             storage: {{filesystem: {{rootdirectory: {:?}}}}}\n",
            work.join("registry")
        );
        fs::write(&configuration, text)?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run docker-registry (package docker-registry)")?;
        let registry = Self { address, process };
        let begun = Instant::now();
        while TcpStream::connect(&registry.address).is_err() {
            if begun.elapsed() > Duration::from_secs(60) {
                bail!("the registry does not listen");
            }
            sleep(Duration::from_millis(20));
        }
        let copied = Command::new("skopeo")
            .args(["copy", "--quiet", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:latest", layout.display()))
            .arg(format!("docker://{}", registry.image()))
            .status()?;
        if !copied.success() {
            bail!("skopeo cannot fill the registry");
        }
        Ok(registry)
    }

    pub(crate) fn image(&self) -> String {
        format!("{}/debian:latest", self.address)
    }
}
