//! A real web server in a guest, reached by real clients through every frontend.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use sm_e2e::{Done, Home, Vm, image, unique};
use sm_frontends::HandoffSender;

const PAGE: &str = "Welcome to nginx!";
/// A file of this size is made for `/large`.
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
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{:?}",
                web.vm.inspect()
            );
        }
        web
    }

    /// What is published: the plain port, and the TLS port with its certificate.
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

    /// Whether `curl` got what it was asked for, and that.
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
    // Twice over one connection, too.
    let url = format!("http://{plain}/");
    web.page(&[&url]);
    web.page(&[&url, &url]);
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
    // Not for that name, or not trusted: the client says so.
    let resolved = format!("else.test:{}:127.0.0.1", tls.port());
    let named = format!("https://else.test:{}/", tls.port());
    assert!(
        !web.curl(&[&trusted[..], &["--resolve", &resolved, &named]].concat())
            .0
    );
    assert!(!web.curl(&[&format!("https://localhost:{}/", tls.port())]).0);

    // A router that has read the request hands the connection over.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let mut router = HandoffSender::connect(&web.handoff).unwrap();
    let request = b"GET / HTTP/1.1\r\nHost: any\r\nConnection: close\r\n\r\n";
    router.send(&accepted, request).unwrap();
    drop(accepted);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(PAGE), "{answer}");
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
    for url in [
        format!("http://{plain}/"),
        format!("https://localhost:{}/", tls.port()),
    ] {
        let done = Command::new("wrk")
            .args(["-t", "1", "-c", "50", "-d", "5", "--timeout", "60s", &url])
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
    // In the middle of a transfer the guest is killed: an end, not a hang.
    let mut client = TcpStream::connect(plain).unwrap();
    std::io::Write::write_all(&mut client, b"GET /large HTTP/1.0\r\n\r\n").unwrap();
    client.read_exact(&mut [0; 1000]).unwrap();
    web.home.sm(&["kill", &web.vm.name]).exits(0);
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest);
    assert!(rest.len() < LARGE);
}
