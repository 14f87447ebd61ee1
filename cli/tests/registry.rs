//! `sm pull` against the distribution's own registry, filled by skopeo: open,
//! behind a password, and behind TLS.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failed expectation is a failed test"
)]

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use sm_image::{Compression, Config, LayoutBuilder, MemoryFile};

/// `tester` with the password `secret`, as `htpasswd -B` writes it.
const HTPASSWD: &str = "tester:$2y$05$AnN9e0cFMXxC0RCdnfhP8OcEnAVraePaic14eNp94RuIlvvKqEXL6\n";
/// The same for Docker's configuration.
const AUTH: &str = "dGVzdGVyOnNlY3JldA==";

/// Whether the programs are there. `cargo xtask test` installs them, and then
/// they have to be.
fn tools() -> bool {
    let found = |program: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
    };
    let missing: Vec<_> = ["docker-registry", "skopeo", "openssl"]
        .into_iter()
        .filter(|program| !found(program))
        .collect();
    if !missing.is_empty() {
        assert!(
            std::env::var_os("SM_TEST_REGISTRY").is_none(),
            "missing: {missing:?}"
        );
        eprintln!("skipped: missing are {missing:?}");
    }
    missing.is_empty()
}

/// A registry, and the home of somebody who uses it.
struct Registry {
    directory: tempfile::TempDir,
    address: String,
    process: Child,
    /// How skopeo talks to it.
    skopeo: Vec<String>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Registry {
    fn start(
        settings: impl FnOnce(&Path, &str) -> (Vec<(&'static str, String)>, Vec<String>),
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Free a moment ago, and nobody asks for it by chance.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let (settings, skopeo) = settings(directory.path(), &address);
        let configuration = directory.path().join("registry.yml");
        fs::write(
            &configuration,
            format!(
                "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: \"{address}\"}}\n\
                 storage: {{filesystem: {{rootdirectory: \"{}\"}}}}\n",
                directory.path().join("storage").display()
            ),
        )
        .unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .envs(settings)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while TcpStream::connect(&address).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "it listens");
            std::thread::sleep(Duration::from_millis(20));
        }
        let registry = Self {
            directory,
            address,
            process,
            skopeo,
        };
        registry.fill();
        registry
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Puts an image of two layers there, by skopeo.
    fn fill(&self) {
        let layout = self.path("layout");
        let mut image = LayoutBuilder::new(&layout, Compression::Gzip(6)).unwrap();
        for name in ["one", "two"] {
            let bytes = name.repeat(50_000).into_bytes();
            image
                .memory_layer(&[(name, 0o644, MemoryFile::File(bytes))])
                .unwrap();
        }
        image.finish("v1", Config::default()).unwrap();
        let copied = Command::new("skopeo")
            .args(["copy", "--quiet"])
            .args(&self.skopeo)
            .arg(format!("oci:{}:v1", layout.display()))
            .arg(format!("docker://{}/team/app:v1", self.address))
            .output()
            .unwrap();
        assert!(copied.status.success(), "{copied:?}");
    }

    fn image(&self) -> String {
        format!("{}/team/app:v1", self.address)
    }

    /// Runs `sm` as somebody whose home is in the registry's directory.
    fn sm(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_sm"))
            .args(arguments)
            .env("HOME", self.path("home"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env_remove("DOCKER_CONFIG")
            .env_remove("REGISTRY_AUTH_FILE")
            .output()
            .unwrap()
    }

    /// Pulls the image and returns its ID.
    #[track_caller]
    fn pulled(&self, reference: &str) -> String {
        let output = self.sm(&["pull", reference]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let output = self.sm(&["pull", &self.image()]);
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        let error = String::from_utf8_lossy(&output.stderr);
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }
}

fn open() -> Registry {
    Registry::start(|_, _| (Vec::new(), vec!["--dest-tls-verify=false".to_owned()]))
}

#[test]
fn an_image_is_the_same_as_in_its_layout() {
    if !tools() {
        return;
    }
    let registry = open();
    let id = registry.pulled(&registry.image());
    let layout = format!("oci:{}:v1", registry.path("layout").display());
    assert_eq!(registry.pulled(&layout), id, "skopeo copies it as it is");
    let by_digest = format!("{}/team/app@{id}", registry.address);
    assert_eq!(registry.pulled(&by_digest), id);
    let listed = registry.sm(&["images", "--json"]);
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let names: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|i| i["reference"].as_str().unwrap())
        .collect();
    assert!(names.contains(&&*registry.image()), "{names:?}");
    // Docker's other manifest format, and a tag that moves.
    let old = Command::new("skopeo")
        .args(["copy", "--quiet", "--format", "v2s2"])
        .args(&registry.skopeo)
        .arg(format!("oci:{}:v1", registry.path("layout").display()))
        .arg(format!("docker://{}", registry.image()))
        .output()
        .unwrap();
    assert!(old.status.success(), "{old:?}");
    assert_ne!(registry.pulled(&registry.image()), id);
    let removed = registry.sm(&["rmi", &registry.image()]);
    assert!(removed.status.success(), "{removed:?}");
}

#[test]
fn a_missing_image_and_a_missing_registry_are_named() {
    if !tools() {
        return;
    }
    let registry = open();
    let output = registry.sm(&["pull", &format!("{}/no/such", registry.address)]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        error.contains("no/such:latest") && error.contains("has none"),
        "{error}"
    );
    let never = registry.sm(&["run", "--pull", "never", &registry.image(), "true"]);
    let error = String::from_utf8_lossy(&never.stderr);
    assert!(error.contains("sm pull"), "{error}");
    let mut registry = registry;
    registry.process.kill().unwrap();
    registry.process.wait().unwrap();
    registry.refused(&["cannot"]);
}

#[test]
fn a_password_is_asked_for_and_taken_from_where_docker_has_it() {
    if !tools() {
        return;
    }
    let registry = Registry::start(|directory, _| {
        let file = directory.join("htpasswd");
        fs::write(&file, HTPASSWD).unwrap();
        let settings = vec![
            ("REGISTRY_AUTH", "htpasswd".to_owned()),
            ("REGISTRY_AUTH_HTPASSWD_REALM", "test".to_owned()),
            ("REGISTRY_AUTH_HTPASSWD_PATH", file.display().to_string()),
        ];
        let skopeo = ["--dest-tls-verify=false", "--dest-creds", "tester:secret"];
        (settings, skopeo.map(str::to_owned).to_vec())
    });
    registry.refused(&["refuses", "docker login"]);
    let login = |auth: &str| {
        let docker = registry.path("home/.docker");
        fs::create_dir_all(&docker).unwrap();
        let json = format!(
            "{{\"auths\": {{\"{}\": {{\"auth\": \"{auth}\"}}}}}}",
            registry.address
        );
        fs::write(docker.join("config.json"), json).unwrap();
    };
    login("dGVzdGVyOndyb25n");
    registry.refused(&["refuses", "credentials"]);
    login(AUTH);
    registry.pulled(&registry.image());
}

#[test]
fn tls_is_used_and_a_strangers_certificate_is_not_believed() {
    if !tools() {
        return;
    }
    let registry = Registry::start(|directory, _| {
        // An authority, and the registry's certificate by it.
        fs::write(directory.join("names"), "subjectAltName=IP:127.0.0.1\n").unwrap();
        for line in [
            "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.crt",
            "req -newkey rsa:2048 -nodes -subj /CN=test -keyout key -out request",
            "x509 -req -days 2 -in request -CA ca.crt -CAkey ca.key -CAcreateserial \
             -extfile names -out certificate",
        ] {
            let made = Command::new("openssl")
                .args(line.split_whitespace())
                .current_dir(directory)
                .output()
                .unwrap();
            assert!(made.status.success(), "{line}: {made:?}");
        }
        let (key, certificate) = (directory.join("key"), directory.join("certificate"));
        let settings = vec![
            (
                "REGISTRY_HTTP_TLS_CERTIFICATE",
                certificate.display().to_string(),
            ),
            ("REGISTRY_HTTP_TLS_KEY", key.display().to_string()),
        ];
        (settings, vec!["--dest-tls-verify=false".to_owned()])
    });
    registry.refused(&["certificate"]);
    let trusted = registry
        .path("home/.config/containers/certs.d")
        .join(&registry.address);
    fs::create_dir_all(&trusted).unwrap();
    fs::copy(registry.path("ca.crt"), trusted.join("ca.crt")).unwrap();
    registry.pulled(&registry.image());
}
