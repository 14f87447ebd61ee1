//! Fake monitors: a shell script that prints the sign repeatedly, and a server on the
//! socket in the script's arguments.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

use super::cloud_hypervisor::CloudHypervisor;
use super::firecracker::Firecracker;
use super::{BenchGuest, Contender};

struct Monitor {
    directory: tempfile::TempDir,
    /// Method, path and body of each request.
    requests: Arc<Mutex<Vec<(String, Value)>>>,
    stop: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Creates a monitor that refuses requests to `refused`.
    fn new(refused: &'static str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script = format!(
            "#!/bin/sh\necho \"$@\" >>{0}/arguments\n\
             for word; do\n\
             case $before in --api-sock*) echo \"$word\" >{0}/.at; mv {0}/.at {0}/at;; esac\n\
             before=$word\ndone\n\
             while echo tick; do sleep 0.01; done\n",
            directory.path().display()
        );
        let program = directory.path().join("monitor");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let (requests, stop) = (Arc::default(), Arc::<AtomicBool>::default());
        let server = {
            let (at, requests, stop) = (
                directory.path().join("at"),
                Arc::clone(&requests),
                Arc::clone(&stop),
            );
            std::thread::spawn(move || serve(&at, refused, &requests, &stop))
        };
        Self {
            directory,
            requests,
            stop,
            server: Some(server),
        }
    }

    fn program(&self) -> PathBuf {
        self.directory.path().join("monitor")
    }

    fn recorded_requests(&self) -> Vec<String> {
        let requests = self.requests.lock().unwrap();
        requests.iter().map(|(line, _)| line.clone()).collect()
    }

    fn body(&self, line: &str) -> Value {
        let requests = self.requests.lock().unwrap();
        let found = requests.iter().find(|(request, _)| request == line);
        found
            .unwrap_or_else(|| panic!("{line} was asked"))
            .1
            .clone()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.server.take().map(JoinHandle::join);
    }
}

fn serve(at: &Path, refused: &str, requests: &Mutex<Vec<(String, Value)>>, stop: &AtomicBool) {
    let mut listener: Option<UnixListener> = None;
    while !stop.load(Ordering::Relaxed) {
        // The script was started (again), so its API socket is created.
        if let Ok(socket) = fs::read_to_string(at) {
            fs::remove_file(at).unwrap();
            let bound = UnixListener::bind(socket.trim()).unwrap();
            bound.set_nonblocking(true).unwrap();
            listener = Some(bound);
        }
        match listener.as_ref().map(UnixListener::accept) {
            Some(Ok((stream, _))) => requests.lock().unwrap().push(answer(stream, refused)),
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn answer(stream: UnixStream, refused: &str) -> (String, Value) {
    stream.set_nonblocking(false).unwrap();
    let mut reader = BufReader::new(&stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let request = line.rsplit_once(' ').unwrap().0.to_owned();
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        if header == "\r\n" {
            break;
        }
        if let Some(value) = header.strip_prefix("Content-Length: ") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let status = if request.ends_with(refused) {
        "400 Bad Request"
    } else {
        "204 No Content"
    };
    (&stream)
        .write_all(format!("HTTP/1.1 {status}\r\n\r\n").as_bytes())
        .unwrap();
    (request, serde_json::from_slice(&body).unwrap_or_default())
}

fn guest() -> BenchGuest {
    BenchGuest {
        kernel: "/the/kernel".into(),
        initramfs: "/the/initramfs".into(),
        cmdline: "quiet".to_owned(),
        memory: 256 << 20,
        sign: b"tick",
    }
}

#[test]
fn firecracker_takes_a_snapshot_and_loads_it() {
    let monitor = Monitor::new("nothing");
    let mut rival = Firecracker::new(monitor.program());
    rival.prepare(&guest()).unwrap();
    for _ in 0..2 {
        assert!(rival.restore(&guest()).unwrap() > Duration::ZERO);
    }
    let expected = [
        "PUT /boot-source",
        "PUT /machine-config",
        "PUT /actions",
        "PATCH /vm",
        "PUT /snapshot/create",
        "PUT /snapshot/load",
        "PUT /snapshot/load",
    ];
    assert_eq!(monitor.recorded_requests(), expected);
    let boot = monitor.body("PUT /boot-source");
    assert_eq!(boot["kernel_image_path"], "/the/kernel");
    assert_eq!(boot["initrd_path"], "/the/initramfs");
    assert_eq!(monitor.body("PUT /machine-config")["mem_size_mib"], 256);
    assert_eq!(monitor.body("PATCH /vm")["state"], "Paused");
    let (made, loaded) = (
        monitor.body("PUT /snapshot/create"),
        monitor.body("PUT /snapshot/load"),
    );
    assert_eq!(made["snapshot_path"], loaded["snapshot_path"]);
    assert_eq!(made["mem_file_path"], loaded["mem_backend"]["backend_path"]);
    assert_eq!(loaded["resume_vm"], true);
}

#[test]
fn cloud_hypervisor_takes_a_snapshot_and_starts_from_it() {
    let monitor = Monitor::new("nothing");
    let mut rival = CloudHypervisor::new(monitor.program());
    rival.prepare(&guest()).unwrap();
    rival.restore(&guest()).unwrap();
    let expected = [
        "PUT /api/v1/vm.pause",
        "PUT /api/v1/vm.snapshot",
        "PUT /api/v1/vm.resume",
    ];
    assert_eq!(monitor.recorded_requests(), expected);
    let url = monitor.body("PUT /api/v1/vm.snapshot")["destination_url"].clone();
    let url = url.as_str().unwrap().to_owned();
    let arguments = fs::read_to_string(monitor.directory.path().join("arguments")).unwrap();
    let started: Vec<&str> = arguments.lines().collect();
    assert!(started[0].contains("--kernel /the/kernel --initramfs /the/initramfs"));
    assert!(started[0].contains("size=256M"), "{}", started[0]);
    assert!(
        started[1].contains(&format!("--restore source_url={url}")),
        "{}",
        started[1]
    );
}

#[test]
fn a_rival_that_refuses_is_quoted() {
    let monitor = Monitor::new("/snapshot/create");
    let error = Firecracker::new(monitor.program())
        .prepare(&guest())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/snapshot/create") && error.contains("400"),
        "{error}"
    );
}
