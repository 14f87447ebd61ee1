//! A real web server in a guest, accessed by real clients through every frontend.
#![expect(clippy::unwrap_used, reason = "a failed expectation is a failed test")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use sha2::{Digest as _, Sha256};
use sm_e2e::{Done, Home, Reaped, TIMEOUT, Vm, image, unique};
use sm_frontends::HandoffSender;

const PAGE: &str = "Welcome to nginx!";
/// Size of the file `/large`.
const LARGE: usize = 32 << 20;

struct Web<'a> {
    home: &'a Home,
    vm: Vm<'a>,
    unix: PathBuf,
    handoff: PathBuf,
}

impl<'a> Web<'a> {
    fn start(home: &'a Home) -> Self {
        let (unix, handoff) = (
            home.run_dir().join(unique("web")),
            home.run_dir().join(unique("hand")),
        );
        let vm = home.detached(&[
            "-m",
            "256m",
            "-p",
            "80",
            "--publish-tls",
            "80,alpn=http/1.1,name=web.test",
            "--publish-unix",
            &format!("{}:80", unix.display()),
            "--handoff",
            &format!("{}:80", handoff.display()),
            &image("nginx"),
        ]);
        let web = Self {
            home,
            vm,
            unix,
            handoff,
        };
        let begun = Instant::now();
        while !web.curl(&[&format!("http://{}/", web.tcp())]).0 {
            assert!(begun.elapsed() < TIMEOUT, "{:?}", web.vm.inspect());
        }
        web
    }

    /// Returns the published addresses: the plain port, and the TLS port with its
    /// certificate.
    fn published(&self) -> (SocketAddr, SocketAddr, PathBuf) {
        let list = self
            .home
            .sm(&["port", "--json", &self.vm.name])
            .exits(0)
            .json();
        let mut plain = None;
        let mut tls = None;
        for entry in list.as_array().unwrap() {
            if let Some(address) = entry["host"]["tcp"].as_str() {
                plain = Some(address.parse().unwrap());
            }
            if let Some(address) = entry["host"]["tls"]["address"].as_str() {
                let certificate = entry["host"]["tls"]["certificate"].as_str().unwrap();
                tls = Some((address.parse().unwrap(), PathBuf::from(certificate)));
            }
        }
        let (tls, certificate) = tls.unwrap();
        (plain.unwrap(), tls, certificate)
    }

    fn tcp(&self) -> SocketAddr {
        self.published().0
    }

    /// Runs `curl`; returns true on success, and the output.
    fn curl(&self, arguments: &[&str]) -> (bool, Vec<u8>) {
        let done = Command::new("curl")
            .args(["--silent", "--show-error", "--fail", "--max-time", "120"])
            .args(arguments)
            .output()
            .unwrap();
        (done.status.success(), done.stdout)
    }

    fn page(&self, arguments: &[&str]) {
        let (fetched, page) = self.curl(arguments);
        let page = String::from_utf8_lossy(&page);
        assert!(fetched && page.contains(PAGE), "{arguments:?}: {page}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn nginx_is_reached_through_every_frontend() {
    let web = Web::start(Home::shared());
    let (plain, tls, certificate) = web.published();
    web.page(&[&format!("http://{plain}/")]);
    web.page(&["--unix-socket", text(&web.unix), "http://any/"]);
    let trusted = ["--cacert", text(&certificate)];
    web.page(
        &[
            &trusted[..],
            &[&format!("https://localhost:{}/", tls.port())],
        ]
        .concat(),
    );
    let resolved = format!("web.test:{}:127.0.0.1", tls.port());
    let named = format!("https://web.test:{}/", tls.port());
    web.page(&[&trusted[..], &["--resolve", &resolved, &named]].concat());
    // The client refuses a certificate for another name, or an untrusted one.
    let resolved = format!("else.test:{}:127.0.0.1", tls.port());
    let named = format!("https://else.test:{}/", tls.port());
    assert!(
        !web.curl(&[&trusted[..], &["--resolve", &resolved, &named]].concat())
            .0
    );
    assert!(!web.curl(&[&format!("https://localhost:{}/", tls.port())]).0);

    // A router reads the request and hands the connection over.
    let router = Router::start(&web.handoff);
    web.page(&[&format!("http://{}/", router.address)]);
}

#[test]
fn connections_are_kept_alive_and_half_closed_ones_answered() {
    let web = Web::start(Home::shared());
    let (plain, tls, certificate) = web.published();
    let router = Router::start(&web.handoff);
    let (plain_url, tls_url) = (
        format!("http://{plain}/"),
        format!("https://localhost:{}/", tls.port()),
    );
    let routed = format!("http://{}/", router.address);
    for arguments in [
        &[plain_url.as_str(), &plain_url][..],
        &[
            "--unix-socket",
            text(&web.unix),
            "http://any/",
            "http://any/",
        ],
        &["--cacert", text(&certificate), &tls_url, &tls_url],
        &[&routed, &routed],
    ] {
        // Number of new connections for the first page, and for the second.
        let counted = ["--write-out", "<%{num_connects}>"];
        let (fetched, said) = web.curl(&[&counted[..], arguments].concat());
        let said = String::from_utf8_lossy(&said);
        assert!(
            fetched && said.contains("<1>") && said.ends_with("<0>"),
            "{said}"
        );
    }
    // The client sends the request, and then the end.
    let request = "GET / HTTP/1.0\r\n\r\n";
    let (host, port) = (plain.ip().to_string(), plain.port().to_string());
    for arguments in [&[host.as_str(), &port][..], &["-U", text(&web.unix)]] {
        let mut nc = Command::new("nc.openbsd")
            .args(["-N", "-w", "120"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        nc.stdin
            .take()
            .unwrap()
            .write_all(request.as_bytes())
            .unwrap();
        let done = Done::from(nc.wait_with_output().unwrap());
        assert!(done.exits(0).out().contains(PAGE));
    }
}

/// Accepts connections, reads their first bytes, and hands them over.
struct Router {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Router {
    fn start(handoff: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut sender = HandoffSender::connect(handoff).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let (mut stream, _) = listener.accept().unwrap();
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let count = stream.read(&mut buffer).unwrap();
                if count > 0 {
                    sender.send(&stream, &buffer[..count]).unwrap();
                }
            }
        });
        Self {
            address,
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn large_files_arrive_whole_and_load_loses_nothing() {
    let web = Web::start(Home::shared());
    let (plain, tls, certificate) = web.published();
    let make = format!(
        "head -c {LARGE} /dev/urandom > /var/www/html/large && sha256sum < /var/www/html/large"
    );
    let sum = web.vm.exec(&["sh", "-c", &make]).exits(0).out();
    let plain_url = format!("http://{plain}/large");
    let tls_url = format!("https://localhost:{}/large", tls.port());
    for arguments in [
        &[plain_url.as_str()][..],
        &["--cacert", text(&certificate), &tls_url],
        &["--unix-socket", text(&web.unix), "http://any/large"],
    ] {
        let (fetched, bytes) = web.curl(arguments);
        assert!(
            fetched && bytes.len() == LARGE,
            "{arguments:?}: {}",
            bytes.len()
        );
        let digest = Sha256::digest(&bytes);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(sum.starts_with(&digest), "{arguments:?}");
    }
    let measure = [
        "stats",
        "--profile",
        "--interval",
        "3",
        "--json",
        &web.vm.name,
    ];
    let measuring = web.home.command(&measure).spawn().unwrap();
    let router = Router::start(&web.handoff);
    // A slow machine must end all handshakes within the limit for one.
    for (url, connections) in [
        (format!("http://{plain}/"), "50"),
        (format!("https://localhost:{}/", tls.port()), "10"),
        (format!("http://{}/", router.address), "50"),
    ] {
        let done = Command::new("wrk")
            .args(["-t", "1", "-c", connections, "-d", "5"])
            .args(["--timeout", "60s", &url])
            .output()
            .unwrap();
        let report = String::from_utf8_lossy(&done.stdout).into_owned();
        println!("{report}");
        assert!(
            done.status.success() && report.contains("requests in"),
            "{report}"
        );
        assert!(!report.contains("Socket errors"), "{report}");
        assert!(!report.contains("Non-2xx"), "{report}");
    }
    let profile = Done::from(measuring.wait_with_output().unwrap());
    let profile = profile.exits(0).json();
    let stages = profile.as_array().unwrap().iter();
    let stages: Vec<_> = stages.filter_map(|stage| stage["stage"].as_str()).collect();
    for stage in [
        "accept",
        "open",
        "socket read",
        "socket write",
        "guest kick",
    ] {
        assert!(stages.contains(&stage), "{profile}");
    }
}

#[test]
fn a_guest_that_is_killed_ends_every_transfer() {
    let web = Web::start(Home::shared());
    let (plain, tls, certificate) = web.published();
    let make = format!("head -c {LARGE} /dev/zero > /var/www/html/large");
    web.vm.exec(&["sh", "-c", &make]).exits(0);
    let (plain_url, tls_url) = (
        format!("http://{plain}/large"),
        format!("https://localhost:{}/large", tls.port()),
    );
    let router = Router::start(&web.handoff);
    let routed = format!("http://{}/large", router.address);
    let mut transfers: Vec<_> = [
        &[plain_url.as_str()][..],
        &["--cacert", text(&certificate), &tls_url],
        &["--unix-socket", text(&web.unix), "http://any/large"],
        &[&routed],
    ]
    .into_iter()
    .map(|arguments| {
        // The transfer is too slow to be complete before the kill.
        let transfer = Command::new("curl")
            .args(["--silent", "--show-error", "--limit-rate", "20k"])
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn();
        Reaped(transfer.unwrap())
    })
    .collect();
    for Reaped(transfer) in &mut transfers {
        let stdout = transfer.stdout.as_mut().unwrap();
        stdout.read_exact(&mut [0; 1000]).unwrap();
    }
    web.home.sm(&["rm", "-f", &web.vm.name]).exits(0);
    for Reaped(transfer) in &mut transfers {
        let mut rest = Vec::new();
        let stdout = transfer.stdout.as_mut().unwrap();
        stdout.read_to_end(&mut rest).unwrap();
        // The transfer ends early instead of hanging, and with an error.
        let status = transfer.wait().unwrap();
        assert!(!status.success() && rest.len() < LARGE, "{status}");
    }
}
