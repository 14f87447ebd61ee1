//! Certificates, and proxies that forward encrypted connections.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::support::{Registry, id_of, refused, tools};

/// Creates a certificate authority, a certificate of it for the registry, and one for a
/// client.
fn certify(directory: &Path) {
    let names = "subjectAltName=IP:127.0.0.1,DNS:registry.test\n";
    fs::write(directory.join("names"), names).unwrap();
    for line in [
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.crt",
        "req -newkey rsa:2048 -nodes -subj /CN=test -keyout key -out request",
        "x509 -req -days 2 -in request -CA ca.crt -CAkey ca.key -CAcreateserial \
         -extfile names -out certificate",
        "req -newkey rsa:2048 -nodes -subj /CN=client -keyout client.key -out request",
        "x509 -req -days 2 -in request -CA ca.crt -CAkey ca.key -CAcreateserial \
         -extfile names -out client.cert",
    ] {
        let made = Command::new("openssl")
            .args(line.split_whitespace())
            .current_dir(directory)
            .output()
            .unwrap();
        assert!(made.status.success(), "{line}: {made:?}");
    }
}

/// Starts a registry with TLS, which requires client certificates if `strict`.
fn secure(strict: bool) -> Registry {
    Registry::start(|directory, _| {
        certify(directory);
        let file = |name: &str| directory.join(name).display().to_string();
        let mut settings = vec![
            ("REGISTRY_HTTP_TLS_CERTIFICATE", file("certificate")),
            ("REGISTRY_HTTP_TLS_KEY", file("key")),
        ];
        let mut skopeo = vec!["--dest-tls-verify=false".to_owned()];
        if strict {
            settings.push((
                "REGISTRY_HTTP_TLS_CLIENTCAS",
                format!("[{}]", file("ca.crt")),
            ));
            let known = directory.join("known");
            fs::create_dir(&known).unwrap();
            for name in ["client.cert", "client.key"] {
                fs::copy(directory.join(name), known.join(name)).unwrap();
            }
            skopeo.push(format!("--dest-cert-dir={}", known.display()));
        }
        (settings, skopeo)
    })
}

impl Registry {
    /// Adds files to this user's certificates for a registry.
    fn trust(&self, directory: &str, host: &str, files: &[&str]) {
        let trusted = self.path("home").join(directory).join(host);
        fs::create_dir_all(&trusted).unwrap();
        for name in files {
            fs::copy(self.path(name), trusted.join(name)).unwrap();
        }
    }
}

#[test]
fn tls_is_used_and_unknown_certificates_are_refused() {
    if !tools() {
        return;
    }
    let registry = secure(false);
    registry.refused(&["certificate"]);
    let authority = registry.path("ca.crt").display().to_string();
    let pull = ["pull", &registry.image()];
    let id = id_of(&registry.sm_with(&pull, &[("SSL_CERT_FILE", &authority)]));
    assert_eq!(id, registry.id());
    registry.refused(&["certificate"]);
    registry.trust(".config/docker/certs.d", &registry.address, &["ca.crt"]);
    assert_eq!(registry.pulled(&registry.image()), id);
    // The certificate of an insecure registry is not verified.
    let other = secure(false);
    let configuration = format!(
        "[[registry]]\nlocation = '{}'\ninsecure = true\n",
        other.address
    );
    fs::write(other.path("registries.conf"), configuration).unwrap();
    assert_eq!(other.pulled(&other.image()), id);
}

#[test]
fn client_certificates_are_sent_on_request() {
    if !tools() {
        return;
    }
    let registry = secure(true);
    let certificates = ".config/containers/certs.d";
    registry.trust(certificates, &registry.address, &["ca.crt"]);
    let output = registry.sm(&["pull", &registry.image()]);
    refused(&output, &[&registry.address]);
    registry.trust(
        certificates,
        &registry.address,
        &["client.cert", "client.key"],
    );
    assert_eq!(registry.pulled(&registry.image()), registry.id());
}

/// Starts a proxy for CONNECT; returns its address and the received requests.
fn proxy(upstream: String) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut first = String::new();
            reader.read_line(&mut first).unwrap();
            let mut line = String::new();
            while reader.read_line(&mut line).unwrap() > 2 {
                line.clear();
            }
            log.lock().unwrap().push(first);
            // The client sends nothing before the answer, so the buffer is empty.
            let mut there = TcpStream::connect(&upstream).unwrap();
            stream.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").unwrap();
            let (mut back, mut up) = (there.try_clone().unwrap(), stream.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut back, &mut up);
                let _ = up.shutdown(Shutdown::Write);
            });
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut stream, &mut there);
                let _ = there.shutdown(Shutdown::Write);
            });
        }
    });
    (address, asked)
}

#[test]
fn proxies_are_used_where_the_environment_says() {
    if !tools() {
        return;
    }
    let registry = secure(false);
    registry.trust(".config/containers/certs.d", "registry.test", &["ca.crt"]);
    let (address, asked) = proxy(registry.address.clone());
    let address = format!("http://{address}");
    let pull = ["pull", "registry.test/team/app:v1"];
    let id = id_of(&registry.sm_with(&pull, &[("HTTPS_PROXY", &address)]));
    assert_eq!(id, registry.id());
    let lines = asked.lock().unwrap().clone();
    assert!(
        lines
            .iter()
            .all(|line| line.starts_with("CONNECT registry.test:443 ")),
        "{lines:?}"
    );
    // The name does not resolve, and NO_PROXY requires a direct connection.
    let variables = [
        ("HTTPS_PROXY", &*address),
        ("NO_PROXY", ".other.test,registry.test"),
    ];
    let output = registry.sm_with(&pull, &variables);
    refused(&output, &["registry.test"]);
    assert_eq!(asked.lock().unwrap().len(), lines.len());
    let output = registry.sm_with(&pull, &[("HTTPS_PROXY", "socks5://127.0.0.1:1")]);
    refused(&output, &["SOCKS"]);
    // An unsupported proxy does not matter where it is not used.
    registry.trust(".config/containers/certs.d", &registry.address, &["ca.crt"]);
    let pull = ["pull", &registry.image()];
    id_of(&registry.sm_with(&pull, &[("ALL_PROXY", "socks5://127.0.0.1:1")]));
}
